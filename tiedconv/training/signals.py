"""Signals: the first asks a run to stop at a good moment, the second stops it at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self

# Windows has no SIGHUP.
_ENDING = [getattr(signal, n) for n in ("SIGTERM", "SIGHUP") if hasattr(signal, n)]


class Interrupted(KeyboardInterrupt):
    """A run stopped because it was asked to; its state was saved, where there is a place for it.

    Args:
        signum: the signal that asked.
    """

    def __init__(self, signum: int = signal.SIGINT) -> None:
        super().__init__()
        self.signum = signum


@contextlib.contextmanager
def sigterm_as_keyboard_interrupt() -> Iterator[None]:
    """Within it, SIGTERM and SIGHUP end the work as Ctrl-C does: nothing is left half-written.

    SIGHUP is what a closed terminal sends; under nohup it is ignored, as before. Where someone
    else handles a signal already, and outside the main thread, nothing is changed.
    """

    def end(signum: int, frame: FrameType | None) -> None:
        raise Interrupted(signum)

    main = threading.current_thread() is threading.main_thread()
    free = [s for s in _ENDING if main and signal.getsignal(s) == signal.SIG_DFL]
    for signum in free:
        signal.signal(signum, end)
    try:
        yield
    finally:
        for signum in free:
            signal.signal(signum, signal.SIG_DFL)


class Interrupts:
    """Within it, the first signal is only noted.

    Schedulers of clusters send SIGTERM some time before they end a job, and a closed terminal sends
    SIGHUP. Outside the main thread,
    where Python gives no signals, nothing is changed.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, *_ENDING):
                # A job in the background ignores them; None is a handler that is not Python's.
                if signal.getsignal(signum) not in (signal.SIG_IGN, None):
                    self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before.clear()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.asked is not None:
            raise Interrupted(signum)
        self.asked = signum
