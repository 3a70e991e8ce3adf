"""What all tests share: few threads, fixed seeds, no network, a count of what did not run."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests run side by side: threads of numpy, and of processes that a test starts, would wait for each
# other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

if TYPE_CHECKING:
    from cli_helpers import World

# One thread each, because tests run side by side. Results must not depend on it.
torch.set_num_threads(int(os.environ.get("TIEDCONV_TEST_THREADS", "1")))

# The same examples every time, and no deadline: a busy machine is not a fault.
hypothesis.settings.register_profile(
    "tiedconv",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("tiedconv")

_DESELECTED = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--order-seed",
        type=int,
        help="run the test files, and the tests within each, in a random order with this seed",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Shuffle files, and tests within a file: fixtures of a file are then still made once."""
    seed = config.getoption("order_seed")
    if seed is None:
        return
    draw = random.Random(seed)
    files = [list(group) for _, group in groupby(items, lambda item: item.path)]
    draw.shuffle(files)
    for file in files:
        draw.shuffle(file)
    items[:] = [item for file in files for item in file]


def pytest_deselected(items: list[pytest.Item]) -> None:
    if not items:  # as --last-failed reports none
        return
    config = items[0].config
    config.stash[_DESELECTED] = config.stash.get(_DESELECTED, 0) + len(items)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Each worker of pytest-xdist reports how many tests it left out on request."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["deselected"] = session.config.stash.get(_DESELECTED, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    count = getattr(node, "workeroutput", {}).get("deselected", 0)
    # Every worker collects the same tests.
    node.config.stash[_DESELECTED] = max(count, node.config.stash.get(_DESELECTED, 0))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Count what did not run, each reason once."""
    skips = Counter(
        str(r.longrepr[2] if isinstance(r.longrepr, tuple) else r.longrepr).removeprefix(
            "Skipped: "
        )
        for r in terminalreporter.stats.get("skipped", [])
    )
    deselected = config.stash.get(_DESELECTED, 0)
    if not skips and not deselected:
        return
    terminalreporter.section("did not run")
    for reason, count in skips.most_common():
        terminalreporter.line(f"{count:5} skipped: {reason}")
    if deselected:
        terminalreporter.line(f"{deselected:5} deselected: `make test-all` runs the slow ones too")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Each test starts from one seed, whichever ran before it."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    yield
    torch.set_rng_state(state)


@pytest.fixture
def _only_sleep_takes_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clocks stand still but for `time.sleep`, so that what is timed is exact and busy
    machines change nothing.
    """
    now = [1000.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    for clock in ("perf_counter", "monotonic"):
        monkeypatch.setattr(time, clock, lambda: now[0])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Small weights, a compact file and images, for tests of commands."""
    from cli_helpers import make_world  # it imports much that not every process needs

    return make_world(tmp_path_factory.mktemp("world"))
