"""Gated feed-forwards: `down(act(gate x) * up x)`, as in DINOv2-giant, EVA-02, DINOv3, Llama.

`up` and `down` are a pair; the gate is a matrix of its own, stored apart or in one tensor with
`up`. A hidden unit has a row of both, which are permuted together.
Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202).
"""

from tiedconv.families._patterns import IN_LAYER, FeedForward, pattern_family

_MLP = IN_LAYER + r"\.(?:mlp|ffn|feed_forward|swiglu|DenseReluDense|token_mixer)"
_APART = (
    ("gate_proj", "up_proj", "down_proj"),  # transformers: Llama, Mistral, Qwen, DINOv3
    ("fc1_g", "fc1_x", "fc2"),  # timm's SwiGLU
    ("w1", "w2", "w3"),  # DINOv2's own and timm's, the last one down
    ("w1", "w3", "w2"),  # Llama's own, the second one down
    ("w0", "w1", "w2"),  # timm's ViTamin
    ("wi_0", "wi_1", "wo"),  # T5 1.1
)
_IN_ONE = (
    ("fc1", "fc2"),  # timm's GluMlp
    ("weights_in", "weights_out"),  # transformers' DINOv2
    ("w12", "w3"),  # DINOv2's own
    ("gate_up_proj", "down_proj"),  # transformers' Phi-3
    ("Wi", "Wo"),  # ModernBERT
)

FAMILY = pattern_family(
    "swiglu",
    "blocks.0.mlp.fc1_g.weight, .fc1_x.weight and .fc2.weight",
    *(
        FeedForward(_MLP, gate=f"{gate}.weight", up=f"{up}.weight", down=f"{down}.weight")
        for gate, up, down in _APART
    ),
    *(
        FeedForward(_MLP, gate=f"{both}.weight", up=f"{both}.weight", down=f"{down}.weight")
        for both, down in _IN_ONE
    ),
    FeedForward(_MLP, up="up_proj.weight", down="down_proj.weight"),  # DINOv3 without a gate
)
