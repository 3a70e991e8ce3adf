"""Methods of a tied model that other tools call, and that would write or read the wrong thing.

They are refused with what to do instead. `untie` gives them back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tiedconv.errors import UserError

_HOOK = "_tiedconv_load_hook"
_SAVERS = ("save_pretrained", "push_to_hub")


def watch_tools(model: nn.Module) -> None:
    """Refuse what does not fit a tied model: dense state dicts, and the savers of its library."""
    handle = model.register_load_state_dict_pre_hook(_refuse_dense)  # type: ignore[no-untyped-call]
    model.__dict__[_HOOK] = handle.id
    for name in _SAVERS:
        if hasattr(type(model), name):
            model.__dict__[name] = _Refused(name)


def unwatch_tools(model: nn.Module) -> None:
    """Give the model its own methods back."""
    model._load_state_dict_pre_hooks.pop(model.__dict__.pop(_HOOK, -1), None)
    allow_savers(model)


def allow_savers(model: nn.Module) -> None:
    """Give the model back the savers of its library, which can save it as it is."""
    for name in _SAVERS:
        if isinstance(model.__dict__.get(name), _Refused):
            del model.__dict__[name]


class _Refused:
    """A method that says what to call instead."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *_: Any, **__: Any) -> None:
        raise UserError(
            f"{self._name}() would write the stored tensors of a tied model under names that no "
            "library knows",
            "Nothing was written",
            "Write it with tiedconv.save(model, path); for a dense model call "
            f"tiedconv.untie(model).{self._name}()",
            code="model-is-tied",
        )


def _refuse_dense(
    module: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *_: Any
) -> None:
    """Before a state dict is loaded: it must be of the tied model, not of the original."""
    state: Any = module.__dict__.get("_tiedconv_state")
    if state is None:
        return
    plan = state.plan
    lacks = [name for name in plan.factors if prefix + name not in state_dict]
    dense = [name for name in plan.weights if prefix + name in state_dict]
    if lacks and dense:
        raise UserError(
            f"The state dict is of the original model: it has {dense[0]}, which is computed here, "
            f"and lacks {lacks[0]}",
            "Nothing was loaded",
            "Call tiedconv.untie(model) first and convert it again afterwards, or load the state "
            "dict of the tied model",
            code="state-dict-is-dense",
        )
