"""What a user of constrained decoding relies on: whatever the model wants, the text is JSON, and complete in time."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_edu import LlamaConfig, Transformer, generate
from llama_edu.generation import ContinuousBatcher, JSONConstraint, Sampler
from llama_edu.generation.grammar import JSONState, bytes_to_close, is_complete, json_run, json_step, token_bytes
from llama_edu.tokenizer import BPETokenizer, SentencePieceTokenizer
from tests.bytes_tokenizer import BytesTokenizer

TEXTS = [
    '{"name": "Łódź", "born": [1850, 2.5e-3, -1, true, null, false]}, {"a": {"b": "x\\n\\u00e9"}}\n',
    "naïve 東京",
] * 8
END = "<|end_of_text|>"


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer.train(TEXTS, 330, special_tokens=[END])


@pytest.fixture(scope="module")
def sentencepiece():
    return SentencePieceTokenizer.train(TEXTS * 4, 330)


def accepts(data: bytes) -> bool:
    state = json_run(JSONState("value"), data)
    return state is not None and is_complete(state)


def reads(data: bytes) -> bool:
    def refuse(name):
        raise ValueError(name)  # NaN and Infinity are Python's, not JSON's

    try:
        json.loads(data.decode(), parse_constant=refuse)
        return True
    except ValueError:
        return False


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**14), 10**14) | st.text(max_size=8) | st.floats(1e-9, 1e9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@given(value=values, ascii_only=st.booleans(), indent=st.sampled_from([None, 0, 2]))
def test_accepts_what_python_writes(value, ascii_only, indent):
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    if ascii_only and any(ord(c) > 0xFFFF for c in json.dumps(value, ensure_ascii=False)):
        return  # written as two halves of a pair, which the grammar refuses
    assert accepts(text.encode())


@settings(max_examples=300)
@given(value=values, data=st.data())
def test_agrees_with_python_on_damaged_text(value, data):
    text = bytearray(json.dumps(value, ensure_ascii=False).encode())
    at = data.draw(st.integers(0, len(text) - 1))
    what = data.draw(st.sampled_from(["delete", "insert", "change"]))
    byte = data.draw(st.sampled_from([*b'{}[]",:0-.eE+tfnu\\ \n', 0, 0x80, 0xC3, 0xED, 0xFF]))
    text[at : at + (what != "insert")] = b"" if what == "delete" else bytes([byte])
    if accepts(bytes(text)):
        assert reads(bytes(text))
    elif reads(bytes(text)):  # the three restrictions that the lesson names, and no other
        numbers = json.dumps(json.loads(bytes(text)))
        assert len(text) > 15 or "e" in numbers.lower() or "inf" in numbers.lower() or "\\u" in text.decode()


@pytest.mark.parametrize("code", [*range(0x80, 0x900, 7), 0xD7FF, 0xE000, 0xFFFF, 0x10000, 0x10FFFF])
def test_every_character_of_unicode_is_let_through(code):
    assert accepts(f'"{chr(code)}"'.encode())


@given(st.binary(min_size=1, max_size=4))
def test_no_other_bytes_are_characters(data):
    if accepts(b'"' + data + b'"'):
        assert reads(b'"' + data + b'"')


def test_numbers_that_readers_differ_on_are_refused():
    assert accepts(b"9" * 15) and not accepts(b"9" * 16)
    assert accepts(b"1e99") and not accepts(b"1e100")
    assert accepts(b'"\\uD7ff"') and not accepts(b'"\\ud800"')


def test_the_shortest_end_is_the_shortest():
    begun = [
        "",
        "{",
        '{"',
        '{"a',
        '{"a"',
        '{"a":',
        '{"a":1',
        '{"a":1,',
        "[",
        "[1,",
        "-",
        "1.",
        "1e",
        "t",
        '"\\',
        '"\\u0',
    ]
    for text in (*map(str.encode, begun), b'"\\', b'"\\u0', '"Ł'.encode()[:-1], '{"東'.encode()[:-2]):
        state = json_run(JSONState("value"), text)
        states, n = {state}, 0
        while not any(is_complete(s) for s in states):
            states, n = {t for s in states for b in range(256) if (t := json_step(s, b)) is not None}, n + 1
        assert n == bytes_to_close(state.mode) + len(state.stack), text


def random_logits(seed, vocab):
    return 4 * torch.randn(1, vocab, generator=torch.Generator().manual_seed(seed))


def write(constraint, vocab, end, seed, max_tokens):
    """Ids that a model with random wishes writes."""
    rng, ids = np.random.default_rng(seed), []
    choose = Sampler(temperature=float(rng.uniform(0.3, 3)), seed=seed, constraint=constraint)
    wishes = [random_logits(seed * 7 + i, vocab) for i in range(5)]
    while len(ids) < max_tokens:
        token = int(choose(wishes[int(rng.integers(5))], [0], len(ids), [[1, 2, *ids]]))
        if token == end:
            break
        ids.append(token)
    return ids


@pytest.mark.parametrize("which", ["bytes", "bpe", "sentencepiece"])
def test_whatever_the_model_wants_the_text_parses(which, bpe, sentencepiece):
    tokenizer = {"bytes": BytesTokenizer(), "bpe": bpe, "sentencepiece": sentencepiece}[which]
    ends = 0
    for seed in range(60):
        room = [2, 3, 7, 20, 60, 150][seed % 6]
        end = tokenizer.eos_id if seed % 4 else None
        root = "object" if seed % 2 else "value"
        constraint = JSONConstraint(tokenizer, max_tokens=room, stop_id=end, root=root, max_depth=5)
        ids = write(constraint, tokenizer.n_vocab + 3, end, seed, room)
        assert not set(ids) & set(tokenizer.special_tokens.values())
        text = tokenizer.decode_bytes(ids)
        assert reads(text), text
        assert root == "value" or isinstance(json.loads(text), dict)
        ends += len(ids) < room
    assert ends > 5  # some ended by themselves


def test_masks_agree_with_running_every_token(bpe):
    constraint = JSONConstraint(bpe, max_tokens=10**6, stop_id=bpe.eos_id)
    for seed in range(12):
        ids = write(JSONConstraint(bpe, max_tokens=60), bpe.n_vocab, None, seed, 60)
        state = JSONState("value")
        for token in ids[: 10 + seed]:
            state = json_run(state, constraint.tokens[token])
        right = [d is not None and json_run(state, d) is not None for d in constraint.tokens]
        if is_complete(state):
            right = [ok and state.mode != "done" for ok in right]
            right[bpe.eos_id] = True
        assert constraint.allowed(state, 10**6).tolist() == right


@pytest.fixture(scope="module")
def model(bpe):
    model = Transformer(LlamaConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=352, max_seq_len=96))
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.output.weight.mul_(40)
    return model


@pytest.mark.parametrize("options", [{}, dict(temperature=1.5, top_p=0.95, seed=0), dict(repetition_penalty=1.3)])
def test_generate_writes_json_in_every_row(model, bpe, options):
    constraint = JSONConstraint(bpe, max_tokens=40, stop_id=bpe.eos_id, root="object")
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8]]
    rows = generate(model, prompts, max_new_tokens=40, stop_ids=[bpe.eos_id], constraint=constraint, **options)
    assert all(isinstance(json.loads(bpe.decode_bytes(ids)), dict) for ids in rows)
    again = generate(model, prompts[:1], max_new_tokens=40, stop_ids=[bpe.eos_id], constraint=constraint, **options)
    assert again == rows[:1]


@pytest.mark.parametrize("wish", [None, "7", "[", "{", '"', " "])
@pytest.mark.parametrize("room", [2, 7, 12])
def test_without_a_stop_id_a_complete_text_ends_with_white_space(model, bpe, room, wish):
    favour = None if wish is None else bpe.encode(wish)[0]

    def wishes(logits, rows, step, ids):
        if favour is not None:
            logits = logits.index_fill(1, torch.tensor([favour]), 50.0)
        return constraint(logits, rows, step, ids)

    constraint = JSONConstraint(bpe, max_tokens=room)
    (new,) = generate(model, [[1, 2, 3]], max_new_tokens=room + 8, constraint=wishes)
    text = bpe.decode_bytes(new[:room])
    assert len(new) == room + 8 and reads(text)
    assert not bpe.decode_bytes(new[room:]).strip()


def test_a_stop_id_ends_every_text_in_time(model, bpe):
    constraint = JSONConstraint(bpe, max_tokens=8, stop_id=bpe.eos_id)
    for seed in range(8):
        options = dict(max_new_tokens=20, stop_ids=[bpe.eos_id], temperature=2.0, seed=seed)
        (new,) = generate(model, [[1, 2, 3]], constraint=constraint, **options)
        assert len(new) <= 8 and reads(bpe.decode_bytes(new))


@pytest.mark.parametrize(("begun", "depth"), [(b"[[1", 2), (b"[[1", 3), (b"[1", 1), (b'{"a":[1', 2)])
def test_no_token_ends_deeper_than_max_depth(begun, depth):
    class Closing(BytesTokenizer):
        extra = (b"],[[", b"],[", b'],"b":[[', b'],"b":[', b"]]", b"]}")
        n_vocab = BytesTokenizer.n_vocab + len(extra)

        def decode_bytes(self, ids):
            first = BytesTokenizer.n_vocab
            pieces = [self.extra[i - first] if i >= first else super(Closing, self).decode_bytes([i]) for i in ids]
            return b"".join(pieces)

    constraint = JSONConstraint(Closing(), max_tokens=40, max_depth=depth)
    state = json_run(JSONState("value"), begun)
    after = [None if data is None else json_run(state, data) for data in constraint.tokens]
    right = [s is not None and len(s.stack) <= depth for s in after]
    assert constraint.allowed(state, 40).tolist() == right


def test_continuous_batches_write_json(model, bpe):
    batcher = ContinuousBatcher(model, n_blocks=20, max_batch=2)
    for seed in range(4):
        constraint = JSONConstraint(bpe, max_tokens=30, stop_id=bpe.eos_id)
        choose = Sampler(temperature=1.0, seed=seed, constraint=constraint)
        _ = batcher.submit([1 + seed, 2], max_new_tokens=30, choose=choose, stop_ids=[bpe.eos_id])
    assert all(reads(bpe.decode_bytes(ids)) for ids in batcher.run().values())


def test_tokens_in_the_middle_of_a_text_keep_their_space(sentencepiece):
    tokens = token_bytes(sentencepiece)
    ids = sentencepiece.encode('a {"name": 1')
    assert b"".join(tokens[i] or b"" for i in ids).endswith(b'a {"name": 1')
    assert tokens[sentencepiece.eos_id] is None


def test_bad_options_are_refused_in_a_sentence(model, bpe):
    for options, words in [
        (dict(max_tokens=1, root="object"), "shortest JSON object has 2"),
        (dict(max_tokens=9, max_depth=0), "at least 1"),
        (dict(max_tokens=9, stop_id=bpe.n_vocab), f"stop_id is {bpe.n_vocab}; .* ids 0 to {bpe.n_vocab - 1}"),
        (dict(max_tokens=9, stop_id=-1), "stop_id is -1"),
    ]:
        with pytest.raises(ValueError, match=words):
            JSONConstraint(bpe, **options)
    constraint = JSONConstraint(bpe, max_tokens=20, stop_id=bpe.eos_id)
    with pytest.raises(ValueError, match="max_tokens=10"):
        generate(model, [[1]], max_new_tokens=10, stop_ids=[bpe.eos_id], constraint=constraint)
    with pytest.raises(ValueError, match="not in stop_ids"):
        generate(model, [[1]], max_new_tokens=20, constraint=constraint)
    with pytest.raises(ValueError, match="does not let through"):
        constraint(torch.zeros(1, 352), [0], 1, [[bpe.encode("}")[0]]])


def test_a_tokenizer_without_all_bytes_is_refused():
    class Gaps(BytesTokenizer):
        n_vocab = 100

    with pytest.raises(ValueError, match="single byte 0x64"):
        JSONConstraint(Gaps(), max_tokens=10)
