"""Folders, transforms, data sets and loaders, on tiny images made here."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from error_codes import raises
from PIL import Image

from tiedconv.data import (
    AUGMENTS,
    Batch,
    Broken,
    ImageList,
    Images,
    Loader,
    TensorList,
    as_uint8,
    default_workers,
    eval_transform,
    open_images,
    open_split,
    train_transform,
)
from tiedconv.data.seeds import epoch_seed, sample_seeds, uniforms
from tiedconv.errors import DataError, UserError


@dataclass(frozen=True)
class Preprocess:
    size: int = 8
    resize: int | None = 10
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.25, 0.25, 0.25)
    interpolation: str = "bilinear"


def make_image(path: Path, seed: int = 0, size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)


def make_folder(root: Path, counts: dict[str, int], suffix: str = ".png") -> Path:
    for at, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            make_image(root / name / f"{index:03}{suffix}", 1000 * at + index)
    return root


def names_of(images: Images) -> list[str]:
    return [images.name(index) for index in range(len(images))]


def labels_of(images: Images) -> list[int]:
    return [images.label(index) for index in range(len(images))]


def batches_of(loader: Loader, epoch: int = 0) -> list[Batch]:
    return list(loader.epoch(epoch))


# --- folders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("val_name", ["val", "test"])
def test_the_layout_of_imagenet(tmp_path: Path, val_name: str) -> None:
    make_folder(tmp_path / "train", {"b": 3, "a": 2})
    make_folder(tmp_path / val_name, {"a": 1, "b": 2})
    split = open_split(tmp_path)
    assert split.classes == ("a", "b")
    assert not split.held_out
    assert labels_of(split.train) == [0, 0, 1, 1, 1]
    assert labels_of(split.val) == [0, 1, 1]
    assert split.val.name(2) == str(tmp_path / val_name / "b" / "001.png")
    assert names_of(open_images(tmp_path)) == names_of(split.val)


def test_images_at_any_depth_and_files_that_are_none(tmp_path: Path) -> None:
    make_image(tmp_path / "train" / "a" / "images" / "x.JPEG")
    make_image(tmp_path / "train" / "b" / "y.jpg")
    make_folder(tmp_path / "val", {"a": 1, "b": 0})
    (tmp_path / "train" / "a" / "boxes.txt").write_text("0 0 8 8")
    (tmp_path / "train" / "a" / "._x.png").write_text("")
    (tmp_path / "train" / ".cache").mkdir()
    split = open_split(tmp_path)
    train = tmp_path / "train"
    assert names_of(split.train) == [
        os.path.join(train, "a", "images", "x.JPEG"),
        os.path.join(train, "b", "y.jpg"),
    ]
    assert len(split.val) == 1


def test_a_seeded_part_of_each_class_is_held_out(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": 20, "b": 10, "c": 3, "d": 1})
    split = open_split(tmp_path, val_fraction=0.2, seed=1)
    assert split.held_out
    assert np.bincount(labels_of(split.val), minlength=4).tolist() == [4, 2, 1, 0]
    assert np.bincount(labels_of(split.train)).tolist() == [16, 8, 2, 1]
    held = names_of(split.val)
    assert not set(names_of(split.train)) & set(held)
    assert names_of(open_split(tmp_path, val_fraction=0.2, seed=1).val) == held
    assert names_of(open_split(tmp_path, val_fraction=0.2, seed=2).val) != held
    assert len(open_images(tmp_path)) == 34


def test_train_alone_is_split_too(tmp_path: Path) -> None:
    make_folder(tmp_path / "train", {"a": 4, "b": 4})
    split = open_split(tmp_path, val_fraction=0.25)
    assert split.classes == ("a", "b")
    assert (len(split.train), len(split.val)) == (6, 2)
    with raises(DataError, "no-validation-part", str(tmp_path / "train")):
        open_images(tmp_path)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    make_folder(tmp_path, {"bus": 2, "train": 2})
    assert open_split(tmp_path).classes == ("bus", "train")


def test_a_limit_is_spread_over_the_classes(tmp_path: Path) -> None:
    make_folder(tmp_path / "train", {"a": 9, "b": 2, "c": 5})
    make_folder(tmp_path / "val", {"a": 1, "b": 1, "c": 1})
    split = open_split(tmp_path, limit=8)
    assert np.bincount(labels_of(split.train)).tolist() == [3, 2, 3]
    assert len(split.val) == 3
    other = open_split(tmp_path, limit=8, seed=5)
    assert names_of(other.train) != names_of(split.train)


def _differing(root: Path) -> None:
    make_folder(root / "train", {"a": 1, "b": 1})
    make_folder(root / "val", {"a": 1, "c": 1})


@pytest.mark.parametrize(
    ("build", "code", "names"),
    [
        (lambda root: None, "no-images", "ROOT/train"),
        (lambda root: (root / "a").mkdir(), "no-images", "ROOT/train"),
        (lambda root: make_image(root / "x.png"), "no-labels", "ROOT/train"),
        (lambda root: make_folder(root, {"a": 2, "b": 0}), "empty-class", "class b "),
        (lambda root: make_folder(root, {"a": 1, "b": 1}), "nothing-to-hold-out", "val/"),
        (
            lambda root: make_folder(root / "val", {"a": 1, "b": 1}),
            "no-training-part",
            "ROOT/train",
        ),
        (_differing, "classes-differ", "the class b; only the validation part has the class c"),
    ],
    ids=["empty", "no images", "no folders", "empty class", "one each", "val only", "differ"],
)
def test_folders_that_will_not_do(
    tmp_path: Path, build: Callable[[Path], object], code: str, names: str
) -> None:
    build(tmp_path)
    with raises(DataError, code, names):
        open_split(tmp_path)


def test_missing_folder_and_bad_options(tmp_path: Path) -> None:
    with raises(DataError, "no-data-folder", "nowhere"):
        open_split(tmp_path / "nowhere")
    with raises(UserError, "invalid-val-fraction", "1.5"):
        open_split(tmp_path, val_fraction=1.5)
    with raises(UserError, "invalid-limit", "0"):
        open_split(tmp_path, limit=0)


# --- transforms --------------------------------------------------------------------------------


def test_evaluation_normalises_and_leaves_the_right_size_alone() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    out = eval_transform(Preprocess())(Image.fromarray(pixels))
    expected = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - 0.5) / 0.25
    assert torch.equal(out, expected)
    assert out.is_contiguous()
    assert out.dtype == torch.float32
    assert type(out) is torch.Tensor


@pytest.mark.parametrize("resize", [10, None])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_evaluation_brings_any_size_to_the_models(resize: int | None, interpolation: str) -> None:
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    image.paste((0, 0, 255), (0, 0, 10, 20))  # the left quarter
    out = eval_transform(Preprocess(resize=resize, interpolation=interpolation))(image)
    assert out.shape == (3, 8, 8)
    # Stretched, the left quarter stays a quarter; the centre crop cuts it off.
    assert bool(out[2, 4, 0] > 0) is (resize is None)


@pytest.mark.parametrize("size", [8, 72])
@pytest.mark.parametrize("augment", AUGMENTS)
def test_augmentations_give_the_right_shape(augment: str, size: int) -> None:
    transform = train_transform(Preprocess(size, size + 2), augment)
    for width in (size, 90):
        pixels = np.random.default_rng(0).integers(0, 256, (width, width, 3), np.uint8)
        outs = [transform(Image.fromarray(pixels)) for _ in range(6)]
        assert {tuple(out.shape) for out in outs} == {(3, size, size)}
        assert all(torch.equal(out, outs[0]) for out in outs) is (augment == "none")


def test_transforms_are_small_to_send_and_checked_early() -> None:
    transform = train_transform(Preprocess(), "crop")
    assert pickle.loads(pickle.dumps(transform)) == transform
    with raises(UserError, "unknown-augmentation", "mixup", "none, "):
        train_transform(Preprocess(), "mixup")
    with raises(UserError, "unknown-interpolation", "magic"):
        eval_transform(Preprocess(interpolation="magic"))(Image.new("RGB", (8, 8)))


# --- data sets ---------------------------------------------------------------------------------


def listed(root: Path, *, augment: str = "none", strict: bool = False) -> ImageList:
    return ImageList(open_images(root), train_transform(Preprocess(), augment), strict=strict)


def break_images(root: Path) -> list[str]:
    """Adds a file that is no image and one that is cut off."""
    (root / "a" / "nothing.png").write_bytes(b"this is not an image")
    make_image(root / "b" / "cut.jpg", size=(64, 64))
    cut = root / "b" / "cut.jpg"
    cut.write_bytes(cut.read_bytes()[:300])
    return [str(root / "a" / "nothing.png"), str(cut)]


def test_broken_images_are_skipped_and_named(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": 3, "b": 3})
    broken = break_images(tmp_path)
    loader = Loader(listed(tmp_path), 4, workers=0)
    read = batches_of(loader)
    assert sum(len(batch.images) for batch in read) == 6
    assert [path for batch in read for path in batch.broken] == broken
    assert isinstance(listed(tmp_path)[3], Broken)


def test_a_batch_of_broken_images_is_empty(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(b"no")
    (batch,) = batches_of(Loader(listed(tmp_path), 4, workers=0))
    assert (len(batch.images), len(batch.labels), len(batch.broken)) == (0, 0, 1)


def test_strict_reading_names_the_broken_file(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": 3, "b": 3})
    break_images(tmp_path)
    with raises(DataError, "image-unreadable", "nothing.png"):
        batches_of(Loader(listed(tmp_path, strict=True), 4, workers=0))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "I;16", "CMYK", "LA"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    (tmp_path / "a").mkdir()
    suffix = "jpg" if mode == "CMYK" else "png"
    if mode == "I;16":
        image = Image.fromarray(np.full((8, 8), 128 * 256, np.uint16))
    else:
        image = Image.new("L", (8, 8), 128)
        image = image.convert("RGB").quantize(4) if mode == "P" else image.convert(mode)
    options = {"transparency": b"\x00\x80"} if mode == "P" else {}
    image.save(tmp_path / "a" / f"x.{suffix}", **options)
    sample = listed(tmp_path)[0]
    assert not isinstance(sample, Broken)
    torch.testing.assert_close(
        sample[0], torch.full((3, 8, 8), (128 / 255 - 0.5) / 0.25), atol=0.04, rtol=0
    )


def test_images_in_memory_are_scaled_and_normalised() -> None:
    images = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    data = TensorList(images, [0, 1, 2, 1, 0], mean=(0.1, 0.2, 0.3), std=(1, 2, 4))
    (batch,) = batches_of(Loader(data, 8))
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1.0, 2.0, 4.0])
    expected = (images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(batch.images, expected)
    assert batch.labels.tolist() == [0, 1, 2, 1, 0]
    assert torch.equal(data[2][0], batch.images[2])
    assert default_workers(data) == default_workers(torch.utils.data.Subset(data, [0])) == 0


def test_augmentation_in_memory_shifts_and_mirrors() -> None:
    image = torch.arange(1.0, 17).view(1, 1, 4, 4).repeat(400, 1, 1, 1)
    labels = torch.zeros(400, dtype=torch.int64)
    padded = torch.nn.functional.pad(image[0], [1] * 4, mode="reflect")[0]
    shifts = [padded[y : y + 4, x : x + 4] for y in range(3) for x in range(3)]
    expected = {
        "flip": [image[0, 0], image[0, 0].flip(1)],
        "shift": shifts,
        "crop": shifts + [shift.flip(1) for shift in shifts],
    }
    for augment, allowed in expected.items():
        (batch,) = batches_of(Loader(TensorList(image, labels, augment=augment), 400))
        seen = [[torch.equal(out[0], one) for one in allowed] for out in batch.images]
        assert all(any(row) for row in seen)  # nothing else comes out
        counts = np.array(seen).sum(axis=0)
        assert counts.min() > 0.4 * 400 / len(allowed)  # and each about equally often
    with raises(UserError, "augmentation-needs-files", "RandAugment"):
        TensorList(image, labels, augment="randaugment")


def test_no_black_border_is_moved_in() -> None:
    white = Image.new("RGB", (32, 32), (255, 255, 255))
    shown = train_transform(Preprocess(32, None, mean=(0.5,) * 3, std=(0.5,) * 3), "crop")
    assert all(float(shown(white).min()) == 1 for _ in range(20))
    tensors = TensorList(torch.ones(20, 3, 32, 32), [0] * 20, augment="shift")
    (batch,) = batches_of(Loader(tensors, 20))
    assert float(batch.images.min()) == 1
    # Even where there is nothing to reflect.
    tiny = TensorList(torch.ones(4, 1, 1, 1), [0] * 4, augment="shift")
    (batch,) = batches_of(Loader(tiny, 4))
    assert torch.equal(batch.images, torch.ones(4, 1, 1, 1))


def test_labels_must_belong_to_the_images() -> None:
    with raises(DataError, "shapes-differ", "(3, 1, 2, 2)", "(2,)"):
        TensorList(torch.zeros(3, 1, 2, 2), [0, 1])
    with raises(DataError, "no-images"):
        Loader(TensorList(torch.zeros(0, 1, 2, 2), []), 4)


# --- bytes -------------------------------------------------------------------------------------


def float_batches(data: ImageList | TensorList, seed: int) -> list[torch.Tensor]:
    """What a loader should give, normalised by the data set itself."""

    class Plain(torch.utils.data.Dataset[object]):  # has no `as_uint8`
        classes = data.classes if isinstance(data, ImageList) else ()
        if isinstance(data, TensorList):
            read_batch = data.read_batch

        def __len__(self) -> int:
            return len(data)

        def __getitem__(self, index: int) -> object:
            return data[index]

    loader = Loader(Plain(), 4, shuffle=True, seed=seed, workers=0)
    return [batch.images for batch in loader.epoch(1)]


@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize("erasing", [0.0, 1.0])
def test_images_that_travel_as_bytes_end_as_the_same_bits(
    tmp_path: Path, augment: str, erasing: float
) -> None:
    preprocess = Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    folder = open_images(make_folder(tmp_path, {"a": 5, "b": 5}))
    data = ImageList(folder, train_transform(preprocess, augment, erasing))
    plain, normalisation = as_uint8(data)
    assert normalisation is not None
    assert plain[0][0].dtype == torch.uint8
    here = [b.images for b in Loader(data, 4, shuffle=True, seed=5, workers=0).epoch(1)]
    assert all(torch.equal(a, b) for a, b in zip(here, float_batches(data, 5), strict=True))
    assert all(image.is_contiguous() and image.dtype == torch.float32 for image in here)


@pytest.mark.parametrize("augment", ["none", "flip", "shift", "crop"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16])
@pytest.mark.parametrize("normalised", [True, False])
def test_tensors_that_travel_as_bytes_end_as_the_same_bits(
    augment: str, dtype: torch.dtype, normalised: bool
) -> None:
    images = torch.randint(0, 256, (10, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    mean, std = ((0.4, 0.5, 0.6), (0.2, 0.3, 0.25)) if normalised else (None, None)
    data = TensorList(images.to(dtype), [0] * 10, mean=mean, std=std, augment=augment)
    kept = data.images.clone()
    plain, normalisation = as_uint8(data)
    assert (normalisation is not None) is (dtype == torch.uint8)
    assert next(iter(plain))[0].dtype == (torch.uint8 if normalisation else torch.float32)
    there = Loader(data, 4, shuffle=True, seed=5, workers=0, device=torch.device("cpu"))
    read = [batch.images for batch in there.epoch(1)]
    assert all(torch.equal(a, b) for a, b in zip(read, float_batches(data, 5), strict=True))
    assert torch.equal(data.images, kept)
    assert data[0][0].dtype == torch.float32  # the data set itself is what it was
    if augment == "none" and dtype == torch.uint8 and normalised:
        expected = (images[3] / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(
            3, 1, 1
        )
        assert torch.equal(data[3][0], expected)


def test_whoever_has_a_transform_of_his_own_keeps_his_numbers(tmp_path: Path) -> None:
    images = open_images(make_folder(tmp_path, {"a": 2, "b": 2}))
    data = ImageList(images, lambda image: torch.full((3, 8, 8), 7, dtype=torch.uint8))
    assert as_uint8(data) == (data, None)
    (batch,) = batches_of(Loader(data, 8, workers=0))
    assert batch.images.dtype == torch.uint8


# --- loaders -----------------------------------------------------------------------------------


def numbered(count: int) -> TensorList:
    return TensorList(torch.arange(float(count)).view(-1, 1, 1, 1), [0] * count)


def order_of(loader: Loader, epoch: int) -> list[int]:
    return [int(x) for batch in loader.epoch(epoch) for x in batch.images.flatten()]


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    loader = Loader(numbered(50), 8, shuffle=True, seed=3)
    first, second = order_of(loader, 1), order_of(loader, 2)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    torch.rand(7)
    assert order_of(Loader(numbered(50), 8, shuffle=True, seed=3), 2) == second
    assert order_of(Loader(numbered(50), 8, shuffle=True, seed=4), 2) != second
    assert order_of(Loader(numbered(50), 8), 1) == list(range(50))


def test_training_batches_have_nearly_equal_sizes() -> None:
    loader = Loader(numbered(65), 32, shuffle=True)
    assert [len(batch.labels) for batch in loader.epoch(0)] == [22, 22, 21]
    assert len(loader) == 3
    assert [len(batch.labels) for batch in Loader(numbered(65), 32).epoch()] == [32, 32, 1]


def test_an_epoch_may_be_left_early() -> None:
    loader = Loader(numbered(20), 4, shuffle=True)
    next(iter(loader.epoch(5)))
    assert sorted(order_of(loader, 6)) == list(range(20))


def test_reading_here_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": 4})
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    batches_of(Loader(listed(tmp_path, augment="crop"), 2, shuffle=True, workers=0))
    assert torch.equal(torch.rand(3), expected)


# torch warns of two workers on a machine with one processor.
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_change_nothing(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": 7, "b": 6})
    (tmp_path / "a" / "bad.png").write_bytes(b"no")
    data = listed(tmp_path, augment="crop")
    here = Loader(data, 4, shuffle=True, seed=1, workers=0)
    there = Loader(data, 4, shuffle=True, seed=1, workers=2)
    next(iter(there.epoch(7)))  # an epoch left early must not leak into the next
    for epoch in (1, 2):
        for one, other in zip(here.epoch(epoch), there.epoch(epoch), strict=True):
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.labels, other.labels)
            assert list(one.broken) == list(other.broken)
    # The same workers' error, as it was raised and not as a traceback's text.
    strict = Loader(listed(tmp_path, strict=True), 4, workers=1)
    with raises(DataError, "image-unreadable", "bad.png"):
        batches_of(strict)


def test_any_data_set_of_images_and_labels_will_do() -> None:
    class Noise(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
        def __len__(self) -> int:
            return 5

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return torch.rand(1, 2, 2), index

    loader = Loader(Noise(), 2, workers=0)
    first, again = (torch.cat([b.images for b in loader.epoch(1)]) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, torch.cat([b.images for b in loader.epoch(2)]))


def test_seeds_are_distinct_and_uniform() -> None:
    seeds = np.concatenate([sample_seeds(s, e, 1000) for s in range(3) for e in range(-1, 3)])
    assert len(set(seeds.tolist())) == len(seeds)
    assert len({epoch_seed(s, e) for s in range(30) for e in range(30)}) == 900
    draws = uniforms(seeds, 2)
    assert draws.min() >= 0
    assert draws.max() < 1
    np.testing.assert_allclose(draws.mean(axis=0), 0.5, atol=0.02)
    assert abs(np.corrcoef(draws.T)[0, 1]) < 0.03


def test_importing_loads_no_image_library() -> None:
    code = (
        "import sys, tiedconv.data, tiedconv.training;"
        "loaded = {'torchvision', 'PIL'} & set(sys.modules);"
        "sys.exit(str(loaded) if loaded else 0)"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_lists_of_images_are_plain_data(tmp_path: Path) -> None:
    images = open_images(make_folder(tmp_path, {"a": 2, "b": 1}))
    again = pickle.loads(pickle.dumps(images))
    assert names_of(again) == names_of(images)
    assert labels_of(again) == labels_of(images)
