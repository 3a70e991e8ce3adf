"""What a training leaves for those who watch it: a log, figures for TensorBoard, a picture.

All of them listen to the events of `tiedconv.training`, and change nothing of the training.
"""

from __future__ import annotations

from tiedconv.watching.curve import Course, Curve, Point
from tiedconv.watching.log import JsonLog
from tiedconv.watching.memory import memory_in_use
from tiedconv.watching.picture import draw
from tiedconv.watching.tensorboard import TensorBoard
from tiedconv.watching.watchers import Run, Watcher, Watchers

__all__ = [
    "Course",
    "Curve",
    "JsonLog",
    "Point",
    "Run",
    "TensorBoard",
    "Watcher",
    "Watchers",
    "draw",
    "memory_in_use",
]
