"""Attentions whose layers become narrow with their heads, by class.

Products of queries with keys, and with values, are of no weight: a model that lost heads takes
fewer of them only if its attention runs with fewer. Whether it does is known when narrow layers
are run (`narrow_layers`), too late for a budget. So it is written down for some classes, under
their exact module and name; of others these products are counted whole, which is never too few.
"""

from __future__ import annotations

from torch import nn

_MODELS = "transformers.models"

LOSES_HEADS = frozenset(
    {
        "timm.layers.attention.Attention",
        f"{_MODELS}.deit.modeling_deit.DeiTAttention",
        f"{_MODELS}.dinov3_vit.modeling_dinov3_vit.DINOv3ViTAttention",
        f"{_MODELS}.imagegpt.modeling_imagegpt.ImageGPTAttention",
        f"{_MODELS}.llama.modeling_llama.LlamaAttention",
        f"{_MODELS}.qwen2.modeling_qwen2.Qwen2Attention",
        f"{_MODELS}.qwen3.modeling_qwen3.Qwen3Attention",
        f"{_MODELS}.vit.modeling_vit.ViTAttention",
    }
)


def attentions_that_lose_heads(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the names of all that lies in such attentions."""
    return tuple(
        f"{name}." if name else ""
        for name, module in model.named_modules()
        if f"{type(module).__module__}.{type(module).__qualname__}" in LOSES_HEADS
    )
