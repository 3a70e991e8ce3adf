"""Models of torchvision: `resnet50`, `vit_b_16` and all other names of its registry.

`resnet50.IMAGENET1K_V1` is one with other published weights than the default ones.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any

from torch import Tensor, nn

from tiedconv.errors import SourceError
from tiedconv.sources.arguments import JSON, image_size, refuse_arguments
from tiedconv.sources.init import skip_init
from tiedconv.sources.provider import (
    construct,
    is_download_error,
    not_downloaded,
    unknown_model,
)
from tiedconv.sources.published_weights import preprocess_of, require_member
from tiedconv.sources.source import Preprocess
from tiedconv.sources.state_dict import load_into
from tiedconv.sources.torchvision_compat import import_torchvision

# What torchvision sets by itself when it loads the published weights of these models. A skeleton
# must have it too, or the same weights would compute something else in it.
_WITH_WEIGHTS: dict[str, dict[str, JSON]] = {
    "googlenet": {"transform_input": True, "init_weights": False, "aux_logits": False},
    "inception_v3": {"transform_input": True, "init_weights": False},
}


class TorchvisionModel:
    """One model of torchvision's registry."""

    config: Mapping[str, JSON] | None = None
    packages: tuple[str, ...] = ("torchvision",)
    published_dtype: str | None = None

    def __init__(self, name: str, kwargs: Mapping[str, JSON]) -> None:
        self._models: Any = import_torchvision().models
        self._name, _, self._member = name.partition(".")
        if self._name not in self._models.list_models():
            raise unknown_model(name, name, self._models.list_models())
        if self._member:
            require_member(self._name, self._member)
        refuse_arguments(
            self._name, kwargs, ("weights", "weights_backbone", "pretrained", "progress")
        )
        self._given = dict(kwargs)
        self.kwargs: Mapping[str, JSON] = {**self._as_published(), **kwargs}

    def _weights(self) -> Any:
        """The published weights that the name says, else torchvision's default, or None."""
        if self._member:
            return require_member(self._name, self._member)
        return getattr(self._models.get_model_weights(self._name), "DEFAULT", None)

    def _as_published(self) -> dict[str, JSON]:
        published = dict(_WITH_WEIGHTS.get(self._name, {}))
        weights = self._weights()
        if self._name.startswith("vit_") and weights is not None:
            # The best weights of vit_h_14 are for 518 pixels, its constructor's default is 224.
            published["image_size"] = int(weights.meta["min_size"][0])
        return published

    def build(self) -> nn.Module:
        """The model; raises SourceError for arguments it can't be built with."""
        arguments = dict(self.kwargs)
        builder = self._models.get_model_builder(self._name)
        if "weights_backbone" in inspect.signature(builder).parameters:
            arguments["weights_backbone"] = None  # its default is a download
        return construct(
            self._name,
            self.kwargs,
            lambda: self._models.get_model(self._name, weights=None, **arguments),
        )

    def pretrained(self) -> nn.Module:
        """The model with the published weights, from torchvision's cache or the network."""
        weights = self._weights()
        if weights is None:
            raise SourceError(
                f"torchvision has no pretrained weights for {self._name}",
                hint="Pass --weights FILE or --weights none",
                code="no-pretrained-weights",
            )
        return construct(self._name, self._given, lambda: self._fetch(weights))

    def _fetch(self, weights: Any) -> nn.Module:
        try:
            # torch.hub announces downloads on standard output, which is for results.
            with skip_init(), redirect_stdout(sys.stderr):
                model: nn.Module = self._models.get_model(
                    self._name, weights=weights, progress=False, **self._given
                )
        except ValueError as error:
            if "expected value" not in str(error):
                raise
            raise SourceError(
                f"The pretrained weights of {self._name} don't allow these arguments ({error})",
                "The published model can't be changed in this way",
                "Leave the argument out, or pass --weights FILE or --weights none",
                code="argument-needs-new-weights",
            ) from error
        except Exception as error:
            if not is_download_error(error):
                raise
            raise not_downloaded(self._name, error) from error
        return model

    def load(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Loads weights by name."""
        load_into(model, tensors)

    def preprocess(self, model: nn.Module) -> Preprocess | None:
        """As the published weights say; None where those are not for classifying images."""
        weights = self._weights()
        published = weights and preprocess_of(weights.transforms())
        return published.scaled_to(image_size(self.kwargs)) if published else None
