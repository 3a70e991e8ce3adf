"""The model as it is trained: as it is, replicated in several processes, or sharded over them.

The stored tensors of a tied model are parameters of its root, from which its layers' weights are
computed. Replicas (DDP) and shards (FSDP2) leave them there: each is one storage with one gradient,
the sum over all layers that read it, and one state of the optimiser.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tiedconv.errors import UserError
from tiedconv.training.distributed import DistContext
from tiedconv.training.dtensor import full_tensor


class TrainWrapper:
    """A model in training by this process alone.

    Attributes:
        model: whose parameters are trained.
        forward: what to call in a training step.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.forward: Callable[[Tensor], Any] = model

    def accumulating(self) -> AbstractContextManager[None]:
        """Within it, gradients are not exchanged between the processes yet."""
        return contextlib.nullcontext()

    def after_evaluation(self) -> None:
        """Make the model's parameters those that the optimiser has, after passes without one."""

    def clip(self, parameters: Sequence[nn.Parameter], most: float) -> Tensor:
        """Scale gradients so that their norm is at most `most`; returns what it was."""
        return nn.utils.clip_grad_norm_(parameters, most)

    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """What a checkpoint holds of model and optimiser. All processes must call it."""
        return {"model": dict(self.model.state_dict()), "optimizer": optimizer.state_dict()}

    def load(self, state: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
        """Restore what `state` gave; raises what torch does where it does not fit."""
        self.model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    def finish(self) -> None:
        """Bring what was learned into the caller's model. All processes must call it."""


class Replicated(TrainWrapper):
    """A copy in each process, whose gradients are averaged (DDP)."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__(model)
        ids = [device] if device.type == "cuda" else None
        self._replica = DistributedDataParallel(model, device_ids=ids)
        self.forward = self._replica

    def accumulating(self) -> AbstractContextManager[None]:
        return self._replica.no_sync()


class Sharded(TrainWrapper):
    """A part of each tensor in each process; they are put together for a forward pass (FSDP2).

    The caller's model stays whole, and gets the result in the end.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        own = copy.deepcopy(model).to(device)
        super().__init__(own)
        self._given = model
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        # One group: any layer may read any stored tensor, so all must be there together.
        self._sharded: Any = fully_shard(own, mesh=mesh)
        self.forward = own

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        self._sharded.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self._sharded.set_requires_gradient_sync(True)

    def after_evaluation(self) -> None:
        self._sharded.reshard()  # it stays put together until a backward pass

    def clip(self, parameters: Sequence[nn.Parameter], most: float) -> Tensor:
        return full_tensor(super().clip(parameters, most))

    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, state = get_state_dict(self.model, optimizer, options=_full_state())
        return {"model": model, "optimizer": state}

    def load(self, state: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
        from torch.distributed.checkpoint.state_dict import set_state_dict

        set_state_dict(
            self.model, optimizer, model_state_dict=state["model"],
            optim_state_dict=state["optimizer"], options=_full_state(),
        )  # fmt: skip

    def finish(self) -> None:
        state = self.model.state_dict()
        self._given.load_state_dict({name: full_tensor(tensor) for name, tensor in state.items()})


def make_learner(
    model: nn.Module, processes: DistContext, device: torch.device, sharding: str
) -> TrainWrapper:
    """The model made ready for these processes; it is on its device already, unless sharded.

    Raises:
        UserError: shards of a model that is in one process.
    """
    if sharding == "fsdp" and not processes.several:
        raise UserError(
            "Sharding (fsdp) was asked for, but there is one process",
            "There is nothing to share the model with",
            "Start several with torchrun --nproc-per-node N -m tiedconv ..., or leave it out",
            code="sharding-needs-processes",
        )
    if not processes.several:
        return TrainWrapper(model)
    return Sharded(model, device) if sharding == "fsdp" else Replicated(model, device)


def _full_state() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=True)
