"""Where the work is done, and in which number format and memory layout."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tiedconv.errors import UserError


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """The device of this name; "auto" takes CUDA, else Apple's GPU, else the CPU.

    Raises:
        UserError: a device that is unknown or not in this machine.
    """
    if name == "auto":
        found = "cuda" if torch.cuda.is_available() else "mps" if _mps() else "cpu"
        return torch.device(found)
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(
            f"Unknown device {name}",
            hint="Choose auto, cpu, cuda, cuda:N or mps",
            code="unknown-device",
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and count <= (device.index or 0):
        raise UserError(
            f"The device {name} was asked for, but torch {torch.__version__} sees {count} CUDA "
            f"device{'' if count == 1 else 's'}",
            hint="Choose --device cpu, or install a CUDA build of torch and its driver",
            code="device-missing",
        )
    if device.type == "mps" and not _mps():
        raise UserError(
            "The device mps was asked for, but torch can't use it here",
            hint="Choose --device cpu",
            code="device-missing",
        )
    return device


def seeds_apart(device: torch.device) -> AbstractContextManager[None]:
    """A context after which torch's global generators are what they were before."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _mps() -> bool:
    return torch.backends.mps.is_available()


AMPS = ("auto", "off", "bf16", "fp16")


@dataclass(frozen=True)
class Placement:
    """How images reach the model: device, number format of autocast, channels-last layout."""

    device: torch.device
    autocast_in: torch.dtype | None = None
    channels_last: bool = False

    @property
    def scales(self) -> bool:
        """Whether gradients need a scale so as not to vanish."""
        return self.autocast_in == torch.float16

    @classmethod
    def choose(
        cls, model: nn.Module, device: torch.device, amp: str = "auto", channels_last: str = "auto"
    ) -> Placement:
        """Decides what "auto" means for this model on this device."""
        if amp == "auto":
            amp = "off"
            if device.type == "cuda":
                amp = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
        return cls(
            device,
            autocast_in={"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp),
            channels_last=channels_last == "on"
            or (channels_last == "auto" and is_convolutional(model)),
        )

    def place(self, model: nn.Module) -> None:
        """Moves the model; its 4-D parameters get the chosen layout, keeping their identity."""
        model.to(self.device)
        if self.channels_last:
            set_layout(model, torch.channels_last)

    def release(self, *models: nn.Module | None) -> None:
        """Gives the parameters their usual layout back; they stay on the device."""
        for model in models:
            if model is not None and self.channels_last:
                set_layout(model, torch.contiguous_format)

    def images(self, images: Tensor) -> Tensor:
        """A batch (B, C, H, W), or of another form, on the device; images in the chosen layout."""
        maps = self.channels_last and images.ndim == 4
        layout = torch.channels_last if maps else torch.contiguous_format
        return images.to(self.device, non_blocking=True, memory_format=layout)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context to run the model in."""
        if self.autocast_in is not None:
            return torch.autocast(self.device.type, dtype=self.autocast_in)
        return nullcontext()


def is_convolutional(model: nn.Module) -> bool:
    """Whether a model has a convolution that is more than a cutting into patches."""
    return any(
        isinstance(module, nn.Conv2d)
        and (module.kernel_size != module.stride or module.kernel_size == (1, 1))
        for module in model.modules()
    )


def set_layout(model: nn.Module, layout: torch.memory_format) -> None:
    """Stores each 4-D parameter in this layout."""
    for parameter in model.parameters():
        if parameter.ndim == 4:
            # Through .data: optimisers and ties hold the Parameter itself.
            parameter.data = parameter.data.contiguous(memory_format=layout)
