"""The module that stands for a linear of a loaded artifact: right in eager, under any backend.

Its forward is one opaque op, which finds the packed weight by the Parameter it is given; the
pass `normalize` takes it for the linear it is, so backend "qoq" compiles the model it would
compile before packing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Linear, Module, Parameter
from transformers.pytorch_utils import Conv1D

from qoqc.ir import ops
from qoqc.quant.weight import PackedWeight
from qoqc.runtime.weights import STORE, WeightRef

torch.library.define(
    "qoqc::stored_linear",
    # x [..., K], a Parameter with packed rows in STORE, [N, K] or transposed -> [..., N]
    "(Tensor x, Tensor weight, Tensor? bias, bool transposed) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
stored_linear = torch.ops.qoqc.stored_linear.default


@torch.library.impl("qoqc::stored_linear", "default")
def _stored_linear_impl(
    x: Tensor, weight: Parameter, bias: Tensor | None, transposed: bool
) -> Tensor:
    packed = STORE.current(weight)
    return cast(
        "Tensor",
        ops.w4a8_linear(
            *ops.quantize_act(x),
            packed.qweight,
            packed.channel_scale,
            packed.group_word,
            packed.channel_zero,
            bias,
            None,
            x.dtype,
        ),
    )


@torch.library.register_fake("qoqc::stored_linear")  # type: ignore[untyped-decorator]
def _stored_linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1 if transposed else 0]))


class PackedLinear(Module):
    """A linear without 16-bit weight: `weight` [N, K] ([K, N] if transposed) reads as NaN.

    It is made open, with the packed tensors as buffers on the meta device that a loader fills by
    name. `seal` gives them to STORE, which may regroup them; then the module has none of its own,
    and its state_dict is made from STORE's: the names and the bytes it was loaded with.
    """

    def __init__(
        self, like: Module, tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]
    ) -> None:
        """Stand in for `like`, which `replaceable` accepts; tensors: shape and dtype by field."""
        super().__init__()
        old = cast("Parameter", like.weight)
        self.transposed = isinstance(like, Conv1D)
        rows, columns = old.shape
        self.out_features = columns if self.transposed else rows
        self.in_features = rows if self.transposed else columns
        self.dtype = old.dtype
        self.register_parameter("bias", cast("Parameter | None", like.bias))
        # models that initialize children's weights themselves (gpt2) have something to write to
        self.register_buffer("weight", torch.empty(1, dtype=self.dtype), persistent=False)
        for name, (shape, dtype) in tensors.items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))
        # transformers would fill the weights of modules it has not loaded a weight for
        self._is_hf_initialized = True

    def seal(self, name: str, packed: PackedWeight | None = None) -> None:
        """Take `packed`, or what a loader put in the buffers, as the weight of Parameter `name`."""
        if packed is None:
            parts = cast("dict[str, Any]", self._buffers)
            packed = PackedWeight(
                parts["qweight"],
                parts["channel_scale"],
                parts.get("group_word"),
                parts.get("channel_zero"),
                self.out_features,
                self.in_features,
            )
        self._buffers.clear()
        self._non_persistent_buffers_set.clear()
        self.weight = released_parameter(name, packed, self.dtype, self.transposed)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in the dtype of x."""
        return cast("Tensor", stored_linear(x, self.weight, self.bias, self.transposed))

    def extra_repr(self) -> str:
        """Sizes, as torch.nn.Linear shows them."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, transposed={self.transposed}"
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if destination.pop(f"{prefix}weight", None) is not None:
            for field, tensor in STORE.current(self.weight).tensors().items():
                destination[prefix + field] = tensor

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PackedLinear:
        """`.to()` and its like: the packed tensors follow in their own dtypes."""
        weight = self._parameters.get("weight")
        follow: Any = super()._apply
        if weight is None:
            follow(fn, recurse)
            return self
        self._parameters["weight"] = None
        try:
            follow(fn, recurse)
        finally:
            self._parameters["weight"] = weight
        moved = fn(weight.new_empty(0))
        if moved.device != weight.device or moved.dtype != weight.dtype:
            packed, name = STORE.current(weight), STORE.name(weight)
            tensors = packed.tensors().items()
            parts: dict[str, Any] = {field: t.to(moved.device) for field, t in tensors}
            self.dtype = moved.dtype
            self.seal(name, dataclasses.replace(packed, **parts))
        return self


def replaceable(module: Module) -> bool:
    """Whether PackedLinear computes what `module` does."""
    return isinstance(module, Conv1D) or (
        isinstance(module, Linear) and type(module).forward is Linear.forward
    )


def released_parameter(
    name: str, packed: PackedWeight, dtype: torch.dtype, transposed: bool
) -> Parameter:
    """A Parameter without 16-bit storage of its own whose packed weight is in STORE."""
    n, k = packed.out_features, packed.in_features
    shape = (k, n) if transposed else (n, k)
    one = torch.empty(1, 1, dtype=dtype, device=packed.qweight.device)
    param = Parameter(one.expand(shape), requires_grad=False)
    ref = WeightRef(param, transposed, name)
    STORE.adopt(ref, packed)
    STORE.release(STORE.bundle([ref], packed.group_size), [param])
    return param


def named_tensors(model: Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers under every name they have; packed weights as Parameters."""
    yield from model.named_parameters(remove_duplicate=False)
    for path, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer
