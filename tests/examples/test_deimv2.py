"""The example of DEIMv2-Atto: the published weights in transformers' own class."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
REAL = ROOT / ".data" / "deimv2_atto"

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def example() -> Any:
    sys.path.insert(0, str(ROOT))
    try:
        from examples.deimv2 import model
    finally:
        sys.path.remove(str(ROOT))
    return model


@pytest.fixture(scope="module")
def atto(example: Any) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = example.deimv2_atto()
    return made.eval()


def images(count: int = 1) -> Tensor:
    return torch.rand(count, 3, 320, 320, generator=torch.Generator().manual_seed(0))


def test_the_model_has_the_published_size(atto: nn.Module) -> None:
    assert sum(p.numel() for p in atto.parameters()) == 490_359
    with torch.no_grad():
        output = atto(images())
    assert output.logits.shape == (1, 100, 80)
    assert output.pred_boxes.shape == (1, 100, 4)


def test_queries_keep_the_position_of_the_first_layer(atto: nn.Module) -> None:
    seen: list[Tensor] = []
    layers: Any = atto.model.decoder.layers  # type: ignore[union-attr]
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["position_embeddings"]), with_kwargs=True
        )
        for layer in layers
    ]
    with torch.no_grad():
        atto(images(2))
        other = atto(images(1))
    for hook in hooks:
        hook.remove()
    assert all(torch.equal(seen[0], later) for later in seen[1:3])
    assert all(torch.equal(seen[3], later) for later in seen[4:])
    assert len(seen[3]) == 1  # it is forgotten between two passes
    assert other.logits.isfinite().all()


def test_copies_are_whole(atto: nn.Module) -> None:
    with torch.no_grad():
        expected = atto(images()).logits
        for same in (copy.deepcopy(atto), pickle.loads(pickle.dumps(atto))):
            assert torch.equal(same(images()).logits, expected)


def test_a_folded_norm_is_put_beside_its_convolution(example: Any) -> None:
    published = {
        "encoder.fpn_block.cv1.conv_bn_fused.weight": torch.randn(8, 4, 1, 1),
        "encoder.fpn_block.cv1.conv_bn_fused.bias": torch.randn(8),
        "encoder.fpn_block.cv2.0.bottlenecks.1.conv.weight": torch.randn(4, 4, 3, 3),
        "encoder.fpn_block.cv2.0.bottlenecks.1.conv.bias": torch.randn(4),
        "decoder.decoder.layers.0.norm1.scale": torch.ones(4),
        "decoder.decoder.reg_scale": torch.tensor([4]),
        "decoder.anchors": torch.zeros(1),
    }
    found = example.upstream_weights(published)
    inner = "model.encoder.fpn_block"
    layer = nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8, example.EPS)).eval()
    state = {"0.weight": found[f"{inner}.conv1.conv.weight"]}
    for part in ("weight", "bias", "running_mean", "running_var"):
        state[f"1.{part}"] = found[f"{inner}.conv1.norm.{part}"]
    layer.load_state_dict(state, strict=False)
    x = torch.randn(2, 4, 5, 5)
    weight, bias = list(published.values())[:2]
    torch.testing.assert_close(layer(x), nn.functional.conv2d(x, weight, bias))
    beside = found[f"{inner}.csp_rep1.bottlenecks.1.conv2.conv.weight"]
    assert not beside.any()
    assert found["model.decoder.reg_scale"].dtype == torch.float32
    assert "model.decoder.layers.0.self_attn_layer_norm.weight" in found
    assert not any("anchors" in name for name in found)


@pytest.mark.skipif(
    not (REAL / "deimv2_atto_coco_deploy_statedict.safetensors").is_file(),
    reason="needs the published weights and ONNX file in .data/deimv2_atto",
)
def test_the_published_weights_give_the_published_outputs(example: Any) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    from tiedconv.detection import detections_of

    model = example.deimv2_atto().eval()
    published = load_file(REAL / "deimv2_atto_coco_deploy_statedict.safetensors")
    weights = example.upstream_weights(published)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    own = model.state_dict(keep_vars=True)
    given = {id(own[name]) for name in weights}
    assert not unexpected
    assert all(id(own[name]) in given for name in missing)  # second names of shared heads
    session = onnxruntime.InferenceSession(str(REAL / "deimv2_hgnetv2_atto_coco.onnx"))
    x = images()
    sizes = torch.ones(1, 2, dtype=torch.int64)
    labels, boxes, scores = session.run(
        None, {"images": x.numpy(), "orig_target_sizes": sizes.numpy()}
    )
    with torch.no_grad():
        found = detections_of(model(x), model)[0]
    torch.testing.assert_close(
        found.scores, torch.from_numpy(scores[0])[:100], atol=2e-3, rtol=0.01
    )
    best = slice(0, 5)
    assert found.labels[best].tolist() == labels[0][best].tolist()
    half = found.boxes[:, 2:] / 2
    corners = torch.cat([found.boxes[:, :2] - half, found.boxes[:, :2] + half], 1)
    torch.testing.assert_close(
        corners[best], torch.from_numpy(boxes[0])[best], atol=1e-3, rtol=0.01
    )
