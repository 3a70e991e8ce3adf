"""Attention whose keys and values come from fewer pixels, and from one tensor: PVT, Twins, VOLO.

SegFormer's and PVT's in the names of transformers are among `hf_encoder`.
Wang et al., "Pyramid Vision Transformer" (arXiv 2102.12122).
"""

from tiedconv.families._patterns import IN_LAYER, Attention, Linear, pattern_family

_ATTENTION = IN_LAYER + r"\.(?:attn|self_attn)"

FAMILY = pattern_family(
    "spatial-reduction",
    "blocks.0.attn.q.weight, .attn.kv.weight and .attn.proj.weight",
    Attention(_ATTENTION, q="q.weight", kv="kv.weight", o="proj.weight"),
    Attention(_ATTENTION, q="q.weight", k="k.weight", v="v.weight", o="proj.weight"),
    Attention(_ATTENTION, q="wq.weight", k="wk.weight", v="wv.weight", o="proj.weight"),
    Linear(_ATTENTION, {"reduction": "sr.weight"}),
)
