"""What a model was made from: plain data, kept as JSON in the compact file."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from tiedconv.errors import CheckpointError, PlanError, UserError
from tiedconv.sources.arguments import JSON, is_object

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_INTERPOLATIONS = ("bilinear", "bicubic")
_WEIGHTS = ("default", "none", "file", "memory")
_LARGEST_SIDE = 65536
_OPTIONAL = ("weights_part", "weights_dtype")


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes the input of a model.

    Args:
        size: side of the square input, in pixels.
        resize: length of the shorter side before the centre crop; None resizes straight to
            size x size.
        mean: subtracted from each channel, whose values lie in 0..1.
        std: divides each channel then.
        interpolation: "bilinear" or "bicubic".
        exif: turn images as their EXIF orientation says, which model libraries do not.
    """

    size: int
    resize: int | None = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bilinear"
    exif: bool = False

    def channel_count(self) -> int:
        """Of the model's input: 1 (grey), 3 (RGB) or 4 (RGBA)."""
        return len(self.mean)

    def for_channels(self, channels: int) -> Preprocess:
        """The same for inputs of another number of channels: with the mean of the values."""
        if channels == self.channel_count():
            return self

        def fitted(values: tuple[float, ...]) -> tuple[float, ...]:
            middle = sum(values) / len(values)
            return (middle,) if channels == 1 else (*values, *[middle] * channels)[:channels]

        return replace(self, mean=fitted(self.mean), std=fitted(self.std))

    def scaled_to(self, size: int | None) -> Preprocess:
        """The same at another input size, with the crop in the same proportion."""
        if size is None or size == self.size:
            return self
        resize = None if self.resize is None else round(self.resize * size / self.size)
        return replace(self, size=size, resize=resize)

    def to_json(self) -> dict[str, JSON]:
        """As a JSON object, that `from_json` reads back."""
        return {
            "size": self.size,
            "resize": self.resize,
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
            **({"exif": True} if self.exif else {}),
        }

    @classmethod
    def from_json(cls, data: object) -> Preprocess:
        """Reads what `to_json` wrote.

        Raises:
            PlanError: a key is missing or unknown, or a value has the wrong type or range.
        """
        what = "The image preprocessing"
        items = _object_with(cls, data, what, PlanError, ("exif",))
        sizes = [items["size"]] if items["resize"] is None else [items["size"], items["resize"]]
        if not all(type(side) is int and 0 < side <= _LARGEST_SIDE for side in sizes):
            raise PlanError(
                f"{what} has a size that is not from 1 to {_LARGEST_SIDE}: {reprlib.repr(sizes)}",
                code="invalid-image-size",
            )
        mean, std = _numbers(items["mean"]), _numbers(items["std"])
        if not mean or not std or len(mean) != len(std) or min(std) <= 0:
            raise PlanError(
                f"{what} needs as many means as positive standard deviations, "
                f"not {reprlib.repr(items['mean'])} and {reprlib.repr(items['std'])}",
                code="invalid-mean-or-std",
            )
        if items["interpolation"] not in _INTERPOLATIONS:
            raise PlanError(
                f"{what} has the unknown interpolation {reprlib.repr(items['interpolation'])}",
                hint=f"Known are {' and '.join(_INTERPOLATIONS)}",
                code="unknown-interpolation",
            )
        exif = items.get("exif", False)
        if type(exif) is not bool:
            raise PlanError(
                f"{what} has an exif that is neither true nor false", code="invalid-exif"
            )
        return cls(items["size"], items["resize"], mean, std, items["interpolation"], exif)


@dataclass(frozen=True)
class Source:
    """Where a model came from, and all that is needed to build its class again offline.

    Args:
        spec: the model as the user gave it; "" for a model that was in memory.
        kwargs: arguments of its constructor.
        weights: "default" (pretrained), "none" (random), "file" or "memory".
        weights_sha256: of the weights file, when there is one.
        weights_name: base name of that file, never its path.
        weights_part: the key in that file under which they lay, such as `state_dict_ema`. Written
            only where there is one, as older releases refuse what they do not know.
        weights_dtype: `float16` or `bfloat16` where the original's weights are published in it;
            likewise.
        config: for Hugging Face models, the configuration and the name of the "architecture".
        preprocess: how images are prepared, when the source says so.
        versions: of the libraries that the model was built with.
    """

    spec: str
    kwargs: Mapping[str, JSON] = field(default_factory=dict)
    weights: str = "none"
    weights_sha256: str | None = None
    weights_name: str | None = None
    weights_part: str | None = None
    weights_dtype: str | None = None
    config: Mapping[str, JSON] | None = None
    preprocess: Preprocess | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, JSON]:
        """As a JSON object, that `from_json` reads back."""
        return {
            "spec": self.spec,
            "kwargs": dict(self.kwargs),
            "weights": self.weights,
            "weights_sha256": self.weights_sha256,
            "weights_name": self.weights_name,
            **{name: value for name in _OPTIONAL if (value := getattr(self, name)) is not None},
            "config": None if self.config is None else dict(self.config),
            "preprocess": None if self.preprocess is None else self.preprocess.to_json(),
            "versions": dict(self.versions),
        }

    @classmethod
    def from_json(cls, data: object) -> Source:
        """Reads what `to_json` wrote.

        Raises:
            CheckpointError: a key is missing or unknown, or a value has the wrong type.
        """
        items = _object_with(cls, data, "The model source", CheckpointError, _OPTIONAL)
        sha, name = items["weights_sha256"], items["weights_name"]
        part, dtype = (items.setdefault(name, None) for name in _OPTIONAL)
        config, preprocess = items["config"], items["preprocess"]
        checks = {
            "spec": isinstance(items["spec"], str),
            "kwargs": is_object(items["kwargs"]),
            "weights": items["weights"] in _WEIGHTS,
            "weights_sha256": sha is None or _is_sha256(sha),
            "weights_name": name is None or (isinstance(name, str) and _is_base_name(name)),
            "weights_part": part is None or (isinstance(part, str) and len(part) <= 100),
            "weights_dtype": dtype in (None, "float16", "bfloat16"),
            "config": config is None or is_object(config),
            "versions": is_object(items["versions"])
            and all(isinstance(version, str) for version in items["versions"].values()),
        }
        for key, sound in checks.items():
            if not sound:
                shown = reprlib.repr(items[key])
                raise CheckpointError(
                    f"The model source has a malformed {key!r}: {shown}", code="source-malformed"
                )
        if preprocess is not None:
            try:
                items["preprocess"] = Preprocess.from_json(preprocess)
            except PlanError as error:
                raise CheckpointError(
                    error.what, error.consequence, error.hint, code=error.code
                ) from error
        return cls(**items)


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _is_base_name(name: str) -> bool:
    return "/" not in name and "\\" not in name


def _numbers(value: Any) -> tuple[float, ...]:
    if not isinstance(value, list):
        return ()
    if not all(type(item) in (int, float) and math.isfinite(item) for item in value):
        return ()
    return tuple(float(item) for item in value)


def _object_with(
    cls: type[Preprocess] | type[Source],
    data: object,
    what: str,
    error: type[UserError],
    optional: Sequence[str] = (),
) -> dict[str, Any]:
    """`data` as a dict with exactly the fields of `cls`, of which some are optional."""
    if not isinstance(data, dict):
        raise error(
            f"{what} is not a JSON object but {type(data).__name__}", code="not-a-json-object"
        )
    names = {item.name for item in fields(cls)}
    if unknown := sorted(str(key) for key in set(data) - names):
        raise error(
            f"{what} has the unknown key {reprlib.repr(unknown[0])}",
            "It can't be read",
            code="unknown-key",
        )
    if missing := sorted(names - set(data) - set(optional)):
        raise error(f"{what} lacks the key {missing[0]!r}", "It can't be read", code="missing-key")
    return dict(data)
