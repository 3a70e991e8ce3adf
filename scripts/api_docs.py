"""Write `docs/api.md` from the docstrings of the public API.

python scripts/api_docs.py [--check]
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

from generated_page import write_or_check

import tiedconv

PATH = Path(__file__).parent.parent / "docs" / "api.md"
HEAD = """# Python API

Everything here is importable from `tiedconv`. Errors derive from `tiedconv.TiedconvError`; each
message says what is wrong, what follows, and what to do. This page is made from the docstrings by
`scripts/api_docs.py`.
"""


def main() -> int:
    text = HEAD + "".join(f"\n{section(name)}\n" for name in tiedconv.__all__)
    return write_or_check(PATH, text)


def section(name: str) -> str:
    """Heading, signature and docstring of one public name."""
    thing = getattr(tiedconv, name)
    lines = [f"### `tiedconv.{name}`", ""]
    if isinstance(thing, str):
        return "\n".join([*lines, "The version of this package, as text."])
    if inspect.isfunction(thing):
        signature = re.sub(r"\b(?:[A-Za-z_]\w*\.)+(\w+)", r"\1", str(inspect.signature(thing)))
        # Annotations are texts, and are written without their quotes.
        signature = re.sub(r"(: |-> )(['\"])(.*?)\2(?=[,)]| = |$)", r"\1\3", signature)
        lines += ["```python", f"{name}{signature}", "```", ""]
    return "\n".join([*lines, *body(inspect.getdoc(thing) or "")]).rstrip()


def body(docstring: str) -> list[str]:
    """A docstring with its sections as Markdown lists."""
    lines: list[str] = []
    listing = False
    for line in docstring.splitlines():
        if re.fullmatch(r"(Args|Returns|Raises|Attributes):", line):
            lines += [f"**{line[:-1]}**", ""]
            listing = True
        elif line and not line.startswith(" "):
            listing = False
            lines.append(line)
        elif listing and (match := re.match(r"    (\w[\w, ]*): (.*)", line)):
            lines.append(f"- `{match[1]}`: {match[2]}")
        elif listing and line.startswith("        "):
            lines.append(f"  {line.strip()}")
        else:
            lines.append(line.removeprefix("    ") if listing else line)
    return lines


if __name__ == "__main__":
    sys.exit(main())
