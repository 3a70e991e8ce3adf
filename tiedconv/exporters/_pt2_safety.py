"""Opening a `.pt2` of a stranger: `torch.export.load` unpickles, and evaluates expressions.

An archive of this kind holds pickles (example inputs, constants), which torch loads as code, and
sizes as text, which sympy evaluates. Both are looked at first; what is not plain data is refused.
Guards are Python text too, which torch would execute when the program runs: they are dropped.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tiedconv.errors import CheckpointError

# Sizes are sums and products of symbols, such as `2*Symbol('s77', integer=True) + 1`.
_EXPRESSION = re.compile(r"(?:[\w\s+\-*/%(),<>=&|~]|\d\.\d*|'\w+')*")
_CALL = re.compile(r"(\w+|[\])'])\s*\(")
_CALLED = frozenset(
    """Symbol Dummy Integer Float Rational One Zero NegativeOne Add Mul Pow Abs Max Min Mod floor
    ceiling Piecewise Eq Ne Lt Le Gt Ge And Or Not Equality Unequality StrictLessThan LessThan
    StrictGreaterThan GreaterThan FloorDiv CeilDiv CeilToInt FloorToInt TruncToInt RoundToInt
    PythonMod CleanDiv ModularIndexing IntTrueDiv FloatTrueDiv FloatPow PowByNatural LShift
    RShift ToFloat Identity TruncToFloat RoundDecimal Where IsNonOverlappingAndDenseIndicator
    """.split()  # noqa: SIM905
)
_MOST_JSON = 512 * 2**20
_TEXT_KEYS = ("expr_str", "as_expr")


def checked_archive(path: Path) -> io.BytesIO:
    """The bytes of an exported program, once nothing in them is code.

    Raises:
        CheckpointError: it holds code (`file-contains-code`).
        ValueError, OSError, zipfile.BadZipFile: it is no archive.
    """
    data = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        raw = _raw_names(archive)
        for member in archive.infolist():
            name = member.filename
            with archive.open(member) as file:
                start = file.read(2)
            # Whatever may be a pickle is tried, but for what torch reads as plain numbers.
            named = name.endswith((".pt", ".pkl", ".pickle"))
            begins = start[:1] == b"\x80" or start == b"PK"
            if named or (begins and name.rpartition("/")[2] not in raw):
                _require_tensors(path, name, archive.read(member))
            if name.endswith(".json"):
                if member.file_size > _MOST_JSON:
                    raise ValueError(f"{name} is larger than {_MOST_JSON:,} bytes")
                _require_plain_sizes(path, name, archive.read(member))
            if name.rpartition("/")[2].startswith("custom_obj"):
                raise _has_code(path, f"it holds the object {name}")
            if name.endswith((".so", ".py", ".pyd", ".dll", ".cubin")):
                raise _has_code(path, f"it holds the program {name}")
    return io.BytesIO(data)


def _raw_names(archive: zipfile.ZipFile) -> frozenset[str]:
    """The files that all lists of the archive call plain numbers, which may begin like pickles."""
    pickled: dict[str, bool] = {}
    for member in archive.infolist():
        if not member.filename.endswith("_config.json") or member.file_size > _MOST_JSON:
            continue
        try:
            for payload in json.loads(archive.read(member)).get("config", {}).values():
                name = str(payload["path_name"])
                pickled[name] = pickled.get(name, False) or payload["use_pickle"] is not False
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{member.filename} lists no tensors") from error
    return frozenset(name for name, is_pickled in pickled.items() if not is_pickled)


def _require_tensors(path: Path, name: str, data: bytes) -> None:
    if not data:  # of a program whose examples were removed
        return
    try:
        torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _has_code(path, f"{name} in it is a pickle of more than tensors") from error
    except Exception as error:  # a damaged pickle may raise anything, and is not opened either
        raise ValueError(f"{name} can't be read") from error


def _require_plain_sizes(path: Path, name: str, data: bytes) -> None:
    for text in _expressions(json.loads(data)):
        called = set(_CALL.findall(text))
        if "__" in text or not _EXPRESSION.fullmatch(text) or not called <= _CALLED:
            raise _has_code(path, f"a size in {name} is no sum or product: {text[:60]!r}")


def _expressions(data: Any) -> Iterator[str]:
    if isinstance(data, dict):
        for key, value in data.items():
            if key in _TEXT_KEYS and isinstance(value, str):
                yield value
            else:
                yield from _expressions(value)
    elif isinstance(data, list):
        for value in data:
            yield from _expressions(value)


def _has_code(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} was refused: {reason}",
        "Opening it would run code that the file holds",
        "Export it again with tiedconv export, whose files hold tensors alone",
        code="file-contains-code",
    )
