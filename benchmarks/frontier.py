"""Accuracy against bytes of real files: `auto --bytes` beside rounding and GPTQ of the dense model.

    python benchmarks/frontier.py --model vit-real --weights VIT.safetensors --data CIFAR10
    python benchmarks/frontier.py --model lite0 --weights LITE0.safetensors --data PHOTOS
    python benchmarks/frontier.py --model resnet-narrow --weights RESNET.safetensors --data CIFAR10
    python benchmarks/frontier.py --model dinov2 --weights FOLDER --data PHOTOS --vote CIFAR10

Every method gets the same calibration images, without labels. The baselines quantise each linear
layer and convolution to nearest, or by GPTQ with the second moments of its inputs; scales and all
other tensors are float16. At each size a baseline has its best width (2, 3, 4, 5, 6, 8 bits) and
group (a row, 128, 64, 32 columns), chosen by the divergence on the calibration images. Results go
to `benchmarks/results/frontier.json`, row by row; rows that are there are not made again.

DINOv2 gives features: the distance is half their relative squared error, agreement their cosine, of
the class token and of the patches. `--vote` names photos in class folders for a vote of the nearest
neighbours (of GPTQ in groups of 32 and of `auto`; k = 20, weights exp(cosine / 0.07), 200 training
and 100 test photos a class, 98 px).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from models import MEAN, SIZES, STD, normalised, read_pixels
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import tiedconv
from tiedconv.calibration import gather_statistics
from tiedconv.calibration.config import CalibConfig
from tiedconv.conversion.calibrate import Calibration
from tiedconv.core.packed_codes import packed
from tiedconv.numerics.linalg import cholesky
from tiedconv.numerics.rounding import gptq
from tiedconv.runtime.tie import state_of
from tiedconv.sources import Preprocess
from tiedconv.sources.torchvision_compat import import_torchvision

import_torchvision()
import timm  # noqa: E402

RESULT = Path(__file__).parent / "results" / "frontier.json"
LEAST = 2.0**-24  # of float16, above 0
WIDTHS, GROUPS = (2, 3, 4, 5, 6, 8), (0, 128, 64, 32)
ASKED = {
    "vit-real": (14, 10, 8, 6, 4, 3), "lite0": (25, 14, 10, 8, 6),
    "resnet-narrow": (25, 14, 10, 8, 6, 4), "dinov2": (25, 15, 12, 9, 6, 4),
}  # fmt: skip
HALF = (0.5, 0.5, 0.5)
PREPARED = {
    "vit-real": Preprocess(32, 32, MEAN, STD), "resnet-narrow": Preprocess(32, 32, MEAN, STD),
    "lite0": Preprocess(224, 256, HALF, HALF, "bicubic"),
    "dinov2": Preprocess(112, 128, interpolation="bicubic"),
}  # fmt: skip
Images = tuple[Tensor, Tensor, Tensor, Tensor]
"""Calibration images, judged images, and the labels of both."""


def vit_real(args: argparse.Namespace) -> tuple[nn.Module, Images]:
    """The ViT that someone else trained on CIFAR-10; 512 training images, all test images."""
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=128, depth=4, num_heads=4,
        mlp_ratio=2, num_classes=10,
    )  # fmt: skip
    pixels = read_pixels(args.data)
    train, test = pixels["train"], pixels["test"]
    chosen = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(0))[:512]
    calib, judged = normalised(train.images[chosen]), normalised(test.images)
    return model, (calib, judged, train.labels[chosen], test.labels)


def lite0(args: argparse.Namespace) -> tuple[nn.Module, Images]:
    """EfficientNet-Lite0 on ImageNet photos in class folders: every second one to calibrate by."""
    from tiedconv.data import ImageList, eval_transform, open_images

    photos = ImageList(open_images(args.data), eval_transform(PREPARED["lite0"]))
    samples = [photos[i] for i in range(len(photos))]
    images = torch.stack([s[0] for s in samples])
    labels = torch.tensor([s[1] for s in samples])
    return timm.create_model("tf_efficientnet_lite0"), (
        images[::2], images[1::2], labels[::2], labels[1::2],
    )  # fmt: skip


def resnet_narrow(args: argparse.Namespace) -> tuple[nn.Module, Images]:
    """A bottleneck ResNet of a quarter of the width, trained by `train_models.py` on CIFAR-10."""
    pixels = read_pixels(args.data)
    train, test = pixels["train"], pixels["test"]
    chosen = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(0))[:512]
    calib, judged = normalised(train.images[chosen]), normalised(test.images)
    return SIZES["resnet-narrow"](10), (calib, judged, train.labels[chosen], test.labels)


def dinov2(args: argparse.Namespace) -> tuple[nn.Module, Images]:
    """ViT-S/14 on photos at 112 px: 256 to calibrate by, 250 others judged."""
    from transformers import Dinov2Model

    images = photos(args.data, 112)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    none = torch.zeros(256, dtype=torch.int64)
    model: nn.Module = Dinov2Model.from_pretrained(args.weights, dtype=torch.float32)
    return model, (images[order[:256]], images[order[500:750]], none, none[:250])


def photos(folder: Path, size: int) -> Tensor:
    """All photos in class folders, prepared as DINOv2 wants them."""
    from tiedconv.data import ImageList, eval_transform, open_images

    wanted = Preprocess(size, round(size / 0.875), interpolation="bicubic")
    found = ImageList(open_images(folder), eval_transform(wanted))
    return torch.stack([found[i][0] for i in range(len(found))])


MODELS = {"vit-real": vit_real, "lite0": lite0, "resnet-narrow": resnet_narrow, "dinov2": dinov2}


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """Of all images: logits, or all tokens."""
    found = [model(images[i : i + 50]) for i in range(0, len(images), 50)]
    return torch.cat([f if isinstance(f, Tensor) else f["last_hidden_state"] for f in found])


def divergence(found: Tensor, expected: Tensor) -> float:
    """The mean KL divergence of logits, in nats; of tokens half the relative squared error."""
    if found.ndim == 3:
        energy = expected.square().sum(-1)
        return float(((found - expected).square().sum(-1) / energy).mean() / 2)
    ours, theirs = found.log_softmax(-1), expected.log_softmax(-1)
    return float(F.kl_div(ours, theirs, log_target=True, reduction="batchmean"))


def judged(model: nn.Module, images: Images, expected: Tensor) -> dict[str, float]:
    """Accuracy, share of equal answers, and divergence on the images that nothing was fitted to."""
    found = outputs(model, images[1])
    apart = {"divergence": round(divergence(found, expected), 6)}
    if found.ndim == 3:
        cosine = torch.cosine_similarity(found, expected, -1)
        token, patches = float(cosine[:, 0].mean()), float(cosine[:, 1:].mean())
        return {"agreement": round(token, 5), "patches": round(patches, 5), **apart}
    answers = found.argmax(1)
    return {
        "top1": round(float((answers == images[3]).float().mean()), 4),
        "agreement": round(float((answers == expected.argmax(1)).float().mean()), 4),
        **apart,
    }


Voters = tuple[Tensor, Tensor, Tensor, Tensor]


def voters(folder: Path) -> Voters:
    """CIFAR-10 photos at 98 px: 200 training and 100 test photos a class, with their labels."""
    pixels, found = read_pixels(folder), []
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    for part, count in (("train", 200), ("test", 100)):
        labels = pixels[part].labels
        chosen = torch.cat([(labels == c).nonzero()[:count, 0] for c in range(10)])
        small = pixels[part].images[chosen].float() / 255
        large = F.interpolate(small, (98, 98), mode="bicubic", antialias=True).clamp(0, 1)
        found += [(large - mean) / std, labels[chosen]]
    return found[0], found[1], found[2], found[3]


def vote(model: nn.Module, voting: Voters) -> float:
    """Top-1 of a vote of the 20 nearest class tokens, weighted by exp(cosine / 0.07)."""
    known, asked = (F.normalize(outputs(model, x)[:, 0], dim=-1) for x in (voting[0], voting[2]))
    near = (asked @ known.t()).topk(20)
    scores = torch.zeros(len(asked), 10)
    scores.scatter_add_(1, voting[1][near.indices], (near.values / 0.07).exp())
    return round(float((scores.argmax(1) == voting[3]).float().mean()), 4)


def matrices(model: nn.Module) -> dict[str, Tensor]:
    """The weights that baselines quantise: name to matrix."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return {f"{n}.weight": m.weight.detach().flatten(1) for n, m in layers}


def quantised(matrix: Tensor, moment: Tensor | None, bits: int, group: int) -> tuple[Any, ...]:
    """Integers, scales and the matrix they stand for; GPTQ if there is a moment of the inputs."""
    rows, columns = matrix.shape
    width = min(group or columns, columns)
    largest = 2 ** (bits - 1) - 1 if bits > 2 else 1
    cut = F.pad(matrix.double(), (0, -columns % width)).reshape(rows, -1, width)
    ends = cut.abs().amax(2, keepdim=True).clamp(min=1e-12) / largest
    tried = [ends * s for s in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)]
    errors = torch.stack(
        [((cut / t).round().clamp(-largest, largest) * t - cut).square().sum(2) for t in tried]
    )
    scales = torch.stack(tried).gather(0, errors.argmin(0)[None, :, :, None])[0]
    scales = scales.clamp(min=LEAST).half().double()  # EfficientNet-Lite0 has smaller ones
    units = scales.expand_as(cut).reshape(rows, -1)[:, :columns]
    if moment is None:
        values = (matrix.double() / units).round().clamp(-largest, largest)
    else:
        damped = moment.double() + 0.01 * float(moment.diagonal().mean()) * torch.eye(columns)
        upper = cholesky(torch.cholesky_inverse(cholesky(damped))).t()
        feedback = upper / upper.diagonal().unsqueeze(1)
        # With a unit of its own for each entry, rows are rounded one by one.
        values = torch.cat(
            [
                gptq(matrix[i : i + 1].double(), torch.ones(1, 1).double(), units[i : i + 1],
                     feedback, largest)
                for i in range(rows)
            ]
        ) if group else gptq(
            matrix.double(), units[:, :1].contiguous(), torch.ones(1, columns).double(), feedback,
            largest,
        )  # fmt: skip
    return values, scales, (values * units).float()


def baseline(
    model: nn.Module, moments: dict[str, Tensor] | None, bits: int, group: int
) -> tuple[nn.Module, int]:
    """The dense model, quantised, and the bytes of its file."""
    found, stored = copy.deepcopy(model), {}
    parameters = dict(found.named_parameters())
    for name, matrix in matrices(model).items():
        moment = None if moments is None else moments.get(name)
        if moment is not None and len(moment) != matrix.shape[1]:
            moment = None
        values, scales, whole = quantised(matrix, moment, bits, group)
        parameters[name].data = whole.reshape(parameters[name].shape)
        stored[f"{name}.codes"], stored[f"{name}.scales"] = packed(values, bits), scales.half()
    return found, saved(found, stored, matrices(model))


@torch.no_grad()
def saved(model: nn.Module, stored: dict[str, Tensor], coded: Collection[str]) -> int:
    """The bytes of a file of codes and scales; all but the coded weights is float16 in it."""
    for name, tensor in model.state_dict().items():
        if name not in coded and tensor.is_floating_point():
            half = tensor.half()
            # A variance may be beyond the range of float16, or vanish in it.
            kept = bool(half.isfinite().all()) and not bool(((half == 0) & (tensor != 0)).any())
            stored[name] = half if kept else tensor
            tensor.copy_(stored[name].float())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.safetensors"
        save_file({n: t.contiguous() for n, t in stored.items()}, path)
        return path.stat().st_size


def ours(
    model: nn.Module,
    images: Images,
    size: int,
    effort: str,
    prepared: Preprocess | None = None,
) -> tuple[nn.Module, int, dict[str, Any]]:
    """`auto --bytes`, the bytes of its file, and what the file says of the conversion.

    The effort "none" is without images, "random" is "normal" with as many images of `--calib
    random`: for both the model's preprocessing must be known.
    """
    data: Any = TensorDataset(images[0], torch.zeros(len(images[0]), dtype=torch.int64))
    calib = None
    if effort != "none":
        drawn = effort == "random"
        config = CalibConfig(effort="normal" if drawn else effort)
        calib = Calibration("random" if drawn else data, len(data), config, workers=0)
    tied = tiedconv.convert(model, "auto", bytes=f"{size}%", calib=calib, preprocess=prepared)
    with tempfile.TemporaryDirectory() as folder:
        written = tiedconv.save(tied, Path(folder) / "m.safetensors")
    plan = state_of(tied).plan
    schemes = sorted({group.scheme for group in plan.groups})
    return tied, written, {"schemes": schemes, "parameters": plan.stored}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--efforts", nargs="*", default=["none", "fast", "normal"])
    parser.add_argument("--sizes", nargs="*", type=int, help="percent of the float32 bytes")
    parser.add_argument("--vote", type=Path, help="CIFAR-10, for a model of features")
    parser.add_argument("--widths", nargs="*", type=int, default=WIDTHS)
    parser.add_argument("--groups", nargs="*", type=int, default=GROUPS)
    parser.add_argument("--no-baselines", action="store_true")
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    model, images = MODELS[args.model](args)
    if args.model != "dinov2":
        model.load_state_dict(load_file(args.weights))
    model.eval()
    voting = None if args.vote is None else voters(args.vote)
    dense = 4 * sum(t.numel() for t in model.state_dict().values())
    expected = outputs(model, images[1])
    rows: list[dict[str, Any]] = json.loads(args.result.read_text()) if args.result.exists() else []

    def done(**key: Any) -> bool:
        return any(all(row.get(k) == v for k, v in key.items()) for row in rows)

    def add(row: dict[str, Any]) -> None:
        rows.append({"model": args.model, **row})
        print(rows[-1], flush=True)
        args.result.parent.mkdir(exist_ok=True)
        text = ",\n".join(json.dumps(r) for r in rows)
        args.result.write_text(f"[\n{text}\n]\n")

    def row(bytes_: int, **more: Any) -> dict[str, Any]:
        return {"bytes": bytes_, "percent": round(100 * bytes_ / dense, 2), **more}

    def judge(found: nn.Module, asked: bool = True) -> dict[str, float]:
        votes = {} if voting is None or not asked else {"vote": vote(found, voting)}
        return {**judged(found, images, expected), **votes}

    if not done(model=args.model, method="original"):
        add({"method": "original", **row(dense), **judge(model)})
    if not args.no_baselines:
        targets = outputs(model, images[0])
        data = TensorDataset(images[0], torch.zeros(len(images[0]), dtype=torch.int64))
        found = gather_statistics(model, dict.fromkeys(matrices(model), False), data, workers=0)
        rights = {n: m.right for n, m in found.metrics.items() if m.right is not None}
        for method, moments in (("nearest", None), ("gptq", rights)):
            for bits in args.widths:
                for group in args.groups:
                    if done(model=args.model, method=method, bits=bits, group=group):
                        continue
                    start = time.process_time()
                    other, size = baseline(model, moments, bits, group)
                    add({
                        "method": method, "bits": bits, "group": group, **row(size),
                        "calibration": round(divergence(outputs(other, images[0]), targets), 5),
                        **judge(other, method == "gptq" and group == 32),
                        "seconds": round(time.process_time() - start),
                    })  # fmt: skip
    for effort in args.efforts:
        for size in args.sizes or ASKED[args.model]:
            if done(model=args.model, method="auto", effort=effort, asked=size):
                continue
            start = time.process_time()
            try:
                tied, written, facts = ours(model, images, size, effort, PREPARED[args.model])
            except tiedconv.TiedconvError as error:
                print(size, effort, error, flush=True)
                continue
            seconds = round(time.process_time() - start)
            assert written <= math.floor(size / 100 * dense)
            add({
                "method": "auto", "effort": effort, "asked": size, **row(written), **facts,
                **judge(tied), "seconds": seconds,
            })  # fmt: skip


if __name__ == "__main__":
    main()
