"""`llama-edu scaling fit`: columns and units by name, refusals with line numbers, table and figure."""

import re
from pathlib import Path

import numpy as np
import pytest
import tyro

from llama_edu.cli.scaling import fit, read_table, scaling
from llama_edu.errors import UserError

STUDY = Path(__file__).resolve().parent.parent / "notebooks" / "data" / "scaling_study.csv"
NAMES = {"flops": "flops", "params": "params", "tokens": "tokens", "loss": "loss"}


def write(tmp_path, text):
    path = tmp_path / "runs.csv"
    path.write_text(text)
    return path


def test_the_study_is_fitted_and_drawn(tmp_path, capsys):
    code = fit(STUDY, where=("arm=fit",), bootstrap=50, figure=tmp_path / "out" / "f.png", budget=3e11)
    text = capsys.readouterr().out
    assert code == 0 and "27 runs, 0 rows refused" in text
    assert "1e+11 FLOPs" in text and "5.809e+04" in text and "N*(C) = 5.678" in text
    assert re.search(r"E +2\.98", text) and "Best model for 3e+11 FLOPs" in text
    assert (tmp_path / "out" / "f.png").read_bytes()[:4] == b"\x89PNG"


def test_the_command_has_two_verbs(tmp_path, capsys):
    args = ["fit", str(STUDY), "--where", "arm=fit", "--bootstrap", "0", "--figure", str(tmp_path / "f.png")]
    assert tyro.cli(scaling, args=args) == 0
    with pytest.raises(SystemExit):
        tyro.cli(scaling, args=["study", "--help"])
    assert "--workers" in capsys.readouterr().out


def test_units_and_missing_columns(tmp_path):
    path = write(tmp_path, "Loss,Params [M],tokens [B]\n3.0,10,0.2\n2.9,20,0.4\n")
    table = read_table(path, NAMES)
    assert table.params.tolist() == [1e7, 2e7] and table.tokens.tolist() == [2e8, 4e8]
    assert table.flops.tolist() == [6 * 1e7 * 2e8, 6 * 2e7 * 4e8]
    path = write(tmp_path, "Model Size,Training FLOP [EFLOP],loss\n1e9,6,3\n")
    table = read_table(path, {**NAMES, "params": "model size", "flops": "Training FLOP"})
    assert table.tokens.tolist() == pytest.approx([1e9])


def test_bad_rows_are_refused_with_their_line_numbers(tmp_path):
    rows = "params,tokens,loss 1e7,2e8,3 1e7,2e8,nan 1e7,-1,3 x,2e8,3 1e7,2e8 2e7,inf,3 1e7,2e8,0"
    table = read_table(write(tmp_path, rows.replace(" ", "\n")), NAMES)
    assert len(table.loss) == 1
    assert [line for line, _ in table.refused] == [3, 4, 5, 6, 7, 8]
    assert "loss is 'nan'" in table.refused[0][1] and "params is 'x'" in table.refused[2][1]


@pytest.mark.parametrize(
    "text, words",
    [
        ("params,loss\n1,2\n", "lacks flops .*tokens"),
        ("params,tokens,loss\n1,2,-3\n", "no usable row"),
        ("params,tokens,flops,loss\n7,140,5.9e21,2\n", "another unit"),
        ("params [furlong],tokens,loss\n1,2,3\n", "unit of 'params"),
        ("", "columns are none"),
    ],
)
def test_files_that_cannot_be_used_say_why(tmp_path, text, words):
    with pytest.raises(UserError, match=words):
        read_table(write(tmp_path, text), NAMES)


def test_other_mistakes_are_sentences(tmp_path):
    with pytest.raises(UserError, match="no file"):
        fit(tmp_path / "nothing.csv")
    with pytest.raises(UserError, match="COLUMN=VALUE"):
        fit(STUDY, where=("arm",))
    with pytest.raises(UserError, match="no usable row with arm=none"):
        fit(STUDY, where=("arm=none",))
    path = write(tmp_path, "params,tokens,loss\n1e7,2e8,3\n1e7,2e8,3\n")
    with pytest.raises(UserError, match="neither method"):
        fit(path, figure=tmp_path / "f.png")


def test_one_method_is_enough(tmp_path, capsys):
    rng = np.random.default_rng(0)
    n, d = 10 ** rng.uniform(6, 8, 30), 10 ** rng.uniform(7, 9, 30)
    lines = [f"{a},{b},{2 + 400 / a**0.34 + 400 / b**0.3}" for a, b in zip(n, d)]
    path = write(tmp_path, "params,tokens,loss\n" + "\n".join(lines))
    assert fit(path, bootstrap=0, figure=tmp_path / "f.png") == 0
    out = capsys.readouterr().out
    assert "No parabolas" in out and re.search(r"alpha +0\.34", out)


@pytest.mark.parametrize(
    ("row", "words"), [(b"1e18,\xe9,2\n", "byte 0xe9"), (b"1e18,1e8," + b"2" * 200_000 + b"\n", "field larger")]
)
def test_a_file_that_is_no_csv_is_one_sentence(tmp_path, row, words):
    (tmp_path / "t.csv").write_bytes(b"flops,params,loss\n" + row)
    with pytest.raises(UserError, match=words):
        fit(tmp_path / "t.csv")
