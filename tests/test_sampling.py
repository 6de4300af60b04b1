"""What a user of the choice of the next token relies on."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_edu.generation import Sampler, draw, keep_min_p, keep_top_k, keep_top_p


def test_keep_functions_agree_with_transformers():
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = 3 * torch.randn(40, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for ours, theirs, values in [
        (keep_top_k, TopKLogitsWarper, (1, 3, 50, 300, 1000)),
        (keep_top_p, TopPLogitsWarper, (0.01, 0.3, 0.9, 0.999, 1.0)),
        (keep_min_p, MinPLogitsWarper, (0.0, 0.01, 0.5, 1.0)),
    ]:
        for value in values:
            torch.testing.assert_close(ours(logits, value), theirs(value)(None, logits), atol=0, rtol=0)


def test_keep_top_p_of_one_keeps_everything_in_float32():
    logits = 5 * torch.randn(20, 5000, generator=torch.Generator().manual_seed(0))
    assert keep_top_p(logits, 1.0).isfinite().all()


def test_draw_follows_the_probabilities():
    from scipy.stats import chisquare

    logits = torch.tensor([[0.3, -1.0, 2.0, 0.0, 1.0, -torch.inf]])
    n = 40_000
    uniform = torch.tensor(np.random.default_rng(0).random(n))
    counts = torch.bincount(draw(logits.expand(n, -1), uniform), minlength=6)
    assert counts[5] == 0
    assert chisquare(counts[:5].numpy(), n * logits.double().softmax(-1)[0, :5].numpy()).pvalue > 1e-3


@given(u=st.floats(0, 1, exclude_max=True), logits=st.lists(st.floats(-30, 30), min_size=1, max_size=20))
def test_draw_never_takes_what_has_no_probability(u, logits):
    row = torch.tensor([[-torch.inf, *logits, -torch.inf]], dtype=torch.float64)
    assert 1 <= int(draw(row, torch.tensor([u], dtype=torch.float64))) <= len(logits)


def test_a_row_draws_the_same_in_any_company_and_as_often_as_asked():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    ids = [[]] * 3
    together = [Sampler(temperature=1.5, seed=4)(logits, [0, 1, 2], step, ids).tolist() for step in range(5)]
    choose = Sampler(temperature=1.5, seed=4)
    for step in (3, 0, 4, 3):
        assert choose(logits[1:2], [1], step, ids[:1]).tolist() == together[step][1:2]
