"""Which stage a long piece of work is at, for whoever shows its progress.

The work names its stages when it starts, and enters them one by one. A stage that turns out to be
needless is passed over. Who does not listen pays nothing.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """A stage that starts, or a part of one.

    Attributes:
        name: what is done.
        number: of the stage, from 1.
        count: of all stages.
        part: of the stage, from 1; 0 where it has no parts.
        parts: of the stage.
    """

    name: str
    number: int
    count: int
    part: int = 0
    parts: int = 0


OnStage = Callable[[Stage], None]


@dataclass
class _Work:
    names: tuple[str, ...]
    on_stage: OnStage
    at: int = 0
    since: float = field(default_factory=time.perf_counter)

    def enter(self, name: str) -> None:
        self.leave()
        self.at = self.names.index(name, self.at) + 1
        self.on_stage(Stage(name, self.at, len(self.names)))

    def enter_part(self, part: int, parts: int) -> None:
        if self.at:
            self.on_stage(Stage(self.names[self.at - 1], self.at, len(self.names), part, parts))

    def leave(self) -> None:
        now = time.perf_counter()
        if self.at:
            _log.debug("%s: %.1f s", self.names[self.at - 1], now - self.since)
        self.since = now


_listener: ContextVar[OnStage | None] = ContextVar("stage_listener", default=None)
_work: ContextVar[_Work | None] = ContextVar("stages", default=None)


@contextlib.contextmanager
def listening(on_stage: OnStage) -> Iterator[None]:
    """Within it, `on_stage` is called with each stage that starts."""
    token = _listener.set(on_stage)
    try:
        yield
    finally:
        _listener.reset(token)


@contextlib.contextmanager
def stages(names: Sequence[str]) -> Iterator[None]:
    """Within it, `enter` starts these stages, in this order."""
    listener = _listener.get()
    work = _Work(tuple(names), listener if listener is not None else lambda _: None)
    token = _work.set(work)
    try:
        yield
        work.leave()
    finally:
        _work.reset(token)


def enter(name: str) -> None:
    """Start a stage; the one before it has ended. Outside of `stages` it does nothing.

    Raises:
        ValueError: no such stage is to come.
    """
    work = _work.get()
    if work is not None:
        work.enter(name)


def enter_part(part: int, parts: int) -> None:
    """Start a part of the present stage, counted from 1. Outside of `stages` it does nothing."""
    work = _work.get()
    if work is not None:
        work.enter_part(part, parts)
