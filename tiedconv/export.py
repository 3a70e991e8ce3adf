"""The verb `export`: a compact file in a form that needs no tiedconv."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tiedconv.binding import dense_state_dict
from tiedconv.errors import UserError
from tiedconv.files import check_output, replacing
from tiedconv.loading import load

FORMATS = ("dense",)


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Args:
        path: the file.
        size: in bytes.
        tensors: how many it holds.
        parameters: numbers in it, buffers included.
    """

    path: Path
    size: int
    tensors: int
    parameters: int


def export(
    file: str | Path,
    output: str | Path,
    to: str = "dense",
    *,
    force: bool = False,
    trust_code: bool = False,
) -> Exported:
    """Write a compact model as the plain state dict of its original class.

    Args:
        file: a compact file.
        output: `.safetensors`, or `.pth` for a state dict of torch's.
        to: `dense`.
        force: replace an existing output.
        trust_code: allow the file to name a function that builds the model.

    Raises:
        UserError: unknown format, unreadable file, or an output that can't be written.
    """
    output = Path(output)
    if to not in FORMATS:
        raise UserError(
            f"{to!r} is no format to export to", remedy=f"Use one of: {', '.join(FORMATS)}"
        )
    if output.suffix not in (".safetensors", ".pth", ".pt"):
        raise UserError(
            f"{output.name} has no ending that says how to write it",
            remedy="Name it .safetensors, or .pth for a state dict of torch's",
        )
    check_output(output, force=force)
    model = load(file, trust_code=trust_code)
    # Tensors that the original shares are written once for each of their names: a plain state
    # dict has no way to say that two are one.
    tensors = {name: t.clone() for name, t in dense_state_dict(model).items()}
    with replacing(output, force=force) as part:
        if output.suffix == ".safetensors":
            try:
                save_file(tensors, part, {"format": "pt"})
            except SafetensorError as error:  # a full disk, which `replacing` tells of
                raise OSError(str(error)) from None
        else:
            try:
                torch.save(tensors, part)
            except RuntimeError as error:  # so torch tells a full disk
                raise OSError(str(error).splitlines()[0]) from error
        size = part.stat().st_size
    return Exported(output, size, len(tensors), sum(t.numel() for t in tensors.values()))
