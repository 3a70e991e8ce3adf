"""What all providers of models share: their interface, and errors in one form."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from tiedconv.errors import SourceError, TiedconvError
from tiedconv.sources.arguments import JSON
from tiedconv.sources.source import Preprocess

_LONGEST = 200  # characters: some libraries list all known names in one line


class Provider(Protocol):
    """One named model of one library, with its constructor's arguments."""

    @property
    def kwargs(self) -> Mapping[str, JSON]:
        """The arguments that build it, those that the user left out included where they matter."""

    @property
    def config(self) -> Mapping[str, JSON] | None:
        """What is needed besides to build it offline, if anything."""

    @property
    def packages(self) -> tuple[str, ...]:
        """The packages it is built with, whose versions are recorded."""

    @property
    def published_dtype(self) -> str | None:
        """`float16` or `bfloat16` where the published weights are in it."""

    def build(self) -> nn.Module:
        """The model, with whatever initialisation is in force."""

    def pretrained(self) -> nn.Module:
        """The model with its published weights, fetched if need be."""

    def load(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Loads weights that the user has given into what `build` returned."""

    def preprocess(self, model: nn.Module) -> Preprocess | None:
        """How images are prepared for it, if the library says so."""


def construct(spec: str, kwargs: Mapping[str, JSON], constructor: Callable[[], Any]) -> nn.Module:
    """Calls `constructor`, and raises the library's errors as errors of this package.

    Raises:
        SourceError: an argument is unknown, or the library refuses a value, or it does not
            return a module.
    """
    try:
        model = constructor()
    except TiedconvError:
        raise
    except TypeError as error:
        found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if found is None:
            raise _refused(spec, kwargs, error) from error
        raise SourceError(
            f"{spec} takes no argument {found[1]}",
            "The model can't be built",
            "Correct or leave out this model argument",
            code="unknown-model-argument",
        ) from error
    except Exception as error:  # model libraries raise anything, from KeyError to AssertionError
        raise _refused(spec, kwargs, error) from error
    if not isinstance(model, nn.Module):
        raise SourceError(
            f"{spec} returned a {type(model).__name__}, not a torch.nn.Module",
            "There is nothing to convert",
            "Return the model itself",
            code="not-a-module",
        )
    return model


def _refused(spec: str, kwargs: Mapping[str, JSON], error: Exception) -> SourceError:
    given = ", ".join(f"{name}={value!r}" for name, value in kwargs.items())
    return SourceError(
        f"{spec} can't be built with {given[: 5 * _LONGEST] or 'no arguments'} "
        f"({type(error).__name__}: {first_line(error)})",
        hint="Check the model arguments against the library's documentation",
        code="model-not-built",
    )


def unknown_model(spec: str, name: str, known: Iterable[str], prefix: str = "") -> SourceError:
    """The error for a model that a library does not have, with the nearest names it has."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    meant = ", ".join(prefix + candidate for candidate in near)
    remedy = "Give a torchvision name, timm:NAME, hf:NAME or package.module:function"
    if name.endswith((".safetensors", ".pth", ".pt", ".bin")):
        return SourceError(
            f"{spec!r} is the name of a file, not of a model",
            hint="Name the model, and pass its weights with --weights FILE",
            code="file-as-model",
        )
    if near:
        remedy = f"Similar names: {meant}"
    return SourceError(f"Unknown model {spec!r}", hint=remedy, code="unknown-model")


def is_download_error(error: BaseException) -> bool:
    """Whether an error comes from the network or from the libraries that use it."""
    roots = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
    network = {"huggingface_hub", "httpx", "requests", "urllib3", "http"}
    return isinstance(error, OSError) or bool(roots & network) or "invalid hash" in str(error)


def not_downloaded(spec: str, error: BaseException, reason: str = "") -> SourceError:
    """The error for published weights not fetched; `reason` replaces the text of `error`."""
    return SourceError(
        f"The pretrained weights of {spec} could not be downloaded ({reason or first_line(error)})",
        hint="Download them on a machine with a network and pass --weights FILE, "
        "or try the command with --weights none",
        code="download-failed",
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not empty, or its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        lines[0] += " " + lines[1]
    return lines[0][:_LONGEST].rstrip(". ") if lines else type(error).__name__
