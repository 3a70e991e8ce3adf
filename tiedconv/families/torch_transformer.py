"""PyTorch's own `nn.TransformerEncoder` and `nn.TransformerDecoder`.

Its names are those of many detectors' own code too, where cross-attention is `cross_attn`.
"""

from tiedconv.families._patterns import Attention, FeedForward, pattern_family

_LAYER = r"(?:.*\.)?layers\.(?P<n>\d+)"
_ATTENTION = _LAYER + r"\.(?:self_attn|multihead_attn|cross_attn)"

FAMILY = pattern_family(
    "torch-transformer",
    "encoder.layers.0.self_attn.in_proj_weight",
    Attention(_ATTENTION, qkv="in_proj_weight", o="out_proj.weight"),
    # Where keys or values have another width than queries, the matrices lie apart.
    Attention(
        _ATTENTION, q="q_proj_weight", k="k_proj_weight", v="v_proj_weight", o="out_proj.weight"
    ),
    FeedForward(
        _LAYER, up="linear1.weight", down="linear2.weight", act="activation", alone=False
    ),
)  # fmt: skip
