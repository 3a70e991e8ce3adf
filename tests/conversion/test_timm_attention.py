"""The law of symmetries over timm: aligning changes no output, whatever kind of attention it is.

Two models, the smallest, for each class of timm that attends and has models below 30 million
parameters. All parameters are drawn anew, so that no table or scale is zero, one or alike by
chance. In float32 another order of the same sums moves outputs by up to 1e-5; a symmetry that is
none moves them by a hundredth and more.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from tiedconv.conversion.candidates import memory_store
from tiedconv.conversion.stages import align
from tiedconv.errors import NothingToConvert
from tiedconv.families.inspect import inspect_model
from tiedconv.planning.planner import outlines
from tiedconv.planning.recipe import Recipe
from tiedconv.sources.torchvision_compat import import_torchvision

import_torchvision()
import timm  # noqa: E402

MODELS = """
    bat_resnext26ts botnet26t_256 caformer_s18 cait_xxs24_224 coat_lite_tiny coat_tiny
    coatnet_pico_rw_224 cpubone_nano cpubone_t0 crossvit_9_240 crossvit_tiny_240 csatv2
    csatv2_21m davit_tiny eca_botnext26ts_256 eca_halonext26ts edgenext_x_small
    edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientformerv2_s1
    efficientvit_m0 efficientvit_m1 eva02_tiny_patch14_224 fastvit_mci0 fastvit_sa12 gcvit_xtiny
    gcvit_xxtiny halonet_h1 hiera_tiny_224 levit_128s levit_conv_128s lowformer_b0 lowformer_b1
    maxvit_pico_rw_256 mobilenetv4_hybrid_medium mobilenetv4_hybrid_medium_075 mobilevitv2_050
    mobilevitv2_075 mvitv2_tiny nest_tiny nest_tiny_jx pvt_v2_b0 pvt_v2_b1 resnest14d resnest26d
    sam2_hiera_tiny skresnet18 skresnet34 swiftformer_s swiftformer_xs swin_s3_tiny_224
    swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 swinv2_tiny_window8_256
    swinv2_tiny_window16_256 test_coatnet test_convnext test_efficientnet test_maxvit test_vit
    test_vit2 test_vit3 test_vit_relpos tiny_vit_11m_224 tiny_vit_5m_224
    tnt_s_legacy_patch16_224 tnt_s_patch16_224 twins_pcpvt_small twins_svt_small visformer_tiny
    vit_dlittle_patch16_reg1_gap_256 vit_dwee_patch16_reg1_gap_256 vit_pe_core_tiny_patch16_384
    vit_pe_spatial_tiny_patch16_512 vit_srelpos_small_patch16_224 vit_tiny_patch16_dinov3_qkvb
    volo_d1_224 xcit_nano_12_p8_224
""".split()  # noqa: SIM905

QUICK = {"test_vit_relpos", "test_vit3"}
SCHEMES = ("tied", "lors")


def drawn(model: nn.Module) -> nn.Module:
    """With every parameter drawn anew."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(p[0].numel()))
            elif p.ndim == 1:
                low = 0.6 if name.endswith("weight") else -0.4
                p.copy_(torch.rand(p.shape, generator=generator) * 0.8 + low)
            else:
                p.fill_(0.7)
    return model.eval()


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def rounding(model: nn.Module, x: Tensor) -> float:
    """How far float32 itself moves the output: drawn weights make some models ill-conditioned."""
    exact = copy.deepcopy(model).double()(x.double())
    return relative(model(x).double(), exact)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in MODELS]
)
def test_aligning_changes_no_output(name: str) -> None:
    model = drawn(timm.create_model(name))
    size = model.pretrained_cfg["input_size"]
    x = torch.randn(2, *size, generator=torch.Generator().manual_seed(1))
    info = inspect_model(model)
    with torch.no_grad():
        before = model(x)
        assert bool(before.isfinite().all())
        aligned = 0
        for scheme in SCHEMES:
            try:
                (outlined,) = outlines(info, Recipe.of(scheme))
            except NothingToConvert:
                continue
            workspace = align(outlined, memory_store(model, info))
            other = copy.deepcopy(model)
            for tensor in workspace.editor.edited:
                other.state_dict()[tensor].copy_(workspace.aligned(tensor))
                aligned += 1
            workspace.close()
            moved = relative(other(x), before)
            assert moved < 1e-4 or moved < 3 * rounding(model, x), scheme
    if name in ("test_vit", "test_vit3"):
        assert aligned  # plain attention is aligned, so that the law is no law about nothing
