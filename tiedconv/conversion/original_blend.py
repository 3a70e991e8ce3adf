"""Progressive conversion: fine-tuning that begins at the original model.

Each converted weight is `expression + share * D`, with D the original weight minus the expression
at the start. At share 1 the model is the original one to rounding; as the share falls to 0 the
stored tensors take over, and what is left is the compact model.

A conversion first moves the original by exact changes that leave its outputs as they are (units in
another order, heads rotated), and fits that. So the moves are made again here, by the recipe in
the file's history: D against the weights as they came would be the distance between two bases.
Moves follow from the recipe's rules and the weights alone, whatever a budget or images chose.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tiedconv.conversion.symmetry_proof import SymmetryProof
from tiedconv.conversion.tensor_store import MemoryStore
from tiedconv.core.plan import Plan
from tiedconv.errors import TiedconvError, UserError
from tiedconv.families.inspect import ModelInfo, inspect_model
from tiedconv.numerics.symmetries import Allows
from tiedconv.planning.budget import Budget
from tiedconv.planning.drafting import KEPT, Task, draft
from tiedconv.planning.planner import align_weights
from tiedconv.planning.recipe import Recipe, Rule
from tiedconv.runtime.tensors import state_tensors
from tiedconv.runtime.tie import (
    clear_offsets,
    dense_state_dict,
    has_offsets,
    is_tied,
    scale_offsets,
    set_offsets,
    state_of,
)

_HINT = "Fine-tune without --progressive, or convert the model again with this version"


class OriginalBlend:
    """Fades the original out of a compact model; a `tiedconv.training.Blend`.

    Args:
        model: tied. It is not changed before `begin`.
        original: the model that it was made from, not tied.

    Raises:
        UserError: there is no original, it is another model, or its conversion can't be made again.
    """

    def __init__(self, model: nn.Module, original: nn.Module | None) -> None:
        self._model = model
        self._moved: dict[str, Tensor] | None = moved_original(model, original)

    def begin(self) -> None:
        """Makes the model the original one: offsets for the converted weights, the rest set."""
        assert self._moved is not None, "a fading begins once"
        plan = state_of(self._model).plan
        compact = dense_state_dict(self._model)
        offsets = {n: self._moved[n].to(compact[n].device) - compact[n] for n in plan.weights}
        own = self._model.state_dict(keep_vars=True)
        with torch.no_grad():
            for name in plan.kept:
                own[name].copy_(self._moved[name])
        set_offsets(self._model, offsets)
        self._moved = None

    def set(self, share: float) -> None:
        """Sets what is left of the original; 0 is the end of it, and frees its memory."""
        if not has_offsets(self._model):
            return
        if share > 0:
            scale_offsets(self._model, share)
        else:
            clear_offsets(self._model)

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Makes the model the compact one for a while, as it would be written."""
        before = scale_offsets(self._model, 0.0)
        try:
            yield
        finally:
            scale_offsets(self._model, before)


def moved_original(model: nn.Module, original: nn.Module | None) -> dict[str, Tensor]:
    """The original's tensors, moved as they were when the compact model was fitted to them.

    Args:
        model: tied.
        original: the model that it was made from; it is left as it is.

    Returns:
        tensor name to tensor of the original's shape, on the CPU. Those that needed no move may
        be the original's own, not copies.

    Raises:
        UserError: there is no original, it is another model, or its conversion can't be made again.
    """
    state = state_of(model)
    original = _checked(state.plan, original)
    recipe = conversion_recipe(state.history)
    info = inspect_model(original)
    tasks = _same_tasks(info, recipe, state.plan)
    own = {name: t.detach().cpu() for name, t in state_tensors(original).items()}
    allows = recorded_symmetries(state.history) or SymmetryProof(info, original)
    workspace = MemoryStore({n: own[n] for n in info.shapes}, allows=allows).open()
    with torch.no_grad():
        align_weights(tasks, workspace.editor)
    return {name: workspace.aligned(name) for name in info.shapes}


def recorded_symmetries(history: Sequence[Mapping[str, Any]]) -> Allows | None:
    """Those that the conversion used: its images, or its example, may have proven others.

    None where the history says nothing of them.
    """
    entry = next((e for e in history if e.get("step") == "convert"), {})
    used = (entry.get("symmetries") or {}).get("used")
    if not isinstance(used, Mapping):
        return None
    return lambda block, symmetry: block.name in used.get(symmetry, ())


def conversion_recipe(history: Sequence[Mapping[str, Any]]) -> Recipe:
    """The recipe of the conversion that a file's history tells of.

    Raises:
        UserError: it tells of none, or of one that this version does not understand.
    """
    entry = next((e for e in history if e.get("step") == "convert"), {})
    match entry.get("recipe"):
        case {"rules": [*rules], "params": None | str() as params} if rules:
            pass
        case _:
            raise _not_repeatable("the file does not record its recipe", "recipe-missing")
    try:
        return Recipe(tuple(_rule(rule) for rule in rules), Budget(params) if params else None)
    except (TiedconvError, TypeError, ValueError) as error:
        raise _not_repeatable(
            "this version does not understand its recipe", "recipe-unknown"
        ) from error


def _rule(data: Any) -> Rule:
    match data:
        case {"scheme": str(scheme), "include": [*include], "exclude": [*exclude], **options}:
            globs = tuple(map(str, include)), tuple(map(str, exclude))
            return Rule(scheme, {str(k): v for k, v in options.items()}, *globs)
    raise ValueError("a malformed rule")


def _checked(plan: Plan, original: nn.Module | None) -> nn.Module:
    """The original, if it is one."""
    what = code = ""
    if original is None:
        what, code = "there is no teacher", "teacher-missing"
    elif is_tied(original):
        what, code = "the teacher is a compact model", "teacher-compact"
    else:
        info = inspect_model(original)
        shapes = {**plan.kept, **{n: e.shape for n, e in plan.weights.items()}}
        if dict(info.shapes) != shapes or dict(info.aliases) != dict(plan.aliases):
            what, code = "the teacher has another architecture", "teacher-mismatch"
    if what or original is None:
        raise UserError(
            f"--progressive needs the original model as teacher, but {what}",
            "There is nothing to begin from",
            "Pass --teacher auto or the original's weights, or leave --progressive out",
            code=code,
        )
    return original


def _same_tasks(info: ModelInfo, recipe: Recipe, plan: Plan) -> list[Task]:
    """What the recipe makes of the model, with its unmatched matrices or without, as in the plan.

    Raises:
        UserError: it makes something else.
    """
    for view in (info, dataclasses.replace(info, cautious=True)):
        try:
            tasks = draft(view, recipe)
        except TiedconvError as error:
            if view is not info:
                break  # without its unmatched matrices there is nothing
            raise _not_repeatable(f"it fails now ({error.what})", "conversion-fails") from error
        if _are_same_groups(tasks, plan):
            return tasks
    raise _not_repeatable("it gives other groups than the file has", "groups-mismatch")


def _are_same_groups(tasks: Sequence[Task], plan: Plan) -> bool:
    """Whether the tasks share what the plan does.

    Ranks are not compared: no move depends on them. A scheme that leaves the choice open (`auto`)
    need only govern what was converted.
    """
    converted = [g for g in plan.groups if g.scheme != KEPT]
    if any(len(task.scheme.candidates()) > 1 for task in tasks):
        slots = [s for task in tasks for block in task.blocks for s in block.slots.values()]
        return {m.slot.tensor for g in converted for m in g.members} <= {s.tensor for s in slots}
    drafts = {(d.name, d.scheme.name, d.members) for task in tasks for d in task.drafts}
    return drafts == {(g.name, g.scheme, g.members) for g in converted}


def _not_repeatable(why: str, code: str) -> UserError:
    return UserError(
        f"--progressive has to repeat the file's conversion, but {why}",
        "The original weights can't be aligned with the compact ones",
        _HINT,
        code=code,
    )
