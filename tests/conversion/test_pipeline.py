"""The pipeline: each stage once, few calls deep, and never more stored than was asked for."""

from __future__ import annotations

import gc
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from calibration_helpers import Images, images_of
from micro import all_micros
from safetensors.torch import save_file

import tiedconv
from tiedconv.calibration import CalibConfig
from tiedconv.commands.convert_file import convert_file
from tiedconv.conversion import stages
from tiedconv.conversion.calibrate import Calibration
from tiedconv.conversion.candidates import by_alignment, fit_candidates, memory_store
from tiedconv.conversion.pipeline import plan_on
from tiedconv.conversion.statistics_cache import StatisticsCache
from tiedconv.errors import PlanError
from tiedconv.families.inspect import inspect_model
from tiedconv.planning import planner
from tiedconv.planning.planner import outlines
from tiedconv.planning.recipe import Recipe
from tiedconv.sources.models import open_model

RESNET = "resnet50"
STAGES = ("inspect.inspect_model", "planner.outlines", "stages.align", "stages.fit", "tie.tie")
PACKAGE = str(Path(tiedconv.__file__).parent)


@contextmanager
def watched(names: tuple[str, ...]) -> Iterator[tuple[Counter[str], Counter[str]]]:
    """Counts calls of the package's functions, and how deep inside each other these lie at most.

    A function that calls itself, to walk an expression, counts once.
    """
    calls: Counter[str] = Counter()
    deepest: Counter[str] = Counter()
    stack: list[tuple[object, int]] = [(None, 0)]

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if not frame.f_code.co_filename.startswith(PACKAGE) or frame.f_code.co_name[0] == "<":
            return
        if event == "call":
            above, depth = stack[-1]
            stack.append((frame.f_code, depth + (above is not frame.f_code)))
            deepest["all"] = max(deepest["all"], stack[-1][1])
            name = f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"
            if name in names:
                calls[name] += 1
                deepest[name] = max(deepest[name], stack[-1][1])
        elif event == "return" and len(stack) > 1:
            stack.pop()

    sys.setprofile(profile)
    try:
        yield calls, deepest
    finally:
        sys.setprofile(None)


def weights_of_resnet(path: Path) -> Path:
    model = open_model(RESNET, weights="none", model_args={"num_classes": 3}).model
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return path


@pytest.mark.parametrize("weights", [pytest.param("none", marks=pytest.mark.slow), "file"])
def test_a_conversion_to_a_file_runs_each_stage_once_and_few_calls_deep(
    weights: str, tmp_path: Path
) -> None:
    given = "none" if weights == "none" else weights_of_resnet(tmp_path / "w.safetensors")
    counted = (*STAGES, "checkpoint_reader.read", "safetensors_file.write_tensors")
    with watched(counted) as (calls, deepest):
        done = convert_file(
            RESNET, Recipe.of("tied"), tmp_path / "m.safetensors", weights=given,
            model_args={"num_classes": 3},
        )  # fmt: skip
    assert {name: calls[name] for name in STAGES} == dict.fromkeys(STAGES, 1)
    assert calls["checkpoint_reader.read"] == 1  # the file's header, when it is read back
    assert deepest["safetensors_file.write_tensors"] <= 6
    assert max(deepest[name] for name in counted) <= 8
    assert deepest["all"] <= 22  # a scheme asks for a symmetry, and a block is run to prove it
    assert done.written is not None
    assert done.written.plan.stored == done.plan.stored


def test_a_dry_run_plans_once_and_reads_no_weights(tmp_path: Path) -> None:
    with watched((*STAGES, "__init__.open_source", "__init__.open_lazily")) as (calls, _):
        convert_file(RESNET, Recipe.of("tied"), None, model_args={"num_classes": 3})
    assert dict(calls) == {"inspect.inspect_model": 1, "planner.outlines": 1}


def test_a_plan_above_the_budget_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = all_micros()["timm-vit"].model()
    planned = plan_on(model, Recipe.of("lowrank", params="50%"))
    least = planner.allocate

    def too_many(drafts: Any, spare: Any, *rest: Any) -> Any:
        return least(drafts, spare.times(100), *rest)

    monkeypatch.setattr(planner, "allocate", too_many)
    with pytest.raises(PlanError) as caught:
        fit_candidates(planned.info, planned.outlines, memory_store(model, planned.info))
    assert caught.value.code == "budget-exceeded"


@pytest.mark.slow
def test_statistics_are_measured_once_for_each_alignment_and_one_set_is_kept() -> None:
    model = all_micros()["timm-vit"].model()
    planned = plan_on(model, Recipe.of("auto", params="50%"))
    sets: list[weakref.ref[Any]] = []
    alive: list[int] = []

    class Watched(Calibration):
        def measure(self, *given: Any, **options: Any) -> Any:
            gc.collect()
            alive.append(sum(known() is not None for known in sets))
            found = super().measure(*given, **options)
            sets.append(weakref.ref(found))
            return found

    data = Images(images_of("timm-vit", 8))
    calib = Watched(data, config=CalibConfig(effort="fast"), device="cpu", workers=0)
    store, cache = memory_store(model, planned.info), StatisticsCache(model, calib, data)
    fit_candidates(planned.info, planned.outlines, store, cache, count=2)
    alignments = {outlined.alignment for outlined in planned.outlines}
    assert len(sets) == len(alignments) < len(planned.outlines)
    assert alive == [0] * len(sets)  # the last set is freed before the next is measured


def test_outlines_that_align_alike_follow_each_other() -> None:
    info = inspect_model(all_micros()["timm-vit"].model())
    recipes = outlines(info, Recipe.of("auto", params="50%"))
    order = by_alignment(recipes)
    assert sorted(order) == list(range(len(recipes)))
    keys = [recipes[i].alignment for i in order]
    assert [k for i, k in enumerate(keys) if i == 0 or keys[i - 1] != k] == list(
        dict.fromkeys(keys)
    )


def test_equal_alignments_align_alike() -> None:
    model = all_micros()["timm-vit"].model()
    planned = plan_on(model, Recipe.of("auto", params="50%"))
    digests: dict[Any, set[str]] = {}
    for outlined in planned.outlines:
        workspace = stages.align(outlined, memory_store(model, planned.info))
        digests.setdefault(outlined.alignment, set()).add(workspace.digest())
    assert all(len(found) == 1 for found in digests.values())
    assert len(set.union(*digests.values())) == len(digests) > 1
