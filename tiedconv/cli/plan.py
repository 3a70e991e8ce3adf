"""`tiedconv plan`."""

from __future__ import annotations

import atexit
import contextlib
import gc
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tiedconv.cli import common, render
from tiedconv.cli.command import add
from tiedconv.cli.common import CALIBRATION, hint, option_in, say
from tiedconv.cli.option_groups import CalibOptions, ImageOptions, ReadingOptions

if TYPE_CHECKING:
    from tiedconv.commands.compare import Cell, Comparison, Fixed, Row, SchemeSpec
    from tiedconv.commands.compare_bytes import ByteCell

BUDGETS = "70%,50%,30%"


def register(app: typer.Typer) -> None:
    """Add the command."""
    add(
        app,
        plan,
        "tiedconv plan resnet50",
        "tiedconv plan resnet50 --params 50%,30% --calib PHOTOS --weights FILE.safetensors",
        "tiedconv plan resnet50 --bytes 25%,10%,5%",
    )


def plan(
    context: typer.Context,
    model: common.Model,
    *,
    params: Annotated[
        str,
        typer.Option(metavar="BUDGETS", help="Budgets to compare, such as 70%,50%,30% or 40M,20M."),
    ] = BUDGETS,
    macs: Annotated[
        str | None,
        typer.Option(
            metavar="BUDGETS",
            help="Budgets of multiply-adds, such as 70%,50% or 4G, in place of the usual --params.",
        ),
    ] = None,
    bytes_: Annotated[
        str | None,
        typer.Option(
            "--bytes",
            metavar="BUDGETS",
            help="Budgets of the file's bytes, such as 25%,10% or 2MB, in place of the usual "
            "--params: the bits that each number gets.",
        ),
    ] = None,
    calib: Annotated[
        Path | None,
        option_in(
            CALIBRATION,
            f"{common.CALIB_SOURCES} Estimate the KL divergence of the outputs for each scheme and "
            "budget. Needs weights.",
            metavar="IMAGES",
        ),
    ] = None,
    weights: common.Weights = "default",
    reading: ReadingOptions,
    model_arg: common.ModelArg = None,
    images: ImageOptions,
    options: CalibOptions,
    json_: common.Json = False,
) -> None:
    """Compare what every scheme takes at each budget, without converting anything.

    Parameters, bytes in float32, and multiply-adds of a forward pass.

    Takes seconds and loads no weights. With [b]--calib[/b] every combination is fitted, and its
    expected KL divergence from the original's outputs (in nats, before fine-tuning) is shown.
    """
    from tiedconv.cli.progress import PlanBar
    from tiedconv.commands.compare import compare

    if calib is None:
        common.refuse_without_images(context, "calib_images", "strict", "output_name")
    is_usual = macs is None and bytes_ is None
    budgets = params.split(",") if is_usual or common.is_given(context, "params") else []
    sizes = [text.strip() for text in (bytes_ or "").split(",") if text.strip()]
    change = images.change()
    quick = contextlib.nullcontext() if calib else _quick_start()
    with PlanBar("fitting") as bar, quick:
        given = None
        if calib is not None:
            given = options.calibration(calib, bar, effort="fast")
        found = compare(
            model, budgets, macs=(macs or "").split(","), bytes=sizes, calib=given,
            weights=weights, reading=reading.reading(),
            model_args=common.model_args(model_arg), preprocess=change, seed=options.seed,
            on_fit=bar.fit,
        )  # fmt: skip
    if json_:
        common.print_json(found)
        return
    _show(found)
    again = [("--model-arg", pair) for pair in model_arg or []]
    again += [] if weights == "default" else [("--weights", weights)]
    words = [word for pair in (*again, *images.given.items()) for word in pair if word]
    _show_next(found, words, calib)


@contextlib.contextmanager
def _quick_start() -> Iterator[None]:
    """Turns off garbage collection within it, and at the end of the program.

    A model library makes a million objects that stay alive. Scanning them again and again while it
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


def _show(found: Comparison) -> None:
    costs = found.images is not None
    if found.byte_cells:
        _show_bytes(found)
    if found.rows and found.budgets:
        columns = ["scheme"]
        for budget in found.budgets:
            columns += [budget, "nats"] if costs else [budget]
        rows = [[row.spec.name, *_cells(row, costs)] for row in found.rows]
        title = f"{found.model}, {found.original:,} parameters: stored at each budget"
        common.show_table(columns, rows, title)
    if found.fixed and found.budgets:
        say("")
        columns = ["of fixed size", "stored", "ratio"] + ["nats"] * costs
        columns += ["bytes", "macs"] * (found.macs is not None)
        common.show_table(columns, [_fixed(f, costs, found.macs) for f in found.fixed])
    if found.rows and found.budgets and found.macs is not None:
        say("")
        _show_work(found)
    say("")
    for note in _notes(found):
        say(note)


def _show_bytes(found: Comparison) -> None:
    """How many bits a number gets, for each fraction of the parameters that is kept."""
    from tiedconv.commands.compare_bytes import WHOLE

    sizes = {cell.budget: cell.bytes for cell in found.byte_cells}
    rows = []
    for kept in dict.fromkeys(cell.params for cell in found.byte_cells):
        cells = {c.budget: c for c in found.byte_cells if c.params == kept}
        stored = next(iter(cells.values())).stored
        name = "whole model" if kept == WHOLE else f"{kept} of the parameters"
        rows.append([name, f"{stored:,}", *(_bits(cells.get(b)) for b in sizes)])
    heads = [f"{budget} = {render.size(size)}" for budget, size in sizes.items()]
    title = f"{found.model}, {found.original:,} parameters: bits for each number in a file of"
    common.show_table(["kept", "numbers", *heads], rows, title)


def _bits(cell: ByteCell | None) -> str:
    if cell is None:
        return "–"
    if cell.cost is None:
        return f"{cell.bits:.2f}"
    scheme = "" if cell.scheme is None else f" {cell.scheme}"
    return f"{cell.bits:.2f}{scheme}, {_nats(cell.cost)} nats{' *' if cell.best else '  '}"


def _show_work(found: Comparison) -> None:
    """Bytes and multiply-adds of the same cells."""
    columns = ["scheme"]
    for budget in found.budgets:
        columns += [budget, "bytes"]
    rows = []
    for row in found.rows:
        cells = [row.spec.name]
        for cell in row.cells:
            size = "" if cell.bytes is None else render.size(cell.bytes)
            cells += [render.percent(cell.macs_share) or "–", size]
        rows.append(cells)
    inputs = render.shapes(found.inputs)
    title = f"{render.amount(found.macs or 0)} multiply-adds ({inputs}): taken at each budget"
    common.show_table(columns, rows, title)


def _cells(row: Row, costs: bool) -> list[str]:
    cells: list[str] = []
    for cell in row.cells:
        if cell.stored is None:
            cells.append(_from(row, cell))
        else:
            cells.append(_size(cell.stored, cell.share))
        if costs:
            cells.append(_nats(cell.cost) + (" *" if cell.best else "  "))
    return cells


def _from(row: Row, cell: Cell) -> str:
    """The smallest size that a scheme reaches, of what the budget is of."""
    if cell.of == "params":
        return f"– from {_size(row.smallest, row.share)}"
    if row.macs_share is None or row.macs_share >= 1:
        return "– never fewer"
    return f"– from {render.percent(row.macs_share)} macs"


def _fixed(f: Fixed, costs: bool, macs: int | None) -> list[str]:
    cells = [f.spec.name, f"{f.stored:,}", render.percent(f.share)]
    cells += [_nats(f.cost)] * costs
    return cells + [render.size(f.bytes or 0), render.percent(f.macs_share)] * (macs is not None)


def _size(stored: int, share: float | None) -> str:
    return f"{stored:,} {render.percent(share):>7}"


def _nats(cost: float | None) -> str:
    return "" if cost is None else f"{cost:.3g}"


def _notes(found: Comparison) -> list[str]:
    notes = [_coverage(found)]
    if found.byte_cells:
        notes.append(
            "Bits: on average, in the file. convert --bytes tries the plans of its column and a "
            "few between them, and takes the one of the lowest cost on the images."
        )
    for row in found.rows:
        others = [c for c in row.cells if c.how is not None and c.how != row.spec]
        for how in dict.fromkeys(c.how.name for c in others if c.how is not None):
            where = ", ".join(_label(c) for c in others if c.how and c.how.name == how)
            notes.append(f"{row.spec.name} at {where}: as {how}, chosen automatically.")
    if any(cell.stored is None for row in found.rows for cell in row.cells):
        notes.append("– from: the smallest size that the scheme can reach.")
    if found.macs is not None and found.budgets:
        notes.append(
            "Multiply-adds: with factors applied where that takes fewer, as in ONNX files "
            "(docs/speed.md). Bytes: in float32; --bytes stores integers."
        )
    if found.unfit:
        notes.append(f"Nothing to convert in this model: {', '.join(found.unfit)}.")
    if found.images is not None:
        notes.append(
            f"nats: expected KL divergence of the outputs from the original's per image, from "
            f"{found.images:,} images, before block-wise calibration and fine-tuning; * is the "
            "lowest at its budget. Use it to rank schemes: the measured divergence is often twice "
            "as large, and much larger where it is large."
        )
    if found.skipped:
        notes.append(render.skipped(found.skipped))
    return notes


def _label(cell: Cell) -> str:
    return cell.budget if cell.of == "params" else f"{cell.budget} macs"


def _coverage(found: Comparison) -> str:
    covered = found.coverage
    much = covered.share < 0.99
    kept = f"; the largest of the rest: {covered.largest()}" if much else ""
    return f"{render.percent(covered.share)} of the parameters can be converted{kept}."


def _show_next(found: Comparison, words: Sequence[str], calib: Path | None) -> None:
    """What to type next, for the budget in the middle."""
    picked = [cell for column in _columns(found) if (cell := _pick(column)) is not None]
    model = [found.model, *words]
    images = ["--calib", str(calib) if calib else "IMAGES"]
    sizes = list(dict.fromkeys(cell.budget for cell in found.byte_cells))
    if sizes and not picked:
        options = ["--bytes", sizes[len(sizes) // 2]]
        hint(f"Next: {shlex.join(['tiedconv', 'convert', *model, *options, *images])}")
    if picked:
        cell = picked[len(picked) // 2]
        options = [*_asked(found, cell).flags, f"--{cell.of}", cell.budget]
        hint(f"Next: {shlex.join(['tiedconv', 'convert', *model, *options, *images])}")
    if calib is None:
        model += ["--bytes", ",".join(sizes)] if sizes else []
        hint(f"Expected accuracy loss: {shlex.join(['tiedconv', 'plan', *model])} --calib IMAGES")


def _columns(found: Comparison) -> list[list[Cell]]:
    return [list(column) for column in zip(*(row.cells for row in found.rows), strict=True)]


def _pick(column: Sequence[Cell]) -> Cell | None:
    """The best of a budget; without images the first, which is that of `auto`."""
    feasible = [cell for cell in column if cell.stored is not None]
    return next((c for c in feasible if c.best), feasible[0] if feasible else None)


def _asked(found: Comparison, cell: Cell) -> SchemeSpec:
    """The scheme as the user types it; options that a budget adds are chosen automatically."""
    return next(row.spec for row in found.rows if any(c is cell for c in row.cells))
