"""Imports a module of ours when one of another library is imported, and never that one itself."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def when_imported(name: str, module: str) -> None:
    """Import `module` once `name` is imported; at once if it is already.

    Args:
        name: a module of another library, such as `transformers.quantizers.auto`.
        module: of this package.
    """

    def call() -> None:
        importlib.import_module(module)

    if name in sys.modules:
        call()
    elif not any(isinstance(f, _Finder) and f.name == name for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder(name, call))


class _Finder(MetaPathFinder):
    """Finds one module as the others do, and has it followed by a call."""

    def __init__(self, name: str, call: Callable[[], None]) -> None:
        self.name, self._call = name, call

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        found = find_spec(fullname)
        if found is not None and found.loader is not None:
            found.loader = _Followed(found.loader, self._call)
        return found


class _Followed(Loader):
    def __init__(self, loader: Loader, call: Callable[[], None]) -> None:
        self._loader, self._call = loader, call

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._call()
