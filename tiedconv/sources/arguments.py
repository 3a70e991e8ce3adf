"""Arguments of models: JSON values, as text from the user or from a file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from tiedconv.errors import SourceError, UserError
from tiedconv.io.plain_file import read_toml

JSON: TypeAlias = bool | int | float | str | list["JSON"] | dict[str, "JSON"] | None

_MOST = 2**20  # bytes of a file of arguments


def parse_model_args(args: Sequence[str]) -> dict[str, JSON]:
    """Reads arguments such as `img_size=32`, `flag=true`, `dims=[1,2]` or `act=gelu`.

    Args:
        args: `name=value` each, a value that is not JSON is taken as text; or a `.toml` file.

    Raises:
        UserError: an argument has no "=", no valid name, or is given twice; a file can't be read.
    """
    parsed: dict[str, JSON] = {}
    for arg in args:
        if "=" not in arg and arg.endswith(".toml"):
            _add(parsed, _of_file(Path(arg)))
            continue
        name, equals, text = arg.partition("=")
        name = name.strip()
        if not equals or not name.isidentifier():
            raise UserError(
                f"The model argument {arg!r} is not of the form name=value",
                hint="Write it as, for example, img_size=32",
                code="malformed-model-argument",
            )
        value: JSON = text
        with suppress(ValueError):
            value = json.loads(text, parse_constant=_not_json)
        _add(parsed, {name: value})
    return parsed


def _add(parsed: dict[str, JSON], more: Mapping[str, JSON]) -> None:
    for name, value in more.items():
        if name in parsed:
            raise UserError(
                f"The model argument {name} is given twice",
                hint="Give it once",
                code="model-argument-repeated",
            )
        parsed[name] = value


def _of_file(path: Path) -> dict[str, JSON]:
    """The arguments of a TOML file: `img_size = 32`."""
    try:
        found = read_toml(path, _MOST)
    except (OSError, ValueError) as error:
        raise UserError(
            f"The model arguments {path} can't be read ({error})",
            hint="Give a TOML file with a line such as img_size = 32 for each",
            code="model-arguments-unreadable",
        ) from None
    odd = [name for name, value in found.items() if not (name.isidentifier() and is_json(value))]
    if odd:
        raise UserError(
            f"The model argument {odd[0]} of {path} is neither a number, a text, a truth value, a "
            "list nor a table of these, or has no valid name",
            hint="Leave it out, or give the model as package.module:function",
            code="malformed-model-argument",
        )
    return found


def is_json(value: object) -> bool:
    """Whether a value can be written as JSON and read back the same."""
    if isinstance(value, list):
        return all(is_json(item) for item in value)
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, (bool, int, str)) or is_object(value)


def is_object(value: object) -> bool:
    """Whether a value is a JSON object."""
    return isinstance(value, dict) and all(
        isinstance(key, str) and is_json(item) for key, item in value.items()
    )


def _not_json(constant: str) -> JSON:
    raise ValueError(f"{constant} is not JSON")


def refuse_arguments(spec: str, kwargs: Mapping[str, JSON], reserved: Iterable[str]) -> None:
    """Refuses arguments that would load weights or files other than those recorded."""
    if taken := sorted(set(kwargs) & set(reserved)):
        raise SourceError(
            f"The argument {taken[0]} of {spec} can't be set",
            "It would load weights that the file does not record",
            "Choose the weights with --weights",
            code="reserved-model-argument",
        )


def image_size(kwargs: Mapping[str, JSON]) -> int | None:
    """The input size that constructor arguments ask for, if any; of a vision tower its own."""
    value = kwargs.get("image_size", kwargs.get("img_size"))
    vision = kwargs.get("vision_config")
    if value is None and isinstance(vision, Mapping):
        value = vision.get("image_size")
    if isinstance(value, list) and value:
        value = value[0]
    return value if type(value) is int else None
