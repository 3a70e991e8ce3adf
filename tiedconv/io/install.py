"""From a checked file to a model: its tensors and ties, in a model of the original class."""

from __future__ import annotations

from torch import Tensor, nn

from tiedconv.errors import CheckpointError
from tiedconv.families.inspect import inspect_model
from tiedconv.io.checkpoint_reader import Checkpoint
from tiedconv.io.safetensors_file import DTYPES
from tiedconv.runtime.tie import tie


def install(checkpoint: Checkpoint, skeleton: nn.Module) -> nn.Module:
    """Load a file's tensors and ties into a model of the original class, returned in eval mode.

    Raises:
        CheckpointError: the model has other tensors than the file, or a tensor is damaged.
    """
    _same_names(checkpoint, skeleton)
    # All are read and checked before the first is loaded: a damaged file changes nothing.
    tensors = dict(checkpoint.tensors())
    for name in checkpoint.plan.kept:
        _put(skeleton, name, tensors.pop(name))
    for alias, name in checkpoint.plan.aliases.items():
        if name in checkpoint.plan.kept:
            _alias(skeleton, alias, name)
    tie(
        skeleton,
        checkpoint.plan,
        tensors,
        source=checkpoint.source,
        history=checkpoint.history,
    )
    return skeleton.eval()


def _same_names(checkpoint: Checkpoint, skeleton: nn.Module) -> None:
    info = inspect_model(skeleton)
    plan = checkpoint.plan
    expected = {**plan.kept, **{n: e.shape for n, e in plan.weights.items()}}
    if dict(info.shapes) == expected and dict(info.aliases) == dict(plan.aliases):
        _same_kinds(checkpoint, skeleton)
        return
    differing = [
        f"{n} is {expected.get(n, 'missing')} in the file, {info.shapes.get(n, 'missing')} in "
        f"the model"
        for n in sorted(expected.keys() | info.shapes.keys())
        if expected.get(n) != info.shapes.get(n)
    ] or ["other tensors are shared"]
    raise CheckpointError(
        f"{checkpoint.path} is for another model: {'; '.join(differing[:3])}",
        "It was not loaded",
        "Use the library versions that the file names (tiedconv report FILE), or the right model",
        code="wrong-model",
    )


def _same_kinds(checkpoint: Checkpoint, skeleton: nn.Module) -> None:
    """Refuse integers where the model has floats, and the reverse."""
    own = skeleton.state_dict()
    for name in checkpoint.plan.kept:
        here, there = own[name].dtype, DTYPES[checkpoint.dtypes[name]]
        if here != there and not (here.is_floating_point and there.is_floating_point):
            raise CheckpointError(
                f"{checkpoint.path} is for another model: {name} is {there} in the file, {here} "
                "in the model",
                "It was not loaded",
                "Use the right model, or convert it again",
                code="wrong-model",
            )
    buffers = {name for name, _ in skeleton.named_buffers(remove_duplicate=False)}
    if computed := sorted(buffers & checkpoint.plan.weights.keys()):
        raise CheckpointError(
            f"{checkpoint.path} is for another model: it computes {computed[0]}, which is a "
            "buffer of the model",
            "It was not loaded",
            "Use the right model, or convert it again",
            code="wrong-model",
        )


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter or buffer by the file's tensor, keeping sharing among modules."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    old = module._parameters.get(attribute)
    if old is not None:
        module._parameters[attribute] = nn.Parameter(tensor, requires_grad=old.requires_grad)
    else:
        module._buffers[attribute] = tensor


def _alias(model: nn.Module, alias: str, name: str) -> None:
    path, _, attribute = alias.rpartition(".")
    source_path, _, source_attribute = name.rpartition(".")
    module, source = model.get_submodule(path), model.get_submodule(source_path)
    for table, other in (
        (module._parameters, source._parameters),
        (module._buffers, source._buffers),
    ):
        if attribute in table and source_attribute in other:
            table[attribute] = other[source_attribute]  # type: ignore[assignment]
