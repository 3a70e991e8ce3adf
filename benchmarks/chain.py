"""The whole chain on models of many kinds of output: convert, verify, distil, export, compare.

    python benchmarks/chain.py --photos PHOTOS [--dinov2 FOLDER] [--lite0 WEIGHTS.safetensors]

Each step is the command line's. Real weights where they are given, else tiny models of transformers
with random weights (tables, biases and norms drawn too), and a network of YOLO's shape. The
distance to the original (as the kind of output measures it, on held-out images) is noted after the
conversion and after the block-wise fit; before and after the distillation how far both say the
same. What is refused, or could not be checked, is noted. Results go to
`benchmarks/results/chain.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typer.testing import CliRunner

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "helpers")]  # for the network of YOLO's shape

from tiedconv.cli import app  # noqa: E402
from tiedconv.sources.torchvision_compat import import_torchvision  # noqa: E402

import_torchvision()
from micro import settle  # noqa: E402

RESULT = Path(__file__).parent / "results" / "chain.json"
SIDE = 64
SMALL: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128,
    "image_size": SIDE, "patch_size": 8,
}  # fmt: skip
PREPARED = {
    "do_resize": True, "size": {"height": SIDE, "width": SIDE}, "do_normalize": True,
    "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_processor_type": "ViTImageProcessor",
}  # fmt: skip


def clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    text = {k: v for k, v in SMALL.items() if k not in ("image_size", "patch_size")}
    text |= {"vocab_size": 199, "bos_token_id": 0, "eos_token_id": 198, "pad_token_id": 1}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=SMALL, projection_dim=32))


def siglip() -> nn.Module:
    from transformers import SiglipConfig, SiglipModel

    text = {k: v for k, v in SMALL.items() if k not in ("image_size", "patch_size")}
    text |= {"vocab_size": 199, "bos_token_id": None, "eos_token_id": 198, "pad_token_id": 1}
    return SiglipModel(SiglipConfig(text_config=text, vision_config=SMALL))


def segformer() -> nn.Module:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    return SegformerForSemanticSegmentation(
        SegformerConfig(
            hidden_sizes=[16, 32, 32, 64], depths=[2, 2, 2, 2], num_attention_heads=[1, 2, 2, 4],
            decoder_hidden_size=32, num_labels=8, image_size=SIDE,
        )
    )  # fmt: skip


def depth_anything() -> nn.Module:
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    backbone = Dinov2Config(**SMALL, out_features=["stage1", "stage2", "stage3", "stage4"],
                            reshape_hidden_states=False)  # fmt: skip
    return DepthAnythingForDepthEstimation(
        DepthAnythingConfig(
            backbone_config=backbone, patch_size=8, reassemble_hidden_size=64,
            neck_hidden_sizes=[16, 32, 64, 64], fusion_hidden_size=16, head_hidden_size=16,
        )
    )  # fmt: skip


def vit_mae() -> nn.Module:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    return ViTMAEForPreTraining(
        ViTMAEConfig(
            **SMALL, decoder_hidden_size=32, decoder_num_hidden_layers=2,
            decoder_num_attention_heads=4, decoder_intermediate_size=64,
        )
    )  # fmt: skip


def mask2former() -> nn.Module:
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        SwinConfig,
    )

    backbone = SwinConfig(
        image_size=SIDE, patch_size=4, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4],
        window_size=4, out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    return Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(
            backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32,
            encoder_feedforward_dim=64, dim_feedforward=64, encoder_layers=2, decoder_layers=3,
            num_attention_heads=4, num_queries=10, num_labels=8,
        )
    )  # fmt: skip


def dinov2() -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    return Dinov2Model(Dinov2Config(**SMALL))


TINY: dict[str, Callable[[], nn.Module]] = {
    "DINOv2": dinov2, "CLIP": clip, "SigLIP": siglip, "SegFormer": segformer,
    "Depth Anything": depth_anything, "ViT-MAE": vit_mae, "Mask2Former": mask2former,
}  # fmt: skip


def command(*words: Any) -> tuple[dict[str, Any], str]:
    """What a command prints as JSON, and the code of its error or ""."""
    found = CliRunner().invoke(app, [*map(str, words), "--json"])
    if found.exit_code and not found.stdout.startswith(
        "{"
    ):  # a check that could not be run is told
        text = found.stderr.strip() or repr(found.exception)
        print(text, flush=True)
        return {}, text.splitlines()[-1].rpartition("[")[2].rstrip("]")
    return json.loads(found.stdout), ""


def passed(checks: list[dict[str, Any]]) -> bool | str:
    """Whether all checks passed, or what could not be checked."""
    missing = [f"{c['name']} {c['detail']}" for c in checks if c["passed"] is None]
    return "; ".join(missing) or all(c["passed"] for c in checks)


def chain(
    spec: str, photos: Path, folder: Path, options: list[Any], size: str, effort: str
) -> dict[str, Any]:
    """All steps of one model."""
    compact, tuned, onnx = (folder / name for name in ("c.safetensors", "t.safetensors", "m.onnx"))
    quiet = ["--workers", 0, "--device", "cpu"]
    row: dict[str, Any] = {"bytes": size, "effort": effort}
    found, refused = command(
        "convert", spec, "-o", compact, "--scheme", "auto", "--bytes", size, "--calib", photos,
        "--calib-images", 128, "--effort", effort, "--force", *options, *quiet,
    )  # fmt: skip
    if refused:
        return {**row, "convert": refused}
    said = found["calibration"]
    row |= {
        "compared": said["agreement"]["compares"], "converted": said["agreement"]["mean"],
        "distance": [said["kl_before"], said["kl_after"]],
    }  # fmt: skip
    trust = ["--trust-code"] if ":" in spec and not spec.startswith(("hf:", "timm:")) else []
    weights = options[options.index("--weights") + 1] if "--weights" in options else spec
    found, refused = command("verify", compact, "--original", weights, *trust)
    row["verify"] = refused or passed(found["checks"])
    found, refused = command(
        "finetune", compact, "--data", photos, "-o", tuned, "--teacher", weights, "--distill", 1,
        "--unlabelled", "--steps", 40, "--batch-size", 16, "--limit", 128, "--force",
        "--no-picture", *trust, *quiet,
    )  # fmt: skip
    if refused:
        row["distil"] = refused
    else:
        result = found["result"]
        row["distil"] = [next(iter(result[k].values())) for k in ("metrics_before", "metrics")]
    file = compact if refused else tuned
    found, refused = command("export", file, "-o", onnx, "--force", *trust)
    row["onnx"] = refused or found["difference"]
    if not refused:
        found, refused = command("verify", file, "--against", onnx, *trust)
        row["compare"] = refused or passed(found["checks"])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--dinov2", type=Path)
    parser.add_argument("--lite0", type=Path)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    rows = json.loads(args.result.read_text()) if args.result.exists() else {}
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        todo: dict[str, tuple[str, list[Any], str]] = {}
        for name, build in TINY.items():
            place = folder / name.replace(" ", "-")
            torch.manual_seed(0)
            settle(build()).save_pretrained(place)  # type: ignore[operator]
            (place / "preprocessor_config.json").write_text(json.dumps(PREPARED))
            todo[f"{name}, tiny"] = (f"hf:{place}", [], "15%")
        prepared = ["--image-size", SIDE, "--resize", 0, "--mean", "0,0,0", "--std", "1,1,1"]
        todo["YOLO's shape"] = ("one_stage:one_stage", prepared, "12%")
        if args.lite0:
            spec = "timm:tf_efficientnet_lite0"
            todo["EfficientNet-Lite0"] = (spec, ["--weights", args.lite0.absolute()], "20%")
        if args.dinov2:
            small = ["--image-size", 112]
            todo["ViT-S/14"] = (f"hf:{args.dinov2.absolute()}", small, "12%")
        for name, (spec, options, size) in todo.items():
            if name in rows or (args.only and name not in args.only):
                continue
            start = time.process_time()
            effort = "fast" if name in ("EfficientNet-Lite0", "ViT-S/14") else "normal"
            row = chain(spec, args.photos.absolute(), folder, options, size, effort)
            rows[name] = {**row, "seconds": round(time.process_time() - start)}
            print(name, rows[name], flush=True)
            args.result.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
