"""Tiny query-based detectors of transformers: random weights, the real classes.

Each has a whole backbone of its own (no weights are fetched) of a few thousand numbers, three
decoder layers, and every part that its published configurations have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

_LAYERS = {
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "num_labels": 5,
    "num_queries": 8,
}
_WIDTH = 32
SIDE = 64


def _resnet(stages: list[str]) -> Any:
    from transformers import ResNetConfig

    return ResNetConfig(
        embedding_size=8, hidden_sizes=[32] * 4, depths=[1] * 4, out_features=stages
    )


def _detr() -> nn.Module:
    from transformers import DetrConfig, DetrForObjectDetection

    backbone = _resnet(["stage4"])
    return DetrForObjectDetection(DetrConfig(backbone_config=backbone, d_model=_WIDTH, **_LAYERS))


def _conditional_detr() -> nn.Module:
    from transformers import ConditionalDetrConfig, ConditionalDetrForObjectDetection

    return ConditionalDetrForObjectDetection(
        ConditionalDetrConfig(backbone_config=_resnet(["stage4"]), d_model=_WIDTH, **_LAYERS)
    )


def _dab_detr() -> nn.Module:
    from transformers import DabDetrConfig, DabDetrForObjectDetection

    return DabDetrForObjectDetection(
        DabDetrConfig(backbone_config=_resnet(["stage4"]), hidden_size=_WIDTH, **_LAYERS)
    )


def _deformable_detr(**options: Any) -> nn.Module:
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

    return DeformableDetrForObjectDetection(
        DeformableDetrConfig(
            backbone_config=_resnet(["stage2", "stage3", "stage4"]), d_model=_WIDTH,
            num_feature_levels=3, encoder_n_points=2, decoder_n_points=2, **_LAYERS, **options,
        )
    )  # fmt: skip


def _refined_detr() -> nn.Module:
    return _deformable_detr(with_box_refine=True, two_stage=True, two_stage_num_proposals=8)


def _hybrid(**options: Any) -> dict[str, Any]:
    """What RT-DETR and those after it share, with one layer in their encoder as published."""
    return {
        **_LAYERS,
        "encoder_layers": 1,
        "d_model": _WIDTH,
        "encoder_hidden_dim": _WIDTH,
        "encoder_in_channels": [8, 16, 16],
        "decoder_in_channels": [_WIDTH] * 3,
        "decoder_n_points": 2,
        "num_denoising": 0,
        "hidden_expansion": 0.5,
        **options,
    }


def _rt_backbone() -> Any:
    from transformers import RTDetrResNetConfig

    return RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
        out_indices=[2, 3, 4],
    )  # fmt: skip


def _hgnet() -> Any:
    from transformers import HGNetV2Config

    return HGNetV2Config(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], stem_channels=[3, 4, 8],
        stage_in_channels=[8, 8, 8, 16], stage_mid_channels=[4, 4, 4, 4],
        stage_out_channels=[8, 8, 16, 16], stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[1, 1, 1, 1], stage_downsample=[False, True, True, True],
        stage_light_block=[False, False, True, True], stage_kernel_size=[3, 3, 5, 5],
        out_indices=[2, 3, 4],
    )  # fmt: skip


def _rt_detr() -> nn.Module:
    from transformers import RTDetrConfig, RTDetrForObjectDetection

    return RTDetrForObjectDetection(RTDetrConfig(backbone_config=_rt_backbone(), **_hybrid()))


def _rt_detr_v2() -> nn.Module:
    from transformers import RTDetrV2Config, RTDetrV2ForObjectDetection

    return RTDetrV2ForObjectDetection(RTDetrV2Config(backbone_config=_rt_backbone(), **_hybrid()))


def _d_fine() -> nn.Module:
    from transformers import DFineConfig, DFineForObjectDetection

    config = DFineConfig(backbone_config=_hgnet(), **_hybrid(lqe_hidden_dim=8, max_num_bins=4))
    return DFineForObjectDetection(config)


def _deimv2() -> nn.Module:
    from transformers import Deimv2Config, Deimv2ForObjectDetection

    config = Deimv2Config(backbone_config=_hgnet(), **_hybrid(lqe_hidden_dim=8, max_num_bins=4))
    return Deimv2ForObjectDetection(config)


DETECTORS: dict[str, Callable[[], nn.Module]] = {
    "hf-detr": _detr,
    "hf-conditional-detr": _conditional_detr,
    "hf-dab-detr": _dab_detr,
    "hf-deformable-detr": _deformable_detr,
    "hf-deformable-detr-refined": _refined_detr,
    "hf-rt-detr": _rt_detr,
    "hf-rt-detr-v2": _rt_detr_v2,
    "hf-d-fine": _d_fine,
    "hf-deimv2": _deimv2,
}
