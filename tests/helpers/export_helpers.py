"""A tiny ViT whose compact file the exports are tested on."""

from __future__ import annotations

from torch import nn

from tiedconv.runtime.tie import set_state, state_of

SPEC = "timm:vit_tiny_patch16_224"


MODEL_ARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3,
              "num_classes": 5}  # fmt: skip


def with_image_size(model: nn.Module) -> nn.Module:
    """The source of a model of 16 pixels says so."""
    source = dict(state_of(model).source or {})
    source["preprocess"] = {**source["preprocess"], "size": 16, "resize": None}
    set_state(model, source=source)
    return model
