"""The architectures of `zoo.py`: published sizes, and small forms of those of transformers."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from tiedconv.sources.torchvision_compat import import_torchvision

import_torchvision()
import timm  # noqa: E402
import torchvision  # noqa: E402
import transformers  # noqa: E402

TORCHVISION = """
alexnet convnext_tiny deeplabv3_mobilenet_v3_large deeplabv3_resnet50 densenet121 efficientnet_b0
efficientnet_v2_s fasterrcnn_mobilenet_v3_large_fpn fasterrcnn_resnet50_fpn fcn_resnet50
fcos_resnet50_fpn googlenet inception_v3 keypointrcnn_resnet50_fpn lraspp_mobilenet_v3_large
maskrcnn_resnet50_fpn maxvit_t mc3_18 mnasnet1_0 mobilenet_v2 mobilenet_v3_large mvit_v1_b mvit_v2_s
r2plus1d_18 r3d_18 raft_small regnet_x_400mf regnet_y_400mf resnet18 resnet50 resnext50_32x4d
retinanet_resnet50_fpn s3d shufflenet_v2_x1_0 squeezenet1_0 ssd300_vgg16
ssdlite320_mobilenet_v3_large swin3d_t swin_t swin_v2_t vgg16 vgg16_bn vit_b_16 wide_resnet50_2
"""

TIMM = """
aimv2_large_patch14_224 bat_resnext26ts beit_base_patch16_224 beitv2_base_patch16_224
botnet26t_256 caformer_s18 cait_s24_224 coat_lite_small coatnet_0_224 coatnext_nano_rw_224
convformer_s18 convit_small convmixer_768_32 convnext_tiny convnext_zepto_rms convnextv2_tiny
crossvit_small_240 cs3darknet_m csatv2 cspdarknet53 cspresnet50 darknet53 davit_tiny
deit3_small_patch16_224 deit_small_distilled_patch16_224 densenet121 dla34 dla46_c dm_nfnet_f0 dpn68
eca_halonext26ts eca_nfnet_l0 ecaresnet26t edgenext_small efficientformer_l1 efficientformerv2_s0
efficientnet_b0 efficientnetv2_rw_t efficientvit_b0 efficientvit_l1 efficientvit_m0
ese_vovnet19b_dw eva02_tiny_patch14_224 eva_giant_patch14_224 fasternet_t0 fastvit_t8 fbnetc_100
flexivit_small focalnet_tiny_srf gcresnet50t gcvit_tiny ghostnet_100 ghostnetv2_100 gmixer_24_224
gmlp_s16_224 halonet26t haloregnetz_b hardcorenas_a hgnet_tiny hgnetv2_b0 hiera_tiny_224
hieradet_small hrnet_w18_small inception_next_tiny inception_resnet_v2 inception_v3 inception_v4
lambda_resnet26t lcnet_050 levit_256 levit_conv_256 mambaout_tiny maxvit_rmlp_tiny_rw_256
maxvit_tiny_tf_224 maxxvit_rmlp_nano_rw_256 mixer_b16_224 mixnet_s mnasnet_100
mobilenet_edgetpu_v2_m mobilenetv1_100 mobilenetv2_100 mobilenetv3_large_100
mobilenetv4_conv_small mobilenetv4_hybrid_medium mobileone_s0 mobilevit_s mobilevitv2_100
mvitv2_tiny naflexvit_base_patch16_gap nasnetalarge nest_tiny nextvit_small nf_regnet_b0 nf_resnet50
nfnet_f0 pit_s_224 pnasnet5large poolformer_s12 poolformerv2_s12 pvt_v2_b1 rdnet_tiny regnetv_040
regnetx_004 regnety_004 regnetz_005 repghostnet_050 repvgg_a2 repvit_m1 res2net50_26w_4s
resmlp_12_224 resnest14d resnet18 resnet50 resnet50d resnetaa50 resnetblur50 resnetv2_50
resnetv2_50x1_bit resnext50_32x4d rexnet_100 sam2_hiera_tiny samvit_base_patch16 selecsls42
semnasnet_100 sequencer2d_s seresnet50 shvit_s1 skresnet18 spnasnet_100 starnet_s1 swiftformer_xs
swin_s3_tiny_224 swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 swinv2_tiny_window8_256
test_byobnet test_convnext test_efficientnet test_resnet test_vit tf_efficientnet_lite0
tf_efficientnetv2_s tiny_vit_21m_224 tiny_vit_5m_224 tinynet_a tnt_s_patch16_224 tresnet_m
twins_pcpvt_small twins_svt_small vgg16 visformer_small vit_base_patch16_clip_224
vit_base_r50_s16_224 vit_giant_patch14_dinov2 vit_medium_patch16_rope_reg1_gap_256
vit_pe_core_tiny_patch16_384 vit_relpos_base_patch16_224 vit_small_patch16_224
vit_small_plus_patch16_dinov3 vit_small_r26_s32_224 vit_so150m_patch16_reg4_gap_256
vit_so400m_patch14_siglip_224 vit_srelpos_small_patch16_224 vit_tiny_r_s16_p8_224
vitamin_small_224 volo_d1_224 vovnet39a wide_resnet50_2 xception xception41 xcit_small_12_p16_224
"""

_TRANSFORMER = {
    "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96,
    "image_size": 64, "patch_size": 16,
}  # fmt: skip
_TEXT = {**_TRANSFORMER, "vocab_size": 64, "max_position_embeddings": 32}
_LLAMA = {**_TEXT, "num_key_value_heads": 3, "head_dim": 16, "pad_token_id": 0}
_STAGES = {"image_size": 64, "depths": [2, 2, 2], "hidden_sizes": [16, 32, 64]}
_SWIN = {
    "image_size": 64, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
}  # fmt: skip
_TOWERS = {"text_config": _TEXT, "vision_config": _TRANSFORMER, "projection_dim": 16}

TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any] | None]] = {
    "ViT": ("ViTModel", "ViTConfig", _TRANSFORMER),
    "DeiT": ("DeiTModel", "DeiTConfig", _TRANSFORMER),
    "BEiT": ("BeitModel", "BeitConfig", _TRANSFORMER),
    "Data2Vec": ("Data2VecVisionModel", "Data2VecVisionConfig", _TRANSFORMER),
    "IJEPA": ("IJepaModel", "IJepaConfig", _TRANSFORMER),
    "DINOv2": ("Dinov2Model", "Dinov2Config", _TRANSFORMER),
    "DINOv2, SwiGLU": ("Dinov2Model", "Dinov2Config", {**_TRANSFORMER, "use_swiglu_ffn": True}),
    "DINOv3": ("DINOv3ViTModel", "DINOv3ViTConfig", _TRANSFORMER),
    "DINOv3 ConvNeXt": ("DINOv3ConvNextModel", "DINOv3ConvNextConfig", None),
    "ViT-MAE": (
        "ViTMAEForPreTraining", "ViTMAEConfig",
        {**_TRANSFORMER, "decoder_hidden_size": 48, "decoder_num_hidden_layers": 2,
         "decoder_num_attention_heads": 3, "decoder_intermediate_size": 96},
    ),
    "VideoMAE": ("VideoMAEModel", "VideoMAEConfig", {**_TRANSFORMER, "num_frames": 4}),
    "TimeSformer": ("TimesformerModel", "TimesformerConfig", {**_TRANSFORMER, "num_frames": 2}),
    "YOLOS": (
        "YolosForObjectDetection", "YolosConfig",
        {**_TRANSFORMER, "image_size": [64, 64], "num_detection_tokens": 5},
    ),
    "ViTDet": ("VitDetModel", "VitDetConfig", _TRANSFORMER),
    "Swin": ("SwinModel", "SwinConfig", _SWIN),
    "Swin v2": ("Swinv2Model", "Swinv2Config", _SWIN),
    "MaskFormer": ("MaskFormerModel", "MaskFormerConfig", None),
    "Mask2Former": ("Mask2FormerModel", "Mask2FormerConfig", None),
    "UperNet": ("UperNetForSemanticSegmentation", "UperNetConfig", None),
    "Hiera": (
        "HieraModel", "HieraConfig",
        {"image_size": [64, 64], "embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 4],
         "mlp_ratio": 2.0},
    ),
    "SegFormer": (
        "SegformerForSemanticSegmentation", "SegformerConfig",
        {"hidden_sizes": [16, 32, 40, 48], "depths": [2, 2, 2, 2], "decoder_hidden_size": 32,
         "num_attention_heads": [1, 2, 5, 6], "num_labels": 6},
    ),
    "PVT": (
        "PvtModel", "PvtConfig",
        {"image_size": 64, "hidden_sizes": [16, 32, 40, 48], "depths": [2, 2, 2, 2],
         "num_attention_heads": [1, 2, 5, 6], "sequence_reduction_ratios": [4, 2, 2, 1]},
    ),
    "PVT v2": (
        "PvtV2Model", "PvtV2Config",
        {"image_size": 64, "hidden_sizes": [16, 32, 40, 48], "depths": [2, 2, 2, 2],
         "num_attention_heads": [1, 2, 5, 6]},
    ),
    "CvT": (
        "CvtModel", "CvtConfig",
        {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 3], "depth": [1, 2, 3]},
    ),
    "LeViT": ("LevitModel", "LevitConfig", None),
    "GLPN": ("GLPNForDepthEstimation", "GLPNConfig", None),
    "DPT": ("DPTForDepthEstimation", "DPTConfig", None),
    "Depth Anything": ("DepthAnythingForDepthEstimation", "DepthAnythingConfig", None),
    "CLIP": ("CLIPModel", "CLIPConfig", _TOWERS),
    "SigLIP": ("SiglipModel", "SiglipConfig", {
        "text_config": {**_TEXT, "projection_size": 48}, "vision_config": _TRANSFORMER,
    }),
    "OWL-ViT": ("OwlViTModel", "OwlViTConfig", _TOWERS),
    "BLIP": ("BlipModel", "BlipConfig", None),
    "X-CLIP": ("XCLIPModel", "XCLIPConfig", None),
    "ViLT": ("ViltModel", "ViltConfig", None),
    "SAM": ("SamModel", "SamConfig", None),
    "SAM 2": ("Sam2Model", "Sam2Config", None),
    "DETR": ("DetrForObjectDetection", "DetrConfig", None),
    "Conditional DETR": ("ConditionalDetrForObjectDetection", "ConditionalDetrConfig", None),
    "Deformable DETR": ("DeformableDetrForObjectDetection", "DeformableDetrConfig", None),
    "RT-DETR": ("RTDetrForObjectDetection", "RTDetrConfig", None),
    "RT-DETR v2": ("RTDetrV2ForObjectDetection", "RTDetrV2Config", None),
    "D-FINE": ("DFineForObjectDetection", "DFineConfig", None),
    "Grounding DINO": ("GroundingDinoModel", "GroundingDinoConfig", None),
    "Table Transformer": ("TableTransformerModel", "TableTransformerConfig", None),
    "ConvNeXt": ("ConvNextModel", "ConvNextConfig", {
        **_STAGES, "num_stages": 3, "depths": [2, 2, 2],
    }),
    "ResNet": ("ResNetModel", "ResNetConfig", {
        "embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 2],
    }),
    "RegNet": ("RegNetModel", "RegNetConfig", {
        "embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 2], "groups_width": 16,
    }),
    "BiT": ("BitModel", "BitConfig", {
        "embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 2], "num_groups": 4,
    }),
    "EfficientNet": ("EfficientNetModel", "EfficientNetConfig", None),
    "MobileNetV1": ("MobileNetV1Model", "MobileNetV1Config", {"image_size": 64}),
    "MobileNetV2": ("MobileNetV2Model", "MobileNetV2Config", {"image_size": 64}),
    "MobileViT": ("MobileViTModel", "MobileViTConfig", {"image_size": 64}),
    "PoolFormer": ("PoolFormerModel", "PoolFormerConfig", {
        "hidden_sizes": [16, 32, 40, 48], "depths": [2, 2, 2, 2],
    }),
    "FocalNet": ("FocalNetModel", "FocalNetConfig", None),
    "SwiftFormer": ("SwiftFormerModel", "SwiftFormerConfig", None),
    "BERT": ("BertModel", "BertConfig", _TEXT),
    "RoBERTa": ("RobertaModel", "RobertaConfig", _TEXT),
    "ELECTRA": ("ElectraModel", "ElectraConfig", {**_TEXT, "embedding_size": 48}),
    "ALBERT": ("AlbertModel", "AlbertConfig", {**_TEXT, "embedding_size": 24}),
    "DistilBERT": ("DistilBertModel", "DistilBertConfig", {
        "dim": 48, "n_layers": 3, "n_heads": 3, "hidden_dim": 96, "vocab_size": 64,
    }),
    "ModernBERT": ("ModernBertModel", "ModernBertConfig", {**_TEXT, "pad_token_id": 0}),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", {
        "n_embd": 48, "n_layer": 3, "n_head": 3, "vocab_size": 64,
    }),
    "GPT-NeoX": ("GPTNeoXModel", "GPTNeoXConfig", _TEXT),
    "OPT": ("OPTModel", "OPTConfig", {**_TEXT, "ffn_dim": 96, "word_embed_proj_dim": 48}),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "Mistral": ("MistralModel", "MistralConfig", {**_LLAMA, "num_key_value_heads": 1}),
    "Qwen2": ("Qwen2Model", "Qwen2Config", _LLAMA),
    "Qwen3": ("Qwen3Model", "Qwen3Config", _LLAMA),
    "Gemma": ("GemmaModel", "GemmaConfig", _LLAMA),
    "Phi": ("PhiModel", "PhiConfig", _TEXT),
    "Phi-3": ("Phi3Model", "Phi3Config", {**_LLAMA, "hidden_size": 48}),
    "T5": ("T5EncoderModel", "T5Config", {
        "d_model": 48, "d_kv": 16, "d_ff": 96, "num_layers": 3, "num_heads": 3, "vocab_size": 64,
    }),
    "BART": ("BartModel", "BartConfig", {
        "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 3,
        "decoder_attention_heads": 3, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96,
        "vocab_size": 64,
    }),
    "Perceiver": ("PerceiverModel", "PerceiverConfig", None),
    "Whisper": ("WhisperModel", "WhisperConfig", None),
    "AST": ("ASTModel", "ASTConfig", None),
    "TextNet": ("TextNetModel", "TextNetConfig", None),
}  # fmt: skip
"""Model class, configuration class, and a small configuration; None where the form is no small."""

NAMES = [
    *(f"torchvision:{n}" for n in TORCHVISION.split()),
    *(f"timm:{n}" for n in TIMM.split()),
    *(f"transformers:{n}" for n in TRANSFORMERS),
]


def published(name: str) -> nn.Module:
    """An architecture in its published size, on the meta device where its constructor lets it."""
    try:
        with torch.device("meta"):
            return built(name, small=False)
    except NotImplementedError:  # it reads a tensor while it is built
        return built(name, small=False)


def built(name: str, *, small: bool = True) -> nn.Module:
    """An architecture; of transformers in its small form if that is asked for."""
    library, _, which = name.partition(":")
    if library == "timm":
        model: nn.Module = timm.create_model(which)
    elif library == "torchvision":
        builder = torchvision.models.get_model_builder(which)
        known = inspect.signature(builder).parameters
        options: dict[str, Any] = {"weights": None}
        if "weights_backbone" in known:
            options["weights_backbone"] = None
        if which in ("googlenet", "inception_v3"):  # as their weights are published
            options |= {"init_weights": False, "transform_input": True}
            options |= {"aux_logits": False} if which == "googlenet" else {}
        model = builder(**options)
    else:
        model_class, config_class, sizes = TRANSFORMERS[which]
        config = getattr(transformers, config_class)(**(sizes if small and sizes else {}))
        model = getattr(transformers, model_class)(config)
    return model


def has_small_form(name: str) -> bool:
    """Whether the checks that run a model can run this one here."""
    library, _, which = name.partition(":")
    return library != "transformers" or TRANSFORMERS[which][2] is not None
