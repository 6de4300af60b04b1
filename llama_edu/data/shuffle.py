"""A random order of n things that is computed, not stored: a Feistel network over the numbers below n."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

TURNS = 8  # of the network; four already look random, the rest costs little


def _mix(x: np.ndarray | np.uint64) -> np.ndarray | np.uint64:
    """The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014): every bit of the input reaches all of them."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def shuffled(
    position: Int[np.ndarray, " *shape"], n: int, seed: int, epoch: Int[np.ndarray, " *shape"] | np.integer | int
) -> Int[np.ndarray, " *shape"]:
    """Which of n things stands at `position` (0 to n - 1) of a random order, one order for each seed and epoch.

    A Feistel network turns half of the bits by a hash of the other half, again and again: a bijection of the numbers
    below a power of four, at no memory. Results beyond n - 1 go through it again until they fall inside, which keeps it
    a bijection (Black and Rogaway, Ciphers with arbitrary finite domains, CT-RSA 2002).
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    key = _mix(_mix(np.uint64(seed & 0xFFFF_FFFF_FFFF_FFFF)) ^ np.broadcast_to(epoch, position.shape).astype(np.uint64))
    out = position.astype(np.uint64)
    todo = np.ones(out.shape, bool)
    while todo.any():
        left, right = out[todo] >> half, out[todo] & low
        for turn in range(TURNS):
            left, right = right, left ^ (_mix(right ^ key[todo] ^ np.uint64(turn << 56)) & low)
        out[todo] = left << half | right
        todo &= out >= n
    return out.astype(np.int64)
