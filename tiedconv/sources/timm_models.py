"""Models of timm: `timm:vit_tiny_patch16_224`, with or without a tag of its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from tiedconv.errors import MissingExtra, SourceError, WeightsError
from tiedconv.sources.arguments import JSON, image_size, refuse_arguments
from tiedconv.sources.hub import hub_if_reachable
from tiedconv.sources.name_matching import match_names
from tiedconv.sources.provider import (
    construct,
    is_download_error,
    not_downloaded,
    unknown_model,
)
from tiedconv.sources.source import Preprocess
from tiedconv.sources.state_dict import load_into
from tiedconv.sources.torchvision_compat import import_torchvision

_RESERVED = (
    "cache_dir",
    "checkpoint_path",
    "model_name",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
)


class TimmModel:
    """One model of timm's registry."""

    config: Mapping[str, JSON] | None = None
    packages: tuple[str, ...] = ("torchvision", "timm")
    published_dtype: str | None = None

    def __init__(self, name: str, kwargs: Mapping[str, JSON]) -> None:
        self._timm = _import_timm()
        self._name, self._spec = name, f"timm:{name}"
        # timm takes "hf-hub:..." and "local-dir:..." for names too, and fetches and reads what
        # they point to, which a skeleton must not.
        if ":" in name or not self._known():
            known = [*self._timm.list_models(), *self._timm.list_pretrained()]
            raise unknown_model(self._spec, name, known, "timm:")
        refuse_arguments(self._spec, kwargs, _RESERVED)
        self.kwargs: Mapping[str, JSON] = dict(kwargs)

    def _known(self) -> bool:
        architecture, _, tag = self._name.partition(".")
        return bool(self._timm.is_model(architecture)) and (not tag or self._has_weights())

    def _has_weights(self) -> bool:
        return bool(self._timm.models.is_model_pretrained(self._name))

    def build(self) -> nn.Module:
        """The model; raises SourceError for arguments it can't be built with."""
        return construct(
            self._spec,
            self.kwargs,
            lambda: self._timm.create_model(self._name, pretrained=False, **self.kwargs),
        )

    def pretrained(self) -> nn.Module:
        """The model with timm's weights. With another number of classes its head is new."""
        if not self._has_weights():
            raise SourceError(
                f"timm has no pretrained weights for {self._name}",
                hint="Pass --weights FILE or --weights none",
                code="no-pretrained-weights",
            )
        return construct(self._spec, self.kwargs, self._fetch)

    def _fetch(self) -> Any:
        # Initialisation is not skipped: what timm does not load (a new head) must be random.
        with hub_if_reachable() as unreachable:
            try:
                return self._timm.create_model(self._name, pretrained=True, **self.kwargs)
            except Exception as error:
                if not is_download_error(error):
                    raise
                raise not_downloaded(self._spec, error, unreachable) from error

    def load(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Loads weights by name, or as timm loads files of this model if need be.

        timm renames what older releases and the authors of a model wrote, and brings position
        embeddings to the model's image size.
        """
        try:
            load_into(model, tensors)
        except WeightsError as error:
            converted = self._converted(tensors)
            if converted is None:
                raise error from None
            load_into(model, converted)

    def _converted(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
        """The weights as timm loads them into this model; None if it can't."""
        plain = self.build()
        own = dict(getattr(plain, "pretrained_cfg", None) or {})
        size = (own.get("input_size") or (3, 224, 224))[1:]
        settings = {
            **own,
            "state_dict": match_names(tensors, plain.state_dict()),
            "source": "",
            # Else timm drops a classifier of another size, or adds up the channels of the first
            # layer: the model would then not be the file's.
            "classifier": None,
            "input_size": (self.kwargs.get("in_chans", 3), *size),
        }
        architecture = self._name.partition(".")[0]
        try:
            model: nn.Module = self._timm.create_model(
                architecture, pretrained=True, pretrained_cfg=settings, **self.kwargs
            )
        except Exception:  # the filters of its models raise anything for a file that is not theirs
            return None
        return model.state_dict()

    def preprocess(self, model: nn.Module) -> Preprocess | None:
        """As the configuration of the pretrained weights says."""
        published = getattr(model, "pretrained_cfg", None)
        if not published:
            return None
        settings: dict[str, Any] = self._timm.data.resolve_data_config(pretrained_cfg=published)
        size = image_size(self.kwargs) or int(settings["input_size"][-1])
        squashed = settings["crop_mode"] == "squash"
        # timm rounds the side before the crop down.
        resize = None if squashed else math.floor(size / settings["crop_pct"])
        channels = self.kwargs.get("in_chans", 3)
        found = Preprocess(
            size=size,
            resize=resize,
            mean=tuple(map(float, settings["mean"])),
            std=tuple(map(float, settings["std"])),
            interpolation="bilinear" if settings["interpolation"] == "bilinear" else "bicubic",
        )
        return found.for_channels(channels) if isinstance(channels, int) else found


def _import_timm() -> ModuleType:
    import_torchvision()
    try:
        import timm
        import timm.data
        import timm.models
    except ImportError as error:
        raise MissingExtra.of("timm", "timm", "A model of the kind timm:NAME") from error
    module: ModuleType = timm
    return module
