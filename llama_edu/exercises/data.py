"""Checks for the exercises of lesson 30: the document mask, windows, the part of a rank, and quotas."""

from __future__ import annotations

import numpy as np
import torch

from llama_edu.exercises import exercise

__all__ = ["check_attention_mask", "check_part_of_rank", "check_quotas", "check_windows_of"]


@exercise(lesson="30_data", level=1, minutes=5)
def check_attention_mask(attempt) -> str | None:
    ids = torch.tensor([3, 3, 3, 5, 5, 9])
    mask = attempt(ids.clone())
    n = len(ids)
    if tuple(mask.shape) != (n, n):
        return f"The result must have the shape (seq, seq), here ({n}, {n}); yours has {tuple(mask.shape)}."
    if mask.dtype != torch.bool:
        return f"The result must be of bool; yours is of {mask.dtype}. Compare, and do not multiply."
    same, causal = ids[:, None] == ids[None, :], torch.ones(n, n, dtype=torch.bool).tril()
    right = same & causal
    if torch.equal(mask, right):
        later = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2])
        expected = (later[:, None] == later[None, :]).tril()
        return None if torch.equal(attempt(later), expected) else "Right for one row only: use the argument."
    wrong = {
        "Documents attend to each other: you only asked that the key is not later. Ask for the same document, too.": (
            causal
        ),
        "A position sees its future: it must be of the same document, and not later.": same,
        "A position does not see itself: not later includes now (tril, with no offset).": same & causal.tril(-1),
        "Queries and keys are exchanged: the row is the one who looks, the column is looked at.": right.T,
        "True and False are exchanged: True is for what may be seen.": ~right,
        "You joined the conditions by or: both must hold.": same | causal,
        "A position sees the other documents and not its own: compare with ==.": ~same & causal,
    }
    for verdict, values in wrong.items():
        if torch.equal(mask, values):
            return verdict
    if (mask & ~same).any():
        return "Documents attend to each other: position 3 begins a document, and sees something of the one before."
    return "Nothing crosses a document, but inside one not exactly the positions up to the query are seen."


@exercise(lesson="30_data", level=1, minutes=10)
def check_windows_of(attempt) -> str | None:
    tokens, T = np.arange(100, 123), 5  # 23 tokens: 4 windows, two tokens are left over
    result = attempt(tokens.copy(), T)
    if not isinstance(result, tuple | list) or len(result) != 2:
        return "Return two arrays: inputs and targets."
    x, y = (np.asarray(a) for a in result)
    if x.shape != y.shape or x.ndim != 2 or x.shape[1] != T:
        return f"Inputs and targets must both have the shape (windows, {T}); yours have {x.shape} and {y.shape}."
    if np.array_equal(x, y):
        return "The targets are the inputs: the model would learn to repeat. Shift them by one."
    if np.array_equal(y + 1, x):
        return "Shifted the wrong way: the target of a position is the token after it, not before it."
    if np.array_equal(y[:, :-1], x[:, 1:]) and np.array_equal(y[:, -1], x[:, 0]):
        return "The shift wraps inside a window: the last target must be the token after the window, not its first."
    if len(x) and not np.array_equal(y, x + 1):
        return "The target of a position is the token right after it in the text; some of yours are not."
    starts = x[:, 0] - 100
    if len(x) > 1 and np.array_equal(np.diff(starts), np.full(len(x) - 1, T + 1)):
        return "A gap: the last target of a window is never an input, so some tokens are never read. Step by seq_len."
    if len(x) > 1 and (np.diff(starts) < T).any():
        return "The windows overlap: tokens are asked for more than once. Step by seq_len."
    if len(x) != (len(tokens) - 1) // T or not np.array_equal(starts, np.arange(len(x)) * T):
        return f"{len(tokens)} tokens make {(len(tokens) - 1) // T} windows of {T}, the first at 0; yours are {len(x)}."
    for n in (20, 21):
        got = len(attempt(np.arange(n), T)[0])
        if got != (n - 1) // T:
            return (
                f"{n} tokens make {(n - 1) // T} windows of {T}, because the last input needs a target; "
                f"yours are {got}."
            )
    return None


@exercise(lesson="30_data", level=2, minutes=10)
def check_part_of_rank(attempt) -> str | None:
    batch = 12
    parts = {
        ranks: [[list(attempt(step, rank, ranks, batch)) for rank in range(ranks)] for step in range(3)]
        for ranks in (1, 2, 4)
    }
    for ranks, steps in parts.items():
        if any(len(part) != batch // ranks for step in steps for part in step):
            return f"A rank of {ranks} reads {batch // ranks} of {batch} sequences; yours reads another number."
    if parts[1][0] == parts[1][1]:
        return "Every step reads the same: the batch of a step begins at step * batch_size."
    for ranks in (2, 4):
        if parts[ranks][0][0] == parts[ranks][0][1]:
            return "All ranks read the same sequences: the batch is paid for several times and read once."
    flat = lambda ranks, step: sorted(s for part in parts[ranks][step] for s in part)
    if parts[1] != [[list(range(step * batch, (step + 1) * batch))] for step in range(3)]:
        return "With one rank, step 1 of batches of 12 reads the sequences 12 to 23; yours reads others."
    for step in range(3):
        for ranks in (2, 4):
            if flat(ranks, step) != flat(1, step):
                return (
                    f"The batch depends on the number of ranks: in step {step} it is {flat(1, step)} with 1 rank, but "
                    f"{flat(ranks, step)} with {ranks}. Take the batch of the step first, then divide it."
                )
    return None


@exercise(lesson="30_data", level=2, minutes=15)
def check_quotas(attempt) -> str | None:
    cases = [
        ([0.5, 0.3, 0.2], 10, [5, 3, 2]),
        # Remainders are equal only where weights are: a tie between others would hang on the rounding of floats.
        ([0.67, 0.15, 0.045, 0.045, 0.045, 0.025, 0.02], 66, [44, 10, 3, 3, 3, 2, 1]),
        ([0.25, 0.25, 0.25, 0.25], 6, [2, 2, 1, 1]),
        ([0.94, 0.03, 0.03], 10, [10, 0, 0]),
        ([1.0], 7, [7]),
        ([0.4, 0.4, 0.2], 4, [2, 1, 1]),
        ([0.36, 0.32, 0.32], 5, [2, 2, 1]),
    ]
    for weights, n, right in cases:
        counts = list(attempt(list(weights), n))
        if len(counts) != len(weights):
            return f"One count for each weight: {len(weights)} are wanted, yours are {len(counts)}."
        if any(count != int(count) for count in counts):
            return f"Counts are whole numbers of sequences; yours are {counts}."
        counts = [int(count) for count in counts]
        if counts == right:
            continue
        whole = [int(w * n + 1e-9) for w in weights]
        shown = f"{weights} of {n} sequences"
        if counts == whole:
            return (
                f"{shown}: you cut off the fractions, so the counts sum to {sum(counts)}. Hand out what is left over."
            )
        if counts == [round(w * n) for w in weights]:
            return f"{shown}: rounding each for itself gives counts that sum to {sum(counts)}, not to {n}."
        if sum(counts) != n:
            return f"{shown}: your counts sum to {sum(counts)}, not to {n}."
        left = n - sum(whole)
        for place in (0, -1):
            all_to_one = list(whole)
            all_to_one[place] += left
            if counts == all_to_one and left > 1:
                return f"{shown}: one source got all {left} left-over sequences. Nobody gets more than one of them."
        if counts == [w + (i < left) for i, w in enumerate(whole)]:
            return f"{shown}: the left-over sequences go to the largest remainders, not to the first sources."
        by_weight = sorted(range(len(weights)), key=lambda i: (-weights[i], i))[:left]
        if counts == [w + (i in by_weight) for i, w in enumerate(whole)]:
            return f"{shown}: the left-over sequences go to the largest remainders, not to the largest weights."
        if any(abs(count - w * n) >= 1 for count, w in zip(counts, weights)):
            return f"{shown}: a count is one or more away from its share; yours are {counts}."
        return f"{shown}: the sum is right, but the left-over sequences went to others than the largest remainders."
    return None
