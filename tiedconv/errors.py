"""Every error that tiedconv raises on purpose.

Each message answers three questions in one line: what is wrong, what follows from it, and
what to do about it.

    TiedconvError
    ├── UserError              the request can't be done as asked (exit code 2)
    │   ├── SourceError        a model can't be found or built
    │   │   ├── WeightsError   weights can't be read or don't fit the model
    │   │   └── MissingExtra   an optional package is needed
    │   ├── SchemeError        unknown scheme, or an option it doesn't take
    │   ├── RecipeError        a recipe that contradicts itself or can't be read
    │   ├── NothingToConvert   no part of the model matches what the scheme looks for
    │   ├── BudgetError        a parameter budget that no choice of ranks can meet
    │   ├── PlanError          an expression or plan that is malformed
    │   ├── CheckpointError    a file that is missing, damaged or not ours
    │   ├── DataError          images or labels that can't be used
    │   └── OutputError        a result that can't be written where asked
    └── RunError               the work began and failed (exit code 1)
        ├── TrainingError      the loss became NaN or infinite
        └── VerifyError        a file does not give what it promises
"""

from __future__ import annotations


class TiedconvError(Exception):
    """Base of all errors raised on purpose.

    Args:
        what: what is wrong, naming the thing it is wrong with.
        follows: what follows from it (may be empty).
        remedy: what the reader can do.
    """

    exit_code = 1

    def __init__(self, what: str, follows: str = "", remedy: str = "") -> None:
        parts = [part.strip().rstrip(".") for part in (what, follows, remedy)]
        super().__init__(". ".join(part for part in parts if part) + ".")
        self.what, self.follows, self.remedy = parts

    def __reduce__(self) -> tuple[type[TiedconvError], tuple[str, str, str]]:
        # Errors cross process borders (data loader workers), so they must pickle.
        return type(self), (self.what, self.follows, self.remedy)


class UserError(TiedconvError):
    """The request can't be done as asked."""

    exit_code = 2


class SourceError(UserError):
    """A model can't be found or built."""


class WeightsError(SourceError):
    """Weights can't be read or don't fit the model."""


class MissingExtra(SourceError):
    """An optional package is needed."""

    def __init__(self, what: str, follows: str = "", remedy: str = "") -> None:
        super().__init__(what, follows, remedy)

    @classmethod
    def of(cls, package: str, extra: str, purpose: str) -> MissingExtra:
        """The error for a missing optional `package` that `purpose` needs."""
        return cls(
            f"{purpose} needs the package {package}, which is not installed",
            remedy=f"Install it with: pip install 'tiedconv[{extra}]'",
        )


class SchemeError(UserError):
    """Unknown scheme, or an option it doesn't take."""


class RecipeError(UserError):
    """A recipe that contradicts itself or can't be read."""


class NothingToConvert(UserError):
    """No part of the model matches what the scheme looks for."""


class BudgetError(UserError):
    """A parameter budget that no choice of ranks can meet.

    Args:
        smallest: the fewest parameters that can be stored.
    """

    def __init__(
        self, what: str, follows: str = "", remedy: str = "", *, smallest: int = 0
    ) -> None:  # fmt: skip
        super().__init__(what, follows, remedy)
        self.smallest = smallest


class PlanError(UserError):
    """An expression or plan that is malformed."""


class CheckpointError(UserError):
    """A file that is missing, damaged or not ours."""


class DataError(UserError):
    """Images or labels that can't be used."""


class OutputError(UserError):
    """A result that can't be written where asked."""


class RunError(TiedconvError):
    """The work began and failed."""


class TrainingError(RunError):
    """The loss became NaN or infinite."""


class VerifyError(RunError):
    """A file does not give what it promises."""
