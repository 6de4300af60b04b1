"""The configuration of a run: one schema for dataclass, file and command line, and a sentence for each mistake."""

import copy
import json
from dataclasses import dataclass

import pytest

from llama_edu import LlamaConfig
from llama_edu.errors import UserError
from llama_edu.training.config import TrainConfig, load_config, parse_arguments

RUN = """
model: {dim: 64, n_layers: 2, n_heads: 4, vocab_size: 300, rope_scaling: {factor: 8}}
train_data: tokens
out_dir: runs/first
steps: 1000
lr: 1e-3            # YAML takes this for text
batch_ramp: [[1000, 32]]
sample_prompts: [Once, "Twice: no"]
"""


@dataclass(frozen=True)
class Plan:
    """How to divide.

    Args:
        dp, tp: ways.
    """

    dp: int = 1
    tp: int = 1


@pytest.fixture
def run_yaml(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(RUN)
    return file


def test_a_file_is_the_dataclass(run_yaml, tmp_path):
    config = load_config(run_yaml)
    assert config.model.rope_scaling.factor == 8.0 and config.lr == 1e-3 and config.batch_ramp == ((1000, 32),)
    assert config == TrainConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    stored = tmp_path / "config.json"
    stored.write_text(json.dumps(config.to_dict()))
    toml = tmp_path / "run.toml"
    toml.write_text(
        'train_data = "tokens"\nout_dir = "runs/first"\nsteps = 1000\nlr = 1e-3\nbatch_ramp = [[1000, 32]]\n'
        'sample_prompts = ["Once", "Twice: no"]\n'
        "[model]\ndim = 64\nn_layers = 2\nn_heads = 4\nvocab_size = 300\nrope_scaling.factor = 8\n"
    )
    assert load_config(stored) == load_config(toml) == config


def test_the_command_line_wins_over_the_file(run_yaml):
    line = ["--config", str(run_yaml), "--lr", "2e-3", "--model.dim=128", "--betas", "0.9", "0.99", "--compile"]
    line += ["--batch-ramp", "500:32", "1000:64", "--val_data", "held_out", "--parallel.tp", "2", "--no-progress"]
    arguments = parse_arguments(line, sections={"parallel": Plan})
    config = arguments.config()
    assert arguments.sections == {"parallel": Plan(tp=2)}
    assert (config.lr, config.model.dim, config.betas, config.compile) == (2e-3, 128, (0.9, 0.99), True)
    assert config.batch_ramp == ((500, 32), (1000, 64)) and config.val_data == "held_out" and not config.progress
    assert config.model.n_layers == 2 and config.steps == 1000 and config.sample_prompts == ("Once", "Twice: no")
    assert parse_arguments(["--config", str(run_yaml), "--val-data", "none"]).config().val_data is None


def test_a_model_may_be_a_preset_with_changes(run_yaml):
    line = ["--config", str(run_yaml), "--model", "llama-3.2-1b"]
    assert parse_arguments(line).config().model == LlamaConfig.preset("llama-3.2-1b")
    small = parse_arguments([*line, "--model.n-layers", "2", "--model.dim", "64", "--model.n-heads", "8"]).config()
    assert (small.model.n_layers, small.model.head_dim, small.model.rope_scaling.factor) == (2, 8, 32.0)
    run_yaml.write_text("model: llama-3-8b\ntrain_data: {books: 0.5, web: 0.5}\nout_dir: x\nsteps: 200\n")
    assert load_config(run_yaml).model == LlamaConfig.preset("llama-3-8b")
    assert load_config(run_yaml, {"model": {"vocab_size": 300}}).model.vocab_size == 300
    other = ["--config", str(run_yaml), "--train-data", "{books: 0.1, web: 0.9}"]
    assert parse_arguments(other).config().train_data == {"books": 0.1, "web": 0.9}


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as left:
        parse_arguments(["--help"], sections={"parallel": Plan}, prog="a-program")
    said = capsys.readouterr().out
    assert left.value.code == 0 and said.startswith("usage: a-program [--config FILE]")
    lines = said.splitlines()
    options = [i for i, line in enumerate(lines) if line.startswith("  --") and "rope-scaling" not in line]
    assert len(options) > 50
    assert all(len(lines[i + 1].partition("(default")[0].strip()) > 4 for i in options)
    assert "  --parallel.tp INT" in said and "{cosine,linear,wsd,constant}" in said


def one_sentence(caught) -> str:
    said = str(caught.value)
    assert "\n" not in said
    return said


@pytest.mark.parametrize(
    "text, words",
    [
        ("- a\n- b\n", "holds a list; a configuration is a table"),
        ("just text\n", "holds a str; a configuration is a table"),
        ("steps: 1\nlr: 2\nsteps: 2\n", "steps is given twice"),
        ("model: {dim: 1, dim: 2}\n", "dim is given twice"),
        ("a: [\n", "cannot be understood: line 2"),
        ("stepz: 3\n", "stepz is no setting; did you mean steps?"),
        ("learning_rate: 3\n", "did you mean lr?"),
        ("dim: 3\n", "did you mean model.dim?"),
        ("qqq: 3\n", "qqq is no setting; there are train_data, out_dir, steps"),
        ("model: {n_head: 3}\n", "model.n_head is no setting; did you mean model.n_heads?"),
        ("model: {rope_scaling: {factr: 3}}\n", "did you mean model.rope_scaling.factor?"),
        ("model: 7\n", "model is 7; it must be a table of its fields"),
        ("model: llama-9\nout_dir: x\nsteps: 1\ntrain_data: x\n", "no preset is called 'llama-9'"),
        ("lr: fast\n", "lr is 'fast'; it must be a number"),
        ("steps: 1.5\n", "steps is 1.5; it must be a whole number"),
        ("steps: true\n", "steps is True; it must be a whole number"),
        ("compile: 1\n", "compile is 1; it must be true or false"),
        ("betas: [0.9]\n", "betas is [0.9]; it must be 2 values, each a number"),
        ("batch_ramp: [1, 2]\n", "batch_ramp is [1, 2]; it must be a list"),
        ("sample_prompts: [1]\n", "sample_prompts is [1]; it must be a list, each text"),
        ("schedule: sine\n", "schedule is 'sine'; it must be cosine, linear, wsd or constant"),
        ("steps: 3\n", "model is not given, and it has no default"),
        ("model: {dim: 4}\n", "model.n_layers is not given"),
        ("!!python/object/apply:os.getcwd []\n", "cannot be understood"),
        ("model:\nsteps: 3\n", "model is None; it must be a table of its fields"),
        ("model: {<<: {dim: 32}, n_layers: 2}\n", "<< merges tables (line 1 and after), which is not read"),
        (f"lr: 1{'0' * 400}\n", "it must be a number below 1.8e308"),
        (f"steps: 0x{'f' * 6000}\n", "steps is a number of thousands of digits; it must be a whole number below 2**64"),
        (f"seed: {2**64}\n", "seed is 18446744073709551616; it must be a whole number below 2**64"),
        (f"betas: {'[' * 3000}\n", "it is nested too deeply"),
        ("steps: 4:00\n", "steps is '4:00'; it must be a whole number"),
        ("train_data: &a {x: *a}\n", "an alias stands inside of what it names"),
    ],
)
def test_a_mistake_in_a_file_is_one_sentence(tmp_path, text, words):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(file)
    assert words in one_sentence(caught)


@pytest.mark.parametrize(("levels", "words"), [(5, "sample_prompts is [['x'], "), (10, "more than 1,000,000 values")])
@pytest.mark.parametrize("name", ["sample_prompts", "train_data"])
def test_aliases_that_stand_for_billions_of_values_cost_nothing(tmp_path, name, levels, words):
    lists = [f"&a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    (tmp_path / "run.yaml").write_text(
        "".join(f"{line}\n" for line in (f"{name}:", "- &a0 [x]", *map("- {}".format, lists)))
    )
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "run.yaml")
    assert words.replace("sample_prompts", name) in one_sentence(caught) and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("written", "value"),
    [("0200", 200), ("1_000", 1000), ("0x10", 16), ("0o10", 8), ("1e3", 1000), ("+5", 5), ("5.", 5), ("'7'", 7)],
)
def test_numbers_are_read_as_yaml_1_2_does(run_yaml, written, value):
    run_yaml.write_text(RUN.replace("steps: 1000", f"steps: {written}\nwarmup: 1"))
    assert load_config(run_yaml).steps == value
    run_yaml.write_text(RUN.replace("train_data: tokens", f"train_data: {{books: {written}}}"))
    assert load_config(run_yaml).train_data["books"] in (value, str(value))  # a quoted one is text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 12.5}, "steps is 12.5; it must be a whole number"),
        ({"betas": (0.9,)}, "betas is (0.9,); it must be 2 values, each a number"),
        ({"betas": (0.9, 0.9, 0.9)}, "it must be 2 values"),
        ({"compile": "no"}, "compile is 'no'; it must be true or false"),
        ({"device": 3}, "device is 3; it must be text"),
        ({"sample_prompts": "abc"}, "sample_prompts is 'abc'; it must be a list, each text"),
        ({"batch_ramp": ((1,),)}, "batch_ramp is ((1,),); it must be a list"),
        ({"model": {"dim": 64}}, "model is {'dim': 64}; it must be a LlamaConfig"),
        ({"lr": "fast"}, "lr is 'fast'; it must be a number"),
        ({"seed": 2**64}, "seed is 18446744073709551616; it must be a whole number below 2**64"),
    ],
)
def test_the_dataclass_takes_no_other_types_than_a_file(run_yaml, changes, words):
    with pytest.raises(UserError) as caught:
        _construct(load_config(run_yaml), changes)
    assert words in one_sentence(caught)


def test_the_dataclass_converts_as_a_file_does(run_yaml):
    config = _construct(load_config(run_yaml), {"steps": "200", "lr": "1e-3", "batch_size": 4.0, "betas": [0, 0.5]})
    assert (config.steps, config.lr, config.batch_size, config.betas) == (200, 1e-3, 4, (0.0, 0.5))
    assert [type(value) for value in (config.steps, config.batch_size, config.betas[0])] == [int, int, float]


def _construct(config, changes):
    """`replace`, around the type checker of the test run."""
    config = copy.copy(config)
    for name, value in changes.items():
        object.__setattr__(config, name, value)
    config.__post_init__()
    return config


def test_files_that_are_none(tmp_path):
    for path, words in (
        (tmp_path / "absent.yaml", "there is no configuration file"),
        (tmp_path, "cannot be read"),
        (tmp_path / "run.txt", "must end in .yaml, .toml or .json"),
        (tmp_path / "twice.toml", "cannot be understood: Cannot overwrite a value"),
        (tmp_path / "twice.json", "steps is given twice"),
        (tmp_path / "bytes.yaml", "cannot be read"),
    ):
        if path.suffix == ".txt":
            path.write_text("steps: 1")
        elif path.name == "twice.toml":
            path.write_text("steps = 1\nsteps = 2\n")
        elif path.name == "twice.json":
            path.write_text('{"steps": 1, "steps": 2}')
        elif path.name == "bytes.yaml":
            path.write_bytes(b"steps: \xff\xfe")
        with pytest.raises(UserError) as caught:
            load_config(path)
        assert words in one_sentence(caught)


@pytest.mark.parametrize(
    "line, words",
    [
        ("--lrr 3", "there is no option --lrr; did you mean --lr?"),
        ("--parallel.tpp 3", "did you mean --parallel.tp?"),
        ("--model.dimm 3", "did you mean --model.dim?"),
        ("--n-layer 3", "did you mean --model.n-layers?"),
        ("--lr", "--lr needs a value: a number"),
        ("--lr 3 4", "--lr takes one value, and here are 2: 3 4"),
        ("--lr x", "--lr is 'x'; it must be a number"),
        ("--steps 1e-3", "--steps is '1e-3'; it must be a whole number"),
        ("--lr 1 --lr 2", "--lr is given twice"),
        ("--compile maybe", "--compile is 'maybe'; it must be true or false"),
        ("--betas 0.9", "it must be 2 values"),
        ("--batch-ramp [[1]]", "it must be a list"),
        ("--batch-ramp [[1", "cannot be understood"),
        (f"--batch-ramp {'[' * 3000}", "...[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[' cannot be understood"),
        (f"--lr {'1' * 5000}", "11...11111111111111111111111111111111111111'; it must be a number below 1.8e308"),
        ("here", "'here' belongs to no option"),
        ("--config absent.yaml", "there is no configuration file absent.yaml"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(line, words):
    with pytest.raises(UserError) as caught:
        parse_arguments(line.split(), sections={"parallel": Plan})
    assert words in one_sentence(caught)
