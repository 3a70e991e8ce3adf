"""What an error advises exists: options on the command line, parameters in Python."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_helpers import World

import tiedconv
from tiedconv.cli import app
from tiedconv.errors import OutputError, UserError
from tiedconv.wording import on_command_line, worded

PACKAGE = Path(tiedconv.__file__).parent
ELSEWHERE = {"loggers", "cli"}  # what only the command line has

OPTION = re.compile(r"(?<![\w-])--([a-z][a-z-]*)")


def messages() -> Iterator[tuple[str, str]]:
    """Each text of the library that names an option, with the file that it stands in."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if ELSEWHERE & set(path.parts) or path.name == "wording.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
            if is_text and "\n" not in node.value and OPTION.search(node.value):
                yield path.name, node.value


def parameters() -> set[str]:
    """Names of the parameters of all that the package offers, and of its records' fields."""
    found = {"base_rank", "shape"}  # of schemes
    for name in tiedconv.__all__:
        value = getattr(tiedconv, name)
        if dataclasses.is_dataclass(value):
            found |= {field.name for field in dataclasses.fields(value)}
        elif callable(value):
            found |= set(inspect.signature(value).parameters)
    return found


MESSAGES = list(messages())
KNOWN = parameters()


def test_there_are_messages() -> None:
    assert len(MESSAGES) > 50


@pytest.mark.parametrize(("file", "text"), MESSAGES)
def test_in_python_a_message_names_parameters(file: str, text: str) -> None:
    said = worded(text)
    whole = re.sub(r"(tiedconv [a-z]+|torchrun|tar) .*", "", said)
    assert not OPTION.search(whole), said
    before = re.sub(r"(tiedconv [a-z]+|torchrun|tar) .*", "", text)
    named = {match[1].replace("-", "_") for match in OPTION.finditer(before)} - {
        "option", "model_arg",
    }  # fmt: skip
    for match in re.finditer(r"(\w+)=", whole):
        assert match[1] in KNOWN | {"ema", "non_finite", "OUT"}, (file, said)
    if named:
        words = set(re.findall(r"\w+", whole))
        assert words & KNOWN, (file, said)


@pytest.mark.parametrize(("file", "text"), MESSAGES)
def test_on_the_command_line_a_message_names_options(file: str, text: str) -> None:
    options = {
        opt.lstrip("-")
        for command in app.registered_commands
        for name in [command.callback.__name__ if command.callback else ""]
        for opt in _options(name)
    }
    with on_command_line():
        assert worded(text) == text
    whole = re.sub(r"(torchrun|tar) .*", "", text)
    for match in OPTION.finditer(whole):
        assert match[1] in options, (file, text)


_found: dict[str, set[str]] = {}


def _options(command: str) -> set[str]:
    import typer

    if not _found:
        group = typer.main.get_command(app)
        for name, each in group.commands.items():  # type: ignore[attr-defined]
            opts = {o for p in each.params for o in (*p.opts, *p.secondary_opts)}
            _found[name] = opts
    return _found[command]


@pytest.mark.parametrize(
    ("typed", "called"),
    [
        ("Pass --force to replace it", "Pass force=True to replace it"),
        ("Use --weights FILE or --weights none", 'Use weights=FILE or weights="none"'),
        ("--scheme lors --params 50%", 'scheme="lors" params="50%"'),
        ("add --model-arg classes=3.", 'add model_args={"classes": 3}.'),
        ("--option groups=all", 'groups="all"'),
        ("--option tie=true --option k=[1,2]", "tie=True k=[1,2]"),
        ("Use --resize 0", "Use preprocess"),
        ("run tiedconv export --to dense", "run tiedconv export --to dense"),
        ("leave --strict out", "leave strict=True out"),
    ],
)
def test_words(typed: str, called: str) -> None:
    assert worded(typed) == called


def test_an_error_speaks_the_language_of_its_reader(world: World) -> None:
    model = tiedconv.load(world.tied)
    with pytest.raises(OutputError) as caught:
        tiedconv.save(model, world.tied)
    assert "force=True" in str(caught.value)
    assert "--force" not in str(caught.value)
    with on_command_line():
        assert "--force" in str(caught.value)


def test_a_plain_message_stays() -> None:
    assert str(UserError("A -- B", hint="Leave it")) == "A -- B. Leave it."
