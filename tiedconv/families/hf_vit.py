"""Hugging Face's ViT and DeiT, in the names of transformers 5 and of older checkpoints."""

from tiedconv.families._patterns import Attention, FeedForward, pattern_family

_LAYER = r"(?:.*\.)?layers?\.(?P<n>\d+)"

FAMILY = pattern_family(
    "hf-vit",
    "vit.layers.0.attention.q_proj.weight",
    Attention(
        _LAYER + r"\.attention",
        q="q_proj.weight",
        k="k_proj.weight",
        v="v_proj.weight",
        o="o_proj.weight",
        norm="layernorm_before",
    ),
    Attention(
        _LAYER + r"\.attention",
        q="attention.query.weight",
        k="attention.key.weight",
        v="attention.value.weight",
        o="output.dense.weight",
    ),
    FeedForward(
        _LAYER + r"\.mlp", up="fc1.weight", down="fc2.weight", act="activation_fn",
        norm="layernorm_after",
    ),
    FeedForward(
        _LAYER, up="intermediate.dense.weight", down="output.dense.weight", alone=False,
        act="intermediate.intermediate_act_fn",
    ),
)  # fmt: skip
