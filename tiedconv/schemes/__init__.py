"""Schemes: how the matrices of a group are stored with fewer parameters.

Each file of this folder that does not begin with an underscore holds one `SCHEME`: a frozen
dataclass whose fields are its options. A new scheme is one new file.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from tiedconv.core.options import current_options
from tiedconv.errors import SchemeError
from tiedconv.schemes._base import Draft, Layout, RankOption, Scheme

__all__ = ["Draft", "Layout", "RankOption", "Scheme", "all_schemes", "make_scheme"]


@functools.cache
def all_schemes() -> dict[str, type[Scheme]]:
    """Every scheme of the folder, by name."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    found = [importlib.import_module(f"{__name__}.{name}").SCHEME for name in names]
    return {scheme.name: scheme for scheme in found}


def make_scheme(name: str, options: Mapping[str, Any]) -> Scheme:
    """The scheme of a name with the given options, former names of options included.

    Raises:
        SchemeError: unknown name, unknown option, or a value of the wrong type.
    """
    schemes = all_schemes()
    if name not in schemes:
        near = difflib.get_close_matches(name, schemes, 1)
        raise SchemeError(
            f"There is no scheme {name!r}",
            hint=(f"Did you mean {near[0]}? " if near else "") + f"Known: {', '.join(schemes)}",
            code="unknown-scheme",
        )
    cls = schemes[name]
    known = {f.name: str(f.type) for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for key, value in current_options(options).items():
        if key not in known:
            raise SchemeError(
                f"Scheme {name} has no option {key!r}",
                hint=f"Its options are: {', '.join(known)}",
                code="unknown-option",
            )
        values[key] = _checked(name, key, known[key], value)
    return cls(**values)


def _checked(scheme: str, key: str, kind: str, value: Any) -> Any:
    """The value, a list as a tuple, if it has the type of the field."""
    if isinstance(value, list):
        value = tuple(value)
    accepted = {
        "bool": isinstance(value, bool),
        "str": isinstance(value, str),
        "int": type(value) is int,
        "float": type(value) in (int, float),
        "tuple[int, ...]": isinstance(value, tuple) and all(type(v) is int for v in value),
    }
    if not any(accepted.get(part.strip(), False) for part in kind.split("|")):
        raise SchemeError(
            f"Option {key}={value!r} of scheme {scheme} has the wrong type",
            hint=f"It takes {kind.replace('tuple[int, ...]', 'a list of whole numbers')}",
            code="wrong-option-type",
        )
    return value
