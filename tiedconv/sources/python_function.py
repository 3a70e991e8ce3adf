"""Models that a user's function returns: `package.module:function`."""

from __future__ import annotations

import difflib
import importlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tiedconv.errors import SourceError
from tiedconv.sources.arguments import JSON, image_size
from tiedconv.sources.provider import construct, first_line
from tiedconv.sources.source import Preprocess
from tiedconv.sources.state_dict import load_into

_SPEC = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_function_spec(spec: str) -> bool:
    """Whether a spec has the form `package.module:function`."""
    return _SPEC.fullmatch(spec) is not None


class PythonFunction:
    """A function that returns a model.

    It may have an attribute `preprocess`: a `Preprocess`, or a dict as `Preprocess.to_json` gives.
    """

    config: Mapping[str, JSON] | None = None
    packages: tuple[str, ...] = ()
    published_dtype: str | None = None

    def __init__(self, spec: str, kwargs: Mapping[str, JSON]) -> None:
        self._spec = spec
        self.kwargs: Mapping[str, JSON] = dict(kwargs)
        self._function = _find(spec)

    def build(self) -> nn.Module:
        """What the function returns; raises SourceError if it fails or returns no module."""
        return construct(self._spec, self.kwargs, lambda: self._function(**self.kwargs))

    def pretrained(self) -> nn.Module:
        """The same: the function itself loads weights, if it wants any."""
        return self.build()

    def load(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Loads weights by name."""
        load_into(model, tensors)

    def preprocess(self, model: nn.Module) -> Preprocess | None:
        """The function's attribute `preprocess`, if it has one."""
        stated = getattr(self._function, "preprocess", None)
        if isinstance(stated, dict):
            stated = Preprocess.from_json(stated)
        if not isinstance(stated, Preprocess):
            return None
        return stated.scaled_to(image_size(self.kwargs))


def _find(spec: str) -> Callable[..., Any]:
    module_name, _, name = spec.partition(":")
    try:
        with _current_directory_importable():
            module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may fail in any way
        raise SourceError(
            f"The module {module_name} of {spec} can't be imported "
            f"({type(error).__name__}: {first_line(error)})",
            hint="Run the command where Python can import it, or correct its name",
            code="module-not-imported",
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        near = difflib.get_close_matches(name, [n for n in vars(module) if n[:1] != "_"], n=3)
        raise SourceError(
            f"The module {module_name} has no function {name}",
            hint=f"Similar names: {', '.join(near)}" if near else "Correct its name",
            code="unknown-function",
        )
    found: Callable[..., Any] = function
    return found


@contextmanager
def _current_directory_importable() -> Iterator[None]:
    # An installed command has its own folder on the path, not the one it is called from.
    here = str(Path.cwd())
    if here in sys.path or "" in sys.path:
        yield
        return
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)
