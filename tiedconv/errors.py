"""Every error that tiedconv raises on purpose.

Each message answers three questions in one line: what is wrong, what follows from it, and
what to do about it. In Python the message names parameters, on the command line options
(`tiedconv.wording`). Each error has a `code`, a short name of what went wrong that stays the same
from release to release; programs and tests compare classes and codes, never wording.

    TiedconvError
    ├── UserError              the request can't be carried out as given (exit code 2)
    │   ├── SourceError        a model can't be found or built
    │   │   ├── WeightsError   weights can't be read or don't fit the model
    │   │   └── MissingExtra   an optional package is needed
    │   ├── SchemeError        unknown scheme, or an invalid option of one
    │   ├── RecipeError        a recipe that contradicts itself or can't be read
    │   ├── NothingToConvert   no part of the model matches the patterns of the scheme
    │   ├── BudgetError        a parameter budget that no choice of ranks can meet
    │   ├── PlanError          an expression or plan that is malformed
    │   ├── CheckpointError    a file that is missing, damaged or not a compact file
    │   ├── DataError          images or labels that can't be used
    │   └── OutputError        a result that can't be written to the given path
    └── RunError               the work started and failed (exit code 1)
        ├── TrainingError      the loss became NaN or infinite
        └── VerifyError        a file does not reproduce what it records
"""

from __future__ import annotations

import re
from typing import ClassVar

from tiedconv.wording import worded

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # which libraries write for terminals


class TiedconvError(Exception):
    """Base of all errors raised on purpose.

    Args:
        what: what is wrong, naming the object it concerns.
        consequence: what follows from it (may be empty).
        hint: what the reader can do.
        code: a stable name of what went wrong, in kebab case; by default that of the class.
    """

    exit_code: ClassVar[int] = 1
    default_code: ClassVar[str] = "error"

    def __init__(
        self, what: str, consequence: str = "", hint: str = "", *, code: str | None = None
    ) -> None:
        parts = [printable(part).strip().rstrip(".") for part in (what, consequence, hint)]
        super().__init__(". ".join(part for part in parts if part) + ".")
        self.what, self.consequence, self.hint = parts
        self.code = code or self.default_code

    def __str__(self) -> str:
        return worded(super().__str__())

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process borders (data loader workers), so they must pickle.
        return _rebuilt, (type(self), (self.what, self.consequence, self.hint), vars(self))


def _rebuilt(
    kind: type[TiedconvError], parts: tuple[str, str, str], state: dict[str, object]
) -> TiedconvError:
    error = kind(*parts)
    vars(error).update(state)
    return error


def printable(text: str) -> str:
    """Text in one line that any terminal shows: control characters and unpaired surrogates escaped.

    Names of files may hold anything, a sequence that clears the screen included.
    """
    return "".join(
        c if c.isprintable() else " " if c in "\n\t" else c.encode("unicode_escape").decode()
        for c in text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class if it has none: fit for one line."""
    text = _COLOUR.sub("", str(error)).strip()
    return next(iter(text.splitlines()), type(error).__name__)


class UserError(TiedconvError):
    """The request can't be carried out as given."""

    default_code = "usage"
    exit_code = 2


class SourceError(UserError):
    """A model can't be found or built."""

    default_code = "source"


class WeightsError(SourceError):
    """Weights can't be read or don't fit the model."""

    default_code = "weights"


class MissingExtra(SourceError):
    """An optional package is needed."""

    default_code = "missing-extra"

    @classmethod
    def of(cls, package: str, extra: str, purpose: str) -> MissingExtra:
        """The error for a missing optional `package` that `purpose` needs."""
        return cls(
            f"{purpose} needs the package {package}, which is not installed",
            hint=f"Install it with: pip install 'tiedconv[{extra}]'",
        )


class SchemeError(UserError):
    """Unknown scheme, or an invalid option of one."""

    default_code = "scheme"


class RecipeError(UserError):
    """A recipe that contradicts itself or can't be read."""

    default_code = "recipe"


class NothingToConvert(UserError):
    """No part of the model matches the patterns of the scheme."""

    default_code = "nothing-to-convert"


class BudgetError(UserError):
    """A parameter budget that no choice of ranks can meet.

    Args:
        smallest: the fewest parameters that can be stored.
    """

    default_code = "budget"

    def __init__(
        self,
        what: str,
        consequence: str = "",
        hint: str = "",
        *,
        code: str | None = None,
        smallest: int = 0,
    ) -> None:
        super().__init__(what, consequence, hint, code=code)
        self.smallest = smallest


class PlanError(UserError):
    """An expression or plan that is malformed."""

    default_code = "plan"


class CheckpointError(UserError):
    """A file that is missing, damaged or not a compact file."""

    default_code = "checkpoint"


class DataError(UserError):
    """Images or labels that can't be used."""

    default_code = "data"


class OutputError(UserError):
    """A result that can't be written to the given path."""

    default_code = "output"


class RunError(TiedconvError):
    """The work started and failed."""

    default_code = "run"


class TrainingError(RunError):
    """The loss became NaN or infinite."""

    default_code = "training"


class VerifyError(RunError):
    """A file does not reproduce what it records."""

    default_code = "verify"
