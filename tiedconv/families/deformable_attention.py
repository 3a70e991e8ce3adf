"""Multi-scale deformable attention, in Deformable DETR and all that came after it.

It has no keys: sampling offsets and attention weights come from the query by two small matrices.
They are opt-in, as a small change of them moves every sampling point. Values are sampled channel by
channel; the other matrices are plain linear layers.
"""

from tiedconv.families._patterns import Linear, pattern_family

_ATTENTION = r"(?:.*\.)?layers\.(?P<n>\d+)\.(?:self_attn|encoder_attn|cross_attn)"

FAMILY = pattern_family(
    "deformable-attention",
    "model.decoder.layers.0.encoder_attn.value_proj.weight and .sampling_offsets.weight",
    Linear(_ATTENTION, {"v": "value_proj.weight", "o": "output_proj.weight"}),
    Linear(
        _ATTENTION,
        {"offsets": "sampling_offsets.weight", "weights": "attention_weights.weight"},
        opt_in=True,
    ),
)
