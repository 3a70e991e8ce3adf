"""What of published architectures can be converted, and whether it is exact.

    pip install timm transformers onnx onnxruntime onnxscript
    python benchmarks/zoo.py [NAME ...] [--checks] [--exports 40]

For each architecture in its published size, without weights: the share of the weights of linear
layers and convolutions (depthwise ones and embeddings aside) that lies in blocks, that of pairs,
and the size at which `tied` and `lors` store it by their defaults.

With `--checks`, small forms (transformers) or the published one up to 60 million parameters, all
parameters drawn at random, are converted at full rank and nothing may change: the matrices of up
to 2^18 values take part, so that every kind of block does and an SVD stays cheap. Then the file is
written and read back (to the bit), untied, run backwards, and verified; some are exported to ONNX.

torchvision's detectors need its own operators to run; where these are absent they are not run.

Rows go to `benchmarks/results/zoo.json`, one by one; those that are there are not made again.
`scripts/zoo_docs.py` makes docs/zoo.md of them.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo_models import NAMES, built, has_small_form, published

import tiedconv
from tiedconv.core.plan import Block, Slot
from tiedconv.errors import NothingToConvert, TiedconvError
from tiedconv.families.inspect import ModelInfo, inspect_model
from tiedconv.planning.drafting import parameters_of
from tiedconv.planning.planner import outline
from tiedconv.planning.recipe import Recipe

RESULT = Path(__file__).parent / "results" / "zoo.json"
LARGEST = 60_000_000
SMALL = 2**18


def convertible(model: nn.Module, info: ModelInfo) -> dict[str, int]:
    """Weights of linear layers and convolutions that are not depthwise, each once."""
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        for key, weight in module._parameters.items():
            full = f"{name}.{key}".strip(".")
            if weight is None or weight.ndim < 2 or full not in info.parameters:
                continue
            is_conv = isinstance(module, nn.modules.conv._ConvNd) and key == "weight"
            depthwise = is_conv and weight.shape[1] == 1
            linear = isinstance(module, nn.Linear) and key == "weight"
            others = isinstance(module, nn.MultiheadAttention) or type(module).__name__ == "Conv1D"
            if (is_conv and not depthwise) or linear or others:
                found[full] = weight.numel()
    return found


def coverage_row(name: str) -> dict[str, Any]:
    """Shares and sizes, from names and shapes alone."""
    model = published(name)
    info = inspect_model(model)
    wanted, inside, paired = convertible(model, info), dict[str, int](), dict[str, int]()
    for _, block in info.blocks:
        for slot in block.slots.values():
            inside[slot.tensor] = inside.get(slot.tensor, 0) + slot.numel
            if block.kind != "linear" and (block.kind != "ffn" or _has_partner(slot, block)):
                paired[slot.tensor] = paired.get(slot.tensor, 0) + slot.numel
    total = max(1, sum(wanted.values()))

    def share(of: Mapping[str, int]) -> float:
        return round(sum(min(n, of.get(w, 0)) for w, n in wanted.items()) / total, 4)

    row = {
        "name": name, "parameters": parameters_of(info), "coverage": share(inside),
        "in_pairs": share(paired),
    }  # fmt: skip
    for scheme in ("tied", "lors"):
        try:
            stored = outline(info, Recipe.of(scheme)).plan.stored
            row[scheme] = round(stored / parameters_of(info), 4)
        except NothingToConvert:
            row[scheme] = None
    return row


def _has_partner(slot: Slot, block: Block) -> bool:
    """Whether a feed-forward keeps its width: then another matrix has the transposed shape."""
    return any((o.rows, o.columns) == (slot.columns, slot.rows) for o in block.slots.values())


def drawn(model: nn.Module) -> nn.Module:
    """With every parameter and statistic drawn, so that nothing is zero, one or alike by chance."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point() or tensor.ndim == 0:
                continue
            if tensor.ndim > 1:
                scale = max(tensor[0].numel(), 1) ** -0.5
                tensor.copy_(scale * torch.randn(tensor.shape, generator=generator))
            elif name.endswith(("weight", "running_var")):
                tensor.copy_(0.6 + 0.8 * torch.rand(tensor.shape, generator=generator))
            elif name.endswith(("bias", "running_mean")):
                tensor.copy_(0.8 * torch.rand(tensor.shape, generator=generator) - 0.4)
    return model.eval()


def inputs_of(name: str, model: nn.Module) -> dict[str, Any] | tuple[Any, ...]:
    """An input of a model, by keyword or by position."""
    library, _, which = name.partition(":")
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if library == "timm":
        return (noise(2, *model.pretrained_cfg["input_size"]),)  # type: ignore[index, misc]
    if library == "torchvision":
        if which.startswith(("r3d", "mc3", "r2plus1d", "s3d", "swin3d", "mvit")):
            return (noise(1, 3, 16, 224, 224),)
        if which.startswith("raft"):
            return (noise(1, 3, 128, 128), noise(1, 3, 128, 128))
        if "rcnn" in which or which.startswith(("retina", "fcos", "ssd")):
            return ([noise(3, 128, 160)],)
        fixed = {"inception_v3": 299, "vit_b_16": 224, "maxvit_t": 224}
        side = fixed.get(which, 128)
        return (noise(2, 3, side, side),)
    ids = torch.randint(3, 60, (2, 12), generator=generator)
    size = getattr(model.config, "image_size", 64)
    side = size[0] if isinstance(size, list | tuple) else size
    if which in ("VideoMAE", "TimeSformer"):
        return {"pixel_values": noise(1, model.config.num_frames, 3, side, side)}
    if hasattr(model.config, "text_config"):
        return {"input_ids": ids, "pixel_values": noise(2, 3, 64, 64)}
    if which == "BART":
        return {"input_ids": ids, "decoder_input_ids": ids}
    if "pixel_values" in str(model.main_input_name):
        return {"pixel_values": noise(2, 3, side if isinstance(side, int) else 64, side or 64)}
    return {"input_ids": ids}


@torch.no_grad()
def outputs(model: nn.Module, given: dict[str, Any] | tuple[Any, ...]) -> list[Tensor]:
    """All floating tensors that a model returns; the random state is the same each time."""
    torch.manual_seed(0)
    found = model(**given) if isinstance(given, dict) else model(*given)
    if hasattr(found, "to_tuple"):
        found = found.to_tuple()
    leaves = pytree.tree_leaves(found)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point() and t.numel()]


def apart(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, relative to the largest entry of its output."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return math.inf
    return max(
        float((a.double() - b.double()).abs().max() / b.abs().max().clamp_min(1e-12))
        for a, b in zip(found, expected, strict=True)
    )


def check_row(name: str, folder: Path, export: bool) -> dict[str, Any]:
    """Whether full rank, file, untying and gradients are right."""
    model = drawn(built(name))
    info = inspect_model(model)
    given = inputs_of(name, model)
    expected = outputs(model, given)
    row: dict[str, Any] = {"checked_parameters": parameters_of(info)}
    try:
        row["float32_error"] = apart(expected, outputs(model.double(), _double(given)))
    except RuntimeError:  # it computes a part in float32 by name
        row["float32_error"] = None
    model.float()
    spec, weights = written(name, model, folder)
    names = [n for n, s in info.parameters.items() if len(s) > 1 and math.prod(s) <= SMALL]
    last: nn.Module | None = None
    for scheme in ("tied", "lors"):
        try:
            tied = tiedconv.convert(spec, scheme, weights=weights, rank=10**6, include=names)
        except NothingToConvert:
            continue
        tied.eval()
        error = apart(outputs(tied, given), expected)
        if error > 1e-5 and (row["float32_error"] or 0.0) > 1e-6:
            # Drawn weights make some models chaotic: a change of 1e-6 flips an image there.
            error = error_in_double(model, given, scheme, names)
            row["in_double"] = True
        row[f"error_{scheme}"] = error
        last = tied
    if last is None:
        return row
    tied = last
    before, path = outputs(tied, given), folder / "m.safetensors"
    tiedconv.save(tied, path)
    row["reloads"] = apart(outputs(tiedconv.load(path).eval(), given), before) == 0
    for parameter in tied.parameters():
        parameter.requires_grad_(True)
    with torch.enable_grad():
        tied.zero_grad()
        found = tied(**given) if isinstance(given, dict) else tied(*given)
        leaves = pytree.tree_leaves(found.to_tuple() if hasattr(found, "to_tuple") else found)
        sum(
            t.float().square().mean() for t in leaves if isinstance(t, Tensor) and t.requires_grad
        ).backward()  # type: ignore[union-attr]
    grads = [p.grad for n, p in tied.named_parameters() if n.startswith("tied/")]
    row["gradients"] = all(g is not None and bool(g.isfinite().all()) for g in grads)
    row["verify"] = verified(path)
    row["untied"] = apart(outputs(tiedconv.untie(tied), given), before)
    if export:
        row["export"] = exported(path, folder / "m.onnx")
    return row


def error_in_double(model: nn.Module, given: Any, scheme: str, names: list[str]) -> float:
    """The same at float64, where rounding is no matter."""
    wide = _double(given)
    expected = outputs(model.double(), wide)
    tied = tiedconv.convert(model, scheme, rank=10**6, include=names).eval()
    error = apart(outputs(tied, wide), expected)
    model.float()
    return error


def _double(given: Any) -> Any:
    return pytree.tree_map(
        lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, given
    )


def written(name: str, model: nn.Module, folder: Path) -> tuple[str, Any]:
    """The spec and the weights that `convert` opens the model by."""
    library, _, which = name.partition(":")
    if library == "transformers":
        model.save_pretrained(folder / "hf")  # type: ignore[operator]
        return f"hf:{folder / 'hf'}", "default"
    path = folder / "weights.safetensors"
    state = {n: t.contiguous().clone() for n, t in model.state_dict().items()}
    save_file(state, path)
    return (which if library == "torchvision" else f"timm:{which}"), path


def verified(path: Path) -> str:
    """`ok`, or the code of the error."""
    try:
        tiedconv.verify(path)
    except TiedconvError as error:
        return error.code
    return "ok"


def exported(path: Path, target: Path) -> str:
    """`ok`, or the code of the error."""
    try:
        tiedconv.export(path, target)
    except TiedconvError as error:
        return error.code
    return "ok"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of names; all if none is given")
    parser.add_argument("--checks", action="store_true")
    parser.add_argument("--exports", type=int, default=0, help="how many to export")
    parser.add_argument("--again", action="store_true", help="make rows again that are there")
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows: dict[str, dict[str, Any]] = {}
    if args.result.exists():
        rows = {row["name"]: row for row in json.loads(args.result.read_text())}
    chosen = [n for n in NAMES if not args.names or any(part in n for part in args.names)]
    for name in chosen:
        if args.again or name not in rows:
            rows[name] = {**rows.get(name, {}), **coverage_row(name)}
            save(args.result, rows)
    exports = sum("export" in row for row in rows.values())
    for name in chosen if args.checks else ():
        row = rows[name]
        if not args.again and ("seconds" in row or "error" in row):
            continue
        if not has_small_form(name) or (
            row["parameters"] > LARGEST and not name.startswith("transformers")
        ):
            continue
        start = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            try:
                row |= check_row(name, Path(folder), exports < args.exports)
            except Exception as error:  # whatever it is, it belongs into the row
                absent = "custom C++ ops" in str(error)
                key = "not_run" if absent else "error"
                row[key] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                traceback.print_exc()
        row["seconds"] = round(time.process_time() - start, 1)
        exports += "export" in row
        print(row, flush=True)
        save(args.result, rows)


def save(path: Path, rows: Mapping[str, dict[str, Any]]) -> None:
    """In the order of the list."""
    path.parent.mkdir(exist_ok=True)
    ordered = [rows[name] for name in NAMES if name in rows]
    path.write_text("[\n" + ",\n".join(map(json.dumps, ordered)) + "\n]\n")


if __name__ == "__main__":
    main()
