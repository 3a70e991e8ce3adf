"""Calibration on samples of several shapes, and on texts that are padded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from error_codes import raises
from torch import Tensor, nn
from torch.utils.data import Dataset
from towers import TOKENS, bert

import tiedconv
from tiedconv.calibration import CalibConfig
from tiedconv.calibration import kfac_statistics as kfac
from tiedconv.calibration.objectives import energies_of
from tiedconv.conversion.calibrate import Calibration
from tiedconv.conversion.fit_cache import _digest_of_images
from tiedconv.conversion.sample_inputs import calibration_samples
from tiedconv.errors import DataError, UserError
from tiedconv.outputs import kind_of
from tiedconv.runtime.sample_table import SampleTable
from tiedconv.runtime.tensors import state_tensors
from tiedconv.runtime.tie import state_of
from tiedconv.sources import Source
from tiedconv.sources.torchvision_compat import import_torchvision

SIZES = ((24, 24), (16, 32), (32, 16))


def calibration(data: Any, **options: Any) -> Calibration:
    config = CalibConfig(steps=8, joint_steps=8, batch_size=8)
    return Calibration(data, config=config, device="cpu", workers=0, **options)


def mixed_images(count: int = 32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, *SIZES[i % 3], generator=generator) for i in range(count)]


class AnySize(nn.Module):
    """Two residual blocks of convolutions and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 32, 1), nn.ReLU(), nn.Conv2d(32, 16, 1)) for _ in range(2)
        )
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return AnySize().eval()


def timm_vit(**options: Any) -> nn.Module:
    import_torchvision()
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model: nn.Module = VisionTransformer(
        img_size=24, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=10, **options
    )
    return model.eval()


def dynamic_vit() -> nn.Module:
    return timm_vit(dynamic_img_size=True)


def dinov2() -> nn.Module:
    import_torchvision()
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    model: nn.Module = Dinov2Model(
        Dinov2Config(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=8
        )
    )
    return model.eval()


def segformer() -> nn.Module:
    import_torchvision()
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    torch.manual_seed(0)
    model: nn.Module = SegformerForSemanticSegmentation(
        SegformerConfig(
            depths=[1, 1], hidden_sizes=[16, 32], num_attention_heads=[1, 2], num_labels=5,
            num_encoder_blocks=2, sr_ratios=[2, 1], patch_sizes=[7, 3], strides=[4, 2],
            mlp_ratios=[2, 2], decoder_hidden_size=32,
        )
    )  # fmt: skip
    return model.eval()


@pytest.mark.parametrize("build", [convolutions, dynamic_vit, dinov2, segformer])
def test_images_of_several_sizes_calibrate_a_model_that_takes_any(
    build: Callable[[], nn.Module],
) -> None:
    model = build()

    def converted() -> nn.Module:
        data = [(image, "no label") for image in mixed_images()]
        return tiedconv.convert(model, "lowrank", params="75%", calib=calibration(data))

    first, second = converted(), converted()
    record: Mapping[str, Any] = state_of(first).history[-1]["calibration"]
    assert record["images"] == 32
    assert record["agreement"]["images"] == 8
    assert record["kl_after"] <= record["kl_before"]
    assert all(after <= before for _, before, after in record["blocks"])
    assert not any(m._forward_pre_hooks for m in first.modules())
    ours, theirs = map(state_tensors, (first, second))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_model_of_one_size_says_so() -> None:
    with raises(DataError, "samples-differ"):
        tiedconv.convert(timm_vit(), "lowrank", calib=calibration(mixed_images(6)))


def test_a_model_that_takes_none_of_the_sizes_says_so() -> None:
    grey = [image[:1] for image in mixed_images(6)]
    with raises(UserError, "images-rejected"):
        tiedconv.convert(convolutions(), "lowrank", calib=calibration(grey))


class Files(Dataset[Any]):
    """Images that are made when they are asked for, with random numbers."""

    def __init__(self, sizes: Sequence[tuple[int, int]]) -> None:
        self.sizes, self.reads = sizes, 0

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Tensor:
        self.reads += 1
        return torch.randn(3, *self.sizes[index % len(self.sizes)])


def test_images_of_one_size_are_not_kept_and_come_as_from_a_tensor() -> None:
    model = convolutions()
    whole = torch.stack(mixed_images(72)[::3])
    listed = tiedconv.convert(model, "lowrank", calib=calibration(list(whole)))
    tensor = tiedconv.convert(model, "lowrank", calib=calibration(whole))
    ours, theirs = map(state_tensors, (listed, tensor))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    same, differing = Files(SIZES[:1]), Files(SIZES)
    with calibration_samples(model, calibration(same), Source("none", None)) as data:
        assert data is same
    with calibration_samples(model, calibration(differing), Source("none", None)) as data:
        assert 48 <= differing.reads <= 50
        assert len(data) == 24  # type: ignore[arg-type]


def test_energies_are_spreads_about_the_mean_of_each_shape() -> None:
    wide, tall = torch.randn(6, 2, 5), torch.randn(3, 4, 5)
    (found,) = energies_of([[wide[:4]], [tall], [wide[4:]]])
    parts = [(x - x.mean(0)).double().square().sum() for x in (wide, tall)]
    assert found == pytest.approx(float(sum(parts)) / 9, rel=1e-5)


# Text


def texts(lengths: Sequence[int], padded: int = 0) -> list[dict[str, Any]]:
    """The same tokens, padded to a length or not."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for length in lengths:
        ids = torch.randint(2, TOKENS, (length,), generator=generator).tolist()
        rest = max(0, padded - length)
        found.append({"input_ids": ids + [7] * rest, "attention_mask": [1] * length + [0] * rest})
    return found


LENGTHS = (9, 5, 12, 3, 9, 7, 5, 12)


@contextmanager
def fed(model: nn.Module, samples: Sequence[Any]) -> Iterator[Dataset[Any]]:
    with calibration_samples(model, calibration(samples), Source("none", None)) as data:
        yield data


@pytest.mark.parametrize("positions", [64, 4])
def test_padding_does_not_count_in_statistics(
    monkeypatch: pytest.MonkeyPatch, positions: int
) -> None:
    """Padded texts in one batch give the sums that the same texts give one by one."""
    monkeypatch.setattr(kfac, "POSITIONS", positions)
    monkeypatch.setattr(torch, "randn", lambda shape, **_: torch.ones(shape))
    model = bert()
    weights = {n: False for n, p in model.named_parameters() if p.ndim == 2 and ".layer." in n}
    everything = torch.arange(len(LENGTHS)).unsqueeze(1)
    found = []
    for samples, batches in (
        (texts(LENGTHS), everything.split(1)),
        (texts(LENGTHS, padded=12), [everything]),
    ):
        with fed(model, samples):
            watch = kfac._Watch(model, weights)
            watch.half = 0
            for numbers in batches:
                kfac._one_batch(model, numbers, watch, torch.Generator())
        found.append(watch.sums)
    model.requires_grad_(False)
    for name in weights:
        for side in ("left", "right"):
            apart, padded = (getattr(sums[name], side) for sums in found)
            assert apart.rows == padded.rows
            one, other = apart.mean(0, 1), padded.mean(0, 1)
            assert torch.allclose(one, other, rtol=1e-3, atol=1e-5 * float(one.abs().max()))


def test_a_model_with_tokens_before_texts_counts_all(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(6, 4)
    kept = torch.tensor([[True, True, False], [True, False, False]])
    assert torch.equal(kfac._some_tokens(rows, kept, of_image=False), rows[[0, 1, 3]])
    model = nn.MultiheadAttention(4, 2)
    assert kfac._Watch(model, {})._by_tokens


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM"])
def test_padding_does_not_count_in_distances(name: str) -> None:
    """The distance of padded texts is the mean of those of the texts by themselves."""
    import transformers

    teacher = getattr(transformers, name)(bert().config).eval()
    student = getattr(transformers, name)(bert().config).eval()
    kind, found = None, []
    for samples, size in ((texts(LENGTHS), 1), (texts(LENGTHS, padded=12), len(LENGTHS))):
        with fed(teacher, samples), fed(student, samples), torch.no_grad():
            sums = torch.zeros(3, dtype=torch.float64)
            for numbers in torch.arange(len(LENGTHS)).unsqueeze(1).split(size):
                answer, output = teacher(numbers), student(numbers)
                kind = kind_of(output, student)
                sums[0] += kind.distance(output, answer, student) * len(numbers)
                sums[1] += kind.divergence(output, answer, student)
                sums[2] += kind.agreement(output, answer, student).sum()
        found.append(sums)
    assert torch.allclose(*found, rtol=1e-4)


@pytest.mark.parametrize("padded", [0, 12])
def test_texts_of_several_lengths_are_calibrated(padded: int) -> None:
    model = bert()
    samples = texts([LENGTHS[i % 8] for i in range(48)], padded)
    by_plain = tiedconv.convert(model, "lowrank", params="60%")
    by_text = tiedconv.convert(model, "lowrank", params="60%", calib=calibration(samples))
    record = state_of(by_text).history[-1]["calibration"]
    assert record["kl_after"] <= record["kl_before"]
    off = [0.0, 0.0]
    with torch.no_grad():
        for sample in texts(LENGTHS):
            given = {name: torch.tensor([values]) for name, values in sample.items()}
            known = model(**given).last_hidden_state
            for i, tied in enumerate((by_plain, by_text)):
                off[i] += float((tied(**given).last_hidden_state - known).square().sum())
    assert off[1] < 0.8 * off[0]


def test_errors_of_units_do_not_count_padding() -> None:
    """What padding makes of a token changes no bit of a calibration."""
    model, found = bert(), []
    for filler in (7, 8):
        samples = texts([LENGTHS[i % 8] for i in range(16)], padded=12)
        for sample in samples:
            ids, mask = sample["input_ids"], sample["attention_mask"]
            sample["input_ids"] = [i if m else filler for i, m in zip(ids, mask, strict=True)]
        calib = calibration(samples)
        found.append(state_tensors(tiedconv.convert(model, "lowrank", calib=calib)))
    assert all(torch.allclose(a, found[1][n], atol=1e-6) for n, a in found[0].items())


def test_two_texts_of_one_length_with_other_padding_count_whole() -> None:
    ids, mask = torch.ones(2, 3, dtype=torch.int64), torch.tensor([[1, 1, 0], [1, 1, 1]])
    numbers = torch.arange(2)
    one = {"input_ids": ids, "attention_mask": mask}
    kept = SampleTable(one).kept_of(numbers)
    assert kept is not None
    assert kept.tolist() == [[True, True, False], [True, True, True]]
    assert SampleTable({**one, "decoder_input_ids": ids}).kept_of(numbers) is None
    assert SampleTable({**one, "decoder_input_ids": ids[:, :2]}).kept_of(numbers) is not None
    both = {**one, "decoder_input_ids": ids, "decoder_attention_mask": mask}
    assert SampleTable(both).kept_of(numbers) is not None
    assert SampleTable({"input_ids": ids}).kept_of(numbers) is None


def test_a_digest_tells_other_samples_of_the_same_number() -> None:
    model, found = bert(), set()
    for samples in (texts(LENGTHS), texts(LENGTHS[::-1]), texts(LENGTHS, padded=12)):
        with fed(model, samples) as data:
            found.add(_digest_of_images(data))
    assert len(found) == 3
