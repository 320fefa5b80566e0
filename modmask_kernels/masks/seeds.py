"""Seeds of a learning run: one stream of noise and one of data for every mask set.

A stream is named by the run's seed and the name of the set, never by the position of the set or
by what is learned beside it, so a set learned alone sees what it sees in a joint run.
"""

from __future__ import annotations

import hashlib

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def hash64(text: str) -> int:
    """The first 64 bits of SHA-256, as an unsigned integer."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def stream_key(seed: int, name: str, purpose: str) -> int:
    """The key of a set's stream: `hash64` of "purpose NUL seed NUL name"."""
    return hash64(f"{purpose}\0{seed}\0{name}")


def step_seed(key: int, step: int) -> int:
    """The seed of one step: output number `step` of SplitMix64 started at `key`, as an int64.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014,
    with the constants of Vigna's public-domain code. For one key all 2**64 outputs differ.
    """
    z = (key + (step + 1) * _GOLDEN) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    z ^= z >> 31
    return z - (1 << 64) if z >> 63 else z
