"""Make a pretrained ResNet50 compact in Python: plan, convert, save, report, load again.

python examples/convert_resnet50.py
python examples/convert_resnet50.py --weights none     # on a machine with no network
"""

import argparse
from pathlib import Path

import torch

import tiedconv


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="default", help="default, none, or a file")
    parser.add_argument("--output", type=Path, default=Path("resnet50-tied.safetensors"))
    parser.add_argument("--small", action="store_true", help="share more: 40 % is stored")
    options = parser.parse_args(arguments)

    # In each bottleneck conv3 becomes the transpose of conv1. Alone that saves 14 %. With these
    # options all blocks of a stage share one W and one 3x3 convolution, which needs more training.
    more = {"groups": "all", "first": "expand", "spatial": True} if options.small else {}

    # A plan has exact sizes and needs no weights.
    plan = tiedconv.plan("resnet50", "tied", **more)
    print(f"planned: {plan.original:,} parameters become {plan.stored:,}")

    # The same class of model, its weights now computed from far fewer numbers.
    model = tiedconv.convert("resnet50", "tied", weights=options.weights, **more)
    assert sum(p.numel() for p in model.parameters()) == plan.stored
    size = tiedconv.save(model, options.output, force=True)
    print(f"{options.output} has {size / 1e6:.1f} MB")

    report = tiedconv.report(options.output)
    for group in report.groups[:3]:
        print(f"  {group.name}: {group.ratio:.1%} stored, relative error {group.error:.3f}")
    print(f"  ... and {len(report.groups) - 3} groups more")

    # Load it again: the outputs are the same to the bit.
    again = tiedconv.load(options.output)
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(images), again(images))
    print("loaded again: the same outputs")


if __name__ == "__main__":
    main()
