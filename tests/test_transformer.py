"""The whole network: agreement with transformers, starting values, ledger, formats, what is applied from outside."""

import copy
import inspect
import math
import platform
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from llama_edu.config import LlamaConfig, RopeScaling, forward_flops_per_token, parameter_counts
from llama_edu.generation.cache import KVCache
from llama_edu.model.manual import manual_backward
from llama_edu.model.rope import interleaved_to_half
from llama_edu.model.transformer import (
    Transformer,
    first_nonfinite,
    forward_flops_by_component,
    residual_stream,
)
from llama_edu.training.precision import bf16_products

BASE = {"dim": 64, "n_layers": 3, "n_heads": 8, "vocab_size": 300, "ffn_dim": 160, "max_seq_len": 256}
VARIANTS = {
    "mha": {},
    "gqa": {"n_kv_heads": 2},
    "mqa tied": {"n_kv_heads": 1, "tie_embeddings": True},
    "head_dim": {"n_kv_heads": 4, "head_dim": 24},
    "scaled rope": {"n_kv_heads": 2, "rope_scaling": RopeScaling(8.0, 1.0, 4.0, 64)},
    "all": {
        "n_kv_heads": 2,
        "head_dim": 6,
        "tie_embeddings": True,
        "rope_scaling": RopeScaling(32.0, 1.0, 4.0, 128),
        "norm_eps": 1e-6,
        "rope_theta": 1e4,
    },
}


def build(seed=0, **kwargs) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(LlamaConfig(**{**BASE, **kwargs}))


def ids(batch=2, seq=40, seed=0):
    return torch.randint(0, 300, (batch, seq), generator=torch.Generator().manual_seed(seed))


def as_hugging_face(model):
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM

    settings = {k: v for k, v in model.cfg.to_hf().items() if k not in ("architectures", "model_type")}
    theirs = LlamaForCausalLM(HFConfig(**settings)).eval()
    own, state = model.state_dict(), {}
    names = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    for old, new in zip(("q", "k", "v", "o"), ("q_proj", "k_proj", "v_proj", "o_proj")):
        names[f"attention.w{old}"] = f"self_attn.{new}"
    for old, new in zip(("1", "2", "3"), ("gate_proj", "down_proj", "up_proj")):
        names[f"feed_forward.w{old}"] = f"mlp.{new}"
    state["model.embed_tokens.weight"] = own["tok_embeddings.weight"]
    state["model.norm.weight"] = own["norm.weight"]
    state["lm_head.weight"] = own["output.weight"]
    for i in range(model.cfg.n_layers):
        for ours, new in names.items():
            w = own[f"layers.{i}.{ours}.weight"]
            if ours.endswith(("wq", "wk")):
                w = interleaved_to_half(w, w.shape[0] // model.cfg.head_dim)
            state[f"model.layers.{i}.{new}.weight"] = w
    theirs.load_state_dict(state)
    return theirs


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_of_transformers(variant):
    model = build(**VARIANTS[variant])
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.uniform_(0.5, 1.5)
        tokens = ids(seq=200)
        difference = (model(tokens) - as_hugging_face(model)(tokens).logits).abs().max()
    assert difference < 1e-5


@pytest.mark.parametrize("variant", ["gqa", "mqa tied"])
def test_gradients_equal_those_of_transformers(variant):
    model = build(**VARIANTS[variant])
    theirs, tokens = as_hugging_face(model), ids()
    for logits in (model(tokens), theirs(tokens).logits):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    pairs = [
        (model.tok_embeddings.weight, theirs.model.embed_tokens.weight),
        (model.layers["1"].feed_forward.w2.weight, theirs.model.layers[1].mlp.down_proj.weight),
        (model.layers["0"].attention.wv.weight, theirs.model.layers[0].self_attn.v_proj.weight),
        (model.layers["2"].attention_norm.weight, theirs.model.layers[2].input_layernorm.weight),
    ]
    for ours, other in pairs:
        torch.testing.assert_close(ours.grad, other.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", LlamaConfig.preset_names())
def test_every_preset_builds_without_memory_at_its_exact_size(name):
    with torch.device("meta"):
        model = Transformer(LlamaConfig.preset(name))
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == model.cfg.num_parameters()
    counts = dict.fromkeys(parameter_counts(model.cfg), 0)
    for path, p in model.named_parameters():
        part = path.split(".")[2] if path.startswith("layers.") else path.split(".")[0]
        counts["norms" if part.endswith("norm") else part] += p.numel()
    assert counts == parameter_counts(model.cfg)


@pytest.mark.parametrize("name", LlamaConfig.preset_names())
def test_flops_by_component_add_up(name):
    cfg = LlamaConfig.preset(name)
    assert sum(forward_flops_by_component(cfg, 4096).values()) == forward_flops_per_token(cfg, 4096)


def test_a_model_from_the_meta_device_computes_like_any_other():
    reference = build(n_kv_heads=2)
    with torch.device("meta"):
        model = Transformer(reference.cfg)
    model.to_empty(device="cpu")
    model.load_state_dict(reference.state_dict())
    torch.testing.assert_close(model(ids()), reference(ids()), rtol=0, atol=0)
    torch.manual_seed(5)
    model.init_weights()
    assert first_nonfinite(model, ids()) is None


def test_a_tied_model_from_the_meta_device_stays_tied():
    with torch.device("meta"):
        model = Transformer(LlamaConfig(**BASE, tie_embeddings=True))
    model.to_empty(device="cpu")
    model.init_weights()
    assert model.output.weight is model.tok_embeddings.weight
    assert sum(p.numel() for p in model.parameters()) == model.cfg.num_parameters()


def test_starting_values_repeat_and_have_the_stated_size():
    a, b = build(seed=3), build(seed=3)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    a.init_weights(torch.Generator().manual_seed(1))
    b.init_weights(torch.Generator().manual_seed(1))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert abs(a.layers["0"].attention.wq.weight.std() * 64**0.5 - 1) < 0.05
    assert abs(a.layers["2"].feed_forward.w2.weight.std() * (160 * 6) ** 0.5 - 1) < 0.05


def test_the_loss_starts_at_log_vocabulary_and_a_half():
    tokens = ids(8, 100)
    logits = build()(tokens)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()
    assert abs(loss - math.log(300) - 0.5) < 0.15


def test_packed_documents_equal_separate_runs():
    model, tokens = build(n_kv_heads=2), ids(1, 30)
    documents = torch.tensor([[4] * 11 + [0] * 12 + [9] * 7])
    restarting = torch.cat([torch.arange(n) for n in (11, 12, 7)])[None]
    for positions in (None, restarting):
        packed = model(tokens, document_ids=documents, positions=positions)
        for i in (4, 0, 9):
            own = documents[0] == i
            torch.testing.assert_close(packed[:, own], model(tokens[:, own]), atol=1e-5, rtol=0)


def test_positions_may_be_given_and_only_distances_matter():
    model, tokens = build(), ids(seq=20)
    positions = torch.arange(20)[None]
    assert torch.equal(model(tokens, positions=positions), model(tokens))
    torch.testing.assert_close(model(tokens, positions=positions + 100), model(tokens), atol=2e-5, rtol=0)


@pytest.mark.parametrize("pieces", [[20], [1] * 20, [7, 1, 1, 11]])
def test_pieces_through_a_cache_equal_one_pass(pieces):
    model, tokens = build(n_kv_heads=2).eval(), ids(seq=20)
    cache = KVCache(model.cfg, batch_size=2, max_seq_len=20)
    with torch.no_grad():
        logits = torch.cat([model(part, cache=cache) for part in tokens.split(pieces, dim=1)], dim=1)
        torch.testing.assert_close(logits, model(tokens), atol=1e-5, rtol=0)


def test_bad_calls_are_refused_in_a_sentence():
    model = build(max_seq_len=16)
    with pytest.raises(ValueError, match="the sequence has 17 tokens, max_seq_len of the model is 16"):
        model(ids(seq=17))
    with pytest.raises(ValueError, match="document_ids and a cache"):
        cache = KVCache(model.cfg, batch_size=2, max_seq_len=16)
        model(ids(seq=4), cache=cache, document_ids=torch.zeros(2, 4, dtype=torch.int64))


def test_a_position_past_the_context_is_refused_in_a_sentence():
    model = build(max_seq_len=16)
    cache = KVCache(model.cfg, batch_size=2, max_seq_len=40)
    with torch.no_grad():
        model(ids(seq=14), cache=cache)
        with pytest.raises(ValueError, match="positions 14 to 18; max_seq_len of the model is 16: "):
            model(ids(seq=5), cache=cache)
        assert cache.lengths.tolist() == [14, 14]
        model(ids(seq=2), cache=cache)
        with pytest.raises(ValueError, match="positions 3 to 16"):
            model(ids(seq=2), positions=torch.tensor([[3, 16]]))


@pytest.mark.parametrize(
    "tokens, kwargs, sentence",
    [
        ([1, 2, 3], {}, r"reads \(batch, seq\), got the shape \(3,\); x\[None\] is a batch of one"),
        ([[1, 2, 50]], {}, "token ids from 1 to 50; the model has 50, from 0"),
        ([[-1, 2, 3]], {}, "token ids from -1 to 3; the model has 50"),
        ([[1, 2, 3]], {"document_ids": torch.zeros(1, 2, dtype=torch.int64)}, r"\(1, 2\) document_ids for \(1, 3\)"),
    ],
)
def test_tokens_that_are_none_of_the_model_are_refused_in_a_sentence(tokens, kwargs, sentence):
    model = Transformer(LlamaConfig(dim=16, n_layers=1, n_heads=2, vocab_size=50))
    unchecked = inspect.unwrap(Transformer.hidden)  # tests check annotated shapes, a program does not
    with pytest.raises(ValueError, match=sentence):
        unchecked(model, torch.tensor(tokens), **kwargs)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_no_sequences_and_no_tokens_have_as_many_logits(shape):
    model = Transformer(LlamaConfig(dim=16, n_layers=1, n_heads=2, vocab_size=50))
    assert model(torch.zeros(shape, dtype=torch.int64)).shape == (*shape, 50)


def test_second_derivatives_and_torch_func_without_the_passes_by_hand():
    model = Transformer(LlamaConfig(dim=16, n_layers=1, n_heads=2, vocab_size=50)).double()
    tokens, weights = torch.arange(6).view(2, 3), {name: p.detach() for name, p in model.named_parameters()}
    loss = lambda weights, tokens: torch.func.functional_call(model, weights, (tokens,)).square().mean()
    with manual_backward(False):
        each = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, tokens[:, None])
        mean = torch.func.grad(loss)(weights, tokens)
        for name, g in each.items():
            torch.testing.assert_close(g.mean(0), mean[name])
        with sdpa_kernel(SDPBackend.MATH):
            _, slope = torch.func.jvp(lambda w: loss(w, tokens), (weights,), (mean,))
            torch.testing.assert_close(slope, sum(g.square().sum() for g in mean.values()))
            gradients = torch.autograd.grad(model(tokens).square().mean(), list(model.parameters()), create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in gradients), list(model.parameters()))
    step = 1e-6 * torch.ones_like(weights["norm.weight"])
    size = lambda w: sum(g.square().sum() for g in torch.func.grad(loss)(w, tokens).values())
    with manual_backward(False):
        up, down = (size({**weights, "norm.weight": weights["norm.weight"] + s}) for s in (step, -step))
    place = [name for name, _ in model.named_parameters()].index("norm.weight")
    torch.testing.assert_close(second[place].sum(), (up - down) / 2e-6, rtol=1e-6, atol=0)


def test_stages_of_a_pipeline_compute_the_whole():
    model, tokens = build(n_kv_heads=2), ids()
    first, last = copy.deepcopy(model), copy.deepcopy(model)
    first.norm = first.output = None
    last.tok_embeddings = None
    for i in ("1", "2"):
        del first.layers[i]
    del last.layers["0"]
    torch.testing.assert_close(last(first(tokens)), model(tokens), rtol=0, atol=0)
    assert set(last.state_dict()) | set(first.state_dict()) == set(model.state_dict())


def test_half_precision_keeps_float32_angles_and_logits():
    model = build(n_kv_heads=2)
    exact = copy.deepcopy(model).double()(ids())
    for dtype, tolerance in ((torch.bfloat16, 0.1), (torch.float16, 0.02)):
        half = copy.deepcopy(model).to(dtype)
        assert half.rope_cos.dtype == torch.float32 and torch.equal(half.rope_sin, model.rope_sin)
        assert half(ids()).dtype == torch.float32
        assert (half(ids()) - exact).square().mean().sqrt() < tolerance
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(ids())
    assert mixed.dtype == torch.float32 and (mixed - exact).square().mean().sqrt() < 0.1


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "autocast", "bf16 stream"])
@pytest.mark.parametrize("tile", [64, 300])
def test_logits_of_many_positions_are_those_with_gradients(kind, tile, monkeypatch):
    """Without gradients they are widened a tile at a time."""
    monkeypatch.setattr("llama_edu.model.transformer._TILE", tile)
    model = build(n_kv_heads=2)
    if kind == "bf16 stream":
        bf16_products(model, torch.optim.SGD(model.parameters()))
    elif kind != "autocast":
        model.to(getattr(torch, kind))
    tokens = torch.randint(300, (5, 211), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "autocast"):
        hidden = model.hidden(tokens).detach()
        with_gradients = model._logits(hidden)
        with torch.no_grad():
            assert (model._narrow_matrix(hidden) is not None) == (kind != "float32")
            without = model._logits(hidden)
    assert with_gradients.requires_grad and not without.requires_grad
    assert without.dtype == torch.float32 and without.shape == (5, 211, 300)
    torch.testing.assert_close(without, with_gradients.detach(), rtol=2**-7, atol=1e-3)
    seen = []
    model.output.register_forward_hook(lambda module, args, out: seen.append((args[0].shape, out.shape)))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "autocast"):
        watched = model._logits(hidden)
    assert seen == [((5, 211, 64), (5, 211, 300))]  # whoever looks on sees all of it once
    torch.testing.assert_close(watched, without, rtol=2**-7, atol=1e-3)


def test_a_pass_under_autocast_rounds_the_output_matrix_once(monkeypatch):
    """It is the largest of all. Asked with it for the dtype of a product, autocast made a copy of its own."""
    monkeypatch.setattr("llama_edu.model.transformer._TILE", 64)
    model, rounded = build(), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op is torch.ops.aten._to_copy.default and args[0].shape == model.output.weight.shape:
                rounded.append(kwargs["dtype"])
            return op(*args, **(kwargs or {}))

    tokens = torch.randint(300, (5, 211), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), Watch():
        model(tokens)
    assert rounded == [torch.bfloat16]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what becomes of freed memory is glibc's affair")
def test_the_memory_of_a_pass_is_there_for_the_next():
    code = f"""
import resource, statistics, torch
from llama_edu import LlamaConfig, Transformer
model = Transformer(LlamaConfig(**{BASE | {"dim": 288, "ffn_dim": 768, "max_seq_len": 512}}))
tokens, faults = torch.zeros(4, 512, dtype=torch.long), [0]
for _ in range(12):
    with torch.no_grad():
        model(tokens)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(statistics.median(b - a for a, b in zip(faults[4:], faults[5:])))
"""
    pages = float(subprocess.check_output([sys.executable, "-c", code], text=True))
    assert pages < 700  # new ones in a pass; a single tensor of the feed-forward layer has 1536


def test_by_hand_and_by_autograd_give_the_same_gradients():
    model = build(n_kv_heads=2).double()
    tokens, found = ids(), []
    for manual in (False, True):
        model.zero_grad()
        with manual_backward(manual):
            loss = model.hidden(tokens).pow(3).sum()  # float64 throughout: the logits would be float32
        loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


def test_activation_checkpointing_from_outside_changes_nothing():
    model, tokens = build(n_kv_heads=2), ids()
    model(tokens).square().mean().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for layer in model.layers.values():
        layer.forward = lambda *args, run=layer.forward: checkpoint(run, *args, use_reentrant=False)
    model(tokens).square().mean().backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected, rtol=0, atol=0)


def test_the_residual_stream_is_a_sum_of_what_the_layers_write():
    model, tokens = build(), ids()
    states = residual_stream(model, tokens)
    assert states.shape == (4, 2, 40, 64)
    assert torch.equal(states[0], model.tok_embeddings(tokens))
    assert torch.equal(model.norm(states[-1]), model.hidden(tokens))
    assert not any(m._forward_hooks for m in model.modules())


def test_the_first_overflow_is_named():
    model, tokens = build(), ids()
    assert first_nonfinite(model, tokens) is None
    with torch.no_grad():
        model.layers["1"].feed_forward.w1.weight *= 200
        model.layers["1"].feed_forward.w3.weight *= 200
    assert first_nonfinite(copy.deepcopy(model).half(), tokens) == "input of layers.1.feed_forward.w2"
    assert first_nonfinite(copy.deepcopy(model).bfloat16(), tokens) is None
    with torch.no_grad():
        model.layers["1"].attention.wv.weight.fill_(6e4)
    assert first_nonfinite(model.half(), tokens) == "output of layers.1.attention.wv"
    with torch.no_grad():
        model.layers["2"].ffn_norm.weight[3] = math.nan
    assert first_nonfinite(model, tokens) == "parameter layers.2.ffn_norm.weight"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


COMPILE = """
import torch
from llama_edu import LlamaConfig, Transformer
model = Transformer(LlamaConfig(dim=64, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=300, max_seq_len=64))
tokens, found = torch.randint(0, 300, (2, 40)), []
documents = torch.arange(40).div(15, rounding_mode="floor").expand(2, -1)
for run in (model, torch.compile(model, fullgraph=True)):
    model.zero_grad()
    logits = run(tokens, document_ids=documents)
    logits.square().mean().backward()
    found.append([logits, *(p.grad.clone() for p in model.parameters())])
torch.testing.assert_close(*found, atol=1e-5, rtol=1e-3)
"""


@pytest.mark.slow
def test_the_model_compiles_as_one_graph():
    # In a process of its own: the type checks of the test run are nothing that torch.compile can trace.
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
