"""What a model is evaluated at.

Each file of this folder whose name does not begin with an underscore holds one `TASK`. A new task
is one new file.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil

from tiedconv.data import Images
from tiedconv.errors import DataError, UserError
from tiedconv.tasks._base import EvaluationTask, Given
from tiedconv.tasks._zero_shot import ZeroShot

__all__ = ["AUTO", "EvaluationTask", "Given", "ZeroShot", "all_tasks", "task_of"]

AUTO = "auto"
"""The task that the data are for."""


@functools.cache
def all_tasks() -> dict[str, EvaluationTask]:
    """Every task of the folder, by name; the one that takes all the rest comes last."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    found = [importlib.import_module(f"{__name__}.{name}").TASK for name in names]
    return {task.name: task for task in sorted(found, key=lambda task: task.last)}


def task_of(name: str, images: Images) -> EvaluationTask:
    """The task that a user asks for, or that the data are for.

    Args:
        name: of a task, or `auto`.
        images: the data.

    Raises:
        UserError: there is no such task (`unknown-task`).
        DataError: the data are not for it (`task-mismatch`).
    """
    tasks = all_tasks()
    if name == AUTO:
        return next(task for task in tasks.values() if task.by_default and task.fits(images))
    if name not in tasks:
        raise UserError(
            f"Unknown task {name!r}", hint=f"Choose {', '.join((AUTO, *tasks))}",
            code="unknown-task",
        )  # fmt: skip
    if not tasks[name].fits(images):
        raise DataError(
            f"The data are not for the task {name}",
            f"It needs {tasks[name].needs}",
            "Leave --task out, or give other data",
            code="task-mismatch",
        )
    return tasks[name]
