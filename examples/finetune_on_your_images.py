"""Convert a model, then fine-tune it on your images with the original as teacher.

    python examples/finetune_on_your_images.py FOLDER

FOLDER holds train/CLASS/*.jpg and val/CLASS/*.jpg, or class folders directly. For a model of your
own classes, give its weights: --model timm:NAME --arg num_classes=3 --weights FILE.
"""

import argparse
from pathlib import Path

import tiedconv
from tiedconv.sources import parse_model_args


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, help="a folder of images by class")
    parser.add_argument("--model", default="vit_b_16")
    parser.add_argument("--arg", action="append", default=[], help="of the model: NAME=VALUE")
    parser.add_argument("--weights", default="default", help="default, or a file")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, help="processes that decode images")
    parser.add_argument("--output", type=Path, default=Path("finetuned.safetensors"))
    options = parser.parse_args(arguments)

    # Half of the parameters: one base for all layers, and a low-rank residual for each.
    model = tiedconv.convert(
        options.model,
        "lors",
        params="50%",
        weights=options.weights,
        model_args=parse_model_args(options.arg),
    )
    converted = options.output.with_stem(options.output.stem + "-converted")
    tiedconv.save(model, converted, force=True)

    # A published model is its own teacher; of other weights the file holds no path, so say it.
    teacher = "auto" if options.weights == "default" else options.weights
    config = tiedconv.TrainConfig(
        epochs=options.epochs, batch_size=options.batch_size, workers=options.workers
    )
    done = tiedconv.finetune(
        converted, options.images, options.output, config, teacher=teacher, force=True
    )
    print(f"top-1 before fine-tuning {done.result.top1_before:.2%}, after {done.result.top1:.2%}")

    # The file knows how its images are prepared, and what was done with it.
    result = tiedconv.evaluate(
        options.output, options.images, batch_size=options.batch_size, workers=options.workers
    ).result
    print(f"{options.output}: top-1 {result.top1:.2%} on {result.images} images")


if __name__ == "__main__":  # image readers are processes of their own, which import this file
    main()
