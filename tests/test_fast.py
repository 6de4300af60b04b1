"""The fast decoder: both engines give what the plain `generate` gives."""

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from llama_edu import LlamaConfig, Transformer, generate
from llama_edu.errors import UserError
from llama_edu.generation import fast, kernels
from llama_edu.generation.decode import NonFiniteLogits
from llama_edu.generation.fast import FastDecoder, FusedWeights, fast_generate
from llama_edu.generation.kernels import prepare_rows, product_rows
from llama_edu.generation.quantize import Packed, quantize
from llama_edu.generation.speculative import speculate

SHAPE = dict(dim=48, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=80, vocab_size=101, max_seq_len=64)
PROMPTS = [[1, 2, 3, 4, 5], [7], [9, 8, 7]]


def model(factor=2.0, **changes) -> Transformer:
    torch.manual_seed(0)
    m = Transformer(LlamaConfig(**{**SHAPE, **changes}))
    with torch.no_grad():
        for p in m.parameters():
            p.mul_(factor if p.dim() == 2 else 1)
    return m


def in_bytes(x):
    """Vectors as the dot product of bytes takes them: each 32 numbers in 127 steps of the largest."""
    groups = x.double().unflatten(-1, (-1, 32))
    steps = groups.abs().amax(-1, keepdim=True) / 127
    return ((groups / steps.clamp_min(1e-300)).round() * steps).flatten(-2)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("n", [1, 2, 3, 6, 8, 13])
def test_the_product_is_that_of_the_dense_weights(kind, n):
    torch.manual_seed(n)
    packed, x = Packed.of(torch.randn(11, 96), kind), torch.randn(16, 96) * torch.logspace(-3, 3, 16)[:, None]
    x[:, 32:64] *= 100
    x[2] = 0
    out, memory = np.zeros((16, 11), np.float32), np.zeros(16 * 96, np.float32)
    prepare_rows(fast._arrays(packed)[0], x.numpy(), memory, n)
    product_rows(*fast._arrays(packed), x.numpy(), memory, out, 1, 10, n)
    if kernels._dots(kind) == "int8":
        x = in_bytes(x)
    elif kernels._dots(kind) == "bfloat16":
        x = x.bfloat16()
    exact = (x.double() @ packed.dense().double().T).numpy()
    size = x.double().norm(dim=1)[:n, None].numpy()
    np.testing.assert_allclose(out[:n, 1:10] / (size + 1e-9), exact[:n, 1:10] / (size + 1e-9), rtol=1e-5, atol=1e-5)
    assert (out[:, [0, 10]] == 0).all() and (out[n:] == 0).all()


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so(kind, wrong):
    packed, x = Packed.of(torch.randn(3, 64), kind), torch.randn(1, 64)
    x[0, 5] = wrong
    out, memory = np.zeros((1, 3), np.float32), np.zeros(64, np.float32)
    prepare_rows(fast._arrays(packed)[0], x.numpy(), memory, 1)
    product_rows(*fast._arrays(packed), x.numpy(), memory, out, 0, 3, 1)
    assert not np.isfinite(out).any()


def test_products_are_right_on_a_processor_that_is_asked_for_less():
    """Machine code for any x86-64 or ARM processor: no dot product of short numbers, nothing that it cannot run."""
    source = """
import numpy as np, torch
from llama_edu.generation import fast, kernels
from llama_edu.generation.quantize import Packed
for kind in ("bfloat16", "int8", "int4"):
    assert kernels._dots(kind) is None
    packed, x = Packed.of(torch.randn(11, 96), kind), torch.randn(16, 96)
    out, memory = np.zeros((16, 11), np.float32), np.zeros(16 * 96, np.float32)
    kernels.prepare_rows(fast._arrays(packed)[0], x.numpy(), memory, 16)
    kernels.product_rows(*fast._arrays(packed), x.numpy(), memory, out, 0, 11, 16)
    np.testing.assert_allclose(out, (x.double() @ packed.dense().double().T).numpy(), rtol=1e-5, atol=1e-4)
"""
    env = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_sixteen_sequences_in_bfloat16_are_as_close_to_exact_arithmetic_as_the_plain_model():
    m = model(1.0).to(torch.bfloat16)
    text = torch.randint(0, 101, (16, 30), generator=torch.Generator().manual_seed(1))
    decoder = FastDecoder(m, batch_size=16)
    decoder.prefill(text[:, :10].tolist())
    ours = torch.stack([decoder.step(text[:, i].tolist()).clone() for i in range(10, 30)], dim=1)
    with torch.no_grad():
        plain, exact = m(text)[:, 10:], m.float()(text)[:, 10:]
    assert (ours - exact).norm() < (plain - exact).norm()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    "changes", [{}, {"tie_embeddings": True, "dim": 64}, {"n_heads": 8, "n_kv_heads": 1, "head_dim": 10}]
)
def test_float32_ids_are_those_of_generate(threads, changes):
    m = model(**changes)
    decoder = FastDecoder(m, batch_size=3, threads=threads)
    for options in (
        {},
        dict(temperature=0.9, top_k=30, top_p=0.9, min_p=0.01, seed=3),
        dict(stop_ids=(generate(m, PROMPTS, max_new_tokens=6)[0][5],)),
    ):
        assert decoder.generate(PROMPTS, max_new_tokens=20, **options) == generate(
            m, PROMPTS, max_new_tokens=20, **options
        )
    assert decoder.generate([[5, 6]], max_new_tokens=9) == generate(m, [[5, 6]], max_new_tokens=9)  # again, smaller
    stream = decoder.generate(PROMPTS, max_new_tokens=4, stream=True)
    assert list(stream) == list(generate(m, PROMPTS, max_new_tokens=4, stream=True))


def test_sixteen_sequences_and_the_whole_context():
    m = model()
    prompts = [[i + 1] * (1 + i % 5) for i in range(16)]
    assert fast_generate(m, prompts, max_new_tokens=30) == generate(m, prompts, max_new_tokens=30)
    longest = [[3] * 10]
    assert fast_generate(m, longest, max_new_tokens=54) == generate(m, longest, max_new_tokens=54)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_weights_may_be_quantised_before_or_by_the_decoder(kind):
    m = model()
    q = quantize(m, kind)
    a, b = FastDecoder(q), FastDecoder(m, weights=kind)
    prompt = [4, 9, 2]
    with torch.no_grad():
        exact = q(torch.tensor([[*prompt, 5]]))[0]
    for decoder in (a, b):
        first = decoder.prefill([prompt])
        torch.testing.assert_close(first[0], exact[2], rtol=0, atol=0.05 * float(exact.std()))  # its cache is bfloat16
        most = 0.1 if kernels._dots(kind) else 0.05  # activations in bytes
        torch.testing.assert_close(decoder.step([5])[0], exact[3], rtol=0, atol=most * float(exact.std()))


def test_bfloat16_is_closer_to_exact_arithmetic_than_the_plain_model():
    m = model(1.0).to(torch.bfloat16)
    text = torch.randint(0, 101, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    decoder = FastDecoder(m)
    decoder.prefill([text[:10]])
    ours = torch.cat([decoder.step([t]).clone() for t in text[10:]])
    with torch.no_grad():
        plain, exact = m(torch.tensor([text]))[0, 10:], m.float()(torch.tensor([text]))[0, 10:]
    assert (ours - exact).abs().max() < 0.05 * exact.std()
    assert (ours - exact).norm() < (plain - exact).norm()


def test_extend_reads_several_tokens_and_truncate_forgets_them():
    m = model()
    decoder = FastDecoder(m, batch_size=2)
    decoder.prefill([[1, 2], [3]])
    tokens = list(range(10, 31))
    with torch.no_grad():
        exact = m(torch.tensor([[3, *tokens]]))[0, 1:]
    torch.testing.assert_close(decoder.extend(tokens, slot=1), exact, rtol=1e-3, atol=1e-3)
    decoder.truncate(6, slot=1)
    torch.testing.assert_close(decoder.step([15], [1])[0], exact[5], rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="slot 0 holds 2 tokens and cannot be cut to 3"):
        decoder.truncate(3)


def test_speculation_with_decoders_gives_the_ids_of_the_target():
    m, draft = model(), model(1.5, n_layers=1)
    for prompt in ([4], [1, 2, 3]):
        result = speculate(FastDecoder(m), FastDecoder(draft), prompt, max_new_tokens=20)
        assert result.ids == generate(m, [prompt], max_new_tokens=20)[0]


def test_helpers_end_with_their_decoder():
    before = {t for t in threading.enumerate() if t.name == "decode"}
    decoder = FastDecoder(model(), threads=3)
    decoder.step([1])
    ours = {t for t in threading.enumerate() if t.name == "decode"} - before
    assert len(ours) == 2
    del decoder
    gc.collect()
    end = time.monotonic() + 20
    while any(t.is_alive() for t in ours) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(t.is_alive() for t in ours)


def test_the_weights_are_read_once_each():
    m = model(dim=64, ffn_dim=128, tie_embeddings=True)
    w = FusedWeights(m)
    table = m.tok_embeddings.weight.numel()
    matrices = table + sum(p.numel() for name, p in m.layers.named_parameters() if p.dim() == 2)
    assert w.nbytes == 4 * matrices
    assert w.embedding.data_ptr() == w.output.values.data_ptr()
    assert FusedWeights(m, "int8").nbytes < 0.3 * w.nbytes


def test_what_cannot_work_is_refused_with_a_sentence(monkeypatch):
    m = model()
    with pytest.raises(UserError, match="a decoder for 1 sequences of 65 tokens"):
        FastDecoder(m, max_seq_len=65)
    with pytest.raises(UserError, match="engine is 'magic'"):
        FastDecoder(m, engine="magic")
    with pytest.raises(UserError, match="this model mixes several"):
        FastDecoder(quantize(model(n_layers=3), "fp8"), engine="kernels")
    with pytest.raises(ValueError, match="this decoder has room for 1 of 64"):
        FastDecoder(m).generate(PROMPTS, max_new_tokens=2)
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        fast_generate(m, [[]], max_new_tokens=2)
    with pytest.raises(ValueError, match="temperature is -1"):
        fast_generate(m, [[1]], max_new_tokens=2, temperature=-1.0)
    decoder = FastDecoder(m, max_seq_len=1)
    decoder.step([1])
    with pytest.raises(ValueError, match="slot 0 is full"):
        decoder.step([1])
    with torch.no_grad():
        m.layers["1"].feed_forward.w2.weight[3, 5] = torch.nan
    with pytest.raises(NonFiniteLogits, match="row 0"):
        fast_generate(m, [[1, 2]], max_new_tokens=3)
    assert fast_generate(m, [], max_new_tokens=3) == []
    monkeypatch.setattr(fast, "_compiler", lambda: None)
    with pytest.warns(UserWarning, match="finds none: the kernels decode instead"):
        assert FastDecoder(model(), engine="compiled").engine == "kernels"


@pytest.mark.parametrize(
    "tokens, slots, sentence",
    [
        ([101, 2], None, "token id 101; the model has 101, from 0"),
        ([2, -1], None, "token id -1; the model has 101"),
        ([10**9], None, "token id 1000000000; the model has 101"),
        ([1, 2], [0, 2], "slot 2; the decoder has 2, from 0"),
        ([1], [-1], "slot -1; the decoder has 2"),
        ([1, 2], [0], "2 tokens for 1 slots"),
        ([1] * 9, [0] * 9, "9 tokens in one step; this decoder takes 8"),
    ],
)
def test_a_step_that_cannot_be_is_refused_and_nothing_is_read(tokens, slots, sentence):
    """The kernels take addresses: an id that there is not would be read from elsewhere."""
    decoder = FastDecoder(model(), batch_size=2, weights="float32")
    before = decoder.prefill(PROMPTS[:2]).clone()
    with pytest.raises(ValueError, match=sentence):
        decoder.step(tokens, slots)
    assert decoder.lengths.tolist() == [5, 1]
    again = FastDecoder(model(), batch_size=2, weights="float32")
    assert torch.equal(again.prefill(PROMPTS[:2]), before)
    assert torch.equal(decoder.step([3, 4]), again.step([3, 4]))


def test_a_nan_that_appears_while_decoding_is_found():
    m = model()
    with torch.no_grad():
        m.tok_embeddings.weight[:] = 0.1
        m.tok_embeddings.weight[50] = torch.nan
    decoder = FastDecoder(m)
    decoder.step([50])
    assert decoder._run.likeliest(1)[1] is False
    decoder.truncate(0)
    decoder.step([3])
    assert decoder._run.likeliest(1)[1] is True


def test_one_text_at_a_time():
    m = model()
    decoder = FastDecoder(m)
    first, second = (decoder.generate([p], max_new_tokens=6, stream=True) for p in ([1, 2, 3], [9, 8]))
    assert next(first)[1] == generate(m, [[1, 2, 3]], max_new_tokens=1)[0][0]
    assert [token for _, token in second] == generate(m, [[9, 8]], max_new_tokens=6)[0]
    with pytest.raises(RuntimeError, match="begun another text in between: make a decoder for each"):
        next(first)


@pytest.mark.parametrize("threads", [1, 2])
def test_python_threads_that_share_a_decoder_get_their_text_or_a_sentence(threads):
    m = model()
    decoder, prompts = FastDecoder(m, threads=threads), [[1, 2, 3], [9, 8], [5]]
    expected = [generate(m, [p], max_new_tokens=12)[0] for p in prompts]
    outcomes = [[], [], []]

    def write(i):
        for _ in range(60):
            try:
                outcomes[i].append(decoder.generate([prompts[i]], max_new_tokens=12)[0])
            except RuntimeError as error:
                outcomes[i].append(str(error))

    callers = [threading.Thread(target=write, args=(i,)) for i in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for outcome, text in zip(outcomes, expected):
        assert len(outcome) == 60 and all(x == text or "begun another text" in x for x in outcome)


def test_a_decoder_is_not_copied():
    decoder = FastDecoder(model())
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="make another one instead of a copy"):
            copied(decoder)


def test_a_thread_that_the_system_refuses_leaves_nobody_waiting(monkeypatch):
    m, start, started = model(), threading.Thread.start, []
    decoder = FastDecoder(m, threads=3)

    def second_fails(thread):
        started.append(thread)
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", second_fails)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        decoder.generate([[1, 2]], max_new_tokens=3)
    started[0].join(timeout=60)
    assert not started[0].is_alive()
    monkeypatch.undo()
    assert decoder.generate([[1, 2]], max_new_tokens=3) == generate(m, [[1, 2]], max_new_tokens=3)


@pytest.mark.parametrize("tied", [False, True])
def test_later_changes_of_the_model_do_not_reach_the_decoder(tied):
    m = model(tie_embeddings=tied)
    decoder = FastDecoder(m)
    before = decoder.prefill([[1, 2, 3]]).clone()
    with torch.no_grad():
        for p in m.parameters():
            p.mul_(-3)
    assert torch.equal(decoder.prefill([[1, 2, 3]]), before)


REFUSED = {
    "no prompts": ([], "0 prompts"),
    "more prompts than slots": ([[1], [2], [3]], "3 prompts of up to 1 tokens: .* room for 2"),
    "a long prompt": ([[1] * 21], "1 prompts of up to 21 tokens: .* of 20"),
    "an empty prompt": ([[1, 2], []], "prompt 1 is empty"),
    "a negative id": ([[1], [-1]], "prompt 1 holds the id -1"),
    "an id beyond the vocabulary": ([[101]], "prompt 0 holds the id 101"),
}


@pytest.mark.parametrize(("prompts", "words"), REFUSED.values(), ids=REFUSED)
def test_prompts_that_cannot_be_read_leave_the_decoder_as_it_was(prompts, words):
    decoder = FastDecoder(model(), batch_size=2, max_seq_len=20)
    decoder.prefill([[1, 2], [3]])
    with pytest.raises(ValueError, match=words):
        decoder.prefill(prompts)
    assert decoder.lengths.tolist() == [2, 1]


def test_steps_of_nothing_and_of_no_numbers():
    decoder = FastDecoder(model())
    decoder.prefill([[1, 2]])
    assert decoder.step([]).shape == decoder.extend([]).shape == (0, 101)
    for wrong in ([1.7], torch.tensor([1.0]), torch.tensor([[1]])):
        with pytest.raises(TypeError):
            decoder.step(wrong)
    with pytest.raises(ValueError, match="slot 5; the decoder has 1"):
        decoder.truncate(0, slot=5)
    with pytest.raises(UserError, match="threads is -1"):
        FastDecoder(model(), threads=-1)
    assert fast_generate(model(), [], max_new_tokens=100) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_is_another_matter(dtype):
    m = model()
    expected, before = generate(m, [[1, 2, 3]], max_new_tokens=5), torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        assert fast_generate(m, [[1, 2, 3]], max_new_tokens=5) == expected
    finally:
        torch.set_default_dtype(before)


def test_weights_of_a_quantised_model_are_what_they_are():
    small = quantize(model(), "int8")
    assert FastDecoder(small, weights="int8").weights.blocks["o"].kind == "int8"
    with pytest.raises(UserError, match="weights is 'int4', and the model is quantised to int8"):
        FastDecoder(small, weights="int4")


COMPILED = """
import torch
from llama_edu import LlamaConfig, Transformer, generate
from llama_edu.generation.fast import FastDecoder
from llama_edu.generation.quantize import quantize

torch.manual_seed(0)
device = DEVICE
model = Transformer(LlamaConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=64, vocab_size=50, max_seq_len=32))
with torch.no_grad():
    for p in model.parameters():
        p.mul_(2 if p.dim() == 2 else 1)
model = model.to(device)
decoder = FastDecoder(model, engine="compiled")
for prompt in ([1, 2, 3], [7]):
    assert decoder.generate([prompt], max_new_tokens=12) == generate(model, [prompt], max_new_tokens=12)
torch._dynamo.config.recompile_limit = 1  # that of all decoders together is eight
prompts = [[1, 2, 3], [7], [4, 5]]
expected = generate(model, prompts, max_new_tokens=12)
decoder = FastDecoder(model, engine="compiled", batch_size=3)
assert decoder.generate(prompts, max_new_tokens=12) == expected
decoder.prefill(prompts)
for slots in ([0, 1, 2], [2, 0], [1]):
    logits = decoder.step([9] * len(slots), slots)
    for row, slot in zip(logits, slots):
        prompts[slot] = [*prompts[slot], 9]
        plain = model(torch.tensor([prompts[slot]], device=device))[0, -1]
        torch.testing.assert_close(row, plain, rtol=1e-4, atol=1e-4)
if device == "cuda":
    half = FastDecoder(quantize(model.to(torch.bfloat16), "fp8"), max_seq_len=32)
    assert len(half.generate([[1, 2, 3]], max_new_tokens=8)[0]) == 8
print("the same ids")
"""


def run_apart(device: str) -> str:
    """The checks of annotations while tests run make a model untraceable: a fresh process has none."""
    source = COMPILED.replace("DEVICE", repr(device))
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(fast._compiler() is None, reason="torch.compile needs a C++ compiler")
def test_the_compiled_engine_gives_the_ids_of_generate():
    assert "the same ids" in run_apart("cpu")


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_compiled_engine_on_a_gpu():
    assert "the same ids" in run_apart("cuda")
