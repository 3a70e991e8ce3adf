"""Encoders of transformers that are no plain ViT: BERT and its kin, Swin, PVT, CvT, DistilBERT.

Queries, keys and values are layers of their own, the output projection lies beside the module that
holds them. A module with further tensors (a bias for each position, a spatial reduction) is not
permuted unless that is proven on the model.
"""

from tiedconv.families._patterns import IN_LAYER, Attention, FeedForward, Linear, pattern_family

_ATTENTION = IN_LAYER + r"\.(?:attention|crossattention|temporal_attention)"
_BLOCK = r"(?:.*\.)?blocks\.(?P<n>\d+)"


def _words(below: str, o: str) -> Attention:
    """`query`, `key` and `value` below a name."""
    q, k, v = (f"{below}{word}.weight" for word in ("query", "key", "value"))
    return Attention(_ATTENTION, q=q, k=k, v=v, o=o)


FAMILY = pattern_family(
    "hf-encoder",
    "encoder.layer.0.attention.self.query.weight and .attention.output.dense.weight",
    _words("self.", "output.dense.weight"),  # BERT, RoBERTa, ELECTRA, Swin v2, PVT
    _words("", "proj.weight"),  # PVT v2
    _words("", "dense.weight"),  # ALBERT
    _words("attention.projection_", "output.dense.weight"),  # CvT
    Attention(
        _BLOCK + r"\.attention", q="q_proj.weight", k="k_proj.weight", v="v_proj.weight",
        o="o_proj.weight",
    ),
    Attention(
        _ATTENTION, q="q_lin.weight", k="k_lin.weight", v="v_lin.weight", o="out_lin.weight"
    ),
    Linear(_ATTENTION, {
        "reduction": "sequence_reduction.sequence_reduction.weight",
        "sequence_reduction": "self.sequence_reduction.weight",
        "spatial_reduction": "spatial_reduction.weight",
    }),
    FeedForward(
        _BLOCK, up="intermediate.dense.weight", down="output.dense.weight", alone=False,
        act="intermediate.intermediate_act_fn",
    ),
    FeedForward(IN_LAYER + r"\.mlp", up="dense1.weight", down="dense2.weight"),
    FeedForward(IN_LAYER + r"\.ffn", up="lin1.weight", down="lin2.weight", act="activation"),
    FeedForward(IN_LAYER, up="ffn.weight", down="ffn_output.weight", alone=False),  # ALBERT
)  # fmt: skip
