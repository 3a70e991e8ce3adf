"""Where models come from: torchvision, timm, transformers, or a function of the user's.

The only place that imports model libraries, each when a model of its is asked for.

| spec | model |
|---|---|
| `resnet50` | any name that torchvision.models.get_model takes |
| `resnet50.IMAGENET1K_V1` | with other published weights than the default ones |
| `timm:vit_tiny_patch16_224` | any name that timm.create_model takes |
| `hf:google/vit-base-patch16-224`, `hf:/local/dir` | a model of transformers |
| `package.module:function` | what the function returns |
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

from tiedconv.errors import SourceError, UserError, WeightsError
from tiedconv.io.narrowing import half_type
from tiedconv.runtime.finite import check_finite
from tiedconv.sources.arguments import JSON, is_json, parse_model_args
from tiedconv.sources.init import seeded, skip_init, skip_memory
from tiedconv.sources.lazy import LazyWeights, loads_plainly
from tiedconv.sources.provider import Provider
from tiedconv.sources.sharded_safetensors import places, weights_file
from tiedconv.sources.source import Preprocess, Source
from tiedconv.sources.weights import (
    AS_PUBLISHED,
    Reading,
    fit_to,
    is_safetensors,
    load_into,
    read_weights,
    sha256_of_file,
    sha256_of_weights,
)

__all__ = [
    "AS_PUBLISHED",
    "JSON",
    "TRUSTED",
    "LazyWeights",
    "Preprocess",
    "Reading",
    "Source",
    "describe",
    "fit_to",
    "load_into",
    "open_lazily",
    "open_source",
    "outline",
    "parse_model_args",
    "read_weights",
    "sha256_of_file",
    "skeleton",
    "skip_init",
]

# Functions that have moved since files were written that name them.
_MOVED = {
    "tiedconv.demo:digits_vit": "tiedconv.commands.demo:digits_vit",
    "tiedconv.demo:digits_resnet": "tiedconv.commands.demo:digits_resnet",
}
# The functions that a file may name: our own, which build models of fixed shape and nothing else.
TRUSTED = frozenset({"tiedconv.commands.demo:digits_vit", "tiedconv.commands.demo:digits_resnet"})


def open_source(
    spec: str,
    kwargs: Mapping[str, JSON] | None = None,
    weights: str | Path = "default",
    *,
    seed: int = 0,
    reading: Reading = AS_PUBLISHED,
) -> tuple[nn.Module, Source]:
    """Builds a model with its weights.

    Args:
        spec: the model, in one of the forms above.
        kwargs: arguments of its constructor (for Hugging Face: values of its configuration).
        weights: "default" for the published ones, "none" for random ones, or the path of a
            file, of an index of shards, or of a folder that holds one of these.
        seed: of all that is random in it; torch's own random state is left as it was.
        reading: which weights of a file, and what to do where they are not finite.

    Returns:
        The model in evaluation mode, and where it came from.

    Raises:
        SourceError: there is no such model, it can't be built with these arguments, or its weights
            can't be loaded.
        WeightsError: the weights file can't be read or does not fit.
        MissingExtra: the library of the spec is not installed.
    """
    provider = _provider(spec, kwargs or {}, network=True)
    sha256 = name = part = dtype = None
    if reading.ema is not None and weights in ("none", "default"):
        raise UserError(
            "--ema and --no-ema choose between the weights of a file, and none was given",
            hint="Pass --weights FILE, or leave the option out",
            code="option-without-effect",
        )
    if weights == "none":
        with seeded(seed):
            model = provider.build()
        kind = "none"
    elif weights == "default":
        with seeded(seed):
            model = provider.pretrained()
        kind, dtype = "default", provider.published_dtype
    else:
        path = weights_file(weights)
        name, kind = path.name, "file"
        # Hashing releases the GIL, so it runs while the weights are read.
        with ThreadPoolExecutor(1) as pool:
            read = read_weights(path, reading.ema)
            digest = pool.submit(sha256_of_weights, path)
            with skip_init():
                model = provider.build()
            provider.load(model, read.tensors)
            sha256, part = digest.result(), read.part or None
            dtype = half_type((t.dtype, tuple(t.shape)) for t in read.tensors.values())
    check_finite(model, reading.non_finite)
    return model.eval(), _source(spec, provider, model, kind, sha256, name, part, dtype)


def open_lazily(
    spec: str,
    kwargs: Mapping[str, JSON] | None = None,
    weights: str | Path = "default",
    *,
    reading: Reading = AS_PUBLISHED,
) -> tuple[nn.Module, Source, LazyWeights] | None:
    """A model whose weights lie in safetensors files, without reading them.

    Args:
        spec: the model, in one of the forms above.
        kwargs: arguments of its constructor.
        weights: as for `open_source`.
        reading: as for `open_source`.

    Returns:
        The model, its parameters on the meta device; where it came from; and what `open_source`
        would put into them, to be read tensor by tensor. None where only `open_source` can load
        the model, or where its error is more exact.

    Raises:
        SourceError, WeightsError, MissingExtra: as for `open_source`.
    """
    path = _weights_of(spec, weights)
    if path is None or reading.ema is not None:  # such a file holds one set of weights
        return None
    provider = _provider(spec, kwargs or {}, network=True)
    try:
        found = places(path)
    except WeightsError:
        if weights == "default":  # its own library may read it
            return None
        raise
    try:
        with skip_memory():
            model = provider.build()
    except SourceError:  # a constructor may read its parameters' values
        return None
    if not loads_plainly(model):
        return None
    try:
        tensors = LazyWeights(model, found, reading.non_finite)
    except WeightsError:
        if _prefix(spec):  # its library may know the file's names
            return None
        raise
    if weights == "default":
        # Only what has its own name is sure to be taken as it is.
        own = all(name in found for name in tensors)
        source = _source(spec, provider, model, "default", dtype=tensors.file_dtype)
        return (model.eval(), source, tensors) if own else None
    digest = sha256_of_weights(path)
    source = _source(spec, provider, model, "file", digest, path.name, dtype=tensors.file_dtype)
    return model.eval(), source, tensors


def outline(spec: str, kwargs: Mapping[str, JSON] | None = None) -> tuple[nn.Module, Source]:
    """As `describe`, with parameters that take no memory, if the constructor does not read them."""
    provider = _provider(spec, kwargs or {}, network=False)
    try:
        with skip_memory():
            model = provider.build()
    except SourceError:  # it may read its parameters' values, or be invalid
        return describe(spec, kwargs)
    return model.eval(), _source(spec, provider, model, "none")


def describe(spec: str, kwargs: Mapping[str, JSON] | None = None) -> tuple[nn.Module, Source]:
    """Builds a model without weights, for its names and shapes alone.

    No network is used: a model of the Hugging Face hub must be in the local cache.

    Args:
        spec: the model, in one of the forms above.
        kwargs: arguments of its constructor.

    Returns:
        The model in evaluation mode, its parameters arbitrary, and where it came from.

    Raises:
        SourceError, MissingExtra: as for `open_source`.
    """
    provider = _provider(spec, kwargs or {}, network=False)
    with skip_init():
        model = provider.build()
    return model.eval(), _source(spec, provider, model, "none")


def skeleton(source: Source, *, trust_code: bool = False) -> nn.Module:
    """Builds the class of model that a file was made from, offline and without weights.

    Args:
        source: as recorded in the file. It may come from anyone, so it can't name code to run.
        trust_code: whether a `package.module:function` that it names may be imported and called.

    Returns:
        The model in evaluation mode. Its buffers are valid; its parameters must be loaded.

    Raises:
        SourceError: the source names code that is not trusted, a model that was in memory, or
            one that can't be built here.
    """
    from tiedconv.sources.python_function import is_function_spec

    spec = _MOVED.get(source.spec, source.spec)
    if not spec:
        raise SourceError(
            "The file was made from a model in memory",
            "Its class can't be built again from the file alone",
            "Load it in Python and pass the model",
            code="class-not-recorded",
        )
    if _prefix(spec) == "" and is_function_spec(spec) and not trust_code and spec not in TRUSTED:
        raise SourceError(
            f"The file names the function {spec}, which would be imported and run",
            "A file is not trusted to name code",
            "If you trust it, pass --trust-code",
            code="code-not-trusted",
        )
    if _prefix(spec) == "hf" and source.config is None:
        raise SourceError(
            f"The file lacks the configuration of {spec}",
            "Its model can't be built offline",
            "Convert the model again",
            code="config-missing",
        )
    provider = _provider(spec, source.kwargs, network=False, config=source.config)
    with skip_init():
        return provider.build().eval()


def _prefix(spec: str) -> str:
    start, colon, _ = spec.partition(":")
    return start if colon and start in ("timm", "hf") else ""


def _weights_of(spec: str, weights: str | Path) -> Path | None:
    """The safetensors file, or index of shards, that weights lie in; None for other formats."""
    if weights == "none":
        return None
    if weights == "default":
        folder = Path(spec.removeprefix("hf:")).expanduser()
        if _prefix(spec) != "hf" or not folder.is_dir():
            return None
        try:
            path = weights_file(folder)
        except WeightsError:
            return None
    else:
        path = weights_file(weights)
    return path if is_safetensors(path) else None


def _provider(
    spec: str,
    kwargs: Mapping[str, JSON],
    *,
    network: bool,
    config: Mapping[str, JSON] | None = None,
) -> Provider:
    """The model that a spec names. Libraries are imported here, and only the one needed."""
    if not all(isinstance(key, str) and is_json(value) for key, value in kwargs.items()):
        raise SourceError(
            f"The model arguments {dict(kwargs)!r} can't be written as JSON",
            "The file could not record how to build the model",
            "Use text, numbers, true, false, null and lists of them",
            code="model-argument-not-json",
        )
    name = spec.partition(":")[2]
    if _prefix(spec) == "timm":
        from tiedconv.sources.timm_models import TimmModel

        return TimmModel(name, kwargs)
    if _prefix(spec) == "hf":
        from tiedconv.sources.hf_models import HfModel

        return HfModel(name, kwargs, config, network)
    from tiedconv.sources.python_function import PythonFunction, is_function_spec

    if is_function_spec(spec):
        return PythonFunction(spec, kwargs)
    from tiedconv.sources.torchvision_models import TorchvisionModel

    return TorchvisionModel(spec, kwargs)


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Versions of torch and of these packages."""
    return {
        "torch": torch.__version__,
        **{name: importlib.metadata.version(name) for name in packages},
    }


def _recorded(spec: str) -> str:
    """A spec as a file keeps it: of a folder the name, as its place tells of this machine."""
    name = spec.removeprefix("hf:")
    if _prefix(spec) != "hf" or not Path(name).expanduser().is_dir():
        return spec
    return f"hf:{Path(name).expanduser().resolve().name}"


def _in_float32(model: nn.Module) -> bool:
    """Whether the model's own parameters are wider than half precision."""
    return all(p.dtype == torch.float32 for p in model.parameters() if p.is_floating_point())


def _source(
    spec: str,
    provider: Provider,
    model: nn.Module,
    weights: str,
    sha256: str | None = None,
    name: str | None = None,
    part: str | None = None,
    dtype: str | None = None,
) -> Source:
    return Source(
        spec=_recorded(spec),
        kwargs=dict(provider.kwargs),
        weights=weights,
        weights_sha256=sha256,
        weights_name=name,
        weights_part=part,
        weights_dtype=dtype if _in_float32(model) else None,
        config=provider.config,
        preprocess=provider.preprocess(model),
        versions=versions_of(provider.packages),
    )
