"""The one way to a model: `open_model` takes a spec, a compact file or a module."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

import tiedconv.sources as sources
from tiedconv.errors import CheckpointError, UserError
from tiedconv.integrations import let_others_save
from tiedconv.io.checkpoint_reader import Checkpoint, read
from tiedconv.io.install import install
from tiedconv.io.safetensors_file import SafetensorsFile
from tiedconv.runtime.finite import check_finite
from tiedconv.runtime.forward_check import check_size
from tiedconv.runtime.tie import is_tied, state_of
from tiedconv.sources import LazyWeights, Preprocess, Reading, Source
from tiedconv.sources.in_memory import source_in_memory
from tiedconv.sources.published_weights import Weights, with_weights_named
from tiedconv.sources.python_function import is_function_spec
from tiedconv.sources.repository import local
from tiedconv.sources.size_guard import bounded

PreprocessChange = Callable[[Preprocess], Preprocess]
"""Another way to prepare images, from the model's own."""


@dataclass(frozen=True)
class OpenedModel:
    """A model, and where it came from.

    Args:
        model: in evaluation mode, on the CPU. Before `load` its parameters may be on the meta
            device; names, shapes and modules are those of the loaded model.
        source: where it came from, with the preprocessing that was asked for.
        tensors: its weights, to be read one at a time; None if they can't be read that way.
    """

    model: nn.Module
    source: Source
    tensors: LazyWeights | None = None
    _load: Callable[[], tuple[nn.Module, Source]] | None = field(default=None, repr=False)

    def load(self) -> OpenedModel:
        """The same with all weights in memory.

        Raises:
            SourceError, WeightsError: as `open_model`.
        """
        if self._load is None:
            return self
        model, source = self._load()
        return OpenedModel(model, dataclasses.replace(source, preprocess=self.source.preprocess))


def open_model(
    model: str | Path | nn.Module,
    *,
    weights: Weights | None = "default",
    model_args: Mapping[str, Any] | None = None,
    preprocess: PreprocessChange | None = None,
    seed: int = 0,
    reading: Reading = sources.AS_PUBLISHED,
    lazy: bool = False,
    compact: bool = False,
    trust_code: bool = False,
) -> OpenedModel:
    """Open a model: one in memory, one named by a spec, or the model of a compact file.

    Args:
        model: a module, a spec such as `resnet50` or `timm:vit_tiny_patch16_224`, or, with
            `compact`, a compact file.
        weights: for a spec: `default`, `none` (random), a file, an index of shards, a folder with
            one of these, or published weights of torchvision, see `published_weights`; None for
            names and shapes alone.
        model_args: arguments of the model's constructor, for a spec.
        preprocess: changes how images are prepared.
        seed: of random weights.
        reading: which weights of a file, and what to do where they are not finite. A module's own
            are refused then.
        lazy: open the weights, but read none of them before `OpenedModel.load`, or one at a time.
        compact: open compact files and tied modules too, rather than refusing them.
        trust_code: allow a compact file to name a function that builds the model.

    Raises:
        UserError: it is tied already (`already-tied`, `already-compact`), or can't take images
            of the size asked for.
        CheckpointError: the compact file is missing, damaged, or for another model.
        SourceError, WeightsError, MissingExtra: the model or its weights can't be opened, or hold
            values that are not finite.
    """
    if isinstance(model, nn.Module):
        if is_tied(model) and not compact:
            raise UserError(
                "This model is tied already",
                hint="Call tiedconv.untie on it first",
                code="already-tied",
            )
        check_finite(model)
        return OpenedModel(model, with_preprocess(source_in_memory(model), preprocess))
    if compact and looks_like_file(model):
        network = load(model, trust_code=trust_code)
        source = source_of(state_of(network).source)
        return OpenedModel(network, with_preprocess(source, preprocess))
    spec = str(model)
    if is_compact(spec):
        raise UserError(
            f"{spec} is a compact file already",
            "Only an original model can be converted or compared",
            f"See what it stores (tiedconv report {spec}), fine-tune it (tiedconv finetune), or "
            "name the model that it was made from",
            code="already-compact",
        )
    wanted: str | Path | None = None
    if weights is not None:
        spec, wanted = with_weights_named(spec, weights)
    _check_preprocess(spec, model_args, preprocess)
    if wanted is None:
        network, source = sources.outline(spec, model_args)
        return OpenedModel(network, with_preprocess(source, preprocess))

    def load_all() -> tuple[nn.Module, Source]:
        return sources.open_source(spec, model_args, wanted, seed=seed, reading=reading)

    opened = sources.open_lazily(spec, model_args, wanted, reading=reading) if lazy else None
    if opened is not None:
        network, source, tensors = opened
        return OpenedModel(network, with_preprocess(source, preprocess), tensors, load_all)
    # What is wrong shows before weights are fetched; a function of the user's is called once.
    if lazy and wanted == "default" and not is_function_spec(spec):
        network, source = sources.outline(spec, model_args)
        return OpenedModel(network, with_preprocess(source, preprocess), None, load_all)
    network, source = load_all()
    return OpenedModel(network, with_preprocess(source, preprocess))


def load(
    path: str | Path, *, model: nn.Module | None = None, trust_code: bool = False
) -> nn.Module:  # fmt: skip
    """The tied model of a file, in evaluation mode on the CPU.

    Args:
        path: a file that tiedconv wrote, or `hub:USER/NAME` for the one of a repository.
        model: an instance of the original class to load into (its weights are replaced), needed
            when the file was made from a model in memory.
        trust_code: allow the file to name a `package.module:function` that builds the model.

    Raises:
        CheckpointError: missing, damaged, or for another model.
        SourceError: the model's class can't be built here.
    """
    checkpoint = read(local(path))
    if model is None:
        model = skeleton_of(checkpoint, trust_code=trust_code)
    found = widened(install(checkpoint, model), checkpoint)
    let_others_save(found)
    return found


def widened(model: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """The model in the precision that the file says it computes in, whatever it is stored in."""
    narrowed = any(step.get("computes_in") == "float32" for step in checkpoint.history)
    return model.float() if narrowed else model


def skeleton_of(checkpoint: Checkpoint, *, trust_code: bool = False) -> nn.Module:
    """A model of the class that a file was made from, with no weights of meaning."""
    source = source_of(checkpoint.source)
    plan = checkpoint.plan
    shapes = [*plan.kept.values(), *(expr.shape for expr in plan.weights.values())]
    with bounded(sum(map(math.prod, shapes)), len(shapes)):
        return sources.skeleton(source, trust_code=trust_code)


def source_of(record: Mapping[str, Any] | None) -> Source:
    """The source that a file or a tied model records."""
    if record is None:
        raise CheckpointError(
            "The file does not record which model it was made from",
            "Its class can't be built",
            "Load it in Python: tiedconv.load(path, model=an_instance)",
            code="class-not-recorded",
        )
    return Source.from_json(record)


def with_preprocess(source: Source, change: PreprocessChange | None) -> Source:
    """The source with another way to prepare images."""
    if change is None:
        return source
    return dataclasses.replace(source, preprocess=change(source.preprocess or Preprocess(224)))


def _check_preprocess(
    spec: str, model_args: Mapping[str, Any] | None, change: PreprocessChange | None
) -> None:
    """Raises UserError if the model can't take images of the size asked for; needs no weights."""
    if change is None:
        return
    model, source = sources.describe(spec, model_args)
    own = source.preprocess or Preprocess(224)
    wanted = change(own)
    if wanted.size != own.size:
        check_size(model, wanted.size, wanted.channel_count())


def is_compact(path: str | Path) -> bool:
    """Whether this is a file that tiedconv wrote, by its head."""
    try:
        with contextlib.closing(SafetensorsFile(Path(path))) as file:
            return "tiedconv" in file.metadata and bool(file.shapes)
    except CheckpointError:
        return False


def looks_like_file(model: str | Path) -> bool:
    """Whether a name is meant as a file rather than as a model spec."""
    path = Path(model)
    return path.is_file() or path.suffix in (".safetensors", ".pth", ".pt", ".bin")
