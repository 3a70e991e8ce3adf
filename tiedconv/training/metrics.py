"""What an evaluation measures: the names of its figures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """What stands in the places of top 1 and top 5 while a training runs.

    Attributes:
        keys: names in files.
        name: of the first, for people, where there is room.
        short: of the first, where there is little.
        labelled: whether it needs labels.
    """

    keys: tuple[str, ...]
    name: str
    short: str
    labelled: bool = True


ACCURACY = Measure(("top1", "top5"), "top-1", "top-1")
AGREEMENT = Measure(("agreement",), "agreement with the teacher", "agreement", labelled=False)
PRECISION = Measure(("ap", "ap50"), "average precision", "AP")
MEASURES = (ACCURACY, AGREEMENT, PRECISION)
