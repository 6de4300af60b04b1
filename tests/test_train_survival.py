"""A run that survives: killed, out of disk, with damaged checkpoints, bad data, and saves behind its back."""

import copy
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bytes_tokenizer import BytesTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_edu import LlamaConfig, Transformer
from llama_edu.data import write_tokens
from llama_edu.errors import UserError
from llama_edu.training import TrainConfig, train
from llama_edu.training import checkpoint as checkpoint_module
from llama_edu.training.checkpoint import checkpoints, load_checkpoint
from llama_edu.training.early import epochs_line, sequences_of
from llama_edu.training.engine import Engine, agreed
from llama_edu.training.metrics import Metrics
from llama_edu.training.optimizer import make_optimizer
from llama_edu.training.schedule import batch_size_at

MODEL = LlamaConfig(
    dim=16, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=32, vocab_size=258, max_seq_len=32, tie_embeddings=True
)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    texts = [f"line {i}: {i * i} is the square of {i}. " for i in range(300)]
    write_tokens(texts[:280], BytesTokenizer(), folder / "train")
    write_tokens(texts[280:], BytesTokenizer(), folder / "val")
    return folder


@pytest.fixture
def config(corpus, tmp_path):
    return TrainConfig(
        model=MODEL,
        train_data=str(corpus / "train"),
        out_dir=str(tmp_path / "run"),
        steps=12,
        batch_size=4,
        seq_len=16,
        lr=1e-2,
        warmup=3,
        precision="float32",
        device="cpu",
        checkpoint_every=4,
        progress=False,
    )


def outcome(result):
    """Weights and losses, for comparing to the last bit."""
    weights = [tensor.numpy().tobytes() for tensor in result.model.state_dict().values()]
    return weights, [(h["step"], h["loss"], h["grad_norm"]) for h in result.history]


class Crash(Exception):
    pass


def crash_after(step):
    def on_step(entry, model):
        if entry["step"] == step:
            raise Crash

    return on_step


# --- in processes of their own --------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX")
@pytest.mark.slow
@pytest.mark.parametrize("case", ["kill", "kill_async", "rewind", "signals", "full_disk", "damaged", "ranks"])
def test_for_real(corpus, tmp_path, case):
    """kill -9 twenty times, in background saves too; signals; a file size limit; damaged files; two ranks that agree.

    See crash_driver.py.
    """
    for name in ("train", "val"):
        (tmp_path / name).symlink_to(corpus / name)
    driver = Path(__file__).with_name("crash_driver.py")
    done = subprocess.run(
        [sys.executable, "-W", "error", driver, case, tmp_path],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    begins = {
        "signals": ["interrupted after step"] * 2,
        "damaged": ["skipped "] * 3,
        "ranks": ["interrupted"],
        "rewind": None,
    }.get(case, [])
    if begins is None:  # once in peace, and again and again as the run is killed and comes to the same place
        assert said and all("back to step 20, and on without the 20 sequences" in line for line in said)
        return
    assert len(said) == len(begins), said
    assert all(line.startswith(begin) for line, begin in zip(said, begins)), said
    if case == "damaged":
        words = ("bytes instead of", "has changed since it was saved", "manifest.json is missing")
        assert all(word in line for word, line in zip(words, said)), said


# --- saving behind the run's back -----------------------------------------------------------------------------------


def test_saves_in_the_background_are_those_in_the_foreground(config):
    front = train(config)
    behind = replace(config, out_dir=config.out_dir + "2", async_checkpoint=True)
    with pytest.raises(Crash):
        train(behind, on_step=crash_after(9))
    assert [p.name for p in checkpoints(Path(behind.out_dir) / "checkpoints")] == ["step_00000004", "step_00000008"]
    result = train(behind)
    assert result.resumed_from == 8 and outcome(result) == outcome(front)
    assert [h["step"] for h in front.history if "checkpoint_seconds" in h] == [5, 9]
    one, two = (
        sorted(p.read_bytes() for p in (Path(c.out_dir) / "checkpoints" / "step_00000008" / "tensors").glob("*.distcp"))
        for c in (config, behind)
    )
    assert len(one) == len(two) == 1 and len(one[0]) == len(two[0])


def test_a_slow_disk_holds_nobody_up_and_two_saves_never_meet(config, monkeypatch):
    publish, writing, on = checkpoint_module._publish, threading.Lock(), {4: threading.Event(), 8: threading.Event()}

    def slowly(partial, target):
        assert writing.acquire(blocking=False), "two saves at once"
        step = int(target.name[5:])
        assert step == 12 or on[step].wait(30), "the run waits for its checkpoint"
        publish(partial, target)
        writing.release()

    def on_step(entry, model):
        if entry["step"] in (7, 11):
            on[entry["step"] - 3].set()

    monkeypatch.setattr(checkpoint_module, "_publish", slowly)
    train(replace(config, async_checkpoint=True, keep_last=9), on_step=on_step)
    assert len(checkpoints(Path(config.out_dir) / "checkpoints")) == 3


def test_a_save_that_fails_in_the_background_is_told_at_the_next_step(config, monkeypatch):
    def full(partial, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "_publish", full)
    seen = []

    def wait(entry, model):
        seen.append(entry["step"])
        time.sleep(0.05)  # the thread has its time between two steps

    with pytest.raises(UserError, match=r"checkpoint of step 4 could not be written .*No space left"):
        train(replace(config, async_checkpoint=True, steps=100), on_step=wait)
    assert 4 <= len(seen) < 20
    assert not list((Path(config.out_dir) / "checkpoints").iterdir())
    monkeypatch.undo()
    assert train(config).step == 12


def test_some_checkpoints_are_kept_for_good(config):
    train(replace(config, steps=14, checkpoint_every=2, keep_last=1, keep_every=6))
    names = [p.name for p in checkpoints(Path(config.out_dir) / "checkpoints")]
    assert names == ["step_00000006", "step_00000012", "step_00000014"]


def test_a_checkpoint_says_what_wrote_it(config):
    train(config)
    state = json.loads((Path(config.out_dir) / "checkpoints" / "step_00000012" / "state.json").read_text())
    assert state["versions"]["torch"] == torch.__version__ and set(state["versions"]) >= {
        "python",
        "numpy",
        "llama_edu",
    }
    assert (state["step"], state["sequence"], state["tokens"]) == (12, 48, 768)


# --- going on under every condition ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_ramp": ((200, 6), (500, 8))},
        {"packing": "best-fit", "document_mask": True},
        {"z_loss": 1e-3, "loss_chunk": 20, "accumulate": 2},
        {"recompute": "full", "precision": "bf16"},
        {"precision": "bf16_copies", "accumulate": 2},
        {"data_workers": 3, "async_checkpoint": True},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_run_goes_on_exactly(config, changes):
    config = replace(config, **changes)
    expected = outcome(train(replace(config, out_dir=config.out_dir + "_peace", data_workers=0)))
    with pytest.raises(Crash):
        train(config, on_step=crash_after(6))
    result = train(config)
    assert result.resumed_from == 4 and outcome(result) == expected


def test_a_mixture_may_change_ahead_but_not_behind(config, corpus):
    def mixture(at, share):
        return {
            "sources": {"one": str(corpus / "train"), "two": str(corpus / "val")},
            "weights": {"one": 0.5, "two": 0.5},
            "changes": [{"at": at, "weights": {"one": share, "two": 1 - share}}],
        }

    with pytest.raises(Crash):
        train(replace(config, train_data=mixture(640, 0.9)), on_step=crash_after(6))
    with pytest.raises(UserError, match="train_data"):
        train(replace(config, train_data=mixture(128, 0.9)))
    result = train(replace(config, train_data=mixture(640, 0.2)))
    assert result.resumed_from == 4 and result.step == 12


class OtherTokenizer(BytesTokenizer):
    special_tokens = {"<|start|>": 256, "<|stop|>": 257}  # noqa: RUF012


def test_a_checkpoint_of_another_tokenizer_is_refused(config, tmp_path):
    with pytest.raises(Crash):
        train(config, on_step=crash_after(5))
    texts = [f"line {i}: {i * i} is the square of {i}. " for i in range(280)]
    write_tokens(texts, OtherTokenizer(), tmp_path / "other")
    with pytest.raises(UserError, match=r"another configuration: tokenizer '.*' \(now '.*'\); choose another out_dir"):
        train(replace(config, train_data=str(tmp_path / "other")))


def test_a_checkpoint_of_another_format_is_refused(config):
    train(config)
    folder = Path(config.out_dir) / "checkpoints" / "step_00000012"
    state = json.loads((folder / "state.json").read_text()) | {"format": 1}
    with pytest.raises(UserError, match="is of format 1; this program reads format 2"):
        (folder / "state.json").write_text(json.dumps(state))
        checkpoint_module.load_checkpoint(folder, torch.nn.Linear(1, 1), torch.optim.SGD([torch.zeros(1)]))


def load(folder, model=MODEL):
    """Load into fresh weights. Returns whether it changed them, or what was said instead."""
    fresh = Transformer(model)
    before = copy.deepcopy(fresh.state_dict())
    try:
        load_checkpoint(folder, fresh, make_optimizer(fresh, 1e-3))
    except UserError as error:
        assert "\n" not in str(error)
        assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())
        return str(error)
    return not torch.equal(fresh.norm.weight, before["norm.weight"])


def flip(folder):
    file = next((folder / "tensors").glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def lose_a_field(folder):
    """With a manifest that agrees."""
    state = json.loads((folder / "state.json").read_text())
    del state["sequence"]
    (folder / "state.json").write_text(json.dumps(state))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["state.json"] = {
        "bytes": (folder / "state.json").stat().st_size,
        "sha256": checkpoint_module._sha256(folder / "state.json"),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_checkpoint_is_loaded_whole_or_not_at_all(config):
    train(replace(config, steps=4))
    folder = Path(config.out_dir) / "checkpoints" / "step_00000004"
    assert load(folder) is True
    for changes, words in (
        ({"n_layers": 1}, "model.layers.1.attention.wk.weight is not in the model (and 35 more differences)"),
        ({"n_layers": 3}, "model.layers.2.attention.wq.weight is not in it"),
        ({"ffn_dim": 64}, "model.layers.0.feed_forward.w1.weight is [32, 16] in it and [64, 16] in the model"),
    ):
        assert words in load(folder, replace(MODEL, **changes))
    assert "is no checkpoint: it has no state.json" in load(folder.with_name("step_00000005"))
    flip(folder)
    assert "has changed since it was saved; take another checkpoint" in load(folder)
    (folder / "state.json").write_text("{")
    assert "its state.json is damaged" in load(folder)


def test_a_checkpoint_without_a_field_is_one_sentence(config):
    train(replace(config, steps=4))
    lose_a_field(Path(config.out_dir) / "checkpoints" / "step_00000004")
    with pytest.raises(UserError, match=r"its state\.json lacks sequence; take another checkpoint"):
        train(config)


def test_a_run_verifies_a_checkpoint_once(config, monkeypatch):
    with pytest.raises(Crash):
        train(config, on_step=crash_after(5))
    seen = []
    verify = checkpoint_module.verify_checkpoint
    monkeypatch.setattr(checkpoint_module, "verify_checkpoint", lambda path: seen.append(path.name) or verify(path))
    assert train(config).resumed_from == 4 and seen == ["step_00000004"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("at", [1, 6, 12])
def test_a_disk_that_is_full_for_the_metrics_ends_the_run_with_a_checkpoint(config, monkeypatch, at):
    expected = outcome(train(replace(config, out_dir=config.out_dir + "_peace")))
    config = replace(config, checkpoint_every=0)

    def fill(self, entry, append=Metrics._append):
        if entry["step"] == at:
            os.dup2(os.open("/dev/full", os.O_WRONLY), self.file.fileno())
        append(self, entry)

    monkeypatch.setattr(Metrics, "_append", fill)
    with pytest.raises(UserError, match=r"metrics.jsonl could not be written: No space left on device; make room"):
        train(config)
    monkeypatch.undo()
    result = train(config)
    assert result.resumed_from == at and outcome(result)[0] == expected[0]
    assert [h["step"] for h in result.history] == [n for n in range(1, 13) if n != at]  # the line that was lost


# --- bad data -------------------------------------------------------------------------------------------------------


class Poisoned(Engine):
    """Loss and gradient are not finite in the backward passes with these numbers."""

    def __init__(self, at):
        self.at, self.calls = at, 0

    def backward(self, model, batch, count, config, **kwargs):
        self.calls += 1
        loss = super().backward(model, batch, count, config, **kwargs)
        return loss * math.nan if self.calls in self.at else loss


def test_after_bad_steps_the_run_goes_back_and_on_past_the_data(config, capsys):
    rows = []

    class Watching(Poisoned):
        def backward(self, model, batch, *args, **kwargs):
            rows.append(batch.tokens.clone())
            return super().backward(model, batch, *args, **kwargs)

    result = train(replace(config, max_skipped=2, keep_last=3), engine=Watching({6, 7}))
    assert "2 steps in a row, up to step 7: back to step 4, and on without the 12 sequences" in capsys.readouterr().err
    assert (result.step, result.rewinds, result.skipped) == (12, 1, 2)
    assert [h["step"] for h in result.history] == list(range(1, 13))
    back = result.history[4]
    assert (back["rewound_from"], back["sequences_passed_over"], back["tokens"]) == (7, 12, 5 * 64)
    assert len(rows) == 7 + 8 and len({r.numpy().tobytes() for r in rows}) == 15, "no batch is read twice"
    discarded = (Path(config.out_dir) / "discarded.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in discarded] == [5, 6, 7]
    assert all(json.loads(line)["rewind"] == 1 for line in discarded)
    shutil.rmtree(Path(config.out_dir) / "checkpoints" / "step_00000012")
    shutil.rmtree(Path(config.out_dir) / "checkpoints" / "step_00000008")
    train(config)  # from before the rewind, and this time nothing is bad: nothing was discarded on the way
    assert (Path(config.out_dir) / "discarded.jsonl").read_text() == ""


def test_a_checkpoint_saved_in_trouble_is_none_to_go_back_to(config):
    cfg = replace(config, checkpoint_every=2, keep_last=1, max_skipped=4, max_rewinds=1)
    result = train(cfg, engine=Poisoned({5, 6, 7, 8}))
    assert result.history[4]["rewound_from"] == 8 and result.rewinds == 1
    with pytest.raises(UserError, match="2 steps in a row, up to step 2: lower lr"):  # there is nothing to go back to
        train(replace(config, out_dir=config.out_dir + "2", max_skipped=2), engine=Poisoned({1, 2}))


# --- the beginning of a run -----------------------------------------------------------------------------------------


@given(
    st.integers(1, 60),
    st.integers(1, 8),
    st.lists(st.tuples(st.integers(1, 2000), st.integers(1, 16)), max_size=3, unique_by=lambda pair: pair[0]),
)
@settings(max_examples=60, deadline=None)
def test_the_sequences_of_a_run_are_counted_through_its_ramp(steps, size, ramp):
    ramp = tuple(sorted(ramp))
    cfg = TrainConfig(
        model=MODEL, train_data="", out_dir="", steps=steps, batch_size=size, batch_ramp=ramp, seq_len=16, warmup=0
    )
    sequences = 0
    for _ in range(steps):
        sequences += batch_size_at(sequences * 16, size, ramp)
    assert sequences_of(cfg) == sequences


def test_the_first_steps_are_looked_at(config, capsys):
    said = []
    train(config, inform=said.append)
    assert len(said) == 2 and "sequences of 16 tokens, 0.0" in said[0]
    assert "log V = 5.55 is expected of fresh weights, within 1.06" in said[1]
    assert capsys.readouterr().err == ""
    train(config, inform=said.append)  # complete: there is no first step
    assert len(said) == 3
    strange = Path(config.out_dir + "2")

    def spoil(model):
        torch.nn.init.normal_(model.tok_embeddings.weight, std=0.5)
        return model

    train(replace(config, out_dir=str(strange)), prepare=spoil)
    assert "look at the weights and the targets" in capsys.readouterr().err


def test_pretrained_weights_are_not_taken_for_fresh_ones(config, capsys):
    class Pretrained(Engine):
        weights = "a/folder"

        def build(self, config):
            model = super().build(config)
            torch.nn.init.normal_(model.tok_embeddings.weight, std=0.5)
            return model

    said = []
    train(config, engine=Pretrained(), inform=said.append)
    assert not any("fresh weights" in line for line in said) and capsys.readouterr().err == ""


def test_repeated_text_is_told(config, corpus):
    from llama_edu.data import open_stream

    many = replace(config, steps=2000)
    stream = open_stream(config.train_data, seq_len=16, seed=0)
    assert epochs_line(many, stream).endswith("beyond 4 epochs repeated text teaches little")
    assert "beyond" not in epochs_line(config, stream)


@pytest.mark.parametrize("lr", [3.0, 100.0, 1e6])
def test_a_learning_rate_that_diverges_at_once_is_told_early(config, lr):
    steps = []
    with pytest.raises(UserError, match=r"lower lr \(now .*warmup \(now 3\)"):
        train(replace(config, lr=lr, steps=200), on_step=lambda entry, model: steps.append(entry["step"]))
    assert len(steps) < 30


def test_samples_leave_the_run_as_it_is(config):
    def sampler(model, prompts):
        assert not model.training
        torch.rand(100)
        return [prompt + "!" for prompt in prompts]

    plain = train(config)
    talking = replace(config, out_dir=config.out_dir + "2", sample_every=5, sample_prompts=("one", "two"))
    result = train(talking, sampler=sampler)
    assert outcome(result) == outcome(plain)
    assert [h["step"] for h in result.history if "samples" in h] == [5, 10]
    assert result.history[4]["samples"][1] == {"prompt": "two", "text": "two!"}


def test_boards_are_filled_when_asked_for(config, monkeypatch):
    pytest.importorskip("tensorboard")
    logged, finished = [], []

    class FakeRun:
        def log(self, values, step):
            logged.append((step, values["loss"]))

        def finish(self):
            finished.append(True)

    fake = type(sys)("wandb")
    fake.init = lambda **kwargs: FakeRun()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    result = train(replace(config, tensorboard=True, wandb="a-project", mfu=True))
    assert logged == [(h["step"], h["loss"]) for h in result.history] and finished == [True]
    assert all(h["mfu"] > 0 for h in result.history)
    files = list((Path(config.out_dir) / "tensorboard").iterdir())
    assert len(files) == 1 and files[0].stat().st_size > 1000
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(files[0].parent))
    events.Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([h["loss"] for h in result.history])


def test_a_board_that_is_not_installed_is_one_sentence(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb is 'a-project', but the package is not installed: pip install wandb"):
        train(replace(config, wandb="a-project"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="tensorboard is true, but the package is not installed"):
        train(replace(config, tensorboard=True))


# --- many ranks agree -----------------------------------------------------------------------------------------------


class Second(Engine):
    """Rank 1 of two, as far as words go: rank 0 has failed with a sentence, or has not."""

    rank, world_size = 1, 2

    def __init__(self, sentence):
        self.sentence = sentence

    def any(self, flag):
        return flag or self.sentence is not None

    def gather(self, value):
        return [self.sentence, value]


def test_what_fails_on_one_rank_is_raised_on_all():
    with agreed(Second(None)):
        pass
    with pytest.raises(UserError, match=r"^rank 0: the disk is full$"), agreed(Second("the disk is full")):
        pass
    with pytest.raises(KeyError), agreed(Second("the disk is full")):
        raise KeyError("one's own error is told as it is")
