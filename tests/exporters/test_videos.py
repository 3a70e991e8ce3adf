"""Models of videos: verified and exported on inputs of five dimensions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiedconv
from tiedconv.commands._reference import images_for
from tiedconv.exporters._format import Outputs, constant_bytes
from tiedconv.runtime.example_inputs import usual_inputs, video_shapes
from tiedconv.runtime.outputs import named_outputs
from tiedconv.runtime.tie import set_state, state_of
from tiedconv.sources import Preprocess
from tiedconv.sources.torchvision_compat import import_torchvision

TINY = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip


def videomae(name: str = "VideoMAEForVideoClassification") -> nn.Module:
    """Its input is `(batch, frames, channels, height, width)`."""
    import_torchvision()
    import transformers

    torch.manual_seed(0)
    config = transformers.VideoMAEConfig(**TINY, num_frames=4, num_labels=5)
    model: nn.Module = getattr(transformers, name)(config)
    return model.eval()


class Convolutions(nn.Module):
    """Its input is `(batch, channels, frames, height, width)`, as torchvision's networks have."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 16, (3, 4, 4), (1, 4, 4), (1, 0, 0))
        self.blocks = nn.ModuleList(nn.Conv3d(16, 16, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x).relu()
        found: Tensor = self.head(x.mean((2, 3, 4)))
        return found


def network(size: int = 16) -> nn.Module:
    """Built by a function, which a file can name."""
    torch.manual_seed(size)
    return Convolutions().eval()


def written(model: nn.Module, spec: str, path: Path) -> None:
    tied = tiedconv.convert(model, "lowrank", rank=4)
    source = {**(state_of(tied).source or {}), "spec": spec}
    source["preprocess"] = Preprocess(16).to_json()
    set_state(tied, source=source)
    tiedconv.save(tied, path)


def test_inputs_of_videos_are_known_from_the_model() -> None:
    assert video_shapes(videomae(), 3, (16, 16))[0] == (4, 3, 16, 16)
    assert video_shapes(network(), 3, (8, 8)) == [(3, 16, 8, 8)]
    assert video_shapes(nn.Conv2d(3, 4, 1), 3, (8, 8)) == []
    taken = [next(kind, None) for kind in usual_inputs(network())]
    assert taken[1] is not None
    assert network()(taken[1]).shape == (1, 12)


def test_multiply_adds_of_videos_are_counted() -> None:
    found = tiedconv.report(tiedconv.convert(videomae(), "lowrank", macs="70%")).macs
    assert found is not None
    assert found["inputs"] == [[1, 4, 3, 16, 16]]


def test_constants_that_no_file_holds_are_counted_once() -> None:
    assert constant_bytes(network()) == 0
    assert constant_bytes(videomae()) == 2 * 2 * 2 * 24 * 4


def test_a_single_output_with_a_name_keeps_it() -> None:
    model = videomae("VideoMAEModel")
    video = torch.zeros(1, 4, 3, 16, 16)
    wrapped = Outputs(model, ["last_hidden_state"], dict)
    assert list(named_outputs(wrapped(video))) == ["last_hidden_state"]
    assert isinstance(Outputs(videomae(), ["logits"], dict)(video), Tensor)


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["onnx", "pt2"])
@pytest.mark.parametrize("kind", ["transformers", "transformers, features", "torchvision"])
def test_a_model_of_videos_is_verified_and_exported(
    kind: str, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options: dict[str, Any] = {"trust_code": True}
    if kind == "torchvision":
        monkeypatch.syspath_prepend(str(Path(__file__).parent))
        written(network(), f"{Path(__file__).stem}:network", tmp_path / "v.safetensors")
    else:
        name = "VideoMAEModel" if "," in kind else "VideoMAEForVideoClassification"
        videomae(name).save_pretrained(tmp_path / "video")  # type: ignore[operator]
        tied = tiedconv.convert(f"hf:{tmp_path / 'video'}", "lowrank", rank=4)
        tiedconv.save(tied, tmp_path / "v.safetensors")
    assert images_for(tiedconv.load("v.safetensors", **options)).ndim == 5
    assert all(check.passed for check in tiedconv.verify("v.safetensors", **options))
    done = tiedconv.export("v.safetensors", f"v.{ending}", **options)
    assert done.difference is not None
    assert done.difference < 1e-4
    checks = tiedconv.verify("v.safetensors", against=f"v.{ending}", **options)
    assert all(check.passed for check in checks)
