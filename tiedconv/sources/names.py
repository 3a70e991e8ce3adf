"""The names of models that libraries publish."""

from __future__ import annotations

from fnmatch import fnmatchcase

from tiedconv.errors import MissingExtra
from tiedconv.sources.torchvision_compat import import_torchvision


def model_names(pattern: str = "*") -> list[str]:
    """Specs of the models of torchvision and timm that have published weights.

    Models of transformers are not listed: any repository or folder of it is one (`hf:NAME`).

    Args:
        pattern: a glob pattern of the names, with or without `timm:`.
    """
    models = import_torchvision().models
    found = [name for name in models.list_models() if fnmatchcase(name, pattern)]
    try:
        import timm
    except ImportError as error:
        if pattern.startswith("timm:"):
            raise MissingExtra.of("timm", "timm", "The list of its models") from error
        return found
    wanted = pattern.removeprefix("timm:")
    return found + [f"timm:{name}" for name in timm.list_models(wanted, pretrained=True)]
