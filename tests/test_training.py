"""Training: against a plain PyTorch loop, resumed to the last bit, and through everything that can befall a run."""

import copy
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from bytes_tokenizer import BytesTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import get_cosine_schedule_with_warmup, get_wsd_schedule

from llama_edu import LlamaConfig, Transformer
from llama_edu.data import Batch, Batches, TokenFile, write_tokens
from llama_edu.errors import UserError
from llama_edu.training import (
    TrainConfig,
    backward_batch,
    bits_per_byte,
    decay_groups,
    evaluate,
    learning_rate,
    newest_checkpoint,
    next_token_loss,
    train,
)

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
        val_data=str(corpus / "val"),
        out_dir=str(tmp_path / "run"),
        steps=12,
        batch_size=4,
        seq_len=16,
        lr=1e-2,
        warmup=3,
        precision="float32",
        device="cpu",
        checkpoint_every=4,
        keep_last=3,
        progress=False,
    )


class Crash(Exception):
    pass


def crash_after(step):
    def on_step(entry, model):
        if entry["step"] == step:
            raise Crash

    return on_step


def outcome(result):
    """Weights and losses, for comparing to the last bit."""
    weights = {name: tensor.clone() for name, tensor in result.model.state_dict().items()}
    return weights, [(h["step"], h["loss"], h["grad_norm"], h.get("val_loss")) for h in result.history]


def assert_same(one, two):
    assert one[1] == two[1]
    assert one[0].keys() == two[0].keys()
    assert all(torch.equal(one[0][name], two[0][name]) for name in one[0])


def checkpoint(config, step):
    return Path(config.out_dir) / "checkpoints" / f"step_{step:08d}"


# --- the mathematics ------------------------------------------------------------------------------------------------


def test_the_loop_is_the_plain_loop(config, corpus):
    """Written out with PyTorch's own parts, in the order of any textbook."""
    result = train(replace(config, accumulate=2, clip=0.5))
    torch.manual_seed(config.seed)
    model = Transformer(MODEL)
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in named.items() if "norm" not in n], "weight_decay": 0.1},
            {"params": [p for n, p in named.items() if "norm" in n], "weight_decay": 0.0},
        ],
        lr=1.0,
        betas=(0.9, 0.95),
    )
    batches = Batches(TokenFile(corpus / "train"), 4, 16, seed=0)
    losses = []
    for step in range(1, 13):
        tokens, targets, _ = batches.batch(step - 1)
        loss = F.cross_entropy(model(tokens).reshape(-1, 258), targets.reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        cosine = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 3) / 9))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (step / 3 if step < 3 else cosine)
        optimizer.step()
        losses.append(loss.item())
    assert [h["loss"] for h in result.history] == pytest.approx(losses, rel=2e-5)
    for name, p in result.model.named_parameters():
        torch.testing.assert_close(p, named[name], rtol=1e-4, atol=1e-5)


def test_it_learns(config):
    result = train(replace(config, steps=150, warmup=10, lr=2e-2, checkpoint_every=0, eval_every=50))
    assert abs(result.history[0]["loss"] - math.log(258)) < 1
    assert result.loss < 2.5 and result.val_loss < 2.5
    assert result.bits_per_byte == pytest.approx(bits_per_byte(result.val_loss, TokenFile(config.val_data)))
    assert [h["step"] for h in result.history if "val_loss" in h] == [50, 100, 150]
    assert not result.interrupted and result.skipped == 0 and result.tokens_per_second > 0


def test_decay_is_for_matrices():
    model = Transformer(MODEL)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, plain = ({names[id(p)] for p in group["params"]} for group in decay_groups(model, 0.1))
    assert plain == {n for n in names.values() if "norm" in n}
    assert decayed | plain == set(names.values()) and not decayed & plain


@pytest.mark.parametrize("accumulate", [1, 2, 3, 6])
def test_accumulation_is_the_large_batch_though_its_parts_differ_in_length(accumulate):
    torch.manual_seed(0)
    model = Transformer(MODEL).double()
    tokens, targets = torch.randint(258, (2, 6, 16))
    for row in range(6):
        targets[row, 2 + 2 * row :] = -100
    logits = model(tokens).double()
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    loss = backward_batch(model, Batch(tokens, targets, torch.zeros_like(tokens)), accumulate=accumulate)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    for p, g in zip(model.parameters(), gradients):
        torch.testing.assert_close(p.grad, g, rtol=1e-5, atol=1e-8)


def test_under_a_document_mask_no_text_reaches_another_document():
    torch.manual_seed(0)
    model = Transformer(MODEL)
    tokens = torch.randint(258, (1, 16))
    documents = torch.tensor([[0] * 7 + [1] * 9])
    targets = tokens.roll(-1, 1).masked_fill(documents == 0, -100)
    other = tokens.clone()
    other[0, :7] = (other[0, :7] + 1) % 258
    inside = [next_token_loss(model, t, targets, documents).item() for t in (tokens, other)]
    across = [next_token_loss(model, t, targets).item() for t in (tokens, other)]
    assert inside[0] == inside[1] and across[0] != across[1]


def test_document_mask_is_an_option_of_a_run(config):
    assert (
        train(config).history[0]["loss"]
        != train(replace(config, out_dir=config.out_dir + "2", document_mask=True)).history[0]["loss"]
    )


def test_bf16_runs_beside_float32_weights(config):
    result = train(replace(config, precision="bf16"))
    exact = train(replace(config, out_dir=config.out_dir + "2"))
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}
    assert result.loss != exact.loss and result.loss == pytest.approx(exact.loss, rel=0.02)


@given(
    st.sampled_from(["cosine", "linear", "wsd", "constant"]),
    st.integers(1, 500),
    st.floats(0, 1),
    st.floats(0, 1),
)
@settings(max_examples=60, deadline=None)
def test_a_schedule_climbs_to_its_peak_and_falls_to_its_end(schedule, steps, share, floor):
    warmup = int(share * steps)
    rates = [
        learning_rate(n, peak=2.0, steps=steps, warmup=warmup, min_ratio=floor, schedule=schedule)
        for n in range(1, steps + 1)
    ]
    climb, fall = rates[: max(warmup, 1)], rates[max(warmup, 1) - 1 :]
    assert climb == sorted(climb) and fall == sorted(fall, reverse=True)
    assert min(rates) > 0 or floor == 0
    if warmup:
        assert rates[warmup - 1] == 2.0 and rates[0] == pytest.approx(2.0 / warmup)
    if warmup < steps and schedule != "constant":
        assert rates[-1] == pytest.approx(2.0 * floor)


def test_schedules_are_those_of_transformers():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=3.0)
    theirs = {
        "cosine": get_cosine_schedule_with_warmup(optimizer, 10, 100),
        "wsd": get_wsd_schedule(
            optimizer, num_warmup_steps=10, num_decay_steps=20, num_training_steps=100, decay_type="linear"
        ),
    }
    for name, scheduler in theirs.items():
        for n in range(1, 100):
            ours = learning_rate(n, peak=3.0, steps=100, warmup=10, min_ratio=0.0, schedule=name)
            assert ours == pytest.approx(3.0 * scheduler.lr_lambdas[0](n), abs=1e-12), (name, n)


def test_evaluation_is_the_mean_over_the_tokens_whatever_the_batch(corpus):
    torch.manual_seed(0)
    model, file = Transformer(MODEL), TokenFile(corpus / "val")
    tokens = torch.from_numpy(file.tokens.astype("int64"))
    total = 0.0
    for start in range(0, len(tokens) - 1, 16):
        window = tokens[start : start + 17]
        total += F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="sum").item()
    for options in ({"batch_size": 1}, {"batch_size": 3, "chunk_size": 7}, {"batch_size": 100}):
        assert evaluate(model, file, seq_len=16, **options) == pytest.approx(total / (len(tokens) - 1))
    assert model.training


def test_an_evaluation_of_nothing_is_refused_and_one_that_fails_leaves_the_model_training(corpus):
    model, file = Transformer(MODEL), TokenFile(corpus / "val")
    with pytest.raises(ValueError, match="max_batches is 0; it must be at least 1"):
        evaluate(model, file, batch_size=2, seq_len=16, max_batches=0)
    model.norm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(model, file, batch_size=2, seq_len=16)
    assert model.training


# --- a run that survives --------------------------------------------------------------------------------------------


def test_a_crashed_run_ends_as_one_left_in_peace(config):
    expected = outcome(train(replace(config, out_dir=config.out_dir + "_peace", checkpoint_every=0)))
    for step in (3, 7, 8, 11):
        with pytest.raises(Crash):
            train(config, on_step=crash_after(step))
    result = train(config)
    assert result.resumed_from == 8
    assert_same(outcome(result), expected)
    lines = [json.loads(line) for line in (Path(config.out_dir) / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.history and [line["step"] for line in lines] == list(range(1, 13))
    again = train(config)
    assert again.resumed_from == 12 and again.bits_per_byte == result.bits_per_byte
    assert_same(outcome(again), expected)


def test_random_numbers_of_the_model_go_on_where_they_were(config):
    def with_dropout(model):
        model.norm.register_forward_hook(lambda module, args, out: F.dropout(out, 0.2, module.training))
        return model

    state = torch.get_rng_state()
    expected = outcome(train(replace(config, out_dir=config.out_dir + "_peace"), prepare=with_dropout))
    with pytest.raises(Crash):
        train(config, prepare=with_dropout, on_step=crash_after(6))
    torch.rand(7)
    assert_same(outcome(train(config, prepare=with_dropout)), expected)
    torch.set_rng_state(state)
    train(replace(config, out_dir=config.out_dir + "_other"), prepare=with_dropout)
    assert torch.equal(torch.get_rng_state(), state)  # a run leaves the caller's generators as they were


def truncate(path):
    file = path / "tensors" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])


def flip(path):
    file = path / "tensors" / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "damage, words",
    [
        (truncate, "bytes instead of"),
        (flip, "has changed since it was saved"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda path: (path / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda path: (path / "manifest.json").write_text("{}"), "does not list"),
        (lambda path: (path / "state.json").unlink(), "state.json is missing"),
    ],
)
def test_a_damaged_checkpoint_is_told_and_passed_over(config, capsys, damage, words):
    expected = outcome(train(replace(config, out_dir=config.out_dir + "_peace")))
    with pytest.raises(Crash):
        train(config, on_step=crash_after(10))
    damage(checkpoint(config, 8))
    stale = checkpoint(config, 8).with_name(".step_00000012.partial")
    stale.mkdir()
    (stale / "half").write_bytes(b"left by a killed save")
    capsys.readouterr()
    result = train(config)
    said = capsys.readouterr().err
    assert "step_00000008" in said and words in said and len(said.splitlines()) == 1
    assert result.resumed_from == 4 and not stale.exists()
    assert_same(outcome(result), expected)
    assert newest_checkpoint(checkpoint(config, 8).parent) == (checkpoint(config, 12), [])


def test_only_the_last_checkpoints_are_kept(config):
    train(replace(config, keep_last=2, checkpoint_every=3))
    assert sorted(p.name for p in checkpoint(config, 0).parent.iterdir()) == ["step_00000009", "step_00000012"]


def test_a_checkpoint_of_another_configuration_is_refused_with_the_fields(config, corpus, tmp_path):
    with pytest.raises(Crash):
        train(config, on_step=crash_after(5))
    before = (checkpoint(config, 4) / "manifest.json").read_bytes()
    with pytest.raises(
        UserError, match=r"another configuration: lr 0.01 \(now 0.02\); model.dim 16 \(now 32\); choose"
    ):
        train(replace(config, lr=0.02, model=replace(MODEL, dim=32)))
    other = write_tokens(["other text " * 100], BytesTokenizer(), tmp_path / "other")
    with pytest.raises(UserError, match="train_data"):
        train(replace(config, train_data=str(other.path)))
    assert (checkpoint(config, 4) / "manifest.json").read_bytes() == before
    assert len((Path(config.out_dir) / "metrics.jsonl").read_text().splitlines()) == 5
    moved = shutil.copytree(config.train_data, tmp_path / "moved")
    free = replace(config, train_data=str(moved), eval_every=2, keep_last=1, checkpoint_every=5, val_data=None)
    assert train(free).resumed_from == 4  # the same tokens elsewhere, and what leaves the weights alone, are welcome


def poison(at, name="norm"):
    """Make the output of a layer NaN in the forward passes numbered `at`."""

    def prepare(model):
        calls = [0]

        def hook(module, args, out):
            calls[0] += module.training
            return out * math.nan if module.training and calls[0] in at else out

        getattr(model, name).register_forward_hook(hook)
        return model

    return prepare


def test_a_step_that_is_not_finite_is_skipped_and_counted(config):
    seen = {}
    result = train(
        config,
        prepare=poison({5}),
        on_step=lambda entry, model: seen.update({entry["step"]: model.layers["0"].attention.wq.weight.clone()}),
    )
    assert result.skipped == 1 and result.step == 12
    assert [h["step"] for h in result.history if h["skipped"]] == [5]
    assert result.history[4]["loss"] is None
    assert torch.equal(seen[4], seen[5]) and not torch.equal(seen[5], seen[6])
    assert all(p.isfinite().all() for p in result.model.parameters())
    assert train(config).skipped == 1


def test_too_many_such_steps_in_a_row_end_the_run_in_a_sentence(config):
    with pytest.raises(UserError, match=r"3 steps in a row, up to step 8: lower lr \(now 0.01\)"):
        train(replace(config, max_skipped=3, max_rewinds=0), prepare=poison(range(6, 99)))
    again = replace(config, out_dir=config.out_dir + "2", max_skipped=3)
    with pytest.raises(UserError, match=r"3 steps in a row, up to step 7, and 2 times before that: lower lr"):
        train(again, prepare=poison(range(6, 99)))


def test_a_run_whose_first_steps_are_skipped_resumes_exactly(config):
    expected = outcome(train(replace(config, out_dir=config.out_dir + "_peace"), prepare=poison(range(1, 7))))
    with pytest.raises(Crash):
        train(config, prepare=poison(range(1, 7)), on_step=crash_after(5))
    assert_same(outcome(train(config, prepare=poison(range(1, 3)))), expected)


def test_a_disk_without_room_is_told_before_anything_is_written(config, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"a checkpoint takes 0 MiB and the disk of .* has 0 MiB left"):
        train(config)
    assert not list(checkpoint(config, 0).parent.iterdir())


def test_two_runs_do_not_share_a_folder(config):
    def second(entry, model):
        with pytest.raises(UserError, match="another run is writing"):
            train(config)
        raise Crash

    with pytest.raises(Crash):
        train(config, on_step=second)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"steps": 0}, "steps is 0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"warmup": 13}, "warmup is 13 steps, the run has only 12"),
        ({"seq_len": 64}, "seq_len is 64, the model's max_seq_len is 32"),
        ({"batch_size": 5, "accumulate": 2}, "5 does not divide by accumulate 2"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
        ({"schedule": "sine"}, "schedule is 'sine'"),
        ({"betas": (0.9, 1.0)}, "betas is"),
        ({"min_lr_ratio": 2.0}, "min_lr_ratio is 2.0"),
    ],
)
def test_impossible_configurations_are_refused(config, changes, words):
    broken = copy.copy(config)
    for name, value in changes.items():  # around the type checker of the test run, as a file or a command line would
        object.__setattr__(broken, name, value)
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        broken.__post_init__()
    assert "\n" not in str(caught.value)


def test_a_configuration_survives_json(config):
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(UserError, match="learning_rate is no setting; did you mean lr"):
        TrainConfig.from_dict({**config.to_dict(), "learning_rate": 1})


@pytest.mark.parametrize(
    ("changes", "given", "words"),
    [
        (
            {},
            {"model": Transformer(replace(MODEL, n_layers=1, max_seq_len=64))},
            "n_layers 1 (2 in config.model); max_seq_len 64 (32 in config.model); set config.model to the model's cfg",
        ),
        ({"sample_every": 2, "sample_prompts": ("a",)}, {}, "sample_every is 2, but there is no sampler"),
        ({"device": "meta"}, {}, "device is 'meta', which cannot compute here"),
    ],
)
def test_what_does_not_fit_the_configuration_is_refused_before_anything_is_written(config, changes, given, words):
    with pytest.raises(UserError, match=re.escape(words)):
        train(replace(config, **changes), **given)
    assert not Path(config.out_dir).exists()


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_a_folder_in_place_of_a_file_is_one_sentence(config, name):
    (Path(config.out_dir) / name).mkdir(parents=True)
    with pytest.raises(UserError, match=rf"{name} could not be written: Is a directory"):
        train(config)


def test_what_does_not_fit_the_data_is_refused(config, tmp_path):
    with pytest.raises(UserError, match="ids up to 257, the model's vocab_size is 100"):
        train(replace(config, model=replace(MODEL, vocab_size=100)))
    with pytest.raises(UserError, match="less than the"):
        train(replace(config, batch_size=10_000))
    with pytest.raises(UserError, match="holds no tokens"):
        train(replace(config, train_data=str(tmp_path)))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be the folder of a run"):
        train(replace(config, out_dir=str(tmp_path / "file")))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA"):
            train(replace(config, device="cuda"))
