"""Weights of a model that are read one tensor at a time, on demand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from tiedconv.io.narrowing import half_type
from tiedconv.runtime.finite import checked
from tiedconv.runtime.tensors import state_tensors
from tiedconv.sources.sharded_safetensors import Place
from tiedconv.sources.state_dict import fit_to

# Modules whose loaders may rename old names, but copy what has the right name.
_COPIES = (
    "torch.nn.",
    "torchvision.models.vision_transformer",
    "torchvision.ops.misc",
    "timm.layers.norm_act",
)


class LazyWeights(Mapping[str, Tensor]):
    """A model's tensors as loading a file would set them, without loading it.

    Each access reads the tensor from the file again, into memory that nothing else uses.

    Args:
        model: for names, shapes and types; its parameters may be on the meta device.
        found: where the file's tensors lie, by the file's names.
        non_finite: as in `Reading`.

    Attributes:
        dtypes: of the model's tensors, by name.
        file_dtype: the half type of the file's weights, if they have one; see `half_type`.

    Raises:
        WeightsError: they don't fit, as `fit_to` says.
    """

    def __init__(
        self, model: nn.Module, found: Mapping[str, Place], non_finite: str = "refuse"
    ) -> None:
        stand_ins = {
            name: torch.empty(place.shape, dtype=place.dtype, device="meta")
            for name, place in found.items()
        }
        place_of = {id(stand_ins[name]): place for name, place in found.items()}
        fitted = fit_to(model, stand_ins)
        self._non_finite = non_finite
        self._parameters = {name for name, _ in model.named_parameters()}
        first: dict[int, str] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.file_dtype = half_type((place.dtype, place.shape) for place in found.values())
        self._sources: dict[str, Place | Tensor] = {}
        for name, own in state_tensors(model).items():
            # A tensor with several names is given by the last, as when a state dict is loaded.
            name_of_all = first.setdefault(id(own), name)
            given = fitted[name]
            self.dtypes[name_of_all] = own.dtype
            self._sources[name_of_all] = place_of.get(id(given), given)

    def __getitem__(self, name: str) -> Tensor:
        source = self._sources[name]
        tensor = source.read() if isinstance(source, Place) else source.clone()
        return checked(
            name,
            tensor.to(self.dtypes[name]),
            is_buffer=name not in self._parameters,
            non_finite=self._non_finite,
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


def loads_plainly(model: nn.Module) -> bool:
    """Whether loading a state dict into a model copies each tensor, and does nothing else.

    Some modules change or lay out differently what they load, or share memory; then only loading
    itself shows what the weights will be.
    """
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values()}
    if not all(isinstance(t, Tensor) and t.is_contiguous() for t in tensors.values()):
        return False
    filled = [t.untyped_storage()._cdata for t in tensors.values() if t.numel()]
    return len(set(filled)) == len(filled) and all(map(_is_plain, model.modules()))


def _is_plain(module: nn.Module) -> bool:
    loader = type(module)._load_from_state_dict
    return loader.__module__.startswith(_COPIES) and not (
        module._load_state_dict_pre_hooks or module._load_state_dict_post_hooks
    )
