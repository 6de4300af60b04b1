"""`llama-edu plan`: a plan, a search, JSON, and every mistake as a sentence."""

import json

import pytest
import tyro

from llama_edu.cli.plan import plan
from llama_edu.config import LlamaConfig
from llama_edu.errors import UserError

ROW = {"model": "llama-3.1-405b", "gpus": 16_384, "tp": 8, "cp": 1, "pp": 16}


def test_a_plan_is_reported(capsys):
    assert plan(**ROW, tokens=15.6e12) == 0
    text = capsys.readouterr().out
    assert "DP 128" in text and "MFU 41.0%" in text and "68.6 days" in text and "57.38 GB of 80" in text


def test_without_degrees_the_best_plan_is_searched(capsys):
    assert plan(model="llama-3.1-8b", gpus=64, batch_tokens=2**22, top=3) == 0
    text = capsys.readouterr().out
    assert text.count(" GB ") > 3 and "plans fit" in text and "does not fit into memory" in text and "The best:" in text


def test_json(capsys):
    assert plan(**ROW, json=True) == 0
    one = json.loads(capsys.readouterr().out)
    assert one["mfu"] == pytest.approx(0.41, abs=0.01) and one["memory"]["weights"] > 6e9
    assert plan(model="llama-3.2-1b", gpus=8, batch_tokens=2**20, json=True, top=2, tokens=1e12) == 0
    many = json.loads(capsys.readouterr().out)
    assert len(many["plans"]) == 2 and many["fit"] > 2 and many["plans"][0]["days"] > 0


def test_the_command_line(capsys):
    args = "--model llama-3.1-405b --gpus 8192 --tp 8 --cp 1 --pp 16 --seq-len 8192 --json".split()
    assert tyro.cli(plan, args=args) == 0
    assert json.loads(capsys.readouterr().out)["batch_per_dp"] == 32


def test_own_model_and_own_gpu(tmp_path, capsys):
    model, gpu = tmp_path / "config.json", tmp_path / "gpu.json"
    model.write_text(json.dumps(LlamaConfig.preset("llama-3.2-1b").to_hf()))
    row = {"name": "X1", "memory": 48e9, "bf16": 2e14, "hbm": 1e12, "nvlink": 1e11, "network": 1e10, "watts": 300}
    gpu.write_text(json.dumps(row))
    assert plan(model=str(model), gpu=str(gpu), gpus=8, batch_tokens=2**18) == 0
    assert "8 x X1" in capsys.readouterr().out
    gpu.write_text(json.dumps({**row, "memory": -1}))
    with pytest.raises(UserError, match="memory is -1"):
        plan(gpu=str(gpu))
    gpu.write_text(json.dumps({"name": "X1", "ram": 3}))
    with pytest.raises(UserError, match="lacks bf16, hbm, memory, network, nvlink, watts and has unknown ram"):
        plan(gpu=str(gpu))
    gpu.write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        plan(gpu=str(gpu))
    with pytest.raises(UserError, match="there is no file"):
        plan(gpu=str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model": "llama-3.1-400b"}, "no model is called 'llama-3.1-400b'; did you mean 'llama-3.1-405b'"),
        ({"gpu": "h1000"}, "no GPU is called 'h1000'; did you mean 'h100'"),
        ({"dp": 64}, "tp 8 x cp 1 x pp 16 x dp 64 is 8,192 GPUs, which is not 16,384"),
        ({"tp": 3}, "which does not divide 16,384"),
        ({"seq_len": 8191, "batch_tokens": None, "batch_per_dp": 16}, "do not divide by tp 8"),
        (
            {"recompute": "none"},
            "needs 154.0 GB a GPU, 74.0 GB more than the 80 GB of an H100; 142.3 GB of it are activ",
        ),
        ({"batch_tokens": 2**24, "batch_per_dp": 16}, "give one of them"),
        ({"batch_tokens": 2**19}, "no whole sequences of 8,192 tokens for each of 128 replicas"),
        ({"pp": None, "tp": None, "batch_per_dp": 16}, "batch_per_dp needs all four degrees"),
        ({"tp": None, "cp": None, "pp": None, "gpus": 16}, "no plan fits; the nearest is tp 8"),
        ({"gpus": 0}, "gpus is 0"),
        ({"kernel_efficiency": 2.0}, "kernel_efficiency is 2.0; it is a share of the peak"),
        ({"tp": -8}, "tp is -8"),
    ],
)
def test_mistakes_are_sentences(change, words):
    with pytest.raises(UserError, match=words):
        plan(**{**ROW, **change})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seq_len": 0}, "seq_len is 0"),
        ({"micro_batch": 0}, "micro_batch is 0"),
        ({"batch_tokens": 0}, "batch_tokens is 0"),
        ({"batch_per_dp": 0}, "batch_per_dp is 0"),
        ({"tokens": float("nan")}, "tokens is nan"),
    ],
)
def test_numbers_that_no_plan_has_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        plan(**{"model": "llama-3.1-8b", "gpus": 8, "batch_tokens": 2**20, **options})
