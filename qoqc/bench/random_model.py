"""Models of a named shape with random weights: in 16 bit, or packed without ever being that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import Linear, Parameter
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

from qoqc.ir.spec import GROUP, TILE_N
from qoqc.parallel.load import split
from qoqc.parallel.ranks import Ranks
from qoqc.quant.pack import ceil_div
from qoqc.quant.weight import PackedWeight
from qoqc.runtime.weights import STORE, GroupSize, WeightRef

CODE_STD = 4.6
"""Standard deviation of uniform 4-bit codes."""

GROUP_SCALES = (8, 16)
"""Range of the level-2 scales; with a zero of 8 all of them are legal (quant/weight.py)."""


def dense_model(sizes: dict[str, Any], device: torch.device) -> Any:
    """A bf16 model of these config values, as transformers initializes it."""
    with device:
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**sizes), dtype=torch.bfloat16
        )
    return model.eval().requires_grad_(False)


def packed_model(
    sizes: dict[str, Any],
    device: torch.device,
    group_size: GroupSize = 128,
    ranks: Ranks | None = None,
) -> Any:
    """A bf16 model whose linears wait packed in STORE, random 4-bit codes, ready for qoqc.compile.

    Their Parameters read as NaN, so the model only runs compiled, with the same group_size. The
    head, the embedding, norms and biases are in bf16. Peak memory beyond the model: one weight.
    With `ranks` it is this rank's part of a model; the whole one never exists.
    """
    # "cuda" as tensors name it, "cuda:0": what is compared below would differ otherwise
    device = torch.empty(0, device=device).device
    with _NoWeights():
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**sizes), dtype=torch.bfloat16
        )
    if ranks is not None:
        split(model, ranks)
    head = model.get_output_embeddings()
    linears = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, Linear) and module is not head
    }
    # the largest first: all released weights share one NaN buffer as large as the largest
    for name, module in sorted(linears.items(), key=lambda item: -item[1].weight.numel()):
        n, k = module.weight.shape
        param = Parameter(torch.empty(n, k, dtype=torch.bfloat16, device=device), False)
        STORE.adopt(WeightRef(param, False, name), random_packed(n, k, device, group_size))
        STORE.release(STORE.bundle([WeightRef(param, False, name)], group_size), [param])
        module.weight = param
    if ranks is not None:  # parts may differ in size, and what all ranks hold must not differ
        torch.manual_seed(torch.initial_seed())
    _fill_rest(model, device)
    return model.eval().requires_grad_(False)


def random_packed(n: int, k: int, device: torch.device, group_size: GroupSize) -> PackedWeight:
    """Random 4-bit codes [n, k] whose values have about the size 1 / sqrt(k)."""
    groups = ceil_div(k, GROUP)
    shape = (ceil_div(n, TILE_N), groups, TILE_N, GROUP // 2)
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    if group_size == -1:
        channel = torch.full((n,), 1 / (CODE_STD * math.sqrt(k)), device=device)
        zero = torch.full((n,), 8, dtype=torch.int32, device=device)
        return PackedWeight(codes, channel, None, zero, n, k)
    low, high = GROUP_SCALES
    scale = torch.randint(low, high + 1, (groups, n), dtype=torch.int32, device=device)
    word = scale | ((128 - 8 * scale) << 8)
    mean = (low + high) / 2
    channel = torch.full((n,), 1 / (CODE_STD * mean * math.sqrt(k)), device=device)
    return PackedWeight(codes, channel, word, None, n, k)


class _NoWeights(TorchFunctionMode):
    """Puts what `torch.empty` makes on the meta device, as modules do with their weights.

    Buffers that are computed (rotary frequencies) and weights made of ones are real.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def _fill_rest(model: Any, device: torch.device) -> None:
    """Random values for what is still on the meta device; the rest moves to `device`."""
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            if param.is_meta:
                fresh = torch.empty(param.shape, dtype=torch.bfloat16, device=device)
                setattr(module, name, Parameter(_random(fresh, name), False))
            elif param.device != device:
                setattr(module, name, Parameter(param.to(device), False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
    model.tie_weights()


def _random(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Values that keep activations near unit size: tables and heads normal, biases zero."""
    if name == "bias":
        return tensor.zero_()
    return tensor.normal_(0, 1 / math.sqrt(tensor.shape[-1]))
