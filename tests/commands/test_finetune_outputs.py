"""Fine-tuning towards outputs that are no class logits: features, pixels, masked pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from error_codes import raises
from micro import settle
from PIL import Image
from torch import nn
from towers import clip

import tiedconv
from tiedconv.commands.finetune import Finetuned, dry_run, finetune
from tiedconv.commands.finetune_inputs import FinetuneRequest, imitated, open_inputs
from tiedconv.errors import UserError
from tiedconv.runtime.tie import state_of
from tiedconv.training import TrainConfig
from tiedconv.training.distributed import ALONE
from tiedconv.training.trainer import TrainerSetup

CONFIG = TrainConfig(steps=8, epochs=None, batch_size=6, distill_weight=1.0, workers=0, lr=2e-3)
SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
PREPARED = {
    "do_resize": True, "size": {"height": 32, "width": 32}, "do_normalize": True,
    "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_processor_type": "ViTImageProcessor",
}  # fmt: skip


def features() -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    return Dinov2Model(Dinov2Config(**SMALL))


def pixels() -> nn.Module:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    return SegformerForSemanticSegmentation(
        SegformerConfig(
            hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4],
            decoder_hidden_size=16, num_labels=4,
        )
    )  # fmt: skip


def masked() -> nn.Module:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    return ViTMAEForPreTraining(
        ViTMAEConfig(
            **SMALL, decoder_hidden_size=16, decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2, decoder_intermediate_size=32,
        )
    )  # fmt: skip


MODELS = {"features": features, "pixels": pixels, "masked": masked, "towers": clip}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images without labels and in class folders, models, and compact forms of them."""
    folder = tmp_path_factory.mktemp("outputs")
    draws = np.random.default_rng(0)
    for i in range(24):
        image = Image.fromarray(draws.integers(0, 255, (32, 32, 3), np.uint8))
        for place in (folder / "flat", folder / "classes" / "ab"[i % 2]):
            place.mkdir(parents=True, exist_ok=True)
            image.save(place / f"{i}.png")
    for name, build in MODELS.items():
        torch.manual_seed(0)
        settle(build()).save_pretrained(folder / name)  # type: ignore[operator]
        (folder / name / "preprocessor_config.json").write_text(json.dumps(PREPARED))
        tied = tiedconv.convert(f"hf:{folder / name}", "lowrank", rank=4)
        tiedconv.save(tied, folder / f"{name}.safetensors")
    return folder


def tuned(work: Path, name: str, output: Path, data: str = "flat", **options: Any) -> Finetuned:
    return finetune(
        work / f"{name}.safetensors", work / data, output, options.pop("config", CONFIG),
        teacher=f"hf:{work / name}", device="cpu", **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("features", "similarity"),
        ("pixels", "agreement"),
        ("masked", "similarity"),
        ("towers", "similarity"),
    ],
)
def test_a_model_comes_nearer_to_its_teacher(
    name: str, metric: str, work: Path, tmp_path: Path
) -> None:
    done = tuned(work, name, tmp_path / "o.safetensors")
    before, after = done.result.metrics_before[metric], done.result.metrics[metric]
    assert 0 < before < after <= 1 + 1e-6
    assert not done.result.metrics_teacher
    entry = state_of(tiedconv.load(tmp_path / "o.safetensors", model=MODELS[name]())).history[-1]
    assert entry[metric] == pytest.approx(after)
    assert entry["kept_step"] > 0


def test_only_the_chosen_output_is_learned(work: Path, tmp_path: Path) -> None:
    chosen, whole = (
        tuned(work, "features", tmp_path / f"{name}.safetensors", output_name=name)
        for name in ("pooler_output", None)
    )
    assert chosen.result.metrics["similarity"] > chosen.result.metrics_before["similarity"]
    before = [done.result.metrics_before["similarity"] for done in (chosen, whole)]
    assert before[0] != pytest.approx(before[1], abs=1e-6)


def test_the_original_sees_images_of_the_size_that_the_compact_model_sees(
    work: Path, tmp_path: Path
) -> None:
    """Its own preparation is of 32 pixels, which would give other tokens."""
    done = tuned(work, "features", tmp_path / "o.safetensors", preprocess=lambda p: p.scaled_to(16))
    assert done.result.metrics["similarity"] > 0.5


def test_a_teacher_with_other_features_is_refused(work: Path, tmp_path: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    wide = Dinov2Model(Dinov2Config(**{**SMALL, "hidden_size": 48, "num_attention_heads": 3}))
    with raises(UserError, "teacher-mismatch"):
        finetune(
            work / "features.safetensors", work / "flat", tmp_path / "o.safetensors", CONFIG,
            teacher=wide, device="cpu",
        )  # fmt: skip


def test_labels_are_not_needed_where_the_distillation_is_all(work: Path, tmp_path: Path) -> None:
    done = tuned(work, "features", tmp_path / "o.safetensors", data="classes")
    assert list(done.result.metrics) == ["similarity"]


def test_labels_can_not_be_learned_from_features(work: Path, tmp_path: Path) -> None:
    config = TrainConfig(steps=2, epochs=None, batch_size=4, workers=0)
    with raises(UserError, "no-logits-returned"):
        tuned(work, "features", tmp_path / "o.safetensors", data="classes", config=config)
    assert not (tmp_path / "o.safetensors").exists()


@pytest.mark.parametrize(
    "options", [{"temperature": 3.0}, {"label_smoothing": 0.1}, {"distillation": "hard"}]
)
def test_options_for_class_logits_are_refused(
    options: dict[str, Any], work: Path, tmp_path: Path
) -> None:
    config = TrainConfig(
        steps=2, epochs=None, batch_size=4, workers=0, distill_weight=1.0, **options
    )
    with raises(UserError, "option-for-classifiers"):
        tuned(work, "features", tmp_path / "o.safetensors", config=config)


def test_a_forecast_takes_the_same_road(work: Path) -> None:
    found = dry_run(
        FinetuneRequest(
            work / "features.safetensors", work / "flat", CONFIG,
            teacher=f"hf:{work / 'features'}", device="cpu",
        )
    )  # fmt: skip
    assert found.steps == 8


def test_teacher_and_model_mask_the_same_patches(work: Path) -> None:
    """A teacher is at no distance from itself, however it draws its masks."""
    inputs = open_inputs(
        FinetuneRequest(
            work / "masked.safetensors", work / "flat", CONFIG, teacher=f"hf:{work / 'masked'}"
        )
    )
    data = imitated(inputs)
    assert data is not None
    assert inputs.teacher is not None
    setup = TrainerSetup(
        inputs.teacher, *data, CONFIG, inputs.teacher, torch.device("cpu"), ALONE
    )  # fmt: skip
    images = torch.stack([data[0][i][0] for i in range(4)])
    for seed in (0, 7):
        loss = setup.updater.objective(images, torch.zeros(4), seed).loss.detach()
        assert float(loss) == pytest.approx(0, abs=1e-9)
    assert setup.held_out.measure() == pytest.approx(0, abs=1e-9)


def test_blocks_can_be_distilled_too(work: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        steps=3, epochs=None, batch_size=6, distill_weight=1.0, workers=0, lr=1e-3, features=1.0,
        mixup=0.2,
    )  # fmt: skip
    done = tuned(work, "features", tmp_path / "o.safetensors", config=config)
    assert done.result.steps == 3
