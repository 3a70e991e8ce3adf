"""The same tiny images in every layout, for the tests of data.

Whoever imports this module is skipped where the packages of a layout are missing.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tiedconv.data import Broken, ImageList, Images, train_transform
from tiedconv.sources import Preprocess

pytest.importorskip("webdataset", reason="shards need the extra webdataset")
datasets = pytest.importorskip("datasets", reason="data sets need the extra hf-data")

CLASSES = ("blue", "green", "red")
COUNTS = {"train": (9, 4, 6), "val": (3, 2, 3)}
PREPROCESS = Preprocess(8, None, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))

Picture = tuple[str, int, bytes]
"""A key, a label, and an encoded image."""


def encoded(seed: int, label: int) -> bytes:
    """A picture of one colour with noise, which a model can learn to name."""
    pixels = np.random.default_rng(seed).integers(0, 120, (8, 8, 3))
    pixels[..., label] += 120
    made = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(made, "PNG")
    return made.getvalue()


def pictures(part: str) -> list[Picture]:
    labels = [label for label, count in enumerate(COUNTS[part]) for _ in range(count)]
    start = 1000 * (part == "val")
    return [(f"{at:04}", label, encoded(start + at, label)) for at, label in enumerate(labels)]


def write_folder(root: Path, parts: dict[str, list[Picture]]) -> str:
    for part, every in parts.items():
        for name in CLASSES:
            (root / part / name).mkdir(parents=True)
        for key, label, image in every:
            (root / part / CLASSES[label] / f"{key}.png").write_bytes(image)
    return str(root)


def write_tiny_imagenet(root: Path, parts: dict[str, list[Picture]]) -> str:
    write_folder(root, {part: every for part, every in parts.items() if part == "train"})
    if "val" in parts:
        (root / "val" / "images").mkdir(parents=True)
        lines = ""
        for key, label, image in mixed(parts["val"]):
            (root / "val" / "images" / f"{key}.png").write_bytes(image)
            lines += f"{key}.png\t{CLASSES[label]}\t0\t0\t9\t9\n"
        (root / "val" / "val_annotations.txt").write_text(lines)
    return str(root)


def write_tar(
    path: Path, files: Iterable[tuple[str, bytes]], style: int = tarfile.PAX_FORMAT
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=style) as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            member.mtime = 1.5  # type: ignore[assignment]  # as the package's writer does
            tar.addfile(member, io.BytesIO(content))
    return path


def sample(key: str, label: int, image: bytes) -> list[tuple[str, bytes]]:
    return [(f"{key}.cls", str(label).encode()), (f"{key}.png", image)]


def mixed(every: Sequence[Picture]) -> list[Picture]:
    order = np.random.default_rng(0).permutation(len(every))
    return [every[at] for at in order]


def write_shards(
    root: Path, parts: dict[str, list[Picture]], place: str = "{part}-{number:06}.tar"
) -> str:
    for part, every in parts.items():
        for number, start in enumerate(range(0, len(every), 7)):
            files = [f for picture in mixed(every)[start : start + 7] for f in sample(*picture)]
            write_tar(root / place.format(part=part, number=number), files)
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return str(root)


def write_shard_folders(root: Path, parts: dict[str, list[Picture]]) -> str:
    return write_shards(root, parts, "{part}/{number}.tar")


def table_of(every: Sequence[Picture], **columns: Any) -> Any:
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
    )
    rows = {
        "image": [{"bytes": image, "path": None} for _, _, image in every],
        "label": [label for _, label, _ in every],
    }
    made = datasets.Dataset.from_dict(rows, features=features)
    for name, values in columns.items():
        made = made.add_column(name, values)
    return made


def write_saved(root: Path, parts: dict[str, list[Picture]]) -> str:
    tables = {part: table_of(mixed(every)) for part, every in parts.items()}
    datasets.DatasetDict(tables).save_to_disk(str(root))
    return f"hf:{root}"


def write_parquet(root: Path, parts: dict[str, list[Picture]]) -> str:
    names = {"train": "train", "val": "validation"}
    for part, every in parts.items():
        (root / "data").mkdir(parents=True, exist_ok=True)
        table_of(every).to_parquet(str(root / "data" / f"{names[part]}-00000-of-00001.parquet"))
    return f"hf:{root}"


def write_hf_folder(root: Path, parts: dict[str, list[Picture]]) -> str:
    return f"hf:{write_folder(root, parts)}"


WRITERS: dict[str, Callable[[Path, dict[str, list[Picture]]], str]] = {
    "folder": write_folder,
    "tiny-imagenet": write_tiny_imagenet,
    "shards": write_shards,
    "shards-in-folders": write_shard_folders,
    "hf-saved": write_saved,
    "hf-parquet": write_parquet,
    "hf-folder": write_hf_folder,
}
each_layout = pytest.mark.parametrize("name", list(WRITERS))
one_of_each = pytest.mark.parametrize("name", ["folder", "shards", "hf-saved"])


def written(root: Path, name: str, *parts: str) -> str:
    return WRITERS[name](root / name, {part: pictures(part) for part in parts or ("train", "val")})


def reader(images: Images, augment: str = "none", *, strict: bool = False) -> ImageList:
    return ImageList(images, train_transform(PREPROCESS, augment), strict=strict)


def contents(images: Images) -> list[tuple[int, bytes]]:
    """Label and pixels of every image, sorted."""
    found = []
    for one in map(reader(images).__getitem__, range(len(images))):
        assert not isinstance(one, Broken)
        found.append((one[1], one[0].numpy().tobytes()))
    return sorted(found)


def expected(part: str) -> list[tuple[int, bytes]]:
    transform = train_transform(PREPROCESS, "none")
    return sorted(
        (label, transform(Image.open(io.BytesIO(image))).numpy().tobytes())
        for _, label, image in pictures(part)
    )
