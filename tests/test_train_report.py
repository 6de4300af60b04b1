"""The report of a run: one file, everything in it, nothing from outside."""

import json
import re

import pytest

from llama_edu.errors import UserError
from llama_edu.training.report import write_report


def entry(step, **more):
    return {
        "step": step,
        "tokens": step * 64,
        "loss": 6.0 - step / 10,
        "lr": 1e-3,
        "grad_norm": 1.0,
        "skipped": False,
        "tokens_per_second": 1000.0,
        **more,
    }


@pytest.fixture
def folder(tmp_path):
    history = [entry(step) for step in range(1, 31)]
    history[9] |= {"loss": None, "grad_norm": None, "skipped": True}
    history[19] |= {"val_loss": 4.5, "val_bits_per_byte": 3.21, "mfu": 0.25, "checkpoint_seconds": 0.5}
    history[29]["samples"] = [{"prompt": "Once <b>", "text": "<script>alert(1)</script> & more"}]
    history[24] |= {"rewound_from": 27, "sequences_passed_over": 12, "rewinds": 1}
    discarded = [entry(step, rewind=1, loss=None, skipped=True) for step in (25, 26, 27)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history))
    (tmp_path / "discarded.jsonl").write_text("".join(json.dumps(line) + "\n" for line in discarded))
    (tmp_path / "config.json").write_text(json.dumps({"steps": 40, "model": {"dim": 16}, "train_data": "a<b"}))
    return tmp_path


def test_everything_is_in_it_and_nothing_from_outside(folder):
    path = write_report(folder)
    page = path.read_text()
    text = re.sub("<[^>]+>", " ", page)
    for words in (
        "30 of 40",
        "1,920",
        "3.000 nats a token at the end",
        "4.500 nats a token, 3.210 bits a byte at step 20",
        "1,000 tokens a second (median), 25% of the device",
        "4; the run went back to a checkpoint once",
        "held the run up for 0.50 s",
        "Before step 25 the run went back from step 27, and on without 12 sequences.",
        "kept: 10.",
        "later discarded: 25, 26, 27.",
        "model.dim",
        "after step 30",
    ):
        assert words in text, words
    assert page.count("<img ") == page.count('alt="') == 1 and "http" not in page
    assert "<script" not in page and "&lt;script&gt;" in page and "a&lt;b" in page


def test_a_run_of_one_skipped_step_has_a_report_too(tmp_path):
    line = entry(1, loss=None, grad_norm=None, skipped=True)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n" + '{"torn')
    assert "steps skipped" in write_report(tmp_path).read_text()


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no run to report"):
        write_report(tmp_path)
