"""The weights that folds change in place: copies by name, and the way back into the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from qoqc.errors import Unsupported
from qoqc.passes.context import Refusal
from qoqc.passes.structure.facts import AttentionBlock, LinearRef, MlpBlock, ModelStructure

Tensors = MutableMapping[str, Tensor]
Map = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class FoldResult:
    """What a fold changed, and what it left alone with the reason."""

    applied: tuple[str, ...]
    refused: tuple[Refusal, ...]


def tensors_of(
    model: Any, structure: ModelStructure, dtype: torch.dtype = torch.float64
) -> tuple[dict[str, Tensor], ModelStructure]:
    """Copies of all parameters by name, and the structure with an output head of its own.

    A head tied to the embedding becomes a tensor of its own, under its module's name.
    Raises Unsupported if transformers does not say which module the head is.
    """
    tensors = {name: p.detach().to(dtype, copy=True) for name, p in model.named_parameters()}
    separate, name = untied(model, structure)
    if name is not None and structure.stream.head is not None:
        tensors[name] = tensors[structure.stream.head.weight].clone()
    return tensors, separate


def untied(model: Any, structure: ModelStructure) -> tuple[ModelStructure, str | None]:
    """The structure with an output head of its own, and the name of its weight.

    As it is, with None, if the head is no other parameter. Raises as tensors_of does.
    """
    stream = structure.stream
    if stream.head is None or not stream.tied:
        return structure, None
    name = _head_name(model)
    head = dataclasses.replace(stream.head, weight=name)
    separate = dataclasses.replace(stream, head=head, tied=False)
    return dataclasses.replace(structure, stream=separate), name


@torch.no_grad()
def write_back(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into the model's parameters, in their dtypes.

    A tensor of a head that was tied becomes a new Parameter, and the config says so
    (`tie_word_embeddings = False`): without, saving and loading would tie it again.
    """
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name in parameters:
            parameters[name].copy_(tensor)
            continue
        if name != _head_name(model):
            raise Unsupported(f"{name} is no parameter of {type(model).__name__}")
        head = model.get_output_embeddings()
        old = head.weight
        head.weight = Parameter(tensor.to(old.dtype), requires_grad=old.requires_grad)
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def _head_name(model: Any) -> str:
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head and head is not None:
            return f"{name}.weight"
    raise Unsupported(
        f"{type(model).__name__} has a tied output head, and get_output_embeddings() does not name "
        "it; it cannot be untied, so rotation and norm folding are off: use --recipe rtn"
    )


def attentions(structure: ModelStructure) -> dict[str, AttentionBlock]:
    """The recognised attentions by the weight of their o."""
    blocks = [layer.attention for layer in structure.layers]
    return {block.o.weight: block for block in blocks if block is not None}


def mlps(structure: ModelStructure) -> dict[str, MlpBlock]:
    """The recognised MLPs by the weight of their down."""
    return {block.down.weight: block for layer in structure.layers for block in layer.mlps}


def matrix(tensors: Tensors, ref: LinearRef) -> Tensor:
    """A view of the whole weight as [rows, in], or [experts, rows, in]."""
    weight = tensors[ref.weight]
    return weight.transpose(-1, -2) if ref.transposed else weight


def map_rows(tensors: Tensors, ref: LinearRef, change: Map) -> None:
    """Apply a linear map of the outputs to rows [.., out, in], and to the bias alike."""
    weight = matrix(tensors, ref)
    index = _index(ref, weight.device)
    weight[..., index, :] = change(weight[..., index, :])
    if ref.bias is not None:
        bias = tensors[ref.bias]
        bias[..., index] = change(bias[..., index, None])[..., 0]


def map_columns(tensors: Tensors, ref: LinearRef, change: Map) -> None:
    """Apply a map to the inputs of these rows: [.., out, in] -> [.., out, in]."""
    weight = matrix(tensors, ref)
    index = _index(ref, weight.device)
    weight[..., index, :] = change(weight[..., index, :])


def _index(ref: LinearRef, device: torch.device) -> Any:
    return slice(None) if ref.is_whole else ref.index().to(device)


def factors(name: str, scale: Tensor, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A caller's factors in the dtype and on the device of a weight.

    Raises ValueError for another shape, Unsupported for factors that are not positive and finite.
    """
    if tuple(scale.shape) != shape:
        raise ValueError(f"{name}: factors of shape {list(scale.shape)}, expected {list(shape)}")
    found = scale.to(like)
    if not bool((torch.isfinite(found) & (found > 0)).all()):
        raise Unsupported(
            f"{name}: a scale is not positive and finite; look for NaN or Inf in the calibration "
            "activations and weights of this layer"
        )
    return found
