"""What all tests share: few threads, fixed seeds, no network."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch
from cli_helpers import World, make_world

torch.set_num_threads(1)

# The same examples every time, and no deadline: a busy machine is no bug.
hypothesis.settings.register_profile(
    "tiedconv",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("tiedconv")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Each test starts from one seed, whichever ran before it."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    yield
    torch.set_rng_state(state)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Small weights, a compact file and images, for tests of commands."""
    return make_world(tmp_path_factory.mktemp("world"))
