"""tiedconv's own file, with its weights in half precision."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from tiedconv.errors import UserError
from tiedconv.exporters._format import Format, Job, Written, called, is_weight
from tiedconv.io.checkpoint import save
from tiedconv.io.checkpoint_reader import read
from tiedconv.io.narrowing import stored_as
from tiedconv.runtime.outputs import named_outputs
from tiedconv.runtime.tensors import state_tensors
from tiedconv.runtime.tie import set_state, state_of
from tiedconv.sources.models import load


class Compact(Format):
    """The same file with half the bytes; it is loaded to float32 and computes in float32."""

    name: ClassVar = "compact"
    has_graph: ClassVar = False
    endings: ClassVar = (".safetensors",)
    dtypes: ClassVar = ("float32", "float16", "bfloat16")

    def write(self, job: Job) -> Written:
        """Matrices and kernels in the given dtype; norms, biases and statistics unchanged."""
        kind = getattr(torch, job.dtype)
        model = job.model
        for name, tensor in state_tensors(model).items():
            if is_weight(name, tensor.shape, tensor.is_floating_point()):
                narrow = tensor.data.to(kind)
                if not torch.isfinite(narrow).all() and torch.isfinite(tensor).all():
                    raise UserError(
                        f"{name} has values that {job.dtype} can't hold",
                        "Nothing was written",
                        "Store it as bfloat16",
                        code="dtype-overflow",
                    )
                tensor.data = narrow
        before = stored_as(state_of(model).history)
        if kind is not torch.float32 or before is not None:
            step = {"step": "export", "dtype": job.dtype, "computes_in": "float32"}
            # An original in half precision would be stored so again.
            step |= {} if before is None else {"stored_as": job.dtype}
            set_state(model, history=(*state_of(model).history, step))
        save(model, job.path, force=True)
        return Written.of(model.state_dict().values())

    def tensors(self, path: Path) -> dict[str, Tensor]:
        """The stored tensors."""
        return dict(read(path).tensors())

    def run(self, path: Path, images: Tensor, text: Tensor | None = None) -> dict[str, Tensor]:
        """By `tiedconv.load`."""
        with torch.no_grad():
            return named_outputs(called(load(path), images, text))


FORMAT = Compact()
