"""What a file's record says, in sentences: its steps, and how images are prepared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tiedconv.utils.figures import accuracy

if TYPE_CHECKING:
    from tiedconv.sources import Preprocess

_TITLES = {
    "agreement": "agreement with the teacher", "similarity": "cosine to the teacher", "ap": "AP",
    "top1": "top-1",
}  # fmt: skip


def history_lines(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each step that a model went through."""
    return [_history_line(entry) for entry in history]


def _history_line(entry: Mapping[str, Any]) -> str:
    if entry.get("step") == "convert":
        recipe = entry.get("recipe") or {}
        rules = "; ".join(
            " ".join(
                [
                    str(r.get("scheme")),
                    *(f"{k}={v}" for k, v in r.items() if _differs_from_default(k, v)),
                ]
            )
            for r in recipe.get("rules", [])
        )
        budget = "".join(f", {k} {recipe[k]}" for k in ("params", "macs", "bytes") if recipe.get(k))
        calib = entry.get("calibration") or {}
        seen = ""
        if calib:
            seen = f", calibrated on {calib.get('images'):,} images ({calib.get('effort')})"
        return f"converted by {rules}{budget}{seen}"
    if entry.get("step") == "finetune":
        return _finetune_line(entry)
    if entry.get("step") == "export":
        return f"stored as {entry.get('dtype')}, computes in {entry.get('computes_in')}"
    return str(entry.get("step"))


def _finetune_line(entry: Mapping[str, Any]) -> str:
    known = [name for name in _TITLES if _is_number(entry.get(name))]
    name = known[0] if known else "top1"
    unlabelled = name in ("agreement", "similarity")
    teacher = entry.get(f"{name}_teacher")
    goal = f" (teacher: {_score(name, teacher)})" if _is_number(teacher) else ""
    return (
        f"fine-tuned on {entry.get('data')} ({entry.get('train_images'):,} images"
        f"{' without labels' if unlabelled else ''}, "
        f"{entry.get('steps'):,} steps, teacher {entry.get('teacher')}): "
        f"{_TITLES[name]} "
        f"{_score(name, entry.get(f'{name}_before'))} before, "
        f"{_score(name, entry.get(name))} after{goal}, on "
        f"{entry.get('val_images'):,} {'held-out ' if entry.get('held_out') else ''}images"
    )


def _score(name: str, value: object) -> str:
    if not _is_number(value):
        return "-"
    return f"{value:.4f}" if name == "similarity" else accuracy(value)  # type: ignore[arg-type]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _differs_from_default(key: str, value: Any) -> bool:
    return key != "scheme" and value not in ([], ["*"])


def preparation(prepared: Preprocess | Mapping[str, Any] | None) -> str:
    """How images become the model's input, in one line."""
    if prepared is None:
        return "Images: the model does not say how they are prepared; 224 pixels are assumed."
    p: Mapping[str, Any] = prepared if isinstance(prepared, Mapping) else prepared.to_json()
    side, shorter = p["size"], p["resize"]
    how = f"resized to {side} x {side} pixels"
    if shorter is not None:
        how = f"shorter side to {shorter} pixels, centre crop of {side} x {side}"
    mean, std = (", ".join(f"{v:.3g}" for v in p[key]) for key in ("mean", "std"))
    turned = ", turned by EXIF" if p.get("exif") else ""
    return f"Images: {how}, {p['interpolation']}{turned}, mean {mean}, std {std}."
