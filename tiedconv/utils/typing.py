"""Types that Python's own annotations can't state in one signature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar, cast, overload

from torch import nn

P = ParamSpec("P")
ModelT = TypeVar("ModelT", bound=nn.Module)


class KeepsType(Protocol[P]):
    """Takes a model in memory and returns one of its class, or takes a spec."""

    @overload
    def __call__(self, model: ModelT, /, *args: P.args, **kwargs: P.kwargs) -> ModelT: ...

    @overload
    def __call__(self, model: str, /, *args: P.args, **kwargs: P.kwargs) -> nn.Module: ...


def keeps_type(function: Callable[Concatenate[str | nn.Module, P], nn.Module]) -> KeepsType[P]:
    """The function itself; a type checker knows that it returns the class that it was given."""
    return cast(KeepsType[P], function)
