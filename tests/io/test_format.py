"""The file as `docs/format.md` describes it, read by the reader that stands there."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from error_codes import raises
from micro import all_micros
from torch import Tensor, nn

import tiedconv
from tiedconv.core import expr, expr_json
from tiedconv.core.plan import Plan
from tiedconv.errors import PlanError
from tiedconv.io import validation as limits
from tiedconv.io.checkpoint_reader import FORMAT
from tiedconv.io.json_text import MAX_NESTING
from tiedconv.io.safetensors_file import COMPACT
from tiedconv.runtime.tie import dense_state_dict, set_state, state_of

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text("utf-8")
LONGEST = 100

# The name is taken by nothing that could be imported; the reader's own folder is not on the path.
ALONE = """
import sys
sys.modules["tiedconv"] = None
import runpy
code, *pairs = sys.argv[1:]
for pair in pairs:
    sys.argv = [code, *pair.split(">")]
    runpy.run_path(code, run_name="__main__")
assert not [name for name in sys.modules if name.startswith("tiedconv.")]
"""

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tied": ("timm-vit", "tied", {"rank": 2}),
    "tied, core": ("torchvision-resnet", "tied", {"base_rank": 0.4, "rank": 2}),
    "lors": ("hf-imagegpt", "lors", {}),
    "lors, bases": ("timm-vit", "lors", {"bases": 2, "rank": 0.1}),
    "basis, tied": ("torchvision-vit", "basis", {"tie": True}),
    "basis, joined": ("timm-vit", "basis", {"groups": "all", "join": True}),
    "shared": ("aliased", "shared", {}),
    "lors-adaptive": (
        "generators",
        "lors-adaptive",
        {"shape": [6, 4], "rank": 2, "k": [0, 1, 2], "include": ["*spatial*"]},
    ),
    "narrow": ("torchvision-resnet", "narrow", {}),
    "halves": ("timm-vit", "lors", {}),
    "integers": ("timm-vit", "auto", {"bytes": "60%"}),
    "narrow integers": ("timm-vit", "narrow", {"params": "90%", "bytes": "40%"}),
    "integers of factors": ("timm-vit", "lors", {"params": "70%", "bytes": "60%", "bits": "3"}),
}


@functools.cache
def reader() -> str:
    """The program of the page."""
    found = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert len(found) == 1
    return str(found[0])


@functools.cache
def converted(case: str) -> nn.Module:
    name, scheme, options = CASES[case]
    model = tiedconv.convert(all_micros()[name].model(), scheme, **options)
    if case == "halves":  # stored narrow, and widened when they are read
        model = model.to(torch.bfloat16)
        step = {"step": "export", "dtype": "bfloat16", "computes_in": "float32"}
        set_state(model, history=(*state_of(model).history, step))
    return model


@pytest.fixture(scope="module")
def read_by_the_page(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """Each case's dense state dict, as the page's reader gives it in a process of its own."""
    folder = tmp_path_factory.mktemp("format")
    (folder / "reader.py").write_text(reader(), "utf-8")
    pairs = []
    for i, case in enumerate(CASES):
        tiedconv.save(converted(case), folder / f"{i}.safetensors")
        pairs.append(f"{folder / f'{i}.safetensors'}>{folder / f'{i}.pth'}")
    subprocess.run(
        [sys.executable, "-I", "-c", ALONE, str(folder / "reader.py"), *pairs],
        check=True,
        cwd=folder,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    return {case: torch.load(folder / f"{i}.pth") for i, case in enumerate(CASES)}


def test_the_reader_is_short_and_needs_torch_and_safetensors_alone() -> None:
    assert len(reader().rstrip().splitlines()) <= LONGEST
    imported = set(re.findall(r"^(?:import|from) (\w+)", reader(), re.MULTILINE))
    assert imported - {"torch", "safetensors"} <= sys.stdlib_module_names


def test_the_reader_gives_the_same_bits(
    read_by_the_page: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    for case, (name, *_) in CASES.items():
        tiedconv.save(converted(case), tmp_path / f"{case}.safetensors")
        loaded = tiedconv.load(tmp_path / f"{case}.safetensors", model=all_micros()[name].model())
        own, found = dense_state_dict(loaded), read_by_the_page[case]
        assert own.keys() == found.keys() == all_micros()[name].model().state_dict().keys()
        for tensor, value in own.items():
            assert found[tensor].dtype == value.dtype, (case, tensor)
            assert torch.equal(found[tensor], value), (case, tensor)
    # A plain model of the original class takes what the page reads.
    micro = all_micros()["aliased"]
    plain = micro.model()
    plain.load_state_dict(read_by_the_page["shared"])
    assert torch.allclose(micro.logits(plain), micro.logits(converted("shared")), atol=1e-5)


def test_the_reader_refuses_damage_and_explosions(tmp_path: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "page"}
    exec(compile(reader(), "format.md", "exec"), namespace)
    path = tmp_path / "m.safetensors"
    tiedconv.save(converted("tied"), path)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged"):
        namespace["dense_state_dict"](str(path))
    at = int.from_bytes(data[:8], "little") // 2
    data[at] = ord("x")
    path.write_bytes(data)
    with pytest.raises(Exception, match=r"damaged|header"):
        namespace["dense_state_dict"](str(path))
    tall, wide = ["ref", "u", [3000, 1]], ["ref", "v", [1, 3000]]
    stored = {"u": torch.zeros(3000, 1), "v": torch.zeros(1, 3000)}
    for bomb in (
        ["matmul", tall, wide], ["add", tall, wide], ["cat", [tall] * 500, 0],
        ["pad", tall, 1, 2**20],
    ):  # fmt: skip
        with pytest.raises(ValueError, match="too expensive"):
            namespace["evaluate"](bomb, stored, 2**20)


def test_the_page_says_which_limits_there_are() -> None:
    for number in (
        COMPACT.values, MAX_NESTING, COMPACT.tensors, expr.MAX_NAME, limits.MAX_WEIGHTS,
        expr_json.MAX_NODES, expr_json.MAX_NODES_IN_ALL, expr_json.MAX_DEPTH, limits.MAX_ENTRIES,
        limits.PER_WEIGHT, limits.PER_PLAN, limits.PRODUCTS_PER_WEIGHT, limits.PRODUCTS_PER_PLAN,
    ):  # fmt: skip
        assert re.search(rf"(?<![\d,]){number:,}(?!\d|,\d)", PAGE), number
    assert f"{COMPACT.header // 2**20} MiB" in PAGE
    assert f"The version described is {FORMAT}." in PAGE


def test_the_page_names_every_key_and_tag() -> None:
    plan = state_of(converted("tied")).plan
    record = plan.to_json()
    for key in [*record, *record["groups"][0]]:
        assert f"`{key}`" in PAGE, key
    tags = {node.tag for e in plan.weights.values() for node in e.walk()}
    for tag in tags:
        assert f'["{tag}",' in PAGE, tag


def test_a_model_beyond_the_limits_is_refused_before_it_is_written(tmp_path: Path) -> None:
    model = tiedconv.convert(all_micros()["timm-vit"].model(), "lors")
    plan = state_of(model).plan
    second_names = {f"a{i}": "head.bias" for i in range(limits.MAX_WEIGHTS + 1)}
    large = Plan(plan.weights, plan.groups, plan.kept, plan.buffers, second_names)
    set_state(model, plan=large)
    with raises(PlanError, "plan-too-large"):
        tiedconv.save(model, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())
