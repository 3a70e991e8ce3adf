"""The plain state dict of the original class."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tiedconv.errors import CheckpointError
from tiedconv.exporters._format import Format, Job, Written
from tiedconv.io.safetensors_file import save_tensors
from tiedconv.runtime.tie import dense_state_dict


class Dense(Format):
    """Every weight under its own name; it has the original's size."""

    name: ClassVar = "dense"
    endings: ClassVar = (".safetensors", ".pth", ".pt")
    compact: ClassVar = False

    def write(self, job: Job) -> Written:
        """As safetensors, or as a pickle of torch's that `torch.load` reads."""
        # Tensors that the original shares are written once for each of their names: a plain state
        # dict has no way to say that two are one.
        tensors = {name: t.clone() for name, t in dense_state_dict(job.model).items()}
        if job.path.suffix == ".safetensors":
            save_tensors(tensors, job.path)
        else:
            try:
                torch.save(tensors, job.path)
            except RuntimeError as error:  # so torch tells a full disk
                raise OSError(str(error).splitlines()[0]) from error
        numbers = sum(t.numel() for t in tensors.values())
        return Written(len(tensors), numbers, sum(t.nbytes for t in tensors.values()))

    def tensors(self, path: Path) -> dict[str, Tensor]:
        """The state dict."""
        try:
            if path.suffix == ".safetensors":
                return dict(load_file(path))
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except (SafetensorError, OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"{path} is no state dict that can be read ({reason})", hint="Export it again"
            ) from None
        return {name: t for name, t in loaded.items() if isinstance(t, Tensor)}

    def run(self, path: Path, images: Tensor) -> Tensor | None:
        """A state dict has no model of its own."""
        return None


FORMAT = Dense()
