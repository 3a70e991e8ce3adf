"""The verb `plan`: what each scheme stores of a model at each budget, side by side.

Without images it takes no weights: sizes and multiply-adds follow from shapes. With images each
cell is fitted in the Fisher-weighted error (see `tiedconv.numerics.kfac_metric`), and the error of
the fit estimates the KL divergence of the converted model's outputs from the original's, before any
block-wise reconstruction or fine-tuning.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tiedconv.commands.compare_bytes import ByteCell, compare_bytes
from tiedconv.conversion.calibrate import Calibration, Images
from tiedconv.conversion.cost_estimate import CostEstimator, Sizes
from tiedconv.conversion.pipeline import original_bytes
from tiedconv.conversion.sample_inputs import calibration_samples
from tiedconv.conversion.workload import count_macs
from tiedconv.core.plan import Plan
from tiedconv.errors import NothingToConvert, RecipeError
from tiedconv.families.inspect import inspect_model
from tiedconv.planning.budget import Budget
from tiedconv.planning.coverage import Coverage, coverage
from tiedconv.planning.drafting import draft
from tiedconv.planning.planner import alternatives, outline
from tiedconv.planning.rank_allocation import has_rank_options, with_least
from tiedconv.planning.recipe import Recipe, Rule
from tiedconv.schemes import all_schemes, make_scheme
from tiedconv.sources import AS_PUBLISHED, Preprocess, Reading
from tiedconv.sources.models import open_model
from tiedconv.sources.published_weights import Weights

BUDGETS = ("70%", "50%", "30%")
BYTES = 4
"""Of a parameter, in float32."""

OnFit = Callable[[int, int, str], None]


@dataclass(frozen=True)
class SchemeSpec:
    """A scheme with the options that differ from its defaults."""

    scheme: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The scheme and its options in few words, such as `shared groups=all`."""
        return " ".join([self.scheme, *self._settings()])

    @property
    def flags(self) -> tuple[str, ...]:
        """How `tiedconv convert` is asked for it."""
        options = [word for setting in self._settings() for word in ("--option", setting)]
        return ("--scheme", self.scheme, *options)

    def recipe(self, budget: Budget | None = None) -> Recipe:
        """Of one rule, with a budget or without."""
        rules = (Rule(self.scheme, self.options),)
        if budget is not None and budget.of == "macs":
            return Recipe(rules, macs=budget)
        return Recipe(rules, budget)

    def _settings(self) -> list[str]:
        return [
            f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in self.options.items()
        ]


@dataclass(frozen=True)
class Cell:
    """One scheme at one budget.

    Args:
        budget: as it was asked for.
        of: of what: `params` or `macs`.
        stored: parameters, None if the budget can't be met.
        share: fraction of the original's parameters, 0 to 1.
        bytes: of the parameters, in float32.
        macs: multiply-adds of a forward pass, each layer in the form that takes fewest; None if
            they are not known.
        macs_share: fraction of the original's multiply-adds, 0 to 1.
        how: the scheme taken, which for small budgets may have an option of its own.
        cost: estimated KL divergence from the original's outputs, in nats for each image.
        best: whether no other scheme at this budget has a lower cost.
    """

    budget: str
    of: str = "params"
    stored: int | None = None
    share: float | None = None
    bytes: int | None = None
    macs: int | None = None
    macs_share: float | None = None
    how: SchemeSpec | None = None
    cost: float | None = None
    best: bool = False


@dataclass(frozen=True)
class Row:
    """A scheme at every budget.

    Args:
        spec: the scheme as it was asked for.
        smallest: the fewest parameters that it can store.
        share: the same as a fraction of the original's parameters.
        cells: one for each budget.
        fewest_macs: the fewest multiply-adds that it can take; None if they are not known.
        macs_share: the same as a fraction of the original's.
    """

    spec: SchemeSpec
    smallest: int
    share: float
    cells: tuple[Cell, ...]
    fewest_macs: int | None = None
    macs_share: float | None = None


@dataclass(frozen=True)
class Fixed:
    """A scheme of one size, with no budget: figures as in `Cell`."""

    spec: SchemeSpec
    stored: int
    share: float
    cost: float | None = None
    bytes: int | None = None
    macs: int | None = None
    macs_share: float | None = None


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Args:
        model: its spec.
        original: its parameters.
        budgets: as they were asked for.
        rows: schemes that a budget can size.
        fixed: schemes that have one size.
        unfit: schemes that find nothing to convert.
        images: that the costs were measured on, None without any.
        skipped: images that could not be read.
        seconds: time taken.
        coverage: how much of the model lies in matrices that can be converted.
        macs: multiply-adds of the original's forward pass; None where it runs on no input that
            was tried.
        inputs: shapes of that input.
        byte_cells: the plans for each budget of bytes.
    """

    model: str
    original: int
    budgets: tuple[str, ...]
    rows: tuple[Row, ...]
    fixed: tuple[Fixed, ...]
    unfit: tuple[str, ...]
    images: int | None
    skipped: int
    seconds: float
    coverage: Coverage
    macs: int | None = None
    inputs: tuple[tuple[int, ...], ...] = ()
    byte_cells: tuple[ByteCell, ...] = ()


def compare(
    model: str | nn.Module,
    budgets: Sequence[str] = BUDGETS,
    *,
    macs: Sequence[str] = (),
    bytes: Sequence[str] = (),
    calib: Images | Calibration | None = None,
    weights: Weights = "default",
    reading: Reading = AS_PUBLISHED,
    model_args: Mapping[str, Any] | None = None,
    preprocess: Callable[[Preprocess], Preprocess] | None = None,
    seed: int = 0,
    on_fit: OnFit | None = None,
) -> Comparison:
    """Every scheme at every budget: exact sizes, and with images what each would cost.

    Args:
        model: a model, which is left as it is, or its spec, such as `resnet50`.
        budgets: percentages of the original such as `50%`, or numbers of parameters such as `12M`.
        macs: likewise of multiply-adds; columns after those of `budgets`.
        bytes: of files, such as `10%` or `2MB`: how many bits each number gets.
        calib: images without labels to estimate costs by: a folder, a data set, or a
            `Calibration` that says how many.
        weights: for a spec: `default`, `none`, or a file. Without images they are not used, but
            a file must fit the model.
        reading: which weights of a file, and what to do where they are not finite.
        model_args: arguments of the model's constructor, for a spec.
        preprocess: changes how images are prepared.
        seed: of random weights.
        on_fit: called with (fits done, fits in all, what comes next).

    Raises:
        RecipeError: a budget that is none.
        BudgetError: multiply-adds can't be counted, and a budget of them was given.
        NothingToConvert: no scheme finds anything in this model.
        UserError: a model or folder that can't be used.
    """
    start = time.perf_counter()
    wanted = _budgets(budgets, macs, bytes)
    if calib is not None and not isinstance(calib, Calibration):
        calib = Calibration(calib, images=256)
    spec = model if isinstance(model, str) else ""
    opened = open_model(
        model,
        weights=None if calib is None and weights in ("default", "none") else weights,
        reading=reading,
        lazy=calib is None,
        model_args=model_args,
        preprocess=preprocess,
        seed=seed,
    )
    workload = count_macs(opened.model, opened.source, calib=calib)
    sizes = Sizes(dataclasses.replace(inspect_model(opened.model), workload=workload))
    # Without images a conversion takes matrices that match no other only where it must.
    careful = None if calib is not None else Sizes(dataclasses.replace(sizes.info, cautious=True))
    rows, fixed, unfit = _sizes(sizes, careful, wanted)
    images, skipped = None, 0
    size = original_bytes(sizes.info, opened.source)
    if calib is None:
        byte_cells = compare_bytes(sizes.info, bytes, size, None)
    else:
        with calibration_samples(opened.model, calib, opened.source) as data:
            estimator = CostEstimator(opened.model, sizes.info, calib, data)
            byte_cells = compare_bytes(sizes.info, bytes, size, estimator, on_fit)
            rows, fixed = _estimated(sizes, estimator, rows, fixed, on_fit)
        images, skipped = estimator.images, estimator.skipped
    seconds = time.perf_counter() - start
    labels = tuple(_label(budget.text, budget.of) for budget in wanted)
    return Comparison(
        spec, sizes.original, labels, rows, fixed, unfit, images, skipped,
        seconds, coverage(sizes.info), None if workload is None else workload.total,
        () if workload is None else workload.inputs, byte_cells,
    )  # fmt: skip


def _label(budget: str, of: str) -> str:
    """A budget's column."""
    return budget if of == "params" else f"{budget} macs"


def _budgets(
    params: Sequence[str], macs: Sequence[str], bytes_: Sequence[str]
) -> list[Budget]:  # fmt: skip
    found = [
        Budget(text.strip(), of)
        for of, texts in (("params", params), ("macs", macs))
        for text in dict.fromkeys(texts)
        if text.strip()
    ]
    if not found and not bytes_:
        raise RecipeError(
            "No budget was given",
            "There is nothing to compare",
            "Write it as 70%,50%,30%",
            code="budget-missing",
        )
    return found


def _sizes(
    sizes: Sizes, careful: Sizes | None, budgets: Sequence[Budget]
) -> tuple[tuple[Row, ...], tuple[Fixed, ...], tuple[str, ...]]:
    """All schemes, without weights."""
    rows: list[Row] = []
    fixed: list[Fixed] = []
    unfit: list[str] = []
    refused: NothingToConvert | None = None
    for scheme in all_schemes():
        try:
            sizable, size = _properties(sizes, scheme)
        except NothingToConvert as error:
            refused = error
            unfit.append(scheme)
            continue
        if sizable:
            rows.append(_row(sizes, careful, SchemeSpec(scheme), budgets))
        if size:
            fixed += _fixed(sizes, scheme)
    if refused is not None and not rows and not fixed:
        raise refused
    return tuple(rows), tuple(fixed), tuple(unfit)


def _properties(sizes: Sizes, scheme: str) -> tuple[bool, bool]:
    """Whether a budget can size a scheme, and whether it has a size of its own without one."""
    made = make_scheme(scheme, {})
    drafts = [d for task in draft(sizes.info, Recipe.of(scheme)) for d in task.drafts]
    is_open = len(made.candidates()) > 1
    sizable = is_open or bool(made.alternatives()) or any(map(has_rank_options, drafts))
    if is_open:
        return sizable, False
    # Where the defaults spend nothing on ranks, what is stored is the scheme's own form.
    bare = [d.scheme.layout(d.shapes).factors for d in with_least(drafts)]
    return sizable, bare == [d.scheme.layout(d.shapes).factors for d in drafts]


def _row(sizes: Sizes, careful: Sizes | None, spec: SchemeSpec, budgets: Sequence[Budget]) -> Row:
    cells: list[Cell] = []
    for budget in budgets:
        found = ((s, s.feasible(spec.recipe(budget))) for s in (careful, sizes) if s)
        of, feasible = next(((s, f) for s, f in found if f), (sizes, []))
        cell = Cell(budget.text, budget.of)
        if feasible:
            plan = outline(of.info, feasible[0]).plan
            figures = _figures(sizes, plan)
            cell = dataclasses.replace(cell, how=_spec_of(feasible[0]), **figures)
        cells.append(cell)
    tried = alternatives(spec.recipe(Budget("100%")))
    smallest = min(s for r in tried if (s := sizes.smallest(r)) is not None)
    fewest = min((n for r in tried if (n := sizes.fewest_macs(r)) is not None), default=None)
    return Row(
        spec, smallest, smallest / sizes.original, tuple(cells), fewest, _macs_share(sizes, fewest)
    )


def _figures(sizes: Sizes, plan: Plan) -> dict[str, Any]:
    """What a plan takes."""
    macs = sizes.macs(plan)
    return {
        "stored": plan.stored,
        "share": plan.stored / sizes.original,
        "bytes": BYTES * plan.stored,
        "macs": macs,
        "macs_share": _macs_share(sizes, macs),
    }


def _macs_share(sizes: Sizes, macs: int | None) -> float | None:
    work = sizes.info.workload
    return None if macs is None or work is None else macs / work.total


def _fixed(sizes: Sizes, scheme: str) -> list[Fixed]:
    """A scheme at its defaults and at what takes it further down, each size once."""
    found: dict[int, Fixed] = {}
    for options in ({}, *all_schemes()[scheme].smaller_options):
        spec = SchemeSpec(scheme, options)
        plan = outline(sizes.info, spec.recipe()).plan
        found.setdefault(plan.stored, Fixed(spec, **_figures(sizes, plan)))
    return list(found.values())


def _spec_of(recipe: Recipe) -> SchemeSpec:
    return SchemeSpec(recipe.rules[0].scheme, recipe.rules[0].options)


def _estimated(
    sizes: Sizes,
    estimator: CostEstimator,
    rows: Sequence[Row],
    fixed: Sequence[Fixed],
    on_fit: OnFit | None,
) -> tuple[tuple[Row, ...], tuple[Fixed, ...]]:
    """The same with sizes as they are fitted, and costs."""
    wanted = [
        recipe
        for row in rows
        for cell in row.cells
        for recipe in sizes.feasible(row.spec.recipe(Budget(cell.budget, cell.of)))
    ] + [f.spec.recipe() for f in fixed]
    each = estimator.in_order(wanted)
    for done, recipe in enumerate(each):
        given = recipe.budget or recipe.macs
        budget = f" at {given.text} of the {given.what}" if given else ""
        if on_fit is not None:
            on_fit(done, len(each), _spec_of(recipe).name + budget)
        estimator.estimate(recipe)
    costs = [estimator.estimate(f.spec.recipe()).cost for f in fixed]
    return tuple(_marked([_estimated_row(sizes, estimator, row) for row in rows])), tuple(
        dataclasses.replace(f, cost=cost) for f, cost in zip(fixed, costs, strict=True)
    )


def _estimated_row(sizes: Sizes, estimator: CostEstimator, row: Row) -> Row:
    cells: list[Cell] = []
    for cell in row.cells:
        wanted = row.spec.recipe(Budget(cell.budget, cell.of))
        found = [estimator.estimate(r) for r in sizes.feasible(wanted)]
        if found:
            best = min(found, key=lambda e: e.cost)
            figures = _figures(sizes, best.plan)
            how, cost = _spec_of(best.recipe), best.cost
            cell = dataclasses.replace(cell, how=how, cost=cost, **figures)
        cells.append(cell)
    return dataclasses.replace(row, cells=tuple(cells))


def _marked(rows: Sequence[Row]) -> list[Row]:
    """The rows with the lowest cost of each budget marked."""
    lowest: dict[tuple[str, str], float] = {}
    for cell in (c for row in rows for c in row.cells):
        if cell.cost is not None:
            at = cell.of, cell.budget
            lowest[at] = min(cell.cost, lowest.get(at, math.inf))

    def marked(cell: Cell) -> Cell:
        best = cell.cost is not None and cell.cost == lowest[cell.of, cell.budget]
        return dataclasses.replace(cell, best=best)

    return [dataclasses.replace(r, cells=tuple(map(marked, r.cells))) for r in rows]
