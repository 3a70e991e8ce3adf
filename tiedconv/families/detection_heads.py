"""The heads of a detector: queries to classes and boxes, and boxes to queries.

All are opt-in: small, and the boxes of each layer depend on them. A recipe may name them. Names of
transformers, of the authors of DETRs, and of torchvision.
"""

from tiedconv.families._patterns import Linear, pattern_family

_MLPS = (
    "bbox_predictor|bbox_embed|enc_bbox_head|pre_bbox_head|query_pos_head|query_scale"
    "|ref_point_head|ref_anchor_head"
)
_ONES = (
    "class_labels_classifier|class_predictor|class_embed|enc_score_head|cls_score|bbox_pred"
    "|cls_logits|bbox_reg|bbox_ctrness"
)
_THREE = {f"layers.{i}": f"layers.{i}.weight" for i in range(3)}

FAMILY = pattern_family(
    "detection-heads",
    "model.decoder.bbox_embed.0.layers.0.weight",
    # One for each layer of the decoder.
    Linear(r"(?:.*\.)?class_embed\.(?P<n>\d+)", {"weight": "weight"}, opt_in=True),
    Linear(r"(?:.*\.)?bbox_embed\.(?P<n>\d+)", _THREE, opt_in=True),
    Linear(
        r"(?:.*\.)?lqe_layers\.(?P<n>\d+)",
        {f"reg_conf.{role}": f"reg_conf.{name}" for role, name in _THREE.items()},
        opt_in=True,
    ),
    # One for all; its own layers may be numbered.
    Linear(rf"(?:.*\.)?(?:{_ONES})", {"weight": "weight"}, opt_in=True),
    Linear(rf"(?:.*\.)?(?:{_MLPS})\.layers\.(?P<n>\d+)", {"weight": "weight"}, opt_in=True),
)
