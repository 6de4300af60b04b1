"""What a user of beam search relies on."""

from itertools import product

import pytest
import torch

from llama_edu import LlamaConfig, Transformer, generate
from llama_edu.generation import NonFiniteLogits, beam_search


def make(vocab_size=5, scale=3.0, seed=0, **changes) -> Transformer:
    shape = dict(dim=16, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=24)
    model = Transformer(LlamaConfig(**{**shape, "vocab_size": vocab_size, **changes}))
    model.init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(10 * scale)
    return model.double()


@torch.no_grad()
def exhaustive(model, prompt, n, alpha, stops):
    """(score, ids) of every text of up to n tokens, best first."""
    found = []
    for length in range(1, n + 1):
        for text in product(range(model.cfg.vocab_size), repeat=length):
            if set(text[:-1]) & stops or (text[-1] not in stops and length < n):
                continue
            z = model(torch.tensor([[*prompt, *text]]))[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            total = float(z[range(length), text].sum())
            found.append((total / length**alpha, [i for i in text if i not in stops]))
    return sorted(found, key=lambda pair: -pair[0])


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 1.0, 3.0])
@pytest.mark.parametrize("stops", [set(), {3}, {1, 3}])
def test_a_beam_that_drops_nothing_finds_what_exhaustive_search_finds(alpha, stops):
    model = make(4, seed=len(stops))
    right = exhaustive(model, [1, 2, 0], 3, alpha, stops)
    beams = beam_search(model, [1, 2, 0], max_new_tokens=3, n_beams=4**3, length_penalty=alpha, stop_ids=stops)
    assert len(beams) == min(len(right), 64)
    torch.testing.assert_close([b.score for b in beams], [s for s, _ in right[: len(beams)]], atol=1e-5, rtol=1e-5)
    gaps = [min(abs(s - other) for j, (other, _) in enumerate(right) if j != i) for i, (s, _) in enumerate(right)]
    clear = [i for i in range(len(beams)) if gaps[i] > 1e-4]
    assert len(clear) > 5 and all(beams[i].ids == right[i][1] for i in clear)


@pytest.mark.parametrize("seed", range(4))
def test_one_beam_is_greedy(seed):
    model = make(40, seed=seed)
    greedy = generate(model, [[1, 2, 3]], max_new_tokens=12)[0]
    assert beam_search(model, [1, 2, 3], max_new_tokens=12, n_beams=1)[0].ids == greedy


def test_scores_are_those_of_the_text():
    model = make(30)
    for beam in beam_search(model, [4, 5], max_new_tokens=8, n_beams=4, length_penalty=0.7):
        with torch.no_grad():
            z = model(torch.tensor([[4, 5, *beam.ids]]))[0, 1:-1].double().log_softmax(-1)
        total = float(z[range(8), beam.ids].sum())
        assert abs(beam.logprob - total) < 1e-4 and abs(beam.score - total / 8**0.7) < 1e-4


@pytest.mark.parametrize("width", [2, 5])
def test_agrees_with_transformers(width, tmp_path):
    from transformers import LlamaForCausalLM

    model = make(30, scale=2.0).float()
    model.save_pretrained(tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for prompt in ([1, 2], [7, 8, 9, 3]):
        ours = beam_search(model, prompt, max_new_tokens=7, n_beams=width)
        out = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=7,
            min_new_tokens=7,
            num_beams=width,
            num_return_sequences=width,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        assert out.sequences[:, len(prompt) :].tolist() == [b.ids for b in ours]
        # `transformers` divides by the length as well
        torch.testing.assert_close(out.sequences_scores.tolist(), [b.score for b in ours], atol=1e-4, rtol=1e-4)


def test_more_beams_than_texts_returns_all_of_them():
    assert len(beam_search(make(4), [1], max_new_tokens=1, n_beams=50)) == 4
    assert len(beam_search(make(4), [1], max_new_tokens=3, n_beams=50, stop_ids=[0, 1, 2, 3])) == 4


def test_bad_input_is_refused_in_a_sentence():
    model = make()
    for options, words in [
        (dict(n_beams=0, max_new_tokens=3), "n_beams is 0"),
        (dict(n_beams=2, max_new_tokens=0), "max_new_tokens 0"),
        (dict(n_beams=2, max_new_tokens=99), "at most"),
        (dict(n_beams=2, max_new_tokens=3, length_penalty=float("nan")), "length_penalty is nan"),
        (dict(n_beams=2, max_new_tokens=3, length_penalty=float("-inf")), "length_penalty is -inf"),
    ]:
        with pytest.raises(ValueError, match=words):
            beam_search(model, [1, 2], **options)
    with torch.no_grad():
        model.output.weight[0] = float("nan")
    with pytest.raises(NonFiniteLogits):
        beam_search(model, [1, 2], max_new_tokens=3, n_beams=2)
