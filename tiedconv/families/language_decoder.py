"""Decoder stacks of language models: Llama, Mistral, Qwen, Phi, Gemma, T5; SAM's decoders alike.

Where several heads of queries share one of keys and values, `tied` has q with o alone: k and v are
no square matrices, so neither is the other's transpose. Heads are rotated by their positions in
most, so only what is proven on the model is moved. Their gated feed-forwards are `swiglu`.
"""

from tiedconv.families._patterns import IN_LAYER, Attention, FeedForward, pattern_family

_ATTENTION = IN_LAYER + r"\.(?:self_attn|cross_attn\w*|encoder_attn|attention)"
_T5 = r"(?:.*\.)?block\.(?P<n>\d+)\.layer\.\d+"


def _projections(o: str) -> Attention:
    q, k, v = (f"{role}_proj.weight" for role in "qkv")
    return Attention(_ATTENTION, q=q, k=k, v=v, o=f"{o}.weight")


FAMILY = pattern_family(
    "language-decoder",
    "model.layers.0.self_attn.q_proj.weight and .self_attn.o_proj.weight",
    _projections("o_proj"),
    _projections("out_proj"),
    _projections("dense"),  # Phi
    Attention(
        _T5 + r"\.(?:SelfAttention|EncDecAttention)",
        q="q.weight", k="k.weight", v="v.weight", o="o.weight",
    ),
    FeedForward(_T5 + r"\.DenseReluDense", up="wi.weight", down="wo.weight"),
    FeedForward(IN_LAYER + r"\.mlp", up="dense_h_to_4h.weight", down="dense_4h_to_h.weight"),
)  # fmt: skip
