"""Multi-scale deformable attention, in Deformable DETR and all that came after it.

It has no keys: where it looks and how much it weighs come from the query by two small matrices,
which are private, as a small change of them moves every sample. Values are sampled channel by
channel; the rest is what a linear layer is.
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
        private=True,
    ),
)
