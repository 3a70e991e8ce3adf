"""What turns a detector's queries into classes and boxes, and boxes into queries.

All of it is private: small, and each layer's boxes hang on it. A recipe may name it.
"""

from tiedconv.families._patterns import Linear, pattern_family

_MLPS = (
    "bbox_predictor|bbox_embed|enc_bbox_head|pre_bbox_head|query_pos_head|query_scale"
    "|ref_point_head|ref_anchor_head"
)
_THREE = {f"layers.{i}": f"layers.{i}.weight" for i in range(3)}

FAMILY = pattern_family(
    "detection-heads",
    "model.decoder.bbox_embed.0.layers.0.weight",
    # One for each layer of the decoder.
    Linear(r"(?:.*\.)?class_embed\.(?P<n>\d+)", {"weight": "weight"}, private=True),
    Linear(r"(?:.*\.)?bbox_embed\.(?P<n>\d+)", _THREE, private=True),
    Linear(
        r"(?:.*\.)?lqe_layers\.(?P<n>\d+)",
        {f"reg_conf.{role}": f"reg_conf.{name}" for role, name in _THREE.items()},
        private=True,
    ),
    # One for all: its own layers are numbered.
    Linear(rf"(?:.*\.)?(?:{_MLPS})\.layers\.(?P<n>\d+)", {"weight": "weight"}, private=True),
)
