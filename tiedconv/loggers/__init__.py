"""Records of a training: a log, scalars for TensorBoard, a picture.

All of them listen to the events of `tiedconv.training`, and change nothing of the training.
"""

from __future__ import annotations

from tiedconv.loggers.curve import Course, Curve, Point
from tiedconv.loggers.log import JsonLog
from tiedconv.loggers.log_reader import LoggedRun, read_log
from tiedconv.loggers.memory import memory_in_use
from tiedconv.loggers.picture import draw
from tiedconv.loggers.tensorboard import TensorBoard
from tiedconv.loggers.watchers import Run, Watcher, Watchers

__all__ = [
    "Course",
    "Curve",
    "JsonLog",
    "LoggedRun",
    "Point",
    "Run",
    "TensorBoard",
    "Watcher",
    "Watchers",
    "draw",
    "memory_in_use",
    "read_log",
]
