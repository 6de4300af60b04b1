"""Every division of a model gives the numbers of one process: loss, norm, gradients, and weights after three steps.

In float64 sums in another order differ by 1e-14 here; 1e-12 is asked for. In float32 one rounding is 6e-8 of a number
and gradients are sums of hundreds of terms: 1e-5 is asked for; of weights 1e-3, as AdamW divides a gradient by its size
and so moves a weight with a gradient of nearly nothing by up to lr = 1e-2, in a direction that rounding decides.
bfloat16 keeps 8 bits, each number is off by up to 0.4 %, and a dozen products follow each other: 4 % of the norm.
"""

import itertools
import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from llama_edu import LlamaConfig, Transformer
from llama_edu.data import Batch
from llama_edu.errors import UserError
from llama_edu.parallel import ParallelEngine, ParallelPlan, RankError, build_mesh, parallelize, run_ranks
from llama_edu.parallel.compat import quiet_gathers, splits_backward
from llama_edu.training import TrainConfig, make_optimizer

MODEL = LlamaConfig(dim=32, n_layers=4, n_heads=8, n_kv_heads=4, ffn_dim=48, vocab_size=96, max_seq_len=32)
CONFIG = TrainConfig(
    model=MODEL,
    train_data="-",
    out_dir="-",
    steps=3,
    warmup=0,
    batch_size=8,
    seq_len=32,
    lr=1e-2,
    clip=0.5,
    precision="float32",
    device="cpu",
    document_mask=True,
)


def batch():
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, MODEL.vocab_size, (8, 33), generator=g)
    targets = tokens[:, 1:].clone()
    targets[:3, 5:9] = -100  # ranks have different numbers of targets
    return Batch(tokens[:, :-1].contiguous(), targets, (torch.rand(8, 32, generator=g) < 0.15).cumsum(1))


def fresh(config, dtype):
    torch.manual_seed(0)
    return Transformer(config.model).to(dtype)


@cache
def reference(model_config, document_mask, z_loss, dtype):
    """One process, plain PyTorch."""
    config = replace(CONFIG, model=model_config, document_mask=document_mask)
    model, data, steps = fresh(config, dtype).train(), batch(), []
    optimizer = make_optimizer(model, config.lr)
    for _ in range(3):
        logits = model(data.tokens, document_ids=data.document_ids if document_mask else None)
        mean = 1 / (data.targets != -100).sum().item()
        loss = mean * F.cross_entropy(logits.flatten(0, 1), data.targets.flatten(), reduction="sum")
        penalty = mean * (logits.logsumexp(-1).square() * (data.targets != -100)).sum()
        (loss + z_loss * penalty).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        steps.append((loss.item(), norm.item(), gradients))
        optimizer.step()
        optimizer.zero_grad()
    return steps, {name: p.detach().clone() for name, p in model.named_parameters()}


def whole(t):
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


def _train(cases, dtype):
    quiet_gathers()
    return [_steps(plan, config, dtype) for plan, config in cases]


def _steps(plan, config, dtype):
    engine = ParallelEngine(plan)
    model = engine.prepare(fresh(config, dtype), config)
    optimizer = engine.optimizer(model, config)
    first, count = engine.share(0, 8)
    data, steps = Batch(*(t[first : first + count] for t in batch())), []
    for _ in range(3):
        n = engine.total((data.targets != -100).sum())
        loss = engine.total(engine.backward(model, data, n, config, autocast=False))
        gradients = {name: whole(p.grad) for name, p in model.named_parameters()}
        norm = engine.clip(model, config.clip, optimizer)
        steps.append((loss.item(), norm.item(), gradients))
        optimizer.step()
        optimizer.zero_grad()
    return steps, {name: whole(p) for name, p in model.named_parameters()}


def launch(cases, dtype):
    """What each case of (plan, config) gave on each rank. All have as many ranks, and are run by the same ones."""
    (world_size,) = {plan.world_size for plan, _ in cases}
    return zip(*run_ranks(_train, world_size, cases, dtype, timeout=300))


def differences(*cases, dtype=torch.float64):
    """Largest differences from one process: of losses, norms, gradients, weights. Every parameter must be somewhere."""
    worst = [0.0] * 4
    for (plan, config), ranks in zip(cases, launch(cases, dtype), strict=True):
        steps, weights = reference(config.model, config.document_mask, config.z_loss, dtype)
        if config.model.tie_embeddings and plan.pp > 1:
            join_copies(ranks, plan)
        for rank_steps, rank_weights in ranks:
            for (loss, norm, gradients), (true_loss, true_norm, true_gradients) in zip(rank_steps, steps, strict=True):
                # max() drops a NaN, so it is looked for by itself
                assert math.isfinite(loss) and math.isfinite(norm)
                assert all(g.isfinite().all() for g in gradients.values())
                worst[0], worst[1] = max(worst[0], abs(loss - true_loss)), max(worst[1], abs(norm - true_norm))
                for name, g in gradients.items():
                    worst[2] = max(worst[2], (g - true_gradients[name]).abs().max().item())
            for name, p in rank_weights.items():
                assert p.isfinite().all(), name
                worst[3] = max(worst[3], (p - weights[name]).abs().max().item())
        assert set().union(*(rank_weights for _, rank_weights in ranks)) == set(weights)
    return worst


def join_copies(ranks, plan):
    """The first and the last stage have a copy of a tied matrix each: equal weights, gradients that are summands."""
    embedding, output, block = "tok_embeddings.weight", "output.weight", plan.cp * plan.tp
    for rank, (steps, weights) in enumerate(ranks):
        if rank // block % plan.pp == 0:
            last_steps, last_weights = ranks[rank + (plan.pp - 1) * block]
            assert torch.equal(weights[embedding], last_weights.pop(output))
            for (*_, mine), (*_, theirs) in zip(steps, last_steps, strict=True):
                mine[embedding] += theirs.pop(output)


P = ParallelPlan
ALONE = [P(dp=2), P(tp=2), P(cp=2), P(pp=2), P(dp=4), P(tp=4), P(cp=4), P(pp=4)]
PAIRS = [P(dp=2, tp=2), P(dp=2, cp=2), P(dp=2, pp=2), P(tp=2, pp=2), P(cp=2, tp=2), P(dp=4, dp_replicate=2)]
TRIPLES = [P(dp=2, tp=2, pp=2), P(dp=2, cp=2, tp=2)]
SCHEDULES = [
    P(pp=2, schedule="gpipe", layers=(1, 3)),
    P(pp=2, schedule="1f1b", micro_batches=8, reshard="always"),
    P(pp=2, schedule="interleaved", virtual_stages=2),
    P(pp=2, schedule="interleaved", virtual_stages=2, micro_batches=8, contiguous=4),  # Llama 3's N
    P(pp=2, dp=2, schedule="interleaved", virtual_stages=2, micro_batches=4, contiguous=4, reshard="always"),
    P(pp=3, schedule="interleaved", virtual_stages=2, micro_batches=8, contiguous=4),
]


def name_of(plan):
    return "-".join(f"{k}={v}" for k, v in vars(plan).items() if v != getattr(P(), k))


@pytest.mark.parametrize("plan", ALONE + PAIRS + SCHEDULES, ids=name_of)
def test_a_divided_model_trains_as_one_process_does(plan):
    assert max(differences((plan, CONFIG))) < 1e-12


@pytest.mark.parametrize("contiguous", [4, 8])
def test_llama_3s_order_on_four_ranks(contiguous):
    model = LlamaConfig(**{**MODEL.to_dict(), "n_layers": 6})
    plan = P(pp=4, schedule="interleaved", virtual_stages=2, micro_batches=8, contiguous=contiguous)
    assert max(differences((plan, replace(CONFIG, model=model)))) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("plan", TRIPLES, ids=name_of)
def test_three_divisions_on_eight_ranks(plan):
    assert max(differences((plan, CONFIG))) < 1e-12


@pytest.mark.parametrize("plan", [P(cp=2, pp=2), P(dp=2, tp=2)], ids=name_of)
def test_without_documents_with_recomputation_in_parts(plan):
    config = replace(CONFIG, document_mask=False, recompute="full", accumulate=2)
    assert max(differences((plan, config))) < 1e-12


def test_a_recomputed_layer_sees_the_mask_of_its_own_micro_batch():
    assert max(differences((P(cp=2, pp=2, micro_batches=4), replace(CONFIG, recompute="selective")))) < 1e-12


TIED = [
    P(dp=2),
    P(tp=2),
    P(pp=2, tp=2),
    P(pp=2, dp=2),
    P(pp=3, layers=(1, 2, 1), micro_batches=4),
    P(pp=2, schedule="interleaved", virtual_stages=2),
]


def tied(config=CONFIG):
    return replace(config, model=LlamaConfig(**{**MODEL.to_dict(), "tie_embeddings": True}))


@pytest.mark.parametrize("plan", TIED, ids=name_of)
def test_a_tied_embedding_stays_tied(plan):
    config = tied()
    if plan.pp == 2 and plan.virtual_stages == 1:
        config = replace(config, accumulate=2)  # the copies are added up once, after all parts
    assert max(differences((plan, config))) < 1e-12


# Chunks of 24 tokens are no divisor of anything; the z-loss is large enough to change every gradient.
LOSS = replace(CONFIG, z_loss=0.01, loss_chunk=24)
LOSSES = {
    2: [(P(tp=2), replace(CONFIG, z_loss=0.01)), (P(tp=2), LOSS), (P(pp=2), LOSS), (P(cp=2), LOSS), (P(dp=2), LOSS)],
    4: [
        (P(tp=2, pp=2), replace(LOSS, accumulate=2)),
        (P(cp=2, tp=2), replace(LOSS, document_mask=False, recompute="full")),
        (P(dp=2, tp=2), replace(LOSS, recompute="selective")),
        (P(cp=2, pp=2, schedule="gpipe"), LOSS),
    ],
}


@pytest.mark.parametrize("world_size", LOSSES)
def test_z_loss_and_the_loss_in_chunks(world_size):
    assert max(differences(*LOSSES[world_size])) < 1e-12


def few(heads, config=CONFIG):
    return replace(config, model=LlamaConfig(**{**MODEL.to_dict(), "n_kv_heads": heads}))


SHARED = {
    2: [(P(tp=2), few(1))],
    4: [
        (P(tp=4), few(2)),
        (P(dp=2, tp=2), few(1, replace(CONFIG, recompute="full"))),
        (P(tp=2, pp=2), few(1, LOSS)),
        (P(cp=2, tp=2), few(1, replace(LOSS, recompute="selective", accumulate=2))),
    ],
    8: [(P(tp=8), few(2)), (P(dp=4, dp_replicate=2, tp=2), few(1))],
}


@pytest.mark.parametrize("world_size", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_fewer_key_value_heads_than_ranks(world_size):
    assert max(differences(*SHARED[world_size])) < 1e-12


def zero_bubble(**axes):
    return P(pp=2, schedule="zero-bubble", virtual_stages=2, **axes)


ZERO_BUBBLE = {
    2: [(zero_bubble(), few(1)), (zero_bubble(micro_batches=8), tied(LOSS))],
    4: [
        (zero_bubble(dp=2), CONFIG),
        (zero_bubble(dp=2), LOSS),
        (zero_bubble(cp=2), LOSS),
        (zero_bubble(tp=2), CONFIG),
        (zero_bubble(tp=2), tied()),
        (zero_bubble(tp=2, micro_batches=2), few(1, replace(LOSS, accumulate=2))),
    ],
    8: [(zero_bubble(cp=2, tp=2), LOSS)],
}


@pytest.mark.parametrize("world_size", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_the_zero_bubble_schedule(world_size):
    if splits_backward():
        assert max(differences(*ZERO_BUBBLE[world_size])) < 1e-12
        return
    for case in ZERO_BUBBLE[world_size]:
        with pytest.raises(RankError, match=r"needs torch 2\.13, and this is 2\.1[12]\..*: install torch 2\.13, or"):
            launch([case], torch.float64)


def test_float32():
    *numbers, weights = differences((P(dp=2, tp=2), CONFIG), (P(tp=4), few(2)), dtype=torch.float32)
    assert max(numbers) < 1e-5
    assert weights < 1e-3


BF16 = {
    2: [(P(dp=2), CONFIG), (P(tp=2), few(1, LOSS))],
    4: [(P(tp=2, pp=2), CONFIG), (P(tp=2, pp=2), LOSS)],
}


@pytest.mark.parametrize("world_size", BF16)
def test_bfloat16_beside_float32_sums(world_size):
    cases = [(plan, replace(config, precision="bf16")) for plan, config in BF16[world_size]]
    for (_, config), ranks in zip(cases, launch(cases, torch.float32), strict=True):
        steps, _ = reference(config.model, True, config.z_loss, torch.float32)
        true_loss, true_norm, true_gradients = steps[0]
        for rank_steps, weights in ranks:
            loss, norm, gradients = rank_steps[0]
            assert abs(loss - true_loss) < 0.01
            assert abs(norm / true_norm - 1) < 0.02
            error = sum((g - true_gradients[name]).square().sum() for name, g in gradients.items()).sqrt()
            assert error < 0.04 * true_norm
            assert all(t.dtype == torch.float32 for t in [*gradients.values(), *weights.values()])


def _misused():
    two = {name: ParallelPlan(**{name: 2}) for name in ("dp", "pp", "cp", "tp")}
    for made, asked in itertools.permutations(two, 2):
        with pytest.raises(UserError, match="make the mesh by build_mesh"):
            parallelize(Transformer(MODEL), build_mesh(two[made]), two[asked])
    model = parallelize(Transformer(MODEL), build_mesh(two["cp"]), two["cp"])
    with pytest.raises(ValueError, match="give its positions as well"):
        model(batch().tokens)


def test_a_mesh_of_another_plan_and_missing_positions_are_refused():
    run_ranks(_misused, 2)


COMPILED = [
    *[(P(dp=2), CONFIG), (P(cp=2), CONFIG), (P(pp=2), CONFIG), (P(tp=2), LOSS)],
    *[(P(dp=2, tp=2), few(1)), (P(cp=2, tp=2), CONFIG), (P(tp=2, pp=2), LOSS)],
    (P(dp=2, tp=2), replace(few(1), recompute="full")),
    (P(cp=2, tp=2), replace(CONFIG, recompute="selective")),
]


# Compiled before 2.13, attention in float64 has float32 sums, which its backward pass refuses.
EXACT = torch.float64 if torch.__version__ >= (2, 13) else torch.float32


def kept(recompute):
    """Bytes that one of two tensor-parallel ranks keeps for the backward pass."""
    plan, sizes = P(tp=2), {}
    model = parallelize(Transformer(MODEL), build_mesh(plan), plan, recompute=recompute, compile=True)

    def see(x):
        if not isinstance(x, torch.nn.Parameter):
            sizes[id(x)] = (x.nbytes, x)  # held, so that no other gets its id
        return x

    with torch.autograd.graph.saved_tensors_hooks(see, lambda x: x):
        model(batch().tokens)
    return sum(size for size, _ in sizes.values())


@pytest.mark.slow
def test_compiled_layers_give_the_same():
    """In a process of its own: the checks of shapes under pytest cannot be traced."""
    code = (
        "import sys; sys.path.insert(0, 'tests'); from dataclasses import replace; import test_parallel_parity as t\n"
        "for plan, config in t.COMPILED:\n"
        "    print(*t.differences((plan, replace(config, compile=True)), dtype=t.EXACT))\n"
        "print(*(t.run_ranks(t.kept, 2, how, timeout=300)[0] for how in ('none', 'selective', 'full')))"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    *differences, bytes_kept = done.stdout.splitlines()
    assert len(differences) == len(COMPILED)
    limits = [1e-12] * 4 if EXACT == torch.float64 else [1e-5] * 3 + [1e-3]
    for line in differences:
        assert all(float(x) < limit for x, limit in zip(line.split(), limits, strict=True)), line
    everything, selective, full = map(int, bytes_kept.split())
    assert full < 0.5 * selective < 0.5 * 0.95 * everything
