"""Images in a Hugging Face data set, by the `datasets` package.

`hf:NAME` or `hf:NAME:CONFIG` is one of the Hub; `hf:FOLDER` is what `save_to_disk` wrote, or a
folder of Parquet files or of images as the package reads them. Which column holds the image and
which the label is read off the types of the columns; `?image=COLUMN&label=COLUMN` says so where
that leaves a choice, `?train=SPLIT&val=SPLIT` names splits, `?revision=...` a version.

The package reads data alone and runs no code that comes with them, which its releases before 4
could do. Images are decoded here, as those of every other layout.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qsl

import numpy as np

from tiedconv.data.images import MAX_CLASSES, Images
from tiedconv.data.layouts._base import VAL_NAMES, Layout, Parts, listed
from tiedconv.errors import DataError, MissingExtra

_OPTIONS = ("image", "label", "train", "val", "revision")


class HuggingFace(Layout):
    """A data set of the Hub, or one in its forms on disk."""

    name = "hf"
    labels_from = "column of integers or of the type ClassLabel"
    expected = "Expected hf:NAME, hf:NAME:CONFIG or hf:FOLDER, with a column of the type Image"

    def takes(self, spec: str) -> bool:
        return spec.startswith("hf:")

    def parts(self, spec: str, *, labels: bool) -> Parts:
        wanted = _Wanted.parse(spec)
        splits = _splits(wanted)
        for option in ("train", "val"):
            if (named := wanted.options.get(option)) and named not in splits:
                raise DataError(
                    f"{wanted.place} has no split {named}",
                    "",
                    f"It has {listed(splits)}",
                    code="unknown-split",
                )

        def list_of(name: str) -> partial[Images]:
            return partial(_listed, splits[name], name, wanted, labels)

        val_name = wanted.options.get("val") or next((n for n in VAL_NAMES if n in splits), None)
        train_name = wanted.options.get("train") or ("train" if "train" in splits else None)
        if train_name is None and val_name is None:
            if len(splits) != 1:
                raise DataError(
                    f"{wanted.place} has the splits {listed(splits)}",
                    "None of them is called train",
                    f"Name them, as in {spec}{'&' if wanted.options else '?'}train=SPLIT",
                    code="no-train-split",
                )
            return Parts(whole=list_of(next(iter(splits))))
        return Parts(
            train=None if train_name is None else list_of(train_name),
            val=None if val_name is None else list_of(val_name),
            train_spec=f"{spec}{'&' if wanted.options else '?'}val={train_name}",
        )

    def title(self, spec: str) -> str:
        wanted = _Wanted.parse(spec)
        if wanted.folder is not None:
            return wanted.folder.resolve().name
        return f"hf:{wanted.place}"


LAYOUT = HuggingFace()


@dataclass(frozen=True)
class _Wanted:
    """What a user's words ask for: a name with a configuration, or a folder."""

    place: str
    config: str | None
    folder: Path | None
    options: Mapping[str, str]

    @classmethod
    def parse(cls, spec: str) -> _Wanted:
        place, _, query = spec.removeprefix("hf:").partition("?")
        options = dict(parse_qsl(query))
        unknown = sorted(set(options) - set(_OPTIONS))
        if unknown or not place or bool(query) != bool(options):
            what = f"the option {listed(unknown)}" if unknown else "no such form"
            raise DataError(
                f"{spec!r} names no data set: there is {what}",
                "",
                f"Write hf:NAME:CONFIG?image=COLUMN&label=COLUMN; options: {', '.join(_OPTIONS)}",
                code="invalid-data-spec",
            )
        folder = Path(os.path.expanduser(place))
        if os.path.isdir(folder):
            return cls(place, None, folder, options)
        name, _, config = place.partition(":")
        return cls(name, config or None, None, options)


class _Rows:
    """The encoded images of one split: a store.

    Args:
        rows: a data set with the one column `column`, as it was loaded: neither shuffled nor
            selected from, as its Arrow table is read directly (its own indexing takes as long as
            the decoding of a small image).
        column: its name.
        title: what to call the split in messages.
    """

    def __init__(self, rows: Any, column: str, title: str) -> None:
        self._rows, self._column, self._title = rows, column, title
        self._images: Any = None

    def __getstate__(self) -> dict[str, Any]:
        # The data set is sent as the path of its file, a column would be sent as its contents.
        return {**self.__dict__, "_images": None}

    def name(self, at: int) -> str:
        return f"{self._title}, row {at}"

    def open(self, at: int) -> str | BinaryIO:
        if self._images is None:
            self._images = self._rows.data.column(self._column)
        image = self._images[at].as_py()
        if image is None or (image["bytes"] is None and not image["path"]):
            raise OSError("the row is empty")
        if image["bytes"] is None:
            path: str = image["path"]
            return path
        return io.BytesIO(image["bytes"])


def _splits(wanted: _Wanted) -> Mapping[str, Any]:
    """The splits of a data set by name; one without any is called "all"."""
    try:
        import datasets
    except ImportError:
        raise MissingExtra.of("datasets", "hf-data", "A Hugging Face data set") from None
    place = str(wanted.folder or wanted.place)
    try:
        with _bars_where_seen():
            if wanted.folder is not None and _is_saved(wanted.folder):
                found = datasets.load_from_disk(place)
            else:
                found = datasets.load_dataset(
                    place, wanted.config, revision=wanted.options.get("revision")
                )
    # Whatever its readers raise, the request can't be done, and their words say why.
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, ImportError) as error:
        raise _unreadable(wanted, error) from error
    except datasets.exceptions.DatasetsError as error:
        raise _unreadable(wanted, error) from error
    return dict(found) if isinstance(found, dict) else {"all": found}


@contextlib.contextmanager
def _bars_where_seen() -> Iterator[None]:
    """Keeps the package's progress bars out of files and pipes."""
    import datasets

    hidden = not sys.stderr.isatty() and not datasets.are_progress_bars_disabled()
    if hidden:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hidden:
            datasets.enable_progress_bars()


def _unreadable(wanted: _Wanted, error: Exception) -> DataError:
    text = str(error).strip()
    reason = " ".join(text.splitlines()[:1]) or type(error).__name__
    return DataError(
        f"The data set {wanted.place} can't be opened: {reason}",
        "",
        HuggingFace.expected,
        code="data-unreadable",
    )


def _is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _listed(rows: Any, split: str, wanted: _Wanted, labels: bool) -> Images:
    """All images of one split."""
    title = f"{wanted.place} ({split})"
    if not len(rows):
        raise DataError(
            f"{title} is empty", "", "Choose another split with ?train= or ?val=", code="no-images"
        )
    image = _column(rows, "image", wanted, [k for k, v in rows.features.items() if _is_image(v)])
    assert image is not None
    store = _Rows(rows.select_columns([image]), image, title)
    label = _label_column(rows, wanted) if labels else None
    if label is None:
        return Images.all_of(store, len(rows), None, ())
    every = rows.select_columns([label]).with_format("arrow")[:][label]
    if every.null_count:
        raise _unlabelled(title, label, "are empty")
    found = every.to_numpy().astype(np.int64)
    if found.min() < 0:
        raise _unlabelled(title, label, "are below 0, which stands for none")
    if found.max() >= MAX_CLASSES:
        raise _unlabelled(title, label, f"are above {MAX_CLASSES - 1:,}")
    names = getattr(rows.features[label], "names", None)
    classes = tuple(names or map(str, range(int(found.max()) + 1)))
    if found.max() >= len(classes):
        raise _unlabelled(title, label, f"name more than its {len(classes)} classes")
    return Images.all_of(store, len(rows), found, classes)


def _is_image(feature: Any) -> bool:
    return type(feature).__name__ == "Image"


def _label_column(rows: Any, wanted: _Wanted) -> str | None:
    kinds = dict(rows.features)
    numbers = [n for n, kind in kinds.items() if str(getattr(kind, "dtype", "")).startswith(
        ("int", "uint"))]  # fmt: skip
    named = [n for n in numbers if type(kinds[n]).__name__ == "ClassLabel"]
    plain = [n for n in numbers if n in ("label", "labels")]
    label = _column(rows, "label", wanted, named or plain)
    if label is not None and label not in numbers:
        raise DataError(
            f"The column {label} of {wanted.place} holds {kinds[label]}, not integers",
            "Its values can't be labels",
            "Make it a ClassLabel: `class_encode_column` of the package does",
            code="invalid-label-column",
        )
    return label


def _column(rows: Any, role: str, wanted: _Wanted, fitting: list[str]) -> str | None:
    """The one column that fits, or that the user named; None if a label is not there at all."""
    named = wanted.options.get(role)
    if named in rows.features:
        return named
    if named is None and len(fitting) == 1:
        return fitting[0]
    if named is None and not fitting and role == "label":
        return None
    what = f"no column {named}" if named else (
        f"several columns that may be the {role}: {listed(fitting)}" if fitting else
        f"no column of the type {role.capitalize()}"
    )  # fmt: skip
    raise DataError(
        f"{wanted.place} has {what}",
        f"Its columns are {listed(rows.features, 12)}",
        f"Name the one to use: hf:{wanted.place}?{role}=COLUMN",
        code="column-unclear",
    )


def _unlabelled(title: str, label: str, what: str) -> DataError:
    return DataError(
        f"Some labels of {title}, column {label}, {what}",
        "Not all images have a class",
        "Use another split, or --unlabelled with --distill 1",
        code="labels-missing",
    )
