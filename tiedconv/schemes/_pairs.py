"""Which matrices may be each other's transpose."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tiedconv.core.partition import partition
from tiedconv.core.plan import Block, Member

Pair = tuple[tuple[str, bool], tuple[str, bool]]

_FFN: Pair = (("up", False), ("down", True))
_SQUEEZE: Pair = (("reduce", False), ("expand", True))

# Role and whether its transpose takes part, for each pair that is stored as one W.
PAIRINGS: Mapping[str, tuple[Pair, ...]] = {
    "kv-qo": (_FFN, _SQUEEZE, (("k", False), ("v", True)), (("q", False), ("o", True))),
    "vo-qk": (_FFN, _SQUEEZE, (("v", False), ("o", True)), (("q", False), ("k", False))),
}


def fits(members: Sequence[Member]) -> bool:
    """Whether all matrices have one shape, so that one W can stand for them."""
    return len(members) > 1 and len({m.shape for m in members}) == 1


def pair_groups(
    blocks: Sequence[Block], groups: str, pairing: str
) -> Iterator[tuple[str, tuple[Member, ...]]]:
    """Feed-forwards and attentions: name and members of each W, those of a group together."""
    stacks: dict[tuple[str, tuple[Pair, ...]], list[Block]] = defaultdict(list)
    for block in sorted(blocks, key=lambda b: b.index):
        if block.kind != "bottleneck":
            # A block that changes its width has no pair of its 1x1 convolutions.
            own = tuple(p for p in PAIRINGS[pairing] if fits(_members(block, p)))
            stacks[block.stack, own].append(block)
    for (_, pairs), layers in stacks.items():
        for part in partition(len(layers), groups):
            chosen = [layers[i] for i in part]
            name = chosen[0].name if len(part) == 1 else f"{chosen[0].name}-{chosen[-1].index}"
            for pair in pairs:
                members = tuple(member for block in chosen for member in _members(block, pair))
                if fits(members):
                    yield f"{name}.{'-'.join(role for role, _ in pair)}", members


def _members(block: Block, pair: Pair) -> list[Member]:
    """The matrices of a pair; none where one of them is missing."""
    if any(role not in block.slots for role, _ in pair):
        return []
    return [Member(block.slots[role], flip) for role, flip in pair]


@dataclass(frozen=True)
class Stage:
    """Bottlenecks that share one W.

    Args:
        name: of the group.
        tied: the blocks, ordinary ones first.
        first: whether conv1 of a block whose width changes takes part, as a slice.
    """

    name: str
    tied: tuple[Block, ...]
    first: str

    def members(self, spatial: bool) -> Iterator[tuple[str, list[Member]]]:
        """The 1x1 convolutions of the stage, then its 3x3 ones if they are shared too."""
        expand = [Member(b.slots["conv3"], flip=True) for b in self.tied if "conv3" in b.slots]
        reduce = [
            Member(b.slots["conv1"])
            for b in self.tied
            if "conv1" in b.slots and (_is_square(b) or self.first == "slice")
        ]
        if len(expand) + len(reduce) > 1:
            yield f"{self.name}.conv1-conv3", expand + reduce
        middle = [Member(b.slots["conv2"]) for b in self.tied if "conv2" in b.slots]
        if spatial and fits(middle):
            yield f"{self.name}.conv2", middle


def bottleneck_groups(blocks: Sequence[Block], groups: str, first: str) -> Iterator[Stage]:
    """The bottlenecks of each stage, divided into those that share one W.

    A block whose conv1 reads another width than its conv3 writes (a stage's first) joins the
    first group of its stage, unless `first` is `keep`; alone it ties only by `slice`.
    """
    stages: dict[tuple[str, int], list[Block]] = defaultdict(list)
    for block in sorted(blocks, key=lambda b: b.index):
        if block.kind == "bottleneck" and {"conv1", "conv3"} <= block.slots.keys():
            conv3 = block.slots["conv3"]
            conv1 = block.slots["conv1"]
            if conv3.columns == conv1.rows and conv1.columns <= conv3.rows:
                stages[block.stack, conv3.columns].append(block)
    for layers in stages.values():
        square = [b for b in layers if _is_square(b)]
        odd = [] if first == "keep" else [b for b in layers if not _is_square(b)]
        parts = [[square[i] for i in part] for part in partition(len(square), groups)]
        if odd and groups != "each" and parts:
            parts[0] += odd
        elif first == "slice":
            parts = [[b] for b in odd] + parts
        for part in parts:
            extra = f"-{part[-1].index}" if len(part) > 1 else ""
            yield Stage(part[0].name + extra, tuple(part), first)


def _is_square(block: Block) -> bool:
    return block.slots["conv1"].columns == block.slots["conv3"].rows
