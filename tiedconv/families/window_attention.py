"""Attention with fused queries, keys and values, within windows or not, whatever its layer's name.

torchvision's Swin, MViT and MaxViT; timm's MaxViT, DaViT, VOLO, CrossViT and CAFormer; SAM, Hiera,
ViTDet, BLIP and TimeSformer of transformers; ModernBERT and Phi-3. timm's own `blocks` are
`timm_vit`. Tables of position biases are unknown tensors, so heads keep their places unless moving
them is proven on the model.
"""

from tiedconv.families._patterns import IN_LAYER, Attention, FeedForward, pattern_family

_ATTENTION = IN_LAYER + (
    r"\.(?:(?:attn_block|attn_grid|spatial_block|channel_block)\.)?"
    r"(?:attn|attention|self_attn|token_mixer|attention\.attention)"
)
_NAMES = (
    ("qkv", "proj"),
    ("qkv", "project.0"),  # torchvision's MViT
    ("qkv", "projection"),  # BLIP
    ("Wqkv", "Wo"),  # ModernBERT
    ("qkv_proj", "o_proj"),  # Phi-3
)
_MAXVIT = r"(?:.*\.)?layers\.(?P<n>\d+)\.layers\.(?:window|grid)_attention"

FAMILY = pattern_family(
    "window-attention",
    "features.1.0.attn.qkv.weight and .attn.proj.weight",
    *(Attention(_ATTENTION, qkv=f"{qkv}.weight", o=f"{o}.weight") for qkv, o in _NAMES),
    Attention(_MAXVIT + r"\.attn_layer\.1", qkv="to_qkv.weight", o="merge.weight"),
    Attention(
        IN_LAYER + r"\.(?:temporal_)?attention", qkv="attention.qkv.weight", o="output.dense.weight"
    ),
    FeedForward(_MAXVIT + r"\.mlp_layer", up="1.weight", down="3.weight", act="2"),
    FeedForward(IN_LAYER + r"\.mlp", up="0.weight", down="3.weight", act="1"),
    FeedForward(
        IN_LAYER + r"\.(?:(?:attn_block|attn_grid)\.)?mlp", up="fc1.weight", down="fc2.weight"
    ),
    FeedForward(IN_LAYER + r"\.mlp", up="lin1.weight", down="lin2.weight"),
    FeedForward(IN_LAYER + r"\.mlp", up="proj_in.weight", down="proj_out.weight"),
)  # fmt: skip
