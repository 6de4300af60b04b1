"""Every rank has its part of the weights that one process would have, and never held more than a layer beside it."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llama_edu import LlamaConfig, Transformer
from llama_edu.model.checkpoint import save_pretrained
from llama_edu.parallel import ParallelEngine, ParallelPlan, RankError, run_ranks
from llama_edu.parallel.checkpoint import whole_state
from llama_edu.training import TrainConfig

P = ParallelPlan
SMALL = LlamaConfig(dim=40, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=60, vocab_size=96, max_seq_len=32)
LARGE = LlamaConfig(dim=512, n_layers=8, n_heads=8, n_kv_heads=4, ffn_dim=1536, vocab_size=8192, max_seq_len=32)
CONFIG = TrainConfig(
    model=SMALL,
    train_data="-",
    out_dir="-",
    steps=1,
    warmup=0,
    batch_size=12,
    seq_len=32,
    precision="float32",
    device="cpu",
)
EMPTY_STAGE = P(pp=2, schedule="interleaved", virtual_stages=2, layers=(2, 0, 0, 2))
PLANS = [P(tp=2, dp=2), P(dp=3), EMPTY_STAGE, P(dp=2, tp=2, pp=2)]


def _fresh(plan, models):
    found = []
    engine = ParallelEngine(plan)
    for cfg in models:
        config = replace(CONFIG, model=cfg)
        torch.manual_seed(5)
        model = engine.prepare(engine.build(config), config)
        generator = torch.get_rng_state()
        assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
        parts = dict(model.stages).values() if plan.pp > 1 else [model]
        tables = [part.rope_cos for part in parts]
        found.append((whole_state(model, engine.mesh, engine._control), generator, tables))
    return found


@pytest.mark.parametrize("plan", PLANS, ids=["tp2dp2", "dp3", "pp2", "dp2tp2pp2"])
def test_fresh_weights_are_those_of_one_process(plan):
    models = [LlamaConfig(**{**SMALL.to_dict(), "tie_embeddings": tied}) for tied in (False, True)]
    ranks = run_ranks(_fresh, plan.world_size, plan, models)
    for i, cfg in enumerate(models):
        torch.manual_seed(5)
        alone, generator = Transformer(cfg), torch.get_rng_state()
        state = ranks[0][i][0]
        assert set(state) == set(alone.state_dict())
        for name, tensor in alone.state_dict().items():
            assert torch.equal(state[name], tensor), name
        for rank in ranks:
            _, after, tables = rank[i]
            assert torch.equal(after, generator)
            assert all(torch.equal(table, alone.rope_cos) for table in tables)


def _pretrained(plan, folders, models):
    found = []
    for folder, cfg in zip(folders, models):
        config = replace(CONFIG, model=cfg)
        engine = ParallelEngine(plan, weights=folder)
        found.append(whole_state(engine.prepare(engine.build(config), config), engine.mesh, engine._control))
    return found


def test_pretrained_weights_are_read_in_parts(tmp_path):
    """From both layouts, Meta's in two files: a parameter is put together before it is divided."""
    tied = LlamaConfig(**{**SMALL.to_dict(), "tie_embeddings": True})
    folders, models = [tmp_path / "hf", tmp_path / "meta"], [tied, SMALL]
    alone = [Transformer(cfg) for cfg in models]
    alone[0].save_pretrained(folders[0], max_shard_size="20KB")
    save_pretrained(alone[1], folders[1], format="meta", model_parallel=2)
    for plan in (P(dp=2, tp=2), P(pp=2, tp=2)):
        states = run_ranks(_pretrained, 4, plan, folders, models)[0]
        for state, model in zip(states, alone, strict=True):
            assert set(state) == set(model.state_dict())
            for name, tensor in model.state_dict().items():
                assert torch.equal(state[name], tensor), name
    with pytest.raises(RankError, match=r"tok_embeddings.weight is \(96, 40\) in .* and \(98, 40\) in the config"):
        run_ranks(_pretrained, 2, P(dp=2), folders[:1], [replace(tied, vocab_size=98)])
    with pytest.raises(RankError, match=r"rope_theta is 500000.0 in .* and 10000.0 in the configuration"):
        run_ranks(_pretrained, 2, P(dp=2), folders[:1], [replace(tied, rope_theta=1e4)])


def _memory(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _peak(plan, config, whole):
    """Bytes of memory that making the model took at most."""
    engine = ParallelEngine(plan)
    engine.prepare(engine.build(CONFIG), CONFIG)  # what the first use of everything takes
    before = _memory("VmRSS")
    model = engine.prepare(Transformer(config.model) if whole else engine.build(config), config)
    assert next(model.parameters()).isfinite().all()
    return _memory("VmHWM") - before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not tell a process its peak")
def test_a_rank_holds_its_part_and_one_layer(monkeypatch):
    # glibc keeps what is freed, more or less of it as the threads happen to run, until it is told a fixed limit.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**16))
    config, plan = replace(CONFIG, model=LARGE, batch_size=4), P(dp=2, tp=2)
    whole = 4 * LARGE.num_parameters()
    largest = 4 * LARGE.vocab_size * LARGE.dim
    # Ranks of a new process: this one has memory that earlier tests freed, and a fork would take from that unseen.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        in_parts, made_whole = (fresh.submit(run_ranks, _peak, 4, plan, config, w).result() for w in (False, True))
    assert max(in_parts) < whole / 4 + largest + 24 * 2**20 < 0.6 * whole
    assert min(made_whole) > whole  # the measure sees a model that is made whole
