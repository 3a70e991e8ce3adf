"""What `finetune` writes besides its model: a log, figures for TensorBoard, a picture."""

from __future__ import annotations

import dataclasses
import functools
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tiedconv.commands.report import report
from tiedconv.errors import MissingExtra, OutputError, TiedconvError, UserError
from tiedconv.io.atomic import check_output
from tiedconv.io.run_dir import RunDir
from tiedconv.loggers import Curve, JsonLog, TensorBoard, Watcher, Watchers, draw
from tiedconv.training import TrainConfig, TrainResult
from tiedconv.utils.plotting import check_picture, new_figure
from tiedconv.version import __version__


@dataclass
class Files:
    """What was asked for, checked before any work.

    Args:
        output: the model to be.
        log, tensorboard, picture: None if not wanted.
        force, resume: as for the model.
        optional: whether a picture that can't be drawn is no error: nobody asked for it.
    """

    output: Path
    log: Path | None
    tensorboard: Path | None
    picture: Path | None
    force: bool
    resume: bool
    optional: bool = False

    @classmethod
    def wanted(
        cls, output: Path, log: Path | None, tensorboard: Path | None, picture: Path | None,
        no_picture: bool, *, force: bool, resume: bool,
    ) -> Files:  # fmt: skip
        """The files that the options name.

        Raises:
            UserError: options that contradict each other, or a file that can't be written.
        """
        if picture is not None and no_picture:
            raise UserError(
                "--picture and --no-picture were both given",
                hint="Give one of them",
                code="options-conflict",
            )
        optional = picture is None
        if optional and not no_picture:
            picture = output.with_suffix(".training.png")
        made = cls(output, log, tensorboard, picture, force, resume, optional)
        made._check()
        return made

    def _check(self) -> None:
        check_output(self.output, force=self.force)
        named = [p for p in (self.output, self.log, self.tensorboard, self.picture) if p]
        if len({path.resolve() for path in named}) < len(named):
            raise OutputError(
                "Two of the model, log, folder and picture have the same name",
                "One would replace the other",
                "Give each a name of its own",
                code="output-paths-collide",
            )
        if self.picture is not None:
            check_picture(self.picture, force=self.force, option="--picture")
            if not self.optional:
                new_figure(1, 1)  # whether it can be drawn

    def watchers(
        self,
        file: Path,
        config: TrainConfig,
        tell: Callable[[str], None],
        settings: Mapping[str, Any],
    ) -> Watching:
        """Those who write them.

        Args:
            file: the compact file to be trained.
            config: of the training.
            tell: called with a line about what can't be written.
            settings: whatever else a log is to say of the run.
        """
        watchers: list[Watcher] = []
        if self.log is not None:
            log = JsonLog(self.log, self.output)
            log.check(force=self.force, resume=self.resume)
            watchers.append(log)
        if self.tensorboard is not None:
            board = TensorBoard(self.tensorboard)
            board.check(force=self.force, resume=self.resume)
            watchers.append(board)
        curve = Curve(RunDir.beside(self.output).path) if self.picture is not None else None
        if curve is not None:
            watchers.append(curve)
        versions = {
            "tiedconv": __version__, "torch": str(torch.__version__),
            "python": platform.python_version(),
        }  # fmt: skip
        said = {
            "file": file,
            **settings,
            "options": dataclasses.asdict(config),
            "versions": versions,
        }
        return Watching(watchers, functools.partial(report, file), said, tell, self, curve)


class Watching(Watchers):
    """Watchers that draw a picture in the end."""

    def __init__(
        self,
        watchers: list[Watcher],
        report: Callable[[], Any],
        settings: dict[str, Any],
        tell: Callable[[str], None],
        files: Files,
        curve: Curve | None,
    ) -> None:
        super().__init__(watchers, report, settings, tell)
        self._files, self._curve = files, curve
        self._told = tell

    def finish(self, result: TrainResult) -> dict[str, Path | None]:
        """The training went well: its figures are noted and drawn; names of what was written."""
        self.end(result)
        return {
            "log": self._files.log,
            "tensorboard": self._files.tensorboard,
            "picture": self._draw(),
        }

    def _draw(self) -> Path | None:
        path, curve = self._files.picture, self._curve
        if path is None or curve is None or curve.run is None:
            return None
        try:
            draw(curve.course, curve.run, path, force=self._files.force)
        except MissingExtra as error:
            self._told(f"No picture was drawn. {error}")
            return None
        except TiedconvError as error:  # the model is written, and that is what was to be done
            self._told(f"No picture was drawn: {error}")
            return None
        return path
