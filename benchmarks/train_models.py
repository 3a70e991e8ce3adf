"""Trains the models that the accuracy benchmark converts, and says how.

    python benchmarks/train_models.py --data CIFAR10 --out MODELS --model resnet-narrow --steps 2500

Trained on nine tenths of the training images; the tenth that is held out is for choosing, the
test part is looked at once, at the end. Weights go to `MODELS/<model>.safetensors`, figures to
`MODELS/<model>.json`. On a GPU: `--model resnet50 --steps 35000 --strong`, likewise `vit-s4`.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch
from models import SIZES, Pixels, batches, cropped, normalised, read_pixels, top1
from safetensors.torch import save_file
from timm.layers import PatchDropout
from torch import Tensor, nn
from torchvision.transforms import v2

RATES = {"resnet50": 0.1, "resnet-narrow": 0.2, "vit-s4": 1e-3, "vit-d128": 1e-3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", choices=[*SIZES], required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--strong", action="store_true", help="RandAugment and CutMix too")
    parser.add_argument("--drop-patches", type=float, default=0.0, help="of a ViT, at first")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    pixels = {k: v.to(device) for k, v in read_pixels(args.data).items()}
    classes = int(pixels["train"].labels.max()) + 1
    model = SIZES[args.model](classes).to(device, memory_format=torch.channels_last)
    start = time.perf_counter()
    train(model, pixels["train"], args, RATES[args.model])
    figures = {
        "model": args.model, "data": args.data.name, "images": len(pixels["train"]),
        "steps": args.steps, "batch_size": args.batch_size, "seed": args.seed,
        "augmentation": "crop, flip" + (", RandAugment, CutMix" if args.strong else ""),
        "drop_patches": args.drop_patches, "parameters": sum(p.numel() for p in model.parameters()),
        "held_out_top1": top1(model, pixels["val"]), "test_top1": top1(model, pixels["test"]),
        "seconds": round(time.perf_counter() - start), "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),  # another number gives another model, as good
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    state = {k: v.cpu().contiguous() for k, v in model.state_dict().items()}
    save_file(state, args.out / f"{args.model}.safetensors")
    (args.out / f"{args.model}.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures), flush=True)


def train(model: nn.Module, pixels: Pixels, args: argparse.Namespace, lr: float) -> None:
    """The whole training, in place: SGD for a ResNet and AdamW for a ViT, one cosine."""
    convolutional = args.model.startswith("resnet")
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    decay = 5e-4 if convolutional else 0.05
    groups = [{"params": decayed, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(groups, lr, momentum=0.9, nesterov=True)
        if convolutional
        else torch.optim.AdamW(groups, lr)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=args.steps, pct_start=0.1, cycle_momentum=False
    )
    generator = torch.Generator().manual_seed(args.seed)
    model.train()
    start = time.perf_counter()
    for step, index in enumerate(batches(len(pixels), args.batch_size, args.steps, args.seed)):
        if args.drop_patches and not convolutional:
            set_patch_drop(model, args.drop_patches if step < 0.75 * args.steps else 0.0)
        batch = pixels.take(index.to(pixels.labels.device))
        images, labels = augmented(
            batch, generator, strong=args.strong, classes=model_classes(model)
        )
        with torch.autocast("cuda", torch.bfloat16, enabled=images.is_cuda):
            scores = model(images.contiguous(memory_format=torch.channels_last))
            loss = nn.functional.cross_entropy(scores, labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(step, round(float(loss), 3), round(time.perf_counter() - start), flush=True)


def set_patch_drop(model: nn.Module, share: float) -> None:
    """How many patches of a ViT are left out while it trains."""
    model.patch_drop = PatchDropout(share) if share else nn.Identity()


def model_classes(model: nn.Module) -> int:
    """Number of outputs of the last layer."""
    head = model.fc if hasattr(model, "fc") else model.head
    assert isinstance(head, nn.Linear)
    return head.out_features


def augmented(
    batch: Pixels, generator: torch.Generator, *, strong: bool, classes: int
) -> tuple[Tensor, Tensor]:
    """Normalised images, and labels as shares `(n, classes)`."""
    images = cropped(batch.images, generator)
    labels = nn.functional.one_hot(batch.labels, classes).float()
    if not strong:
        return normalised(images), labels
    # One draw of RandAugment for each small part of the batch: one for each image is slow.
    policy = v2.RandAugment(2, 9)
    images = torch.cat([policy(part) for part in images.split(16)])
    return v2.CutMix(num_classes=classes)(normalised(images), batch.labels)


if __name__ == "__main__":
    main()
