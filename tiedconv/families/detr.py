"""DETR's layers as transformers has them: an encoder's, a decoder's, a hybrid encoder's (`aifi`).

Positions are added to the inputs of queries and keys, before the projections, so heads may be
permuted and rotated. Conditional and deformable attention have families of their own.
"""

from tiedconv.families._patterns import Attention, FeedForward, Linear, pattern_family

_LAYER = r"(?:.*\.)?(?:encoder|decoder|aifi\.\d+)\.layers\.(?P<n>\d+)"


def _attention(o: str) -> Attention:
    at = _LAYER + r"\.(?:self_attn|encoder_attn|cross_attn)"
    return Attention(at, q="q_proj.weight", k="k_proj.weight", v="v_proj.weight", o=o)


FAMILY = pattern_family(
    "detr",
    "model.decoder.layers.0.encoder_attn.q_proj.weight",
    _attention("o_proj.weight"),
    _attention("out_proj.weight"),
    FeedForward(
        _LAYER + r"\.mlp", up="fc1.weight", down="fc2.weight", act="activation_fn",
        # DAB-DETR's norm comes after the sum, and its PReLU has one slope for all units.
        ignored=("final_layer_norm", "activation_fn"),
    ),
    FeedForward(_LAYER + r"\.mlp", up="layers.0.weight", down="layers.1.weight", act="act"),
    FeedForward(_LAYER, up="fc1.weight", down="fc2.weight", act="activation_fn", alone=False),
    # SwiGLU: units of the gate and of `up` belong together, so they may not be permuted alone.
    FeedForward(_LAYER + r"\.mlp", up="up_proj.weight", down="down_proj.weight"),
    Linear(_LAYER, {"mlp.gate": "mlp.gate_proj.weight", "gateway": "gateway.gate.weight"}),
)  # fmt: skip
