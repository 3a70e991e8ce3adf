"""Where a model in memory came from, as far as it can be proven.

A library's model says little of how it was built. What it says is tried: the library builds a twin
without memory, and only one that is alike in every module, shape and setting counts. Then a file of
the model can be loaded without an instance of its class.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from tiedconv import sources
from tiedconv.errors import TiedconvError
from tiedconv.sources.arguments import JSON
from tiedconv.sources.source import Source


def source_in_memory(model: nn.Module) -> Source:
    """The source of a model in memory; its spec is "" if no library builds a model like it.

    Args:
        model: plain.
    """
    library = type(model).__module__.partition(".")[0]
    try:
        if library == "transformers":
            found = _of_transformers(model)
        else:
            named = {"timm": _timm_specs, "torchvision": _torchvision_specs}.get(library)
            found = None if named is None else _first_alike(model, named(model))
    except (TiedconvError, ImportError):
        found = None
    if found is None:
        return Source("", weights="memory")
    return dataclasses.replace(found, weights="memory")


def alike(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models are built alike: classes, names, shapes, and settings of each module."""
    ours, theirs = dict(a.named_modules()), dict(b.named_modules())
    if ours.keys() != theirs.keys():
        return False
    return all(
        type(m) is type(theirs[name])
        and not m._forward_hooks
        and not m._forward_pre_hooks
        and _settings(m) == _settings(theirs[name])
        and _shapes(m) == _shapes(theirs[name])
        for name, m in ours.items()
    )


def _settings(module: nn.Module) -> dict[str, Any]:
    """Numbers, texts and functions that a module was built with."""
    plain = (bool, int, float, str, type(None), types.FunctionType, types.BuiltinFunctionType,
             types.MethodType)  # fmt: skip

    def is_plain(value: Any) -> bool:
        return isinstance(value, plain) or (isinstance(value, tuple) and all(map(is_plain, value)))

    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and is_plain(value)
    }


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return {name: tuple(tensor.shape) for name, tensor in own}


def _first_alike(
    model: nn.Module, candidates: Iterator[tuple[str, Mapping[str, JSON]]]
) -> Source | None:
    for spec, kwargs in candidates:
        built = _twin(spec, json.dumps(kwargs))
        if built is not None and alike(model, built[0]):
            return built[1]
    return None


@functools.lru_cache(maxsize=64)
def _twin(spec: str, kwargs: str) -> tuple[nn.Module, Source] | None:
    """A library's model, its parameters on the meta device; None if it takes no such argument.

    Kept, as a library has tens of models of one class, and building one takes a tenth of a second.
    """
    try:
        return sources.outline(spec, json.loads(kwargs))
    except TiedconvError:
        return None


def _of_transformers(model: nn.Module) -> Source | None:
    from tiedconv.sources.hf_config import to_data
    from tiedconv.sources.hf_models import HfModel

    config: Any = getattr(model, "config", None)
    if config is None:
        return None
    import transformers

    name = type(model).__name__
    data = {**to_data(transformers, f"hf:{name}", config, {}), "architecture": name}
    provider = HfModel(name, {}, data)
    found = Source(
        f"hf:{name}", config=data, preprocess=provider.preprocess(model),
        versions=sources.versions_of(provider.packages),
    )  # fmt: skip
    return found if alike(model, sources.skeleton(found)) else None


def _timm_specs(model: nn.Module) -> Iterator[tuple[str, Mapping[str, JSON]]]:
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    if not isinstance(name := config.get("architecture"), str):
        return
    tag = config.get("tag")
    spec = f"timm:{name}.{tag}" if tag else f"timm:{name}"
    usual = {
        "num_classes": getattr(model, "num_classes", None),
        "in_chans": _input_channels(model),
        "img_size": _image_size(model),
        "global_pool": getattr(model, "global_pool", None),
    }
    given = {key: value for key, value in usual.items() if isinstance(value, int | str)}
    yield spec, {}
    for keys in (("num_classes",), ("num_classes", "in_chans"), tuple(given)):
        for extra in ((), ("img_size",), ("global_pool",)):
            chosen = {key: given[key] for key in (*keys, *extra) if key in given}
            if chosen:
                yield spec, chosen


def _torchvision_specs(model: nn.Module) -> Iterator[tuple[str, Mapping[str, JSON]]]:
    from tiedconv.sources.torchvision_compat import import_torchvision

    models: Any = import_torchvision().models
    heads = [m.out_features for m in model.modules() if isinstance(m, nn.Linear)]
    for name in models.list_models(models):
        if models.get_model_builder(name).__module__ == type(model).__module__:
            yield name, {"num_classes": heads[-1]} if heads and heads[-1] != 1000 else {}


def _input_channels(model: nn.Module) -> int | None:
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return None if first is None else first.in_channels * first.groups


def _image_size(model: nn.Module) -> int | None:
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return size[0] if isinstance(size, tuple) and len(set(size)) == 1 else None
