"""The lines that load a compact file, in Python and on the command line."""

from __future__ import annotations

import shlex

from tiedconv.sources import Source
from tiedconv.sources.python_function import is_function_spec

_LIBRARIES = {"timm": "timm", "hf": "transformers"}


def python_lines(where: str, source: Source | None) -> list[str]:
    """Python that loads a model and the transform of its images.

    Args:
        where: a file, or `hub:USER/NAME`.
        source: that the file records; None for a model that was in memory.
    """
    argument = ""
    if source is None or not source.spec:
        argument = ", model=YourModel()"
    elif _names_a_function(source):
        argument = ", trust_code=True"
    lines = ["import tiedconv", "", f"model = tiedconv.load({where!r}{argument})"]
    if source is not None and source.preprocess is not None:
        lines.append(f"prepare = tiedconv.transform({where!r})  # from a PIL image to a tensor")
    return lines


def shell_lines(file: str, source: Source | None) -> list[str]:
    """Commands that check a file and export it; none for a model that was in memory."""
    if source is None or not source.spec:
        return []
    trust = " --trust-code" if _names_a_function(source) else ""
    name = f"./{file}" if file.startswith("-") else file
    exported = name.removesuffix(".safetensors") + ".onnx"
    return [
        f"tiedconv verify {shlex.quote(name)}{trust}",
        f"tiedconv export {shlex.quote(name)} -o {shlex.quote(exported)}{trust}",
    ]


def library_of(source: Source | None) -> str:
    """The library that holds the model's class, besides torchvision; "" for none."""
    kind, colon, _ = (source.spec if source else "").partition(":")
    return _LIBRARIES.get(kind, "") if colon else ""


def _names_a_function(source: Source) -> bool:
    return is_function_spec(source.spec) and not library_of(source)
