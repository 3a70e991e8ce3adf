"""Write `docs/errors.md`: every code of an error, from the calls in the source that raise one.

python scripts/error_docs.py [--check]
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from generated_page import write_or_check

from tiedconv import errors

ROOT = Path(__file__).parent.parent
PATH = ROOT / "docs" / "errors.md"
HEAD = """# Error codes

An error is one line: what is wrong, what follows, what to do, and a code in brackets that stays the same from release
to release. In Python it is `error.code` of a `tiedconv.TiedconvError`. The exit code of a command is 2 for a request that
can't be carried out as given, and 1 for work that started and failed. The most frequent ones are explained in
[troubleshooting](troubleshooting.md).

*Reads* is the beginning of the message, with `…` for names and figures; where a code has several messages, one of them.
This page is made from the source by `scripts/error_docs.py`.

| code | class | reads |
| --- | --- | --- |
"""
CLASSES = {
    name: kind
    for name, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, errors.TiedconvError)
}
CODE = re.compile(r"[a-z0-9]+(-[a-z0-9…]+)+|[a-z]+")


def main() -> int:
    return write_or_check(PATH, page())


def page() -> str:
    """The whole page."""
    rows = (f"| `{c}` | {kind} | {reads} |\n" for c, (kind, reads) in codes().items())
    return HEAD + "".join(rows)


def codes() -> dict[str, tuple[str, str]]:
    """Of each code the class and a message, as far as the source says them in one place."""
    texts = [p.read_text("utf-8") for p in sorted((ROOT / "tiedconv").rglob("*.py"))]
    raising = re.compile(r"\braise |\bcode\b|Error")
    trees = [ast.parse(text) for text in texts if raising.search(text)]
    kept = (ast.Call, ast.Assign, ast.FunctionDef)
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, kept)]
    helpers = dict(h for node in nodes if isinstance(node, ast.FunctionDef) for h in helper(node))
    found: dict[str, list[tuple[str, str]]] = {}
    for node in nodes:
        for code in given(node, helpers):
            found.setdefault(code, []).append(said(node, helpers))
    for name, kind in CLASSES.items():
        if "default_code" in vars(kind):
            found.setdefault(kind.default_code, []).append((name, ""))
    best = {code: max(found[code], key=lambda f: (f[0] != "", f[1] != "")) for code in found}
    kinds = {code: kind or "TiedconvError" for code, (kind, _) in best.items()}
    return {c: (kinds[c], best[c][1] or first_line(kinds[c])) for c in sorted(best)}


def first_line(name: str) -> str:
    """What a class of errors stands for."""
    return (inspect.getdoc(CLASSES[name]) or "").splitlines()[0]


class Helper(NamedTuple):
    """A function that is given a code: where it stands, its default, the class of the error."""

    at: int
    default: list[ast.expr]
    kind: str


def helper(function: ast.FunctionDef) -> Iterator[tuple[str, Helper]]:
    """The name of such a function and what is known of it."""
    names = [argument.arg for argument in function.args.args]
    if "code" in names:
        at = names.index("code")
        without_default = len(names) - len(function.args.defaults)
        default = function.args.defaults[max(at - without_default, 0) :][:1]
        calls = [called(node) for node in ast.walk(function) if isinstance(node, ast.Call)]
        yield function.name, Helper(at, default, next((c for c in calls if c in CLASSES), ""))


def given(node: ast.AST, helpers: dict[str, Helper]) -> Iterator[str]:
    """The codes that a line of the source names."""
    values: list[ast.expr] = []
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
        names = [text_of_name(target) for target in node.targets[0].elts]
        if "code" in names and isinstance(node.value, ast.Tuple):
            values = [node.value.elts[names.index("code")]]
    elif isinstance(node, ast.Call):
        values = [keyword.value for keyword in node.keywords if keyword.arg == "code"]
        at, default, _ = helpers.get(called(node), (len(node.args), [], ""))
        values = values or node.args[at : at + 1] or default
        if not values and called(node) in CLASSES and node.args:
            values = [ast.Constant(CLASSES[called(node)].default_code)]
    for value in (each for v in values for each in alternatives(v)):
        if CODE.fullmatch(text(value)):
            yield text(value)


def alternatives(node: ast.expr) -> list[ast.expr]:
    """Both values of `a if condition else b`."""
    if isinstance(node, ast.IfExp):
        return [*alternatives(node.body), *alternatives(node.orelse)]
    return [node]


def said(node: ast.AST, helpers: dict[str, Helper]) -> tuple[str, str]:
    """The class and the first part of the message, as far as they stand there."""
    name, what = "", ""
    if isinstance(node, ast.Call):
        name = called(node)
        name = name if name in CLASSES else helpers.get(name, Helper(0, [], "")).kind
        what = text(node.args[0]) if node.args else ""
    elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
        what = text(node.value.elts[0])
    what = re.sub(r"…(?:[ ,]*…)*", "…", what)
    readable = len(re.findall(r"[A-Za-z]{2,}", what)) > 1
    what = what.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
    what = re.sub(r"[\[\]]", r"\\\g<0>", what)
    return name, " ".join(what.split()) if readable else ""


def called(call: ast.Call) -> str:
    """The name of the function, whichever module it is read from."""
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return text_of_name(call.func)


def text_of_name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def text(node: ast.expr) -> str:
    """A text of the source, with `…` for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return text(node.left) + text(node.right)
    return "…"


if __name__ == "__main__":
    sys.exit(main())
