"""Messages name options as the command line has them; in Python they name parameters instead."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from contextvars import ContextVar

_on_command_line: ContextVar[bool] = ContextVar("on_command_line", default=False)

_NAMES = {
    "distill": "distill_weight",
    "image_size": "preprocess",
    "resize": "preprocess",
    "runtime": "runtimes",
    "bn_batches": "bn_recalibrate",
}
"""Options whose parameter has another name."""

_SWITCHES = {"force", "resume", "strict", "trust_code", "unlabelled", "compile"}
_OF_READING = {"ema", "no_ema", "non_finite"}

_OPTION = re.compile(
    r"(?<![\w-])--([a-z][a-z-]*)"
    # A value: a placeholder, a number, NAME=VALUE, or one of the words that options take.
    r"(?:[ =]((?:[A-Z][A-Z_]+|\d[\d.%]*|\w+=(?:\[[^\]]*\]|[A-Z]+,[A-Z]+|[^\s,;)]*[^\s,;).])"
    r"|(?<=--scheme )[a-z][a-z-]*|auto|none|cpu|cuda"
    r"|off|zero|dense|pt2|onnx|fsdp|flip|imagenet|position)(?![\w=-])))?"
)
# What is typed whole, on any command line, and is not for Python to say otherwise.
_COMMAND = re.compile(r"((?:tiedconv [a-z]+|torchrun|tar) [^();:]*?--[^();:]*)")


@contextlib.contextmanager
def on_command_line() -> Iterator[None]:
    """Within it messages name options: `--force` rather than `force=True`."""
    token = _on_command_line.set(True)
    try:
        yield
    finally:
        _on_command_line.reset(token)


def worded(text: str) -> str:
    """A message as its reader knows the options: as they are typed, or as parameters.

    Args:
        text: names options as they are typed.
    """
    if _on_command_line.get() or "--" not in text:
        return text
    parts = _COMMAND.split(text)  # commands are at odd places
    return "".join(part if i % 2 else _OPTION.sub(_parameter, part) for i, part in enumerate(parts))


def _parameter(match: re.Match[str]) -> str:
    option, value = match[1].replace("-", "_"), match[2]
    if option == "option" and value:
        name, _, given = value.partition("=")
        return f"{name}={_literal(given)}"
    if option == "model_arg" and value:
        name, _, given = value.partition("=")
        return f'model_args={{"{name}": {_literal(given)}}}'
    if option in _OF_READING:
        name = option.removeprefix("no_")
        chosen = str(option == "ema") if name == "ema" else repr(value or "zero")
        return f"reading=Reading({name}={chosen})".replace("'", '"')
    name = _NAMES.get(option, option)
    if name == "preprocess":
        return name  # a function, which no value describes
    if option in _SWITCHES:
        return f"{name}=True"
    if value is None:
        return name
    return f"{name}={_literal(value)}"


def _literal(value: str) -> str:
    """A value as Python writes it; placeholders and lists stay."""
    if value in ("true", "false"):
        return value.capitalize()
    return value if re.fullmatch(r"[A-Z_,]+|[\d.]+|\[.*\]", value) else f'"{value}"'
