"""Small stand-ins for the models, weights and images that commands of the docs name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cli_helpers import MODEL_ARGS, SPEC, run, tiny_model, write_images
from detection_helpers import write_coco
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from tiedconv.sources import Preprocess
from tiedconv.sources.torchvision_compat import import_torchvision

PREPARED = {
    "do_resize": True, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
}  # fmt: skip
# Words of the docs that stand for something the reader has.
WORDS = {
    "resnet50": [SPEC, *MODEL_ARGS],
    "vit_b_16": [SPEC, *MODEL_ARGS],
    "package.module:function": [SPEC, *MODEL_ARGS],
    "my_models:small_vit": ["doc_world:small_vit"],
    "my_detector:detector": ["one_stage:one_stage"],
    "IMAGENET": ["images"],
    "IMAGES": ["images"],
    "PHOTOS": ["photos"],
    "COCO": ["coco"],
    "FOLDER": ["weights"],
    "640": ["64"],
    "8h": ["1m"],
}
DETECTORS = ("hf:FOLDER", "hf:DETECTOR")
# Options that make a command quick, which win over those before them.
QUICK = {
    "convert": ["--workers", "0", "--device", "cpu"],
    "finetune": ["--batch-size", "4", "--workers", "0", "--device", "cpu", "--steps", "2"],
    "evaluate": ["--batch-size", "8", "--workers", "0", "--device", "cpu"],
    "plan": ["--workers", "0", "--device", "cpu"],
    "sensitivity": ["--workers", "0", "--device", "cpu"],
    "bench": ["--rounds", "3", "--batch", "1", "--runtime", "eager"],
}
CALIB = {
    "convert": ["--calib-images", "16", "--batch-size", "8", "--effort", "fast"],
    "plan": ["--calib-images", "16"],
    "sensitivity": ["--calib-images", "16"],
}
SCHEDULE = ("--epochs", "--time-budget")
WRITING = ("convert", "finetune", "export", "bench", "report")


def small_vit() -> nn.Module:
    """torchvision's ViT for images of 32 pixels, of two layers."""
    model: nn.Module = import_torchvision().models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64,
        num_classes=3,
    )  # fmt: skip
    return model.eval()


small_vit.preprocess = Preprocess(32, None, (0.5,) * 3, (0.5,) * 3)  # type: ignore[attr-defined]


def make_doc_world(root: Path) -> None:
    """What commands read and the docs do not make: images, weights, models, compact files."""
    write_images(root / "images")
    for path in sorted((root / "images").rglob("*.png")):
        photo = root / "photos" / path.relative_to(root / "images").with_suffix(".jpg")
        photo.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).save(photo)
    write_coco(root / "coco")
    (root / "weights").mkdir()
    save_file(tiny_model().state_dict(), root / "weights" / "model.safetensors")
    torch.manual_seed(0)
    save_file(small_vit().state_dict(), root / "weights.safetensors")
    weights = ["--weights", root / "weights" / "model.safetensors"]
    run("convert", SPEC, *MODEL_ARGS, *weights, "--scheme", "tied", "-o", root / "tied.safetensors")
    for name in ("compact", "model"):
        shutil.copy(root / "tied.safetensors", root / f"{name}.safetensors")
    _save(_detector(), root / "detector", {"height": 64, "width": 64}, "DetrImageProcessor")
    _save(_dinov2(), root / "dinov2", {"height": 28, "width": 28}, "ViTImageProcessor")
    _save(
        _classifier(), root / "google" / "vit-base-patch16-224", {"height": 224, "width": 224},
        "ViTImageProcessor",
    )  # fmt: skip
    run("convert", f"hf:{root / 'dinov2'}", "--scheme", "tied", "-o", root / "dinov2.safetensors")


def stand_in(command: list[str]) -> list[str]:
    """A command of the docs, with its words replaced and what makes it quick."""
    verb, words = command[1], list(command[2:])
    features = "dinov2" in " ".join(command).lower()
    made: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        if before in ("--bytes", "--params") and verb == "convert":
            made.append("70%")
        elif before == "--latency":
            made.append("0.9x")  # most of such a small model's time is not of its layers
        elif before == "--original" and word == "auto":
            made.append("weights/model.safetensors")
        elif word in DETECTORS and not features:
            made.append("hf:detector")
        elif word in ("hf:FOLDER", "hf:DINOV2"):
            made.append("hf:dinov2")
        else:
            made += WORDS.get(word, [word])
    if verb == "finetune":
        made = _without(made, SCHEDULE)
        if "coco" not in made and "--teacher" not in made:
            made += ["--teacher", "weights/model.safetensors"]
        made += [] if "--dry-run" in made else ["--no-picture"]
    if SPEC in made and "--weights" not in made and "--dry-run" not in made and verb != "plan":
        made += ["--weights", "weights/model.safetensors"]
    quick = QUICK.get(verb, []) + (CALIB.get(verb, []) if "--calib" in made else [])
    force = ["--force"] if verb in WRITING and ("-o" in made or verb != "bench") else []
    return [verb, *made, *quick, *([] if verb == "report" and "-o" not in made else force)]


def _without(words: list[str], options: tuple[str, ...]) -> list[str]:
    """Words without these options and their values."""
    return [
        word
        for before, word in zip(["", *words], words, strict=False)
        if word not in options and before not in options
    ]


def _save(model: Any, folder: Path, size: dict[str, int], processor: str) -> None:
    folder.parent.mkdir(exist_ok=True)
    model.save_pretrained(folder)
    prepared = {**PREPARED, "size": size, "image_processor_type": processor}
    (folder / "preprocessor_config.json").write_text(json.dumps(prepared))


def _seeded(build: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return build().eval()


def _detector() -> Any:
    import_torchvision()
    from detectors import _detr

    return _seeded(_detr)


def _dinov2() -> Any:
    import_torchvision()
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    return _seeded(lambda: Dinov2Model(config))


def _classifier() -> Any:
    import_torchvision()
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        patch_size=32, num_labels=3,
    )  # fmt: skip
    return _seeded(lambda: ViTForImageClassification(config))
