"""Mutated files are refused in our words, or give the same weights, quickly and in little memory.

This is the short run, the same mutations each time. The long one is `benchmarks/fuzz.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from mutations import DAMAGE, KINDS, Random, mutated, unpack
from trials import Tally, attempt, sound_files, warm

import tiedconv

COUNT = 5


@pytest.mark.parametrize("kind", KINDS)
def test_mutations(kind: str, tmp_path: Path) -> None:
    warm()
    tally = Tally()
    for seed in range(COUNT):
        attempt(kind, seed, tmp_path / "m.safetensors", tally, show=seed < 1)
    assert not tally.wrong
    outcomes = tally.outcomes[kind]
    assert sum(outcomes.values()) == COUNT
    if kind in DAMAGE:
        refused, harmless = "refused (CheckpointError)", "harmless: the same weights"
        assert set(outcomes) <= {refused, harmless, "unchanged"}


def test_the_mutations_are_of_use(tmp_path: Path) -> None:
    # Each kind changes the file, and what is sound passes: to refuse all would prove nothing.
    warm()
    for sound in sound_files():
        path = tmp_path / "sound.safetensors"
        path.write_bytes(sound.data)
        assert len(unpack(sound.data).entries) > 10
        for kind in KINDS:
            changed = sum(mutated(kind, seed, sound.data) != sound.data for seed in range(3))
            assert changed >= 2, (sound.name, kind)
        tiedconv.load(path, model=sound.model and sound.model())


def test_the_same_seed_gives_the_same_mutation() -> None:
    data = sound_files()[0].data
    assert all(mutated(kind, 3, data) == mutated(kind, 3, data) for kind in KINDS)
    assert Random("a 1").random() == Random("a 1").random()
