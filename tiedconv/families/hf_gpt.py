"""Hugging Face's ImageGPT and GPT-2: `Conv1D` layers, whose weights are stored `(in, out)`."""

from tiedconv.families._patterns import Attention, FeedForward, pattern_family

_LAYER = r"(?:.*\.)?h\.(?P<n>\d+)"

FAMILY = pattern_family(
    "hf-gpt",
    "transformer.h.0.attn.c_attn.weight",
    Attention(
        _LAYER + r"\.attn", qkv="c_attn.weight", o="c_proj.weight", transposed=True,
        ignored=("bias", "masked_bias"),
    ),
    FeedForward(_LAYER + r"\.mlp", up="c_fc.weight", down="c_proj.weight", transposed=True),
)  # fmt: skip
