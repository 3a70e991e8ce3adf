"""Options that several commands have, declared once each.

A command takes a group as one keyword, such as `images: ImageOptions`; `command.guarded` shows
Typer an option for each field. A command changes defaults by the default that it gives the
keyword, such as `CalibOptions(calib_images=1024)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tiedconv.cli import common
from tiedconv.cli.common import CALIBRATION, IMAGES, option_in
from tiedconv.errors import UserError

if TYPE_CHECKING:
    from tiedconv.conversion.calibrate import Calibration, OnCalibration
    from tiedconv.sources import Preprocess, Reading


@dataclass(frozen=True)
class ImageOptions:
    """How images are prepared, where that differs from the model's own preprocessing."""

    image_size: Annotated[int | None, option_in(IMAGES, "Side of the input in pixels.", min=1)] = (
        None
    )
    resize: Annotated[
        int | None, option_in(IMAGES, "Shorter side before the centre crop; 0 for no crop.", min=0)
    ] = None
    mean: Annotated[
        str | None, option_in(IMAGES, "Mean of each channel, 0 to 1.", metavar="R,G,B")
    ] = None
    std: Annotated[
        str | None, option_in(IMAGES, "Standard deviation of each channel.", metavar="R,G,B")
    ] = None
    interpolation: Annotated[str | None, option_in(IMAGES, "bilinear or bicubic.")] = None
    exif: Annotated[
        bool | None,
        option_in(
            IMAGES,
            "Turn images as their EXIF orientation says; model libraries do not.",
            "--exif/--no-exif",
        ),
    ] = None

    @property
    def given(self) -> dict[str, str]:
        """The options that were given, as they are typed; a switch has no value."""
        values = {name: value for name, value in vars(self).items() if name != "exif"}
        named = {f"--{n.replace('_', '-')}": str(v) for n, v in values.items() if v is not None}
        switch = {None: {}, True: {"--exif": ""}, False: {"--no-exif": ""}}[self.exif]
        return {**named, **switch}

    def change(self) -> Callable[[Preprocess], Preprocess] | None:
        """What they change of a model's own preprocessing; None if nothing.

        Raises:
            UserError: not a mean, a standard deviation or an interpolation.
        """
        if not self.given:
            return None
        means, stds = _channels("--mean", self.mean), _channels("--std", self.std)
        if self.interpolation not in (None, "bilinear", "bicubic"):
            raise UserError(
                f"--interpolation {self.interpolation} is unknown",
                hint="Use bilinear or bicubic",
                code="unknown-interpolation",
            )
        from tiedconv.sources import Preprocess

        def change(own: Preprocess) -> Preprocess:
            own = own.scaled_to(self.image_size)
            mean, std = means or own.mean, stds or own.std
            channels = own.channel_count()  # one value stands for all channels
            return Preprocess(
                own.size,
                own.resize if self.resize is None else (self.resize or None),
                mean * channels if len(mean) == 1 else mean,
                std * channels if len(std) == 1 else std,
                self.interpolation or own.interpolation,
                own.exif if self.exif is None else self.exif,
            )

        return change


@dataclass(frozen=True)
class ReadingOptions:
    """How weights are read."""

    ema: Annotated[
        bool | None,
        typer.Option(
            "--ema/--no-ema",
            help="Of a weights file that holds both: the averaged weights (EMA), or the others. "
            "Default: averaged, as timm does.",
            show_default=False,
            rich_help_panel=common.MODEL,
        ),
    ] = None
    non_finite: Annotated[
        str,
        typer.Option(
            metavar="refuse|zero",
            help="Where a weight is NaN, infinite or above 1e15: refuse the weights, or take 0.",
            rich_help_panel=common.MODEL,
        ),
    ] = "refuse"

    def reading(self) -> Reading:
        """What they describe.

        Raises:
            UserError: an unknown choice.
        """
        from tiedconv.sources import Reading

        return Reading(self.ema, self.non_finite)


@dataclass(frozen=True)
class CalibOptions:
    """Which images a model is calibrated on, and where."""

    calib_images: Annotated[
        int,
        option_in(
            CALIBRATION, "Maximum number of calibration images.", "-n", "--calib-images", min=2
        ),
    ] = 256
    output_name: common.OutputName = None
    strict: common.Strict = False
    device: common.Device = "auto"
    workers: common.Workers = None
    seed: common.Seed = 0

    def calibration(
        self, data: str | Path, on_event: OnCalibration, *, resume: bool = False, **config: Any
    ) -> Calibration:
        """The calibration that they describe.

        Args:
            data: the images.
            on_event: called with progress.
            resume: continue an interrupted one.
            config: fields of `CalibConfig`.
        """
        from tiedconv.calibration import CalibConfig
        from tiedconv.conversion.calibrate import Calibration

        return Calibration(
            data, self.calib_images, CalibConfig(seed=self.seed, **config), self.device,
            self.workers, self.strict, resume=resume, on_event=on_event,
            output=self.output_name,
        )  # fmt: skip


def _channels(option: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in (1, 3) or not all(map(math.isfinite, values)):
        raise UserError(
            f"{option} {text!r} is not one number for each channel",
            hint=f"Write it as {option} 0.485,0.456,0.406",
            code="invalid-mean-or-std",
        )
    least = min(values)
    if max(values) > 1 or least < 0 or (option == "--std" and least == 0):
        raise UserError(
            f"{option} {text} is not between 0 and 1",
            "Pixels are numbers from 0 to 1",
            "Divide values for pixels from 0 to 255 by 255" if max(values) > 1 else "",
            code="invalid-mean-or-std",
        )
    return values
