"""Tied models in transformers: saved, loaded, trained and used by the library's own classes."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from covering import slow_unless
from error_codes import raises
from micro import all_micros
from safetensors.torch import load_file
from torch import Tensor, nn

import tiedconv
from tiedconv.errors import PlanError
from tiedconv.runtime.tie import dense_state_dict, is_tied, state_of
from tiedconv.sources.torchvision_compat import import_torchvision

import_torchvision()
import transformers  # noqa: E402
from transformers.quantizers import auto as quantizers  # noqa: E402

WAYS: dict[str, dict[str, Any]] = {
    "tied": {"scheme": "tied"},
    "lors": {"scheme": "lors"},
    "integers": {"scheme": "auto", "bytes": "30%"},
}
MICROS = [name for name in all_micros() if name.startswith("hf-")]


def vit() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
            image_size=32, patch_size=8, num_labels=3,
        )
    )  # fmt: skip
    return model.eval()


IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: nn.Module, images: Tensor = IMAGES) -> Tensor:
    found: Tensor = model(pixel_values=images).logits
    return found


def tied(way: str = "tied") -> nn.Module:
    return tiedconv.convert(vit(), **WAYS[way])


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def opened(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForImageClassification.from_pretrained(folder, **options)


@pytest.mark.parametrize("way", slow_unless(WAYS, ("tied", "integers")))
def test_a_folder_gives_the_same_model(way: str, tmp_path: Path) -> None:
    model = tied(way)
    back = opened(saved(model, tmp_path / "a"))
    assert type(back).__name__ == "ViTForImageClassification"
    assert is_tied(back)
    assert torch.equal(logits(back), logits(model))
    assert state_of(back).plan == state_of(model).plan
    assert state_of(back).history == state_of(model).history
    assert [p.requires_grad for p in back.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    saved(back, tmp_path / "b")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("way", slow_unless(WAYS, ("integers",)))
def test_each_tensor_is_there_once_and_as_small_as_in_a_file_of_ours(
    way: str, tmp_path: Path
) -> None:
    model = tied(way)
    tensors = load_file(saved(model, tmp_path / "a") / "model.safetensors")
    plan = state_of(model).plan
    names = {*plan.kept, *plan.factors}
    refusing = tensors.keys() - names
    assert len(refusing) == 1
    assert tensors[refusing.pop()].numel() == 0
    assert names <= tensors.keys()
    tiedconv.save(model, tmp_path / "ours.safetensors")
    ours = load_file(tmp_path / "ours.safetensors")  # whose integers are deflated besides
    held = [sum(t.nbytes for t in each.values()) for each in (ours, tensors)]
    assert held[0] <= held[1] <= 1.2 * held[0]


@pytest.mark.parametrize("name", slow_unless(MICROS, ("hf-resnet", "hf-imagegpt")))
def test_every_class_of_it_can_be_saved(name: str, tmp_path: Path) -> None:
    original = all_micros()[name].model()
    model = tiedconv.convert(original, "auto", params="80%", share=False)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    back = type(original).from_pretrained(tmp_path)  # type: ignore[attr-defined]
    for key, tensor in dense_state_dict(model).items():
        assert torch.equal(tensor, dense_state_dict(back)[key]), key


def test_without_tiedconv_a_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tied(), tmp_path)
    monkeypatch.delitem(quantizers.AUTO_QUANTIZATION_CONFIG_MAPPING, "tiedconv")
    monkeypatch.delitem(quantizers.AUTO_QUANTIZER_MAPPING, "tiedconv")
    with pytest.raises(RuntimeError, match="mismatch"):
        opened(tmp_path)


def test_the_plug_in_waits_for_the_library() -> None:
    code = (
        "import sys, tiedconv; assert 'transformers' not in sys.modules and 'torch' not in "
        "sys.modules; from transformers.quantizers import auto; "
        "assert 'tiedconv' in auto.AUTO_QUANTIZER_MAPPING"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


def test_another_class_is_refused(tmp_path: Path) -> None:
    saved(tied(), tmp_path)
    with raises(PlanError, "plan-model-mismatch"):
        transformers.ViTModel.from_pretrained(tmp_path)


def test_an_untied_model_is_saved_as_any_other(tmp_path: Path) -> None:
    model = tied()
    expected = logits(model)
    dense = tiedconv.untie(opened(saved(model, tmp_path / "a")))
    back = opened(saved(dense, tmp_path / "b"))
    assert not is_tied(back)
    assert "quantization_config" not in json.loads((tmp_path / "b" / "config.json").read_text())
    assert torch.allclose(logits(back), expected, atol=1e-6)


def test_copies_and_other_types_are_saved_too(tmp_path: Path) -> None:
    model = tied()
    assert torch.equal(logits(opened(saved(copy.deepcopy(model), tmp_path / "a"))), logits(model))
    half = opened(tmp_path / "a", dtype=torch.float16)
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    found = logits(half, IMAGES.half()).float()
    assert (found - logits(model)).abs().max() < 0.02 * logits(model).abs().max()


def test_a_file_of_ours_is_saved_as_a_folder(tmp_path: Path) -> None:
    saved(vit(), tmp_path / "dense")
    model = tiedconv.convert(f"hf:{tmp_path / 'dense'}", "tied")
    tiedconv.save(model, tmp_path / "m.safetensors")
    loaded = tiedconv.load(tmp_path / "m.safetensors")
    assert torch.equal(logits(opened(saved(loaded, tmp_path / "folder"))), logits(model))


class Pictures(torch.utils.data.Dataset[dict[str, Tensor]]):
    """A colour for each class."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        noise = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(index))
        noise[index % 3] += 2
        return {"pixel_values": noise, "labels": torch.tensor(index % 3)}


def trainer(model: Any, folder: Path, steps: int) -> Any:
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=8, learning_rate=5e-3,
        save_steps=4, report_to=[], disable_tqdm=True, use_cpu=True, logging_strategy="no",
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=Pictures())


def test_its_trainer_trains_stored_tensors_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = opened(saved(tied(), tmp_path / "start"))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer(model, tmp_path / "run", 8).train()
    assert is_tied(model)
    moved = [n for n, p in model.named_parameters() if not torch.equal(p.cpu(), before[n])]
    assert {n for n in before if n.startswith("tied/")} <= set(moved)
    back = opened(tmp_path / "run" / "checkpoint-8")
    assert torch.equal(logits(back), logits(model.cpu().eval()))
    again = opened(tmp_path / "start")
    trainer(again, tmp_path / "run", 8).train(
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4")
    )
    assert torch.allclose(logits(again.cpu().eval()), logits(model), atol=1e-4)


def test_its_pipeline_answers(tmp_path: Path) -> None:
    from PIL import Image

    folder = saved(tied("integers"), tmp_path)
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(folder)
    run = transformers.pipeline("image-classification", model=str(folder), device="cpu")
    found = run(Image.new("RGB", (40, 40), (200, 30, 30)))
    assert {each["label"] for each in found} == {"LABEL_0", "LABEL_1", "LABEL_2"}
    assert sum(each["score"] for each in found) == pytest.approx(1, abs=1e-4)


def test_it_is_pushed_to_a_repository_and_loaded_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's own client, with its two calls of the hub kept on this machine."""
    import huggingface_hub

    def create_repo(self: Any, repo_id: str, **_: Any) -> Any:
        (tmp_path / repo_id).mkdir(parents=True)
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self: Any, repo_id: str, operations: Any, **_: Any) -> Any:
        for each in operations:
            shutil.copy(each.path_or_fileobj, tmp_path / repo_id / each.path_in_repo)
        return SimpleNamespace(commit_url=repo_id)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    model: Any = tied("integers")
    model.push_to_hub("me/small-vit")
    assert torch.equal(logits(opened(tmp_path / "me" / "small-vit")), logits(model))
