"""How large, and how slow, a result may be, as it is asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tiedconv.errors import RecipeError
from tiedconv.utils.figures import milliseconds

_NANOSECONDS = {"us": 1e3, "ms": 1e6, "s": 1e9}
_UNITS = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}


KEYS_OF_ON = ("on", "on_batch_size", "on_threads")
_ON = ("onnx", 1, 1)

Size = float | int | str
"""A size: a fraction such as 0.5, a whole number, or a text such as `50%` or `12M`."""


def size_text(name: str, value: Size | None) -> str:
    """A size as a text.

    Args:
        name: of the option, for messages.
        value: what was given.

    Raises:
        RecipeError: a number that is neither a fraction nor whole (`budget-invalid`).
    """
    if isinstance(value, str):
        return value
    if isinstance(value, float) and 0 < value <= 1:
        return f"{100 * value:.10g}%"
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    raise RecipeError(
        f"Invalid budget {name}={value!r}",
        hint="Give a fraction such as 0.5, a whole number, or a text such as '50%' or '12M'",
        code="budget-invalid",
    )


@dataclass(frozen=True)
class Budget:
    """How much there may be of something: a share of the original's, or a number.

    Args:
        text: such as `50%`, `12M`, `2G`; of a time also `0.6x` and `8ms`.
        of: what: `params`, `macs`, or `latency`, which is counted in nanoseconds.
    """

    text: str
    of: str = "params"

    def __post_init__(self) -> None:
        self._parsed()

    @property
    def what(self) -> str:
        """In words."""
        return {"params": "parameters", "macs": "multiply-adds", "latency": "time"}[self.of]

    def shown(self, count: float) -> str:
        """A number of it, with its unit."""
        return milliseconds(count) if self.of == "latency" else f"{count:,} {self.what}"

    def resolve(self, original: int) -> int:
        """The number, of a model that has so many.

        Raises:
            RecipeError: it is no fewer, so that nothing would be saved.
        """
        number, is_share = self._parsed()
        count = int(original * number / 100) if is_share else int(number)
        if count >= original:
            raise RecipeError(
                f"{self.of}={self.text!r} is not less than the model's own {self.shown(original)}",
                "Nothing would be saved",
                "Give less, such as 50%",
                code="budget-saves-nothing",
            )
        return count

    def _parsed(self) -> tuple[float, bool]:
        """The number, and whether it is a percentage; RecipeError if it is neither."""
        text = self.text.strip().replace("_", "").replace(",", "").lower()
        if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text):
            if 0 < (share := float(match[1])) <= 100:
                return share, True
        elif self.of == "latency":
            return self._parsed_time(text)
        elif match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmbgt]?)", text):
            count = float(match[1]) * _UNITS[match[2]]
            if 1 <= count <= 100:
                raise RecipeError(
                    f"{self.of}={self.text!r} would mean that many {self.what}",
                    "No model is that small",
                    f"For a percentage of the original write {self.text.strip()}%",
                    code="budget-without-percent",
                )
            if count > 100:
                return count, False
        raise RecipeError(
            f"Invalid budget {self.of}={self.text!r}",
            hint="Give a percentage of the original such as 50%, or a number such as 12M",
            code="budget-invalid",
        )

    def _parsed_time(self, text: str) -> tuple[float, bool]:
        """The same of a time that is not a percentage."""
        if (match := re.fullmatch(r"(\d*\.?\d+)\s*x", text)) and 0 < float(match[1]) <= 1:
            return 100 * float(match[1]), True
        if (match := re.fullmatch(r"(\d*\.?\d+)\s*(us|ms|s)", text)) and float(match[1]) > 0:
            return float(match[1]) * _NANOSECONDS[match[2]], False
        raise RecipeError(
            f"Invalid budget {self.of}={self.text!r}",
            hint="Give a share of the original's time such as 0.6x or 60%, or a time such as 8ms",
            code="budget-invalid",
        )


@dataclass(frozen=True)
class RunsOn:
    """Where a time is measured.

    Args:
        runtime: one of `timing.all_runtimes`.
        batch_size: inputs at a time.
        threads: of the runtime.
    """

    runtime: str = "onnx"
    batch_size: int = 1
    threads: int = 1

    def __post_init__(self) -> None:
        counts = (self.batch_size, self.threads)
        if not all(type(count) is int and count > 0 for count in counts):
            raise RecipeError(
                f"Invalid batch size or threads {counts}",
                hint="Give whole numbers of at least 1",
                code="runs-on-invalid",
            )

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{self.runtime}, batch size {self.batch_size}, {threads}"

    def to_json(self) -> dict[str, Any]:
        """Plain data, that `from_json` reads back."""
        return dict(zip(KEYS_OF_ON, (self.runtime, self.batch_size, self.threads), strict=True))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RunsOn:
        """From a recipe's keys; what it lacks is as by default."""
        return cls(*(data.get(key, usual) for key, usual in zip(KEYS_OF_ON, _ON, strict=True)))
