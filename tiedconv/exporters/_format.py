"""What a format is given, and what it returns about the files it wrote."""

from __future__ import annotations

import contextlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tiedconv.errors import CheckpointError, MissingExtra, UserError, first_line
from tiedconv.runtime.dequantize import Integers
from tiedconv.runtime.forward_check import is_out_of_memory
from tiedconv.runtime.outputs import ONLY, chosen, named_outputs
from tiedconv.runtime.tie import state_of

DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
"""Stored dtypes, and the bytes of a value."""

IMAGES, TEXT = "images", "input_ids"
"""Names of the inputs of an exported file."""

LOWERINGS = ("auto", "always", "never")
"""Whether factors are applied one by one: where that is as fast, wherever possible, never."""


@dataclass(frozen=True)
class Job:
    """One export.

    Args:
        model: tied, in evaluation mode; a format may change it.
        images: random images to trace with, `(2, C, H, W)`.
        text: token ids beside them, `(2, tokens)`, for a model that takes both.
        folder: the folder to write into.
        name: file name of the main file.
        outputs: names of the outputs to export; none for a format without a graph.
        dtype: dtype of stored kernels and matrices; the rest stays float32.
        lower: one of `LOWERINGS`.
        opset: ONNX opset, None to choose.
        integers: of the model's quantised matrices, by the names of their floats.
        about: what a user of the file needs to know, such as how images are prepared; plain data.
    """

    model: nn.Module
    images: Tensor
    folder: Path
    name: str
    outputs: tuple[str, ...]
    dtype: str = "float32"
    lower: str = "auto"
    opset: int | None = None
    integers: Mapping[str, Integers] = field(default_factory=dict)
    text: Tensor | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the file is called with, by name."""
        return named_inputs(self.images, self.text)

    @property
    def path(self) -> Path:
        """The main file."""
        return self.folder / self.name


@dataclass(frozen=True)
class Written:
    """What was written.

    Args:
        tensors: number of tensors in the file.
        parameters: values in them.
        weight_bytes: their bytes.
        facts: further figures by name; plain data.
    """

    tensors: int
    parameters: int
    weight_bytes: int
    facts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> Written:
        """The figures of these tensors."""
        listed = list(tensors)
        return cls(len(listed), sum(t.numel() for t in listed), sum(t.nbytes for t in listed))


class Format(ABC):
    """One format to export to.

    `name` is the value of `--to`, `endings` the extensions of its file, `dtypes` those it stores,
    `packages` the packages it needs besides torch, `extra` the extra of tiedconv that installs
    them, `compact` whether each stored tensor is in the file once, `has_graph` whether the file
    runs without the model's class, `opens` whether `opened` loads a file (`verify` measures its
    memory then), `timed` whether `bench` measures it too, `runtime` what runs it, and `lean` the
    option by which that holds one copy of each matrix, which `bench` then measures too.
    """

    name: ClassVar[str]
    endings: ClassVar[tuple[str, ...]]
    dtypes: ClassVar[tuple[str, ...]] = ("float32",)
    packages: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""
    compact: ClassVar[bool] = True
    has_graph: ClassVar[bool] = True
    opens: ClassVar[bool] = False
    timed: ClassVar[bool] = False
    runtime: ClassVar[str] = "torch"
    lean: ClassVar[str] = ""

    def check(self) -> None:
        """Raise MissingExtra if a package that the format needs is not installed."""
        for package in self.packages:
            if importlib.util.find_spec(package) is None:
                raise MissingExtra.of(package, self.extra, f"Export to {self.name}")

    @abstractmethod
    def write(self, job: Job) -> Written:
        """Write the file and its companion files."""

    @abstractmethod
    def tensors(self, path: Path) -> dict[str, Tensor]:
        """Every tensor in a file, by name.

        Raises:
            CheckpointError: the file can't be read.
        """

    def held_bytes(self, path: Path) -> int:
        """Bytes of the tensors in a file, as it stores them.

        Raises:
            CheckpointError: the file can't be read.
        """
        return sum(tensor.nbytes for tensor in self.tensors(path).values())

    def why_not_run(self) -> str | None:
        """Why `run` can't be called here; None if it can."""
        return None

    @abstractmethod
    def run(self, path: Path, images: Tensor, text: Tensor | None = None) -> dict[str, Tensor]:
        """The outputs of a written file, by name.

        Args:
            path: the file.
            images: `(n, C, H, W)`.
            text: token ids, of a model that takes both.

        Raises:
            CheckpointError: the file can't be read.
        """

    def opened(
        self, path: Path, threads: int = 0, *, lean: bool = False
    ) -> Callable[..., dict[str, Tensor]]:
        """A written file, loaded: what it is called with to its outputs. Of formats that open.

        Args:
            path: the file.
            threads: of the runtime, 0 for its own choice.
            lean: hold one copy of each matrix, of formats that are `lean`.

        Raises:
            CheckpointError: the file can't be read.
        """
        raise NotImplementedError

    def write_plain(
        self, model: nn.Module, images: Tensor, path: Path, text: Tensor | None = None
    ) -> None:
        """Write a plain model in the same way: the baseline of `bench`. Of formats that are timed.

        Args:
            model: plain, in evaluation mode.
            images: `(2, C, H, W)`.
            path: the file to write.
            text: token ids beside them, of a model that takes both.
        """
        raise NotImplementedError


class Outputs(nn.Module):
    """A model from images to some of its outputs, taken out of its output object.

    Args:
        model: of any output that `named_outputs` knows.
        names: of the outputs.
        form: what several are given as: `dict` or `tuple`. A single one is given as it is, but in a
            dict if it has a name that a tensor alone would not get.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], form: type) -> None:
        super().__init__()
        self.model, self._names, self._form = model, tuple(names), form

    def forward(self, images: Tensor, text: Tensor | None = None) -> Any:
        """Images `(n, C, H, W)`, and token ids of a model that takes both, to the outputs."""
        found = chosen(named_outputs(called(self.model, images, text)), self._names)
        if len(found) == 1 and (self._form is tuple or ONLY in found):
            return next(iter(found.values()))
        return found if self._form is dict else tuple(found.values())


def called(model: Callable[..., Any], images: Tensor, text: Tensor | None = None) -> Any:
    """What a model returns for images, and for token ids where it takes both."""
    return model(images) if text is None else model(pixel_values=images, input_ids=text)


def named_inputs(images: Tensor, text: Tensor | None) -> dict[str, Tensor]:
    """The inputs of an exported file, by name. Of a model of text alone the first is its text."""
    if not images.is_floating_point():
        return {TEXT: images}
    return {IMAGES: images} if text is None else {IMAGES: images, TEXT: text}


@contextlib.contextmanager
def refusals(tool: str, instead: str) -> Iterator[None]:
    """Turn what a converter raises into an error of the user's model; not out of memory, nor disk.

    Args:
        tool: the converter, such as "coremltools".
        instead: formats to export to, such as "--to pt2".

    Raises:
        UserError: `model-not-exportable`.
    """
    try:
        yield
    except Exception as error:  # tracing runs the model's code: no common base
        cause = error.__cause__
        if cause is not None and is_out_of_memory(cause):
            raise cause from None
        if isinstance(error, OSError | UserError) or is_out_of_memory(error):
            raise
        raise UserError(
            f"{tool} can't take this model ({type(error).__name__}: {first_line(error)})",
            "Nothing was written",
            f"Export it with {instead}",
            code="model-not-exportable",
        ) from error


def unreadable(path: Path, expected: str, error: Exception) -> CheckpointError:
    """The error for an exported file that a library can't read.

    Args:
        path: the file.
        expected: what it should be, such as "an ONNX file".
        error: what the library raised.
    """
    return CheckpointError(
        f"{path} can't be read as {expected} ({first_line(error)})",
        hint="Export it again",
        code="file-damaged",
    )


def is_weight(name: str, shape: Sequence[int], is_float: bool) -> bool:
    """Whether a tensor is stored in the narrower dtype: a matrix or a kernel, of floats."""
    is_matrix = name.startswith("tied/") or name.endswith("weight")
    return is_float and is_matrix and sum(n > 1 for n in shape) >= 2


def stored_bytes(model: nn.Module, dtype: str) -> int:
    """The bytes of a tied model's tensors, each counted once, with weights of this dtype.

    Args:
        model: tied.
        dtype: one of `DTYPES`.
    """
    plan = state_of(model).plan
    own = model.state_dict()
    total = 0
    for name in plan.tensors:
        tensor = own[name]
        size = tensor.element_size()
        if is_weight(name, tensor.shape, tensor.is_floating_point()):
            size = min(size, DTYPES[dtype])
            if dtype == "int8":
                total += 4 * tensor.shape[0]  # a scale for each row
        total += tensor.numel() * size
    return total


def constant_bytes(model: nn.Module) -> int:
    """The bytes of tensors that a model computes when it is built, and that no file holds.

    As sinusoidal positions: a graph holds them beside what is stored.
    """
    state = model.state_dict(keep_vars=True)
    stored = {t.untyped_storage().data_ptr() for t in state.values() if isinstance(t, Tensor)}
    own = (t for m in model.modules() for t in [*vars(m).values(), *m._buffers.values()])
    found = {t.untyped_storage().data_ptr(): t for t in own if isinstance(t, Tensor)}
    return sum(t.nbytes for place, t in found.items() if place not in stored)


def random_images(*shape: int) -> Tensor:
    """The same random images, or videos, each time: two of a shape such as `(C, H, W)`."""
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
