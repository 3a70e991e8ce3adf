"""Parameters of the decoder, part by part, by formula and counted: they must agree.

    python examples/adamixer/count.py

The formulas are worked out from the papers' sizes alone; the counts are those of the model that
is built here and, for LORS, of tiedconv's plan for it by `lors.toml`.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # this folder is the package `adamixer`

import tiedconv
from adamixer.conversion import RECIPE
from adamixer.decoder import Decoder
from adamixer.settings import LORS, STOCK, Setting

PUBLISHED = {"stock": "110.27", "lors": "35.35"}  # million, arXiv 2403.04303
K = (1, 1, 2, 2, 3, 3)  # terms of each stage
STATIC, ADAPTIVE = 8, 16  # ranks

PARTS = {
    "attention": "stages.*.attention.*",
    "sampling offsets": "stages.*.sampler.*",
    "feed-forward": "stages.*.ffn.*",
    "class branch": "stages.*.classes.*",
    "box branch": "stages.*.box.*",
    "norms": "stages.*_norm.*",
    "projection, bias": "stages.*.projection.bias",
    "projection, weight": "stages.*.projection.weight",
    "channel generator": "stages.*.channel_generator.linear.weight",
    "spatial generator": "stages.*.spatial_generator.linear.weight",
    "projection, shared": "tied/*projection*/base",
    "projection, B A": "tied/*projection*/[AB]*",
    "channel generator, shared": "tied/*channel_generator*/base",
    "channel generator, B E A": "tied/*channel_generator*/[ABE]*",
    "spatial generator, shared": "tied/*spatial_generator*/base",
    "spatial generator, B E A": "tied/*spatial_generator*/[ABE]*",
}
Counts = dict[str, int]


def linear(inputs: int, outputs: int) -> int:
    """A Linear with its bias."""
    return inputs * outputs + outputs


def other_parts(s: Setting) -> Counts:
    """What LORS leaves as it is, all stages together."""
    w = s.width
    branch = linear(w, w) + 2 * w
    each = {
        "attention": 4 * linear(w, w) + s.heads,
        "sampling offsets": linear(w, 3 * s.groups * s.in_points),
        "feed-forward": linear(w, s.ffn) + linear(s.ffn, w),
        "class branch": branch + linear(w, s.classes),
        "box branch": branch + linear(w, 4),
        "norms": 3 * 2 * w,
        "projection, bias": w,
    }
    return {name: s.stages * n for name, n in each.items()}


def generated(s: Setting) -> dict[str, tuple[int, int]]:
    """The matrices, (out, in), that a query makes for each group."""
    return {
        "channel generator": (s.channels, s.channels),
        "spatial generator": (s.out_points, s.in_points),
    }


def stock_counts(s: Setting) -> Counts:
    """Every part of a decoder without LORS, by formula."""
    parts = other_parts(s)
    parts["projection, weight"] = s.stages * s.mixed * s.width
    for name, (out, inputs) in generated(s).items():
        parts[name] = s.stages * s.groups * linear(s.width, out * inputs)
    return parts


def lors_counts(s: Setting) -> Counts:
    """Every part of a decoder with LORS, by formula."""
    parts = other_parts(s)
    terms = sum(K)
    parts["projection, shared"] = s.mixed * s.width
    parts["projection, B A"] = terms * STATIC * (s.mixed + s.width)
    for name, (out, inputs) in generated(s).items():
        parts[f"{name}, shared"] = s.groups * linear(s.width, out * inputs)
        core = linear(s.width, ADAPTIVE**2)  # E, one for all groups
        parts[f"{name}, B E A"] = terms * (core + s.groups * ADAPTIVE * (out + inputs))
    return parts


def counted(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> Counts:
    """The numbers in tensors, by part; a name that belongs to none is an error."""
    found: Counter[str] = Counter()
    for name, shape in shapes:
        found[next(p for p, glob in PARTS.items() if fnmatchcase(name, glob))] += math.prod(shape)
    return dict(found)


def built_stock(s: Setting) -> Counts:
    """Every part of a decoder that was built."""
    return counted((n, tuple(p.shape)) for n, p in skeleton(s).named_parameters())


def built_lors(s: Setting) -> Counts:
    """Every part of what tiedconv would store of it."""
    plan = tiedconv.plan(skeleton(s), recipe=tiedconv.Recipe.from_toml(RECIPE))
    return counted({**plan.kept, **plan.factors}.items())


def skeleton(s: Setting) -> Decoder:
    """A decoder without weights: shapes are enough to count."""
    with torch.device("meta"):
        return Decoder(s)


def main() -> None:
    stock, lors = stock_counts(STOCK), lors_counts(LORS)
    assert stock == built_stock(STOCK), "the stock decoder differs from its formulas"
    assert lors == built_lors(LORS), "the plan differs from its formulas"
    print("| part, of all 6 stages | stock | with LORS |\n|---|---:|---:|")
    for part in PARTS:
        row = (f"{c[part]:,}" if part in c else "-" for c in (stock, lors))
        print(f"| {part} | {' | '.join(row)} |")
    totals = {"stock": sum(stock.values()), "lors": sum(lors.values())}
    print(f"| **decoder** | **{totals['stock']:,}** | **{totals['lors']:,}** |")
    for name, total in totals.items():
        assert f"{total / 1e6:.2f}" == PUBLISHED[name], f"{name}: {total:,}"
    print("| published | 110.27 M | 35.35 M |")


if __name__ == "__main__":
    main()
