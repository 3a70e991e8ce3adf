"""Configurations of Hugging Face models: plain data from which their classes are built offline."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tiedconv.errors import SourceError
from tiedconv.sources.arguments import JSON
from tiedconv.sources.provider import first_line

# Kept out of the stored configuration: where it came from, what differs between machines, and
# the precision of the published file (a skeleton is float32).
_NOT_KEPT = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "auto_map"})
_NOT_TAKEN = frozenset({"auto_map", "quantization_config", "use_pretrained_backbone"})


def to_data(
    transformers: Any, spec: str, config: Any, kwargs: Mapping[str, JSON]
) -> dict[str, JSON]:
    """The JSON of a configuration, with the user's arguments in it and its architecture's name.

    Args:
        transformers: the library.
        spec: the model, for messages.
        config: a configuration object of the library, which is changed.
        kwargs: values to set in it.

    Raises:
        SourceError: an argument is unknown or its value refused, or there is no architecture.
    """
    for key, value in kwargs.items():
        if not hasattr(config, key):
            raise SourceError(
                f"{spec} takes no argument {key}: its configuration has none",
                "The model can't be built",
                "Correct or leave out this model argument",
                code="unknown-model-argument",
            )
        try:
            setattr(config, key, value)
        except Exception as error:  # the library checks types with errors of its own
            raise SourceError(
                f"Invalid model argument {key}={value!r} of {spec} ({first_line(error)})",
                hint="Give a value of the right type",
                code="invalid-model-argument",
            ) from error
    named = getattr(config, "architectures", None) or [_usual_class(transformers, spec, config)]
    stored: dict[str, JSON] = json.loads(config.to_json_string(use_diff=False))
    kept = {key: value for key, value in stored.items() if key not in _NOT_KEPT}
    return {**kept, "architecture": str(named[0])}


def from_data(transformers: Any, spec: str, data: Mapping[str, JSON]) -> Any:
    """A new configuration object from what `to_data` returned.

    Raises:
        SourceError: the installed library does not know such a configuration.
    """
    values = _harmless(dict(data))
    values.pop("architecture", None)
    model_type = values.pop("model_type", None)
    try:
        return transformers.AutoConfig.for_model(model_type, **values)
    except Exception as error:  # the library checks values with errors of its own
        raise SourceError(
            f"The configuration of {spec} is not one that transformers "
            f"{transformers.__version__} knows ({first_line(error)})",
            hint="Install the release of transformers that it was made with",
            code="config-unknown",
        ) from error


def architecture(transformers: Any, spec: str, name: object) -> Any:
    """The model class of that name, which must be one of the library itself.

    Raises:
        SourceError: there is none.
    """
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise SourceError(
            f"transformers {transformers.__version__} has no model class {name!r}",
            f"{spec} can't be built: only model classes of the library itself are run",
            "Install the release of transformers that has it",
            code="unknown-architecture",
        )
    return found


def _usual_class(transformers: Any, spec: str, config: Any) -> str:
    """The library's class for image classification, or else for object detection."""
    for auto in ("AutoModelForImageClassification", "AutoModelForObjectDetection"):
        found = getattr(transformers, auto)._model_mapping.get(type(config), None)
        if found is not None:
            break
    else:
        raise SourceError(
            f"The configuration of {spec} names no architecture",
            "The class of its model is not known",
            'Add "architectures": ["..."] to its config.json',
            code="architecture-missing",
        )
    return str((found[0] if isinstance(found, tuple) else found).__name__)


def _harmless(value: Any) -> Any:
    """A configuration without what makes transformers fetch weights or code, at any depth."""
    if isinstance(value, list):
        return [_harmless(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _harmless(item)
        for key, item in value.items()
        # An "implementation" of the attention may be a kernel that the hub delivers.
        if key not in _NOT_TAKEN and "_implementation" not in key
    }
