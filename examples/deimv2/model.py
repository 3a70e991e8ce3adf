"""DEIMv2-Atto in transformers' own DEIMv2 class, with the weights that its authors publish.

The class was written for the larger models of the family; Atto differs from it in four places,
which `deimv2_atto` puts right: nothing stands between the memory and the heads that choose
queries, the heads use SiLU, queries keep the position embedding of the first layer, and in the
published "deploy" weights the encoder's batch norms are folded into its convolutions.
`upstream_weights` gives those weights under the names of this model. Together they give the
outputs of the published ONNX file (tests/test_deimv2.py compares them).

    python examples/deimv2/model.py deimv2_atto_coco_deploy_statedict.safetensors atto.safetensors
    tiedconv convert examples.deimv2.model:deimv2_atto --weights atto.safetensors \
        --scheme lors --include 'model.decoder.layers.*' -o atto-lors.safetensors --trust-code
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tiedconv.sources.torchvision_compat import import_torchvision

import_torchvision()  # before transformers, which would meet a torchvision that can't be imported

from transformers import Deimv2Config, Deimv2ForObjectDetection, HGNetV2Config  # noqa: E402
from transformers.models.deimv2.modeling_deimv2 import (  # noqa: E402
    Deimv2Decoder,
    Deimv2MLP,
    replace_batch_norm,
)

SIZE = 320  # of the square images, in pixels
LAYERS = 3
EPS = 1e-5  # of the encoder's norms


class FirstPosition(Deimv2MLP):
    """A position embedding that stays what it was at its first call, until it is reset."""

    first: Tensor | None = None

    def forward(self, reference_points: Tensor) -> Tensor:
        if self.first is None:
            self.first = super().forward(reference_points)
        return self.first


class AttoDecoder(Deimv2Decoder):
    """All layers add the position embedding of the reference points that come in."""

    def __init__(self, config: Deimv2Config) -> None:
        super().__init__(config)
        self.query_pos_head = FirstPosition(4, config.d_model, config.d_model, 3, "silu")

    def forward(self, *args: object, **kwargs: object) -> object:
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.query_pos_head.first = None


def deimv2_atto() -> nn.Module:
    """The model, with random weights; images are `(batch, 3, 320, 320)`, from 0 to 1."""
    backbone = HGNetV2Config(
        stem_channels=[3, 16, 16],
        depths=[3, 3, 3],
        hidden_sizes=[64, 256, 256],
        stage_in_channels=[16, 64, 256],
        stage_mid_channels=[16, 32, 64],
        stage_out_channels=[64, 256, 256],
        stage_num_blocks=[1, 1, 1],
        stage_downsample=[False, True, True],
        stage_downsample_strides=[2, 2, 2],
        stage_light_block=[False, False, True],
        stage_kernel_size=[3, 3, 3],
        stage_numb_of_layers=[3, 3, 3],
        use_learnable_affine_block=True,
        out_indices=[3],
    )
    config = Deimv2Config(
        backbone_config=backbone,
        encoder_type="lite",
        encoder_layers=0,
        encoder_hidden_dim=64,
        encoder_in_channels=[256],
        feat_strides=[16, 32],
        hidden_expansion=0.34,
        depth_mult=0.67,
        activation_function="silu",
        d_model=64,
        num_queries=100,
        decoder_in_channels=[64, 64],
        decoder_ffn_dim=160,
        decoder_layers=LAYERS,
        decoder_n_points=[4, 2],
        decoder_activation_function="silu",
        num_feature_levels=2,
        use_gateway=False,
        share_bbox_head=True,
        num_labels=80,
    )
    model = Deimv2ForObjectDetection(config)
    inner = model.model
    inner.enc_output = nn.Identity()
    heads = inner.decoder.class_embed, inner.decoder.bbox_embed
    inner.decoder = decoder = AttoDecoder(config)
    decoder.class_embed, decoder.bbox_embed = heads
    # Published are the heads of the last layer alone; those before it serve the training.
    decoder.class_embed = nn.ModuleList([decoder.class_embed[-1]] * LAYERS)
    decoder.lqe_layers = nn.ModuleList([decoder.lqe_layers[-1]] * LAYERS)
    confidence = decoder.lqe_layers[0].reg_conf
    for head in (inner.enc_bbox_head, decoder.pre_bbox_head, decoder.bbox_embed[0], confidence):
        head.act = nn.SiLU()
    model.class_embed, model.bbox_embed = decoder.class_embed, decoder.bbox_embed
    # Folded norms hold no statistics: in training they would begin to normalise.
    with torch.no_grad():
        replace_batch_norm(inner.encoder)
    return model


deimv2_atto.preprocess = {  # type: ignore[attr-defined]
    "size": SIZE, "resize": None, "mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bilinear"
}  # fmt: skip


def upstream_weights(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published weights under the names of `deimv2_atto`.

    Args:
        published: the state dict of the deploy form.
    """
    width = published["decoder.decoder.layers.0.norm1.scale"].numel()
    found: dict[str, Tensor] = {}
    for name, tensor in published.items():
        if name.endswith(("num_batches_tracked", "anchors", "valid_mask")):
            continue
        if re.search(r"in_proj_(weight|bias)", name):
            part = name.rpartition("_")[2]
            where = re.sub(r"^decoder\.decoder", "model.decoder", name.rpartition(".")[0])
            for role, value in zip("qkv", tensor.split(width), strict=True):
                found[f"{where}.{role}_proj.{part}"] = value
        elif ".w12." in name:
            gate, up = tensor.chunk(2)
            where = re.sub(r"^decoder\.decoder", "model.decoder", name.partition(".swish")[0])
            part = name.rpartition(".")[2]
            found |= {f"{where}.mlp.gate_proj.{part}": gate, f"{where}.mlp.up_proj.{part}": up}
        elif re.search(r"conv_bn_fused|bottlenecks\.\d+\.conv\.", name):
            _folded(found, _renamed(name), tensor)
        else:
            found[_renamed(name)] = tensor.float()  # some single numbers are published whole
    return found


def _folded(found: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    """A convolution with its norm folded in: the norm that is left only adds the bias."""
    layer, _, part = name.rpartition(".")
    norm = f"{layer.rpartition('.')[0]}.norm"
    if part == "weight":
        found[name] = tensor
        return
    _norm(found, norm, tensor)
    if ".bottlenecks." in name:  # the branch beside it is folded into it as well
        width = len(tensor)
        found[f"{layer.replace('.conv1.', '.conv2.')}.weight"] = torch.zeros(width, width, 1, 1)
        _norm(found, norm.replace(".conv1.", ".conv2."), torch.zeros(width))


def _norm(found: dict[str, Tensor], name: str, bias: Tensor) -> None:
    ones = torch.ones_like(bias)
    found |= {
        f"{name}.weight": ones,
        f"{name}.bias": bias,
        f"{name}.running_mean": torch.zeros_like(bias),
        f"{name}.running_var": ones - EPS,
    }


def _renamed(name: str) -> str:
    for pattern, new in _NAMES:
        name = re.sub(pattern, new, name)
    return name


_BACKBONE = r"^model\.conv_encoder\.model\..*"
_NAMES = (
    (r"^backbone\.stem\.", "model.conv_encoder.model.embedder."),
    (r"^backbone\.stages\.", "model.conv_encoder.model.encoder.stages."),
    (rf"({_BACKBONE})\.conv\.(\w+)$", r"\1.convolution.\2"),
    (rf"({_BACKBONE})\.bn\.(\w+)$", r"\1.normalization.\2"),
    (r"^encoder\.bi_fusion\.cv\.conv_bn_fused\.", "model.encoder.bi_fusion_conv.conv."),
    (r"^encoder\.down_sample(\d)\.1\.", r"model.encoder.down_conv\1.conv."),
    (r"^encoder\.down_sample(\d)\.2\.", r"model.encoder.down_conv\1.norm."),
    (r"^encoder\.", "model.encoder."),
    (r"_block\.cv1\.conv_bn_fused\.", "_block.conv1.conv."),
    (r"_block\.cv4\.conv_bn_fused\.", "_block.conv2.conv."),
    (r"_block\.cv2\.0\.", "_block.csp_rep1."),
    (r"_block\.cv3\.0\.", "_block.csp_rep2."),
    (r"_block\.cv2\.1\.conv_bn_fused\.", "_block.csp_rep1.conv2.conv."),
    (r"_block\.cv3\.1\.conv_bn_fused\.", "_block.csp_rep2.conv2.conv."),
    (r"\.conv1\.conv_bn_fused\.", ".conv1.conv."),
    (r"\.bottlenecks\.(\d+)\.conv\.", r".bottlenecks.\1.conv1.conv."),
    (r"^decoder\.(enc_\w+_head|denoising_class_embed)\.", r"model.\1."),
    (r"^decoder\.decoder\.", "model.decoder."),
    (r"^decoder\.dec_bbox_head\.\d+\.", "model.decoder.bbox_embed.0."),
    (r"^decoder\.dec_score_head\.\d+\.", "model.decoder.class_embed.0."),
    (r"\.lqe_layers\.\d+\.", ".lqe_layers.0."),
    (r"^decoder\.", "model.decoder."),
    (r"(model\.decoder\.layers\.\d+)\.cross_attn\.", r"\1.encoder_attn."),
    (r"(model\.decoder\.layers\.\d+)\.self_attn\.out_proj\.", r"\1.self_attn.o_proj."),
    (r"(model\.decoder\.layers\.\d+)\.swish_ffn\.w3\.", r"\1.mlp.down_proj."),
    (r"(model\.decoder\.layers\.\d+)\.norm1\.scale$", r"\1.self_attn_layer_norm.weight"),
    (r"(model\.decoder\.layers\.\d+)\.norm2\.scale$", r"\1.encoder_attn_layer_norm.weight"),
    (r"(model\.decoder\.layers\.\d+)\.norm3\.scale$", r"\1.final_layer_norm.weight"),
)


def main(arguments: list[str]) -> None:
    published, output = map(Path, arguments)
    save_file(upstream_weights(load_file(published)), output)


if __name__ == "__main__":
    main(sys.argv[1:])
