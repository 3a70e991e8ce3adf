"""`tiedconv plan`."""

from __future__ import annotations

import atexit
import contextlib
import gc
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from tiedconv.calibration import CalibConfig
from tiedconv.cli import common, render
from tiedconv.cli.common import hint, say
from tiedconv.cli.progress import Bar
from tiedconv.commands.compare import BUDGETS, Cell, Comparison, Fixed, Row, Way, compare
from tiedconv.conversion.calibrate import Calibration, Event, Measuring


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(common.guarded(plan))


def plan(
    context: typer.Context,
    model: common.Model,
    params: Annotated[
        str,
        typer.Option(metavar="BUDGETS", help="Budgets to compare, such as 70%,50%,30% or 40M,20M."),
    ] = ",".join(BUDGETS),
    calib: Annotated[
        Path | None,
        typer.Option(
            metavar="IMAGES",
            help="A folder of images, with or without classes, or shards or hf:NAME: estimate by "
            "them how far each cell's answers stray from the original's. Needs weights.",
        ),
    ] = None,
    calib_images: common.CalibImages = 256,
    weights: common.Weights = "default",
    model_arg: common.ModelArg = None,
    image_size: common.ImageSize = None,
    resize: common.Resize = None,
    mean: common.Mean = None,
    std: common.Std = None,
    interpolation: common.Interpolation = None,
    strict: common.Strict = False,
    device: common.Device = "auto",
    workers: common.Workers = None,
    seed: common.Seed = 0,
    json_: common.Json = False,
) -> None:
    """Compare what every scheme stores at each budget, before anything is converted.

    It takes seconds and no weights. With [b]--calib[/b] each cell is fitted, and says how many
    nats its answers would be from the original's, before healing.
    """
    if calib is None:
        common.refuse_without_images(context, "calib_images", "strict")
    change = common.preprocess_change(image_size, resize, mean, std, interpolation)
    quick = contextlib.nullcontext() if calib else _quick_start()
    with PlanBar("fitting") as bar, quick:
        given = None
        if calib is not None:
            config = CalibConfig(effort="fast", seed=seed)
            given = Calibration(calib, calib_images, config, device, workers, strict, on_event=bar)
        found = compare(
            model, params.split(","), calib=given, weights=weights,
            model_args=common.model_args(model_arg), preprocess=change, seed=seed, on_fit=bar.fit,
        )  # fmt: skip
    if json_:
        common.print_json(found)
        return
    _show(found)
    again = {
        "--weights": None if weights == "default" else weights,
        "--image-size": image_size,
        "--resize": resize,
        "--mean": mean,
        "--std": std,
        "--interpolation": interpolation,
    }
    words = [w for pair in model_arg or [] for w in ("--model-arg", pair)]
    words += [w for o, v in again.items() if v is not None for w in (o, str(v))]
    _show_next(found, words, calib)


@contextlib.contextmanager
def _quick_start() -> Iterator[None]:
    """Within it, and when the program ends, no cycles are collected.

    A model library makes a million objects that stay. To look at them again and again while it
    is imported, and once more at the end, took a quarter of the time of a plan.
    """
    atexit.register(gc.freeze)
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class PlanBar(Bar):
    """A bar that listens to a comparison."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self._fits = (0, 0, "")

    def fit(self, done: int, total: int, what: str) -> None:
        """Fits done, and the next one."""
        self._fits = (done, total, what)
        self.update(done, total, what)

    def __call__(self, event: Event) -> None:
        if isinstance(event, Measuring):
            done, total, what = self._fits
            self.update(done, total, f"{what}: image {event.images:,} of {event.total:,}")


def _show(found: Comparison) -> None:
    costs = found.images is not None
    if found.rows:
        columns = ["scheme"]
        for budget in found.budgets:
            columns += [budget, "nats"] if costs else [budget]
        rows = [[row.way.name, *_cells(row, costs)] for row in found.rows]
        title = f"{found.model}, {found.original:,} parameters: stored at each budget"
        common.show_table(columns, rows, title)
    if found.fixed:
        say("")
        columns = ["at a size of its own", "stored", "share"] + ["nats"] * costs
        common.show_table(columns, [_fixed(f, costs) for f in found.fixed])
    say("")
    for note in _notes(found):
        say(note)


def _cells(row: Row, costs: bool) -> list[str]:
    cells: list[str] = []
    for cell in row.cells:
        if cell.stored is None:
            cells.append(f"– from {_size(row.smallest, row.share)}")
        else:
            cells.append(_size(cell.stored, cell.share))
        if costs:
            cells.append(_nats(cell.cost) + (" *" if cell.best else "  "))
    return cells


def _fixed(f: Fixed, costs: bool) -> list[str]:
    cells = [f.way.name, f"{f.stored:,}", render.percent(f.share)]
    return cells + [_nats(f.cost)] * costs


def _size(stored: int, share: float | None) -> str:
    return f"{stored:,} {render.percent(share):>7}"


def _nats(cost: float | None) -> str:
    return "" if cost is None else f"{cost:.3g}"


def _notes(found: Comparison) -> list[str]:
    notes: list[str] = []
    for row in found.rows:
        others = [c for c in row.cells if c.how is not None and c.how != row.way]
        for how in dict.fromkeys(c.how.name for c in others if c.how is not None):
            where = ", ".join(c.budget for c in others if c.how and c.how.name == how)
            notes.append(f"{row.way.name} at {where}: as {how}, which convert tries by itself.")
    if any(cell.stored is None for row in found.rows for cell in row.cells):
        notes.append("– from: the smallest size that the scheme can reach.")
    if found.unfit:
        notes.append(f"Nothing to convert in this model: {', '.join(found.unfit)}.")
    if found.images is not None:
        notes.append(
            f"nats: estimated divergence of the answers from the original's for each image, from "
            f"{found.images:,} images, before block-wise fitting and healing; * is the lowest at "
            "its budget. It ranks rather than foretells: what is measured is often twice as much, "
            "and far more where much is lost."
        )
    if found.skipped:
        notes.append(render.skipped(found.skipped))
    return notes


def _show_next(found: Comparison, words: Sequence[str], calib: Path | None) -> None:
    """What to type next, for the budget in the middle."""
    picked = [cell for column in _columns(found) if (cell := _pick(column)) is not None]
    model = [found.model, *words]
    if picked:
        cell = picked[len(picked) // 2]
        options = [*_asked(found, cell).flags, "--params", cell.budget]
        images = ["--calib", str(calib) if calib else "IMAGES"]
        hint(f"Next: {shlex.join(['tiedconv', 'convert', *model, *options, *images])}")
    if calib is None:
        hint(f"What each would lose: {shlex.join(['tiedconv', 'plan', *model])} --calib IMAGES")


def _columns(found: Comparison) -> list[list[Cell]]:
    return [list(column) for column in zip(*(row.cells for row in found.rows), strict=True)]


def _pick(column: Sequence[Cell]) -> Cell | None:
    """The best of a budget; where nothing was measured, the first, which is `auto`'s."""
    feasible = [cell for cell in column if cell.stored is not None]
    return next((c for c in feasible if c.best), feasible[0] if feasible else None)


def _asked(found: Comparison, cell: Cell) -> Way:
    """The way as the user asks for it: what a budget adds to it comes by itself."""
    return next(row.way for row in found.rows if any(c is cell for c in row.cells))
