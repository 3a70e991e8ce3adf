"""Random numbers that depend on what they are for, not on the order of drawing.

Every seed is mixed from (seed, epoch, index). So neither the number of worker processes nor a
resume changes an augmentation or an order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

UInt64s = np.ndarray[Any, np.dtype[np.uint64]]

# SplitMix64 (Steele, Lea and Flood, 2014): a step of the counter and two multipliers.
_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)

_OF_A_STEP = 0x73746570  # any number: it sets seeds of steps apart from seeds of epochs


def mixed(values: UInt64s) -> UInt64s:
    """Scrambles 64-bit numbers, one to one; neighbours come out unrelated."""
    values = (values ^ (values >> np.uint64(30))) * _FIRST
    values = (values ^ (values >> np.uint64(27))) * _SECOND
    return values ^ (values >> np.uint64(31))


def sample_seeds(seed: int, epoch: int, count: int) -> UInt64s:
    """One seed for each of `count` samples in this epoch, shape (count,)."""
    return mixed(np.arange(count, dtype=np.uint64) * _STEP + np.uint64(epoch_seed(seed, epoch)))


def epoch_seed(seed: int, epoch: int) -> int:
    """The seed of one epoch, from 0 to 2**64 - 1; any integers will do."""
    both = np.array([seed % 2**64, epoch % 2**64], dtype=np.uint64)
    first, second = mixed(both * _STEP + _STEP)
    return int(mixed(np.array([first ^ (second >> np.uint64(1))], dtype=np.uint64))[0])


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """The seed of one optimiser step on one of several devices, from 0 to 2**64 - 1.

    Unlike the seed of the epoch with that number, whose order of images it must not follow.
    """
    return epoch_seed(epoch_seed(epoch_seed(seed, step), rank), _OF_A_STEP)


def uniforms(seeds: UInt64s, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """`count` uniform numbers in [0, 1) for each seed, shape (len(seeds), count)."""
    counters = np.arange(1, count + 1, dtype=np.uint64) * _STEP
    bits = mixed(seeds[:, None] + counters[None, :]) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53
