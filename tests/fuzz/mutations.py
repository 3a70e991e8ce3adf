"""Files as someone careless or hostile would make them, from sound ones.

A mutation is a function of a random generator and a sound file that returns the bytes of another.
`DAMAGE` changes bytes and no hash, as a bad disk or a cut transfer does. `FORGERIES` change what
the file says and hash it again, as a forger does: only the checks behind the hashes can stop them.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tiedconv.io.safetensors_file import DTYPES

Random = random.Random


@dataclass
class Entry:
    """A tensor of a file."""

    name: str
    dtype: str
    shape: list[int]
    data: bytes


@dataclass
class Parts:
    """A file taken apart; `pack` puts it together, with hashes that fit unless given others."""

    entries: list[Entry]
    record: Any
    source: Any
    extra: dict[str, str] = field(default_factory=dict)

    def copy(self) -> Parts:
        """One of one's own."""
        return copy.deepcopy(self)

    def entry(self, name: str) -> Entry:
        """The tensor of a name."""
        return next(e for e in self.entries if e.name == name)


def unpack(data: bytes) -> Parts:
    """Take a sound file apart."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    entries = [
        Entry(name, e["dtype"], e["shape"], data[8 + length :][slice(*e["data_offsets"])])
        for name, e in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    ]
    return Parts(entries, json.loads(metadata["tiedconv"]), json.loads(metadata["source"]))


def hash_of(entry: Entry) -> str:
    """As `checkpoint.save` makes it."""
    head = f"{DTYPES.get(entry.dtype, entry.dtype)} {tuple(entry.shape)} "
    return hashlib.sha256(head.encode() + entry.data).hexdigest()


def pack(
    parts: Parts,
    *,
    rehash: bool = True,
    text: Callable[[str], str] = str,
    header: Callable[[dict[str, Any]], Any] = lambda h: h,
    head: Callable[[str], str] = str,
) -> bytes:
    """The bytes of a file.

    Args:
        parts: of it.
        rehash: give each tensor the hash that fits.
        text: changes the record's JSON text, before the digest is made.
        header: changes the header before it becomes JSON, head after that.
    """
    record = parts.record
    if rehash and isinstance(record, dict) and "sha256" in record:
        record = {**record, "sha256": {e.name: hash_of(e) for e in parts.entries}}
    body, source = text(json.dumps(record)), json.dumps(parts.source)
    digest = hashlib.sha256(f"{body}\n{source}".encode(errors="replace")).hexdigest()
    metadata = {"tiedconv": body, "source": source, "digest": digest, **parts.extra}
    made: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for e in parts.entries:
        made[e.name] = {
            "dtype": e.dtype, "shape": e.shape, "data_offsets": [at, at + len(e.data)]
        }  # fmt: skip
        at += len(e.data)
    encoded = head(json.dumps(header(made))).encode(errors="surrogatepass")
    return struct.pack("<Q", len(encoded)) + encoded + b"".join(e.data for e in parts.entries)


# Damage: bytes change, hashes don't.


def flip_a_bit(rng: Random, good: bytes) -> bytes:
    """Anywhere."""
    return _flipped(good, rng.randrange(len(good)), rng)


def flip_a_bit_of_the_header(rng: Random, good: bytes) -> bytes:
    """Where most of what decides lies."""
    return _flipped(good, rng.randrange(8 + int.from_bytes(good[:8], "little")), rng)


def _flipped(good: bytes, at: int, rng: Random) -> bytes:
    return good[:at] + bytes([good[at] ^ 1 << rng.randrange(8)]) + good[at + 1 :]


def overwrite_a_run(rng: Random, good: bytes) -> bytes:
    """A sector that came back wrong."""
    start = rng.randrange(len(good))
    count = min(rng.choice([1, 16, 512, 4096]), len(good) - start)
    return good[:start] + rng.choice([bytes(count), rng.randbytes(count)]) + good[start + count :]


def cut_short(rng: Random, good: bytes) -> bytes:
    """A copy that stopped."""
    return good[: rng.choice([rng.randrange(len(good)), rng.randrange(64), len(good) - 1])]


def insert_or_remove_bytes(rng: Random, good: bytes) -> bytes:
    """All that follows is shifted."""
    at, count = rng.randrange(len(good)), rng.choice([1, 8, 100])
    if rng.random() < 0.5:
        return good[:at] + good[at + count :]
    return good[:at] + rng.randbytes(count) + good[at:]


def join_two_halves(rng: Random, good: bytes) -> bytes:
    """The start of the file, then a piece of it again."""
    return good[: rng.randrange(len(good))] + good[rng.randrange(len(good)) :]


def swap_tensors(rng: Random, good: bytes) -> bytes:
    """The bytes of two tensors of one size, or their entries in the header."""
    parts = unpack(good)
    a = rng.choice(parts.entries)
    same = [e for e in parts.entries if len(e.data) == len(a.data) and e.data != a.data]
    if not same:
        return flip_a_bit(rng, good)
    b = rng.choice(same)
    a.data, b.data = b.data, a.data
    return pack(parts, rehash=False)


def change_a_dtype(rng: Random, good: bytes) -> bytes:
    """The same bytes, read otherwise."""
    parts = unpack(good)
    entry = rng.choice(parts.entries)
    entry.dtype = {"F32": "I32", "I64": "F64"}[entry.dtype]
    return pack(parts, rehash=False)


DAMAGE: dict[str, Callable[[Random, bytes], bytes]] = {
    "a bit flipped": flip_a_bit,
    "a bit of the header flipped": flip_a_bit_of_the_header,
    "a run of bytes overwritten": overwrite_a_run,
    "cut short": cut_short,
    "bytes inserted or removed": insert_or_remove_bytes,
    "two pieces joined": join_two_halves,
    "two tensors swapped": swap_tensors,
    "a tensor's type changed": change_a_dtype,
}


# Forgeries: the hashes fit.

_HUGE = [2**20, 2**31, 2**40, 2**63 - 1, 2**63, 2**64, 10**30]


def _garbage(rng: Random) -> Any:
    return rng.choice(
        [
            None, True, False, 0, 1, -1, 2, 3, 0.5, 1e308, -0.0, "", "x", "tied/x/W", [], {}, [[]],
            [0], [1, 1], {"": None}, "\x1b[31mred\x1b[0m\r", "[red]x[/red]", "a" * 2000, "\u202e",
            rng.choice(_HUGE), [rng.choice(_HUGE), rng.choice(_HUGE)], rng.randrange(100),
        ]
    )  # fmt: skip


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key in it, at any depth."""
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in list(items):
        yield data, key
        if isinstance(value, dict | list):
            yield from _places(value)


def _vary(rng: Random, root: Any) -> None:
    """Change one thing of nested data."""
    container, key = rng.choice(list(_places(root)))
    value = container[key]
    how = rng.randrange(6)
    if how == 0 and isinstance(container, dict):
        container[rng.choice(["x", "", "tied/x/W", key + "."])] = container.pop(key)
    elif how == 0 or (how == 1 and isinstance(container, dict)):
        del container[key]
    elif how == 1:
        container.insert(key, copy.deepcopy(rng.choice(container)))
    elif how == 2 and type(value) is int:
        container[key] = rng.choice([value + 1, value - 1, value * 2, -value, float(value)])
    elif how == 3:
        other, place = rng.choice(list(_places(root)))
        container[key] = copy.deepcopy(other[place])
    else:
        container[key] = _garbage(rng)


def vary_the_record(rng: Random, parts: Parts) -> bytes:
    """One thing, or three, anywhere in the record."""
    for _ in range(rng.choice([1, 1, 3])):
        _vary(rng, parts.record)
    return pack(parts, rehash=rng.random() < 0.9)


def vary_an_expression(rng: Random, parts: Parts) -> bytes:
    """One thing in a weight's expression."""
    weights = parts.record["plan"]["weights"]
    _vary(rng, weights[rng.choice(list(weights))])
    return pack(parts)


def vary_the_groups(rng: Random, parts: Parts) -> bytes:
    """One thing in the groups, which a report is made of."""
    _vary(rng, parts.record["plan"]["groups"])
    return pack(parts)


def vary_the_history(rng: Random, parts: Parts) -> bytes:
    """One thing in the history, or a history of garbage."""
    history = parts.record["history"]
    if rng.random() < 0.5:
        _vary(rng, history)
    else:
        history.insert(rng.randrange(len(history) + 1), _garbage(rng))
    return pack(parts)


def vary_the_source(rng: Random, parts: Parts) -> bytes:
    """One thing in the source."""
    if isinstance(parts.source, dict) and rng.random() < 0.9:
        _vary(rng, parts.source)
    else:
        parts.source = _garbage(rng)
    return pack(parts)


def ask_for_a_giant(rng: Random, parts: Parts) -> bytes:
    """Arguments of the model that would take all memory, or reach outside of the file."""
    if not isinstance(parts.source, dict):
        return vary_the_source(rng, parts)
    key = rng.choice(
        ["depth", "embed_dim", "img_size", "num_classes", "mlp_ratio", "num_heads", "patch_size",
         "checkpoint_path", "pretrained", "cache_dir", "pretrained_cfg_overlay", "norm_layer"]
    )  # fmt: skip
    value = rng.choice(
        [10**4, 10**5, 10**6, 2**24, 1e9, -1, 0, "/etc/passwd", True, [10**5] * 4, {"file": "/x"}]
    )
    parts.source["kwargs"] = {**parts.source["kwargs"], key: value}
    if rng.random() < 0.2:
        side = rng.choice([2_000, 65_536])
        parts.source["preprocess"] = {
            "size": side, "resize": None, "mean": [0.0] * rng.choice([1, 3, 1000]),
            "std": [1.0] * 3, "interpolation": "bilinear",
        }  # fmt: skip
    if rng.random() < 0.3:
        parts.source["spec"] = rng.choice(
            ["resnet50", "timm:swin_tiny_patch4_window7_224", "os:system", "timm:local-dir:/tmp",
             "timm:hf-hub:a/b", "hf:/tmp", "posix:abort", "tiedconv.commands.demo:digits_vit",
             "../x"]
        )  # fmt: skip
    return pack(parts)


def refer_wrongly(rng: Random, parts: Parts) -> bytes:
    """References to what is not there, is something else, or is the weight itself."""
    weights = parts.record["plan"]["weights"]
    found = [r for e in weights.values() for r in refs(e)]
    target = rng.choice(found)
    kept = rng.choice(list(parts.record["plan"]["kept"].items()))
    name, shape = rng.choice(
        [kept, (rng.choice(list(weights)), target[2]), ("tied/none/W", target[2]),
         (target[1], target[2][::-1]), (target[1] + "\n", target[2]), ("", target[2]),
         tuple(rng.choice(found)[1:])]
    )  # fmt: skip
    target[1], target[2] = name, shape
    return pack(parts)


def refs(expr: Any) -> Iterator[list[Any]]:
    """The references of an expression, to be changed in place."""
    if isinstance(expr, list):
        if expr[:1] == ["ref"]:
            yield expr
        else:
            for item in expr:
                yield from refs(item)


def alias(rng: Random, parts: Parts) -> bytes:
    """Second names of second names, of themselves, of nothing; in circles."""
    plan = parts.record["plan"]
    names = [*plan["kept"], *plan["weights"], *plan["aliases"], "a", "b", "tied/x/W"]
    for _ in range(rng.choice([1, 2, 500])):
        plan["aliases"][rng.choice(names)] = rng.choice(names)
    if rng.random() < 0.3:
        plan["aliases"].update(a="b", b="a")
    return pack(parts)


def rename(rng: Random, parts: Parts) -> bytes:
    """Everywhere the same wrong name for a tensor, so that only the name is wrong."""
    old = rng.choice(parts.entries).name
    new = rng.choice(
        ["", "x" * 600, "x" * 2**20, "\x1b]0;owned\x07", "a\nb", "__metadata__", "\u202eabc", "..",
         "tied/" + old, "/etc/passwd", parts.entries[0].name, "[red]x[/red]", "a.b.c.d"]
    )  # fmt: skip
    text = json.dumps(parts.record).replace(json.dumps(old), json.dumps(new))
    parts.record = json.loads(text)
    parts.entry(old).name = new
    return pack(parts)


def _store(parts: Parts, name: str, shape: list[int], dtype: str = "F32") -> list[Any]:
    parts.entries.append(
        Entry(name, dtype, shape, bytes(math.prod(shape) * DTYPES[dtype].itemsize))
    )
    return ["ref", name, shape]


def explode(rng: Random, parts: Parts) -> bytes:
    """Well-typed expressions of the right shape and small size with immense ones inside."""
    weights = parts.record["plan"]["weights"]
    name = rng.choice(list(weights))
    shape = _shape(weights[name])
    n = rng.choice([300, 1000, 5000])
    tall, wide = _store(parts, "tied/x/u", [n, 1]), _store(parts, "tied/x/v", [1, n])
    how = rng.randrange(5)
    if how == 0:
        inner: Any = [rng.choice(["matmul", "add", "mul"]), tall, wide]
    elif how == 1:
        inner = ["cat", [["cat", [tall] * rng.choice([4, 20]), 1]] * rng.choice([4, 20]), 0]
    elif how == 2:
        inner = ["matmul", tall, wide]
        for _ in range(rng.choice([2, 6])):
            inner = ["matmul", inner, inner]
    elif how == 3:
        inner = ["add", tall, wide]
        for _ in range(rng.choice([2, 20])):
            inner = ["permute", ["reshape", inner, [n * n]], [0]]
            inner = ["reshape", inner, [n, n]]
    else:
        inner = ["mul", ["reshape", tall, [n, 1, 1]], ["reshape", wide, [1, n, 1]]]
        inner = ["reshape", ["mul", inner, ["reshape", wide, [1, 1, n]]], [n * n, n]]
    take = math.prod(shape)
    whole = _count(inner)
    flat = ["slice", ["reshape", inner, [whole]], 0, 0, min(take, whole)]
    if whole < take:
        flat = ["cat", [flat] * -(-take // whole), 0]
        flat = ["slice", flat, 0, 0, take]
    weights[name] = ["reshape", flat, shape]
    _drop_unused(parts)
    return pack(parts)


def _shape(expr: list[Any]) -> list[int]:
    from tiedconv.core.expr_json import from_json

    return list(from_json(expr).shape)


def _count(expr: list[Any]) -> int:
    """Elements, without the limits of the algebra."""
    match expr:
        case ["ref", _, shape] | ["reshape", _, shape]:
            return math.prod(shape)
        case ["permute", x, _]:
            return _count(x)
        case ["cat", xs, _]:
            return sum(map(_count, xs))
        case ["matmul", ["ref", _, [n, 1]], _] | ["add" | "mul", ["ref", _, [n, 1]], _]:
            return int(n * n)
        case ["matmul", a, _]:
            return _count(a)
    raise AssertionError(expr)


def _drop_unused(parts: Parts) -> None:
    plan = parts.record["plan"]
    used = {r[1] for e in plan["weights"].values() for r in refs(e)} | plan["kept"].keys()
    parts.entries = [e for e in parts.entries if e.name in used]
    for group in plan["groups"]:
        stem = "tied/" + group["name"].replace(".", "/") + "/"
        group["factors"] = {f: s for f, s in group["factors"].items() if stem + f in used}


def nest(rng: Random, parts: Parts) -> bytes:
    """Expressions, and lists and objects where any may stand, far too deep or too many."""
    weights = parts.record["plan"]["weights"]
    name = rng.choice(list(weights))
    how, depth = rng.randrange(4), rng.choice([25, 100, 400])
    if how == 0:
        expr = weights[name]
        for _ in range(depth):
            expr = ["reshape", expr, _shape(weights[name])]
        weights[name] = expr
    elif how == 1:
        weights[name] = ["cat", [weights[name]] * rng.choice([600, 5_000]), 0]
    elif how == 2:
        expr = weights[name]
        for _ in range(rng.choice([8, 12])):
            expr = ["add", expr, expr]
        weights[name] = expr
    else:
        many = rng.choice([3_000, 12_000])
        weights.update({f"more.{i}": weights[name] for i in range(many)})
    return pack(parts)


def claim_a_huge_shape(rng: Random, parts: Parts) -> bytes:
    """Shapes that no file could hold, in the plan, in the header or in both."""
    entry = rng.choice(parts.entries)
    shape = [rng.choice(_HUGE) for _ in range(rng.choice([1, 2, 8, 9]))]
    if rng.random() < 0.3:
        shape[rng.randrange(len(shape))] = 0
        entry.data = b""
    old = json.dumps(entry.shape)
    text = json.dumps(parts.record)
    if rng.random() < 0.7:
        for before in (f"{json.dumps(entry.name)}, {old}", f"{json.dumps(entry.name)}: {old}"):
            after = before.removesuffix(old) + json.dumps(shape)
            text = text.replace(before, after)
    parts.record = json.loads(text)
    if rng.random() < 0.7:
        entry.shape = shape
    return pack(parts)


def empty_a_tensor(rng: Random, parts: Parts) -> bytes:
    """Tensors of no elements, or more of them than the plan knows."""
    if rng.random() < 0.5:
        _store(parts, rng.choice(["extra", "tied/extra/W", "x.y"]), [0, 3])
        return pack(parts)
    entry = rng.choice(parts.entries)
    zero = [0, *entry.shape[1:]]
    plan = parts.record["plan"]
    if entry.name in plan["kept"]:
        plan["kept"][entry.name] = zero
    entry.shape, entry.data = zero, b""
    return pack(parts)


def change_a_dtype_and_hash(rng: Random, parts: Parts) -> bytes:
    """The same bytes as another type, or another type throughout."""
    for entry in rng.sample(parts.entries, rng.choice([1, 1, 5])):
        to = rng.choice(["I32", "F64", "I64", "BOOL", "F8_E4M3", "U8", "F16", "C64", "F4", "", 3])
        entry.dtype = to  # type: ignore[assignment]
        if to in DTYPES and rng.random() < 0.8:
            count = math.prod(entry.shape) * DTYPES[to].itemsize  # type: ignore[index]
            entry.data = rng.randbytes(count)
    return pack(parts)


def forge_the_hashes(rng: Random, parts: Parts) -> bytes:
    """Hashes that are missing, of something else, or of another type."""
    parts.record["sha256"] = {e.name: hash_of(e) for e in parts.entries}
    _vary(rng, {"sha256": parts.record["sha256"]})
    return pack(parts, rehash=False)


def trick_json(rng: Random, parts: Parts) -> bytes:
    """What JSON's grammar allows, or Python's reader beyond it, and a plan has no use for."""
    trick = rng.choice(
        ["NaN", "Infinity", "-Infinity", "1e999", "1" * 400, "1" * 5000, '"\\ud800"', '"\\udfff"',
         "[" * 500 + "]" * 500, "[" * 100_000 + "]" * 100_000, "{" * 3000,
         '{"a":' * 900 + "1" + "}" * 900,
         "[" + "[]," * 300_000 + "[]]", "[" + "0," * 600_000 + "0]", "\ufeff1", "'a'", "/*c*/1"]
    )  # fmt: skip

    def text(body: str) -> str:
        how = rng.randrange(3)
        if how == 0:  # any key a second time
            key = rng.choice(["format", "plan", "history", "sha256"])
            return body[:-1] + f', "{key}": {trick}' + "}"
        if how == 1:
            return body.replace('"error": null', f'"error": {trick}', 1).replace(
                '"history": [', f'"history": [{{"step": "x", "top2": {trick}}}, ', 1
            )
        at = rng.choice([i for i, c in enumerate(body) if c in "[,:"])
        return body[: at + 1] + trick + ("," if body[at] == "[" else "") + body[at + 1 :]

    return pack(parts, text=text)


def repeat_a_key(rng: Random, parts: Parts) -> bytes:
    """A tensor, or the record, twice in the header: readers differ in which one they take."""
    entry = rng.choice(parts.entries)
    other = copy.deepcopy(parts)
    other.entry(entry.name).data = rng.randbytes(len(entry.data))

    def head(text: str) -> str:
        start = text.index(json.dumps(entry.name) + ": {")
        again = text[start : text.index("}", start) + 1]
        if rng.random() < 0.5:
            return text[:-1] + ", " + again.replace("F32", "I32") + "}"
        return text.replace('"__metadata__": {', '"__metadata__": {"tiedconv": "{}", ', 1)

    return pack(rng.choice([parts, other]), head=head)


def forge_the_header(rng: Random, parts: Parts) -> bytes:
    """Offsets that overlap, leave gaps, point outside or run backwards; entries of wrong types."""

    def header(made: dict[str, Any]) -> dict[str, Any]:
        name = rng.choice([e.name for e in parts.entries])
        how = rng.randrange(6)
        entry = made[name]
        if how < 3:
            start, stop = entry["data_offsets"]
            by = rng.choice([4, -4, 2**40, -(2**40), 2**64, stop - start])
            entry["data_offsets"] = rng.choice(
                [[start + by, stop + by], [start + by, stop], [start, stop + by], [stop, start]]
            )
        elif how == 3:
            other = rng.choice([e.name for e in parts.entries])
            entry["data_offsets"] = made[other]["data_offsets"]
        elif how == 4:
            made[name] = _garbage(rng)
        else:
            _vary(rng, {k: v for k, v in made.items() if k != "__metadata__"})
        return made

    return pack(parts, header=header)


def forge_the_metadata(rng: Random, parts: Parts) -> bytes:
    """Metadata that are no texts, none at all, or a great many."""
    many = {f"k{i}": "v" for i in range(rng.choice([10, 100_000]))}
    trick: Any = rng.choice(
        [None, [], "x", {}, {"tiedconv": 3}, {"tiedconv": "null"}, {"tiedconv": "[]"}, many]
    )

    def header(made: dict[str, Any]) -> Any:
        if rng.random() < 0.1:
            return rng.choice([[], None, "x", 3, [made]])
        old = made["__metadata__"]
        made["__metadata__"] = {**old, **trick} if isinstance(trick, dict) else trick
        return made

    return pack(parts, header=header)


def write_a_huge_header(rng: Random, parts: Parts) -> bytes:
    """Metadata of many megabytes, or a length that only says so."""
    if rng.random() < 0.8:
        good = pack(parts)
        length = rng.choice([2**24, 2**26, 2**32, 2**62, 2**63, 2**64 - 1, len(good), 0, 1])
        return struct.pack("<Q", length) + good[8:]
    size = rng.choice([2**20, 9 * 2**20, 40 * 2**20])
    parts.extra["x"] = rng.choice(["a", "\u20ac", "\U0001f600"]) * (size // 4)
    return pack(parts)


FORGERIES: dict[str, Callable[[Random, Parts], bytes]] = {
    "forged: anything in the record": vary_the_record,
    "forged: an expression": vary_an_expression,
    "forged: an expression that explodes": explode,
    "forged: nested or numerous": nest,
    "forged: references": refer_wrongly,
    "forged: huge shapes": claim_a_huge_shape,
    "forged: empty tensors": empty_a_tensor,
    "forged: types": change_a_dtype_and_hash,
    "forged: second names": alias,
    "forged: names": rename,
    "forged: groups": vary_the_groups,
    "forged: history": vary_the_history,
    "forged: source": vary_the_source,
    "forged: arguments of the model": ask_for_a_giant,
    "forged: hashes": forge_the_hashes,
    "forged: JSON": trick_json,
    "forged: keys twice": repeat_a_key,
    "forged: header": forge_the_header,
    "forged: metadata": forge_the_metadata,
    "forged: a huge header": write_a_huge_header,
}
KINDS = (*DAMAGE, *FORGERIES)


def mutated(kind: str, seed: int, good: bytes) -> bytes:
    """The mutation of a sound file that a kind and a seed stand for."""
    rng = Random(f"{kind} {seed}")
    if kind in DAMAGE:
        return DAMAGE[kind](rng, good)
    return FORGERIES[kind](rng, unpack(good))
