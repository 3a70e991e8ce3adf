"""The plain state dict of the original class."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tiedconv.errors import first_line
from tiedconv.exporters._format import Format, Job, Written, unreadable
from tiedconv.io.safetensors_file import save_tensors
from tiedconv.runtime.tie import dense_state_dict


class Dense(Format):
    """Every weight under its own name, at the original's size."""

    name: ClassVar = "dense"
    has_graph: ClassVar = False
    endings: ClassVar = (".safetensors", ".pth", ".pt")
    compact: ClassVar = False

    def write(self, job: Job) -> Written:
        """As safetensors, or as a pickle that `torch.load` reads."""
        # Tensors that the original shares are written once for each of their names: a plain state
        # dict can't express sharing.
        tensors = {name: t.clone() for name, t in dense_state_dict(job.model).items()}
        if job.path.suffix == ".safetensors":
            save_tensors(tensors, job.path)
        else:
            try:
                torch.save(tensors, job.path)
            except RuntimeError as error:  # torch's error for a full disk
                raise OSError(first_line(error)) from error
        return Written.of(tensors.values())

    def tensors(self, path: Path) -> dict[str, Tensor]:
        """The state dict."""
        try:
            if path.suffix == ".safetensors":
                return dict(load_file(path))
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except (SafetensorError, OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise unreadable(path, "a state dict", error) from error
        return {name: t for name, t in loaded.items() if isinstance(t, Tensor)}

    def why_not_run(self) -> str:
        """Without the class of the model it has no forward pass."""
        return "a state dict has no graph to run"

    def run(self, path: Path, images: Tensor, text: Tensor | None = None) -> dict[str, Tensor]:
        """Not possible."""
        raise NotImplementedError


FORMAT = Dense()
