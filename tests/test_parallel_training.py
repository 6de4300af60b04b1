"""The loop on many ranks: losses of one process, checkpoints that fit another division, a whole model in the end."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from bytes_tokenizer import BytesTokenizer

from llama_edu import LlamaConfig, Transformer
from llama_edu.data import write_tokens
from llama_edu.parallel import ParallelEngine, ParallelPlan, RankError, run_ranks
from llama_edu.training import TrainConfig, train

P = ParallelPlan
MODEL = LlamaConfig(dim=32, n_layers=4, n_heads=8, n_kv_heads=4, ffn_dim=48, vocab_size=264, max_seq_len=32)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    texts = [f"line {i}: {i * i} is the square of {i}. " for i in range(300)]
    write_tokens(texts[:280], BytesTokenizer(), folder / "train")
    write_tokens(texts[280:], BytesTokenizer(), folder / "val")
    return folder


@pytest.fixture
def config(tokens, tmp_path):
    return TrainConfig(
        model=MODEL,
        train_data=str(tokens / "train"),
        val_data=str(tokens / "val"),
        out_dir=str(tmp_path / "run"),
        steps=6,
        batch_size=8,
        seq_len=32,
        lr=1e-2,
        warmup=2,
        precision="float32",
        device="cpu",
        document_mask=True,
        checkpoint_every=3,
        progress=False,
    )


def start(config):
    torch.manual_seed(3)
    return Transformer(config.model).double()


class Stopped(Exception):
    pass


def _train(plan, config, stop_at=None):
    def on_step(entry, model):
        if entry["step"] == stop_at:
            raise Stopped

    engine = ParallelEngine(plan)
    try:
        result = train(config, model=start(config), engine=engine, on_step=on_step)
    except Stopped:
        return None
    model = engine.whole(result.model, config)
    history = [(entry["loss"], entry["grad_norm"]) for entry in result.history]
    return history, result.val_loss, result.resumed_from, model and model.state_dict()


def on(plan, config, stop_at=None):
    return run_ranks(_train, plan.world_size, plan, config, stop_at, timeout=120)


@pytest.fixture
def undivided(config, tmp_path):
    """One rank without any division."""
    return on(P(), replace(config, out_dir=str(tmp_path / "one")))[0]


def assert_same(result, undivided):
    history, val_loss, _, state = result
    torch.testing.assert_close(history, undivided[0], atol=1e-11, rtol=0)
    assert abs(val_loss - undivided[1]) < 1e-11
    assert set(state) == set(undivided[3])
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, undivided[3][name], atol=1e-10, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [(P(dp=2), P(dp=2, cp=2)), (P(dp=2, tp=2, pp=2), P()), (P(tp=2), P(pp=2)), (P(dp=4), P(pp=2, tp=2))],
    ids=["dp2-to-dp2cp2", "dp2tp2pp2-to-1", "tp2-to-pp2", "dp4-to-pp2tp2"],
)
def test_a_checkpoint_goes_on_under_another_division(config, undivided, before, after, tmp_path):
    on(before, config, stop_at=5)
    result = on(after, config)[0]
    assert result[2] == 3
    assert_same(result, undivided)


def _sequences_at_a_time(plan, config):
    """Of forward passes in training, and of those in evaluation."""
    seen = {True: set(), False: set()}

    def see(module, args):
        if isinstance(module, torch.nn.RMSNorm | torch.nn.Embedding) or hasattr(module, "attention_norm"):
            seen[module.training].add(len(args[0]))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(see)
    val_loss = train(config, model=start(config), engine=ParallelEngine(plan)).val_loss
    hook.remove()
    return seen[True], seen[False], val_loss


@pytest.mark.parametrize("plan", [P(dp=2), P(pp=2), P(dp=2, pp=2)], ids=["dp", "pp", "dp-pp"])
def test_an_evaluation_reads_as_many_sequences_at_a_time_as_training(config, plan, tmp_path):
    """Three batches: two ranks have one for both in the end."""
    config = replace(config, steps=1, warmup=0, checkpoint_every=0, eval_batches=3)
    one = run_ranks(_sequences_at_a_time, 1, P(), replace(config, out_dir=str(tmp_path / "one")), timeout=120)
    for trained, evaluated, val_loss in run_ranks(_sequences_at_a_time, plan.world_size, plan, config, timeout=120):
        assert max(evaluated) == max(trained) == 8 // plan.dp // (2 if plan.pp > 1 else 1)
        assert abs(val_loss - one[0][2]) < 1e-11


@pytest.mark.slow
def test_shared_heads_are_in_a_checkpoint_once(config, tmp_path):
    model = LlamaConfig(**{**MODEL.to_dict(), "n_kv_heads": 2})
    config = replace(config, model=model, z_loss=1e-3, loss_chunk=40)
    undivided = on(P(), replace(config, out_dir=str(tmp_path / "one")))[0]
    on(P(tp=4), config, stop_at=5)
    result = on(P(tp=2, pp=2), config)[0]
    assert result[2] == 3
    assert_same(result, undivided)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"), [(P(pp=2, tp=2), P(dp=2)), (P(), P(pp=2, dp=2))], ids=["pp2tp2-to-dp2", "1-to-pp2dp2"]
)
def test_a_tied_matrix_with_two_copies_is_saved_as_one(config, before, after, tmp_path):
    config = replace(config, model=LlamaConfig(**{**MODEL.to_dict(), "tie_embeddings": True}))
    undivided = on(P(), replace(config, out_dir=str(tmp_path / "one")))[0]
    on(before, config, stop_at=5)
    result = on(after, config)[0]
    assert result[2] == 3
    assert_same(result, undivided)


def test_checkpoints_behind_the_runs_back(config, undivided):
    config = replace(config, async_checkpoint=True, checkpoint_every=2)
    on(P(dp=2), config, stop_at=5)
    result = on(P(dp=2), config)[0]
    assert result[2] in (2, 4)
    assert_same(result, undivided)


def _export(plan, config, path):
    engine = ParallelEngine(plan)
    model = engine.whole(engine.prepare(Transformer(config.model), config), config)
    if engine.rank == 0:
        model.save_pretrained(path)


def test_a_divided_model_goes_out_to_hugging_face(config, tmp_path):
    import transformers

    torch.manual_seed(7)
    run_ranks(_export, 4, P(tp=2, pp=2), config, tmp_path / "hf")
    torch.manual_seed(7)
    ours, tokens = Transformer(config.model), torch.arange(20)[None]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(theirs(tokens).logits, ours(tokens), atol=1e-5, rtol=1e-5)
    for name, p in Transformer.from_pretrained(tmp_path / "hf").named_parameters():
        assert torch.equal(p, dict(ours.named_parameters())[name])


@pytest.mark.parametrize(
    ("plan", "changes", "words"),
    [
        (P(dp=2), {"batch_size": 3}, "a batch of 3 sequences does not divide by dp 2"),
        (P(tp=2), {"seq_len": 31}, "do not divide by tp 2"),
        (P(pp=2), {"batch_size": 5}, "the 5 sequences"),
    ],
)
def test_what_cannot_be_divided_is_refused_on_all_ranks(config, plan, changes, words):
    with pytest.raises(RankError, match=words) as caught:
        on(plan, replace(config, **changes))
    assert "UserError" in caught.value.detail


def test_more_ranks_than_the_plan_has_are_refused(config):
    with pytest.raises(RankError, match="makes 1 ranks, and 2 are running"):
        run_ranks(_train, 2, P(), config)


def _line(tokens, out):
    shape = "--dim 32 --n-layers 4 --n-heads 8 --n-kv-heads 4 --model.ffn-dim 48 --model.vocab-size 264".split()
    run = "--seq-len 32 --batch-size 8 --steps 4 --eval-every 2 --precision float32 --no-model.tie-embeddings".split()
    return [
        "--data",
        str(tokens / "train"),
        "--val-data",
        str(tokens / "val"),
        "--out",
        str(out),
        *shape,
        *run,
        "--no-mfu",
    ]


def _lines(out):
    return [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_torchrun_and_one_process_tell_the_same(tokens, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4", "--standalone", "--no-python"]
    torchrun = [
        *torchrun,
        sys.executable,
        "-m",
        "llama_edu.train",
        "--parallel.tp",
        "2",
        *_line(tokens, tmp_path / "four"),
    ]
    done = subprocess.run(torchrun, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = [sys.executable, "-m", "llama_edu.train", *_line(tokens, tmp_path / "alone")]
    done = subprocess.run(alone, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    one = [sys.executable, "-m", "llama_edu.cli.main", "train", *_line(tokens, tmp_path / "one")]
    subprocess.run(one, check=True, capture_output=True, timeout=240)
    for folder in ("four", "alone"):
        for ours, theirs in zip(_lines(tmp_path / folder), _lines(tmp_path / "one"), strict=True):
            assert ours.keys() - {"checkpoint_seconds"} == theirs.keys() - {"checkpoint_seconds"}
            for name in ("loss", "grad_norm", "lr", "tokens", "val_loss"):
                assert ours.get(name, 0) == pytest.approx(theirs.get(name, 0), rel=1e-4)
        assert (tmp_path / folder / "run" / "report.html").exists()
        weights = Transformer.from_pretrained(tmp_path / folder / "model").state_dict()
        assert set(weights) == set(Transformer.from_pretrained(tmp_path / "one" / "model").state_dict())


GPUS = torch.cuda.device_count()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "options"),
    [
        (1, []),
        (2, ["--parallel.tp", "2"]),
        (4, ["--parallel.tp", "2", "--parallel.pp", "2"]),
        (8, ["--parallel.tp", "2"]),
    ],
)
def test_on_gpus(n, options, tokens, tmp_path):
    if n > GPUS:
        pytest.skip(f"needs {n} GPUs, this machine has {GPUS}")
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(n),
        "--standalone",
        "--no-python",
    ]
    torchrun += [
        sys.executable,
        "-m",
        "llama_edu.train",
        "--device",
        "cuda",
        *options,
        *_line(tokens, tmp_path / "out"),
    ]
    done = subprocess.run(torchrun, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = [sys.executable, "-m", "llama_edu.cli.main", "train", "--device", "cpu", *_line(tokens, tmp_path / "one")]
    subprocess.run(alone, check=True, timeout=400)
    for ours, theirs in zip(_lines(tmp_path / "out"), _lines(tmp_path / "one"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
