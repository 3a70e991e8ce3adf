"""Classes of modules whose blocks are known to have every symmetry that their names suggest.

Only for models that can't be run (their weights stay on disk): where a model runs, its symmetries
are tried instead (`conversion.symmetry_proof`). A class counts under its exact module and name, and
only if every module below it is listed as well: a timm attention with norms of q and k, or with an
activation that is not listed, is not exact.
"""

from __future__ import annotations

from tiedconv.families import Hints

_TORCH = "torch.nn.modules."

BLOCKS = {
    "timm.layers.attention.Attention",
    "timm.layers.mlp.Mlp",
    "timm.models.resnet.Bottleneck",
    f"{_TORCH}activation.MultiheadAttention",
    f"{_TORCH}transformer.TransformerDecoderLayer",
    f"{_TORCH}transformer.TransformerEncoderLayer",
    "torchvision.models.resnet.Bottleneck",
    "torchvision.models.vision_transformer.MLPBlock",
    "transformers.models.deit.modeling_deit.DeiTAttention",
    "transformers.models.deit.modeling_deit.DeiTMLP",
    "transformers.models.resnet.modeling_resnet.ResNetBottleNeckLayer",
    "transformers.models.vit.modeling_vit.ViTAttention",
    "transformers.models.vit.modeling_vit.ViTMLP",
}
"""An attention, a feed-forward or a bottleneck, or a layer whose own feed-forward is one."""

LAYERS = {
    "timm.models.vision_transformer.Block",
    "torchvision.models.vision_transformer.EncoderBlock",
    "transformers.models.deit.modeling_deit.DeiTLayer",
    "transformers.models.vit.modeling_vit.ViTLayer",
}
"""Layers whose two norms feed their attention and their feed-forward alone."""

_PARTS = {
    f"{_TORCH}activation.GELU",
    f"{_TORCH}activation.ReLU",
    f"{_TORCH}batchnorm.BatchNorm2d",
    f"{_TORCH}container.Sequential",
    f"{_TORCH}conv.Conv2d",
    f"{_TORCH}dropout.Dropout",
    f"{_TORCH}linear.Identity",
    f"{_TORCH}linear.Linear",
    f"{_TORCH}linear.NonDynamicallyQuantizableLinear",
    f"{_TORCH}normalization.LayerNorm",
    "transformers.activations.GELUActivation",
    "transformers.models.resnet.modeling_resnet.ResNetConvLayer",
    "transformers.models.resnet.modeling_resnet.ResNetShortCut",
}


def is_exact_block(module: str, hints: Hints) -> bool:
    """Whether a module of this name and all below it are of listed classes."""
    below = (key for key in hints if key.startswith(f"{module}.") and key.endswith(".class"))
    return hints.get(f"{module}.class") in BLOCKS and all(
        hints[key] in BLOCKS | _PARTS for key in below
    )


def is_exact_layer(module: str, hints: Hints) -> bool:
    """Whether the norms of a module of this name are known to feed its blocks alone."""
    return hints.get(f"{module}.class") in LAYERS
