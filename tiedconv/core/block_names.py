"""The numbered blocks of a model, found in the names of its tensors.

Training gives each block its learning rate, calibration fits one block after the other: both ask
here. It holds for any library: `blocks.3`,
`encoder.layers.encoder_layer_3`, `layer1.0`, `stages.0.layers.1`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

_DIGITS = re.compile(r"(.*[_-])?\d+")  # a component such as `3`, `encoder_layer_3`, `block1-0`
_ENDS_IN_DIGITS = re.compile(r".*\d+")  # `denselayer12` too, but also `conv1`


def block_names(matrices: Sequence[str], least: int = 1) -> Callable[[str], str | None]:
    """A function from a tensor's name to the name of its block, or None outside of all blocks.

    A block is a numbered module with at least two matrices, most of which do not lie in numbered
    modules below it that are like this themselves: a stage holds blocks, but a block with a
    numbered part stays one. Where there is no such module, one matrix is enough.

    Args:
        matrices: names of the tensors of two or more dimensions.
        least: 2, and a model without modules of two matrices has no blocks.
    """
    for pattern, enough in ((_DIGITS, 2), (_ENDS_IN_DIGITS, 2), (_DIGITS, 1)):
        if enough < least:
            continue
        counts: dict[str, int] = defaultdict(int)
        for name in matrices:
            for prefix in _numbered(name, pattern):
                counts[prefix] += 1
        candidates = {prefix for prefix, count in counts.items() if count >= enough}
        inner: dict[str, int] = defaultdict(int)
        for name in matrices:
            found = [p for p in _numbered(name, pattern) if p in candidates]
            for outer in found[:-1]:
                inner[outer] += 1
        blocks = {p for p in candidates if inner[p] <= counts[p] / 2}
        if len(blocks) > 1:
            break
    else:
        blocks = set()

    def home(name: str) -> str | None:
        parts = name.split(".")
        prefixes = (".".join(parts[:i]) for i in range(1, len(parts)))
        return next((prefix for prefix in prefixes if prefix in blocks), None)

    return home


def _numbered(name: str, pattern: re.Pattern[str]) -> Iterator[str]:
    """The prefixes of a tensor's name that end in a number, outermost first."""
    parts = name.split(".")
    for i, part in enumerate(parts[:-1], 1):
        if pattern.fullmatch(part):
            yield ".".join(parts[:i])
