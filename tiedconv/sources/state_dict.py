"""Fitting the tensors of a weights file to a model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from tiedconv.errors import WeightsError
from tiedconv.runtime.tensors import state_tensors
from tiedconv.sources.name_matching import match_names

Shape = tuple[int, ...]


def fit_to(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gives tensors the names of a model's own, and checks that they are all there and fit.

    Args:
        model: the model, whose state dict gives names and shapes.
        tensors: the weights as read. Prefixes such as `module.` are dropped where the names
            then match the model's better.

    Returns:
        One tensor for each name of the model's state dict. Counters of batches, and further
        names of a tensor that is there under one of its names, are filled in.

    Raises:
        WeightsError: names are missing or unexpected, or shapes or data types differ.
    """
    state = state_tensors(model)
    fitted = match_names(tensors, state)
    _fill_in(fitted, state)
    _drop_recomputed(fitted, model, state)
    shapes = {
        name: (tuple(fitted[name].shape), tuple(value.shape))
        for name, value in state.items()
        if name in fitted and fitted[name].shape != value.shape
    }
    missing = [name for name in state if name not in fitted]
    unexpected = [name for name in fitted if name not in state]
    if shapes or missing or unexpected:
        raise describe_mismatch(model, "The weights", shapes, missing, unexpected)
    for name, value in state.items():
        if value.is_floating_point() and not fitted[name].is_floating_point():
            raise WeightsError(
                f"{name} holds {fitted[name].dtype} in the file, {value.dtype} in the model",
                "Quantized weights can't be converted",
                "Give the weights as floating-point numbers",
                code="weights-quantized",
            )
    return {name: fitted[name] for name in state}


def load_into(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Loads weights into a model, all of them, in the model's own types.

    Raises:
        WeightsError: they don't fit, as `fit_to` says.
    """
    fitted = OrderedDict(fit_to(model, tensors))
    # The versions of modules, by which some loaders convert older layouts. Those of the file are
    # under its own names; a safetensors file has none, and is of today's layout.
    stated = getattr(tensors, "_metadata", None) if fitted.keys() <= tensors.keys() else None
    own = model.state_dict()._metadata  # type: ignore[attr-defined]
    fitted._metadata = stated or own  # type: ignore[attr-defined]
    model.load_state_dict(fitted, strict=True)


def _fill_in(fitted: dict[str, Tensor], state: Mapping[str, Tensor]) -> None:
    present = {_place(value): name for name, value in state.items() if name in fitted}
    for name, value in state.items():
        if name in fitted:
            continue
        if name.endswith("num_batches_tracked"):  # files older than it lack it; it starts at zero
            fitted[name] = value
        elif value.numel() and (other := present.get(_place(value))):
            fitted[name] = fitted[other]


def _place(value: Tensor) -> tuple[int, int, Shape, Shape]:
    # By the storage, not its address: tensors on the meta device have none.
    storage = int(value.untyped_storage()._cdata)
    return storage, int(value.storage_offset()), tuple(value.shape), tuple(value.stride())


def _drop_recomputed(
    fitted: dict[str, Tensor], model: nn.Module, state: Mapping[str, Tensor]
) -> None:
    # Older releases saved buffers, such as relative position indices, that the constructor
    # computes and newer ones no longer save.
    for name, buffer in model.named_buffers():
        if name not in state and name in fitted and fitted[name].shape == buffer.shape:
            del fitted[name]


def describe_mismatch(
    model: nn.Module,
    what: str,
    shapes: Mapping[str, tuple[Shape, Shape]],
    missing: Sequence[str],
    unexpected: Sequence[str],
) -> WeightsError:
    """The error for weights that don't fit a model.

    Args:
        model: the model.
        what: the weights, as the first words of the message.
        shapes: for each tensor whose shape differs, that in the file and that in the model.
        missing: names that only the model has.
        unexpected: names that only the file has.
    """
    parts = []
    if missing:
        parts.append(f"the file lacks {_first_three(missing)}")
    if unexpected:
        parts.append(f"the model has no {_first_three(unexpected)}")
    if shapes:
        parts.append(
            _first_three(
                [
                    f"{n} is {there} in the file, {here} in the model"
                    for n, (there, here) in shapes.items()
                ],
                "; ",
            )
        )
    remedy = "Check that the file belongs to this model and its model arguments"
    if not missing and not unexpected and (classes := _other_classes(shapes)):
        labelled = hasattr(getattr(model, "config", None), "num_labels")
        argument = "num_labels" if labelled else "num_classes"
        remedy = f"If the file is for {classes} classes, add --model-arg {argument}={classes}"
    return WeightsError(
        f"{what} don't fit the model: {'; '.join(parts)}", "", remedy, code="weights-mismatch"
    )


def _other_classes(shapes: Mapping[str, tuple[Shape, Shape]]) -> int | None:
    """The file's number of classes, if that is all in which it differs from the model."""
    changes = {(there[:1], here[:1]) for there, here in shapes.values()}
    rest = all(there[1:] == here[1:] for there, here in shapes.values())
    if len(changes) != 1 or not rest or len(shapes) > 6:
        return None
    there, _ = changes.pop()
    return there[0] if there else None


def _first_three(items: Sequence[str], between: str = ", ") -> str:
    more = len(items) - 3
    return between.join(items[:3]) + (f" and {more} more" if more > 0 else "")
