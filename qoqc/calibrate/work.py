"""One layer under calibration: its tensors, its inputs, and what can be measured on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qoqc.calibrate.blocks import Blocks, rounded_act
from qoqc.calibrate.forward import Stop
from qoqc.calibrate.hessian import Hessian
from qoqc.calibrate.ranges import plain_grid
from qoqc.calibrate.recipe import LayerRecord, Recipe
from qoqc.calibrate.weight_step import quantize_linear
from qoqc.passes.folds.tensors import FoldResult, matrix
from qoqc.passes.structure.facts import AttentionBlock, Layer, LinearRef, ModelStructure
from qoqc.quant.weight import dequantize_weight

Fold = Callable[[ModelStructure, dict[str, Tensor]], FoldResult]

TOKENS = 2048
"""Inputs of a linear that a trial of its smoothing is judged on."""

ROWS = 512
"""Output channels that the last word on a fold is said on."""


@dataclasses.dataclass
class LayerWork:
    """What the steps of a layer share.

    layer      its facts; None if nothing in the block was recognised
    structure  the model's, with this layer alone: folds then touch nothing else
    tensors    fp32, of this layer, on the compute device; the steps change them in place
    packed     the layer's parameters that the product packs
    inputs     hidden states of the search windows, fp32 [1, S, width] each
    """

    blocks: Blocks
    index: int
    layer: Layer | None
    structure: ModelStructure
    tensors: dict[str, Tensor]
    packed: Sequence[str]
    inputs: Sequence[Tensor]
    recipe: Recipe
    record: LayerRecord

    def apply(self, fold: Fold) -> bool:
        """Fold for good; a refusal goes into the record. True if something was changed."""
        result = fold(self.structure, self.tensors)
        self.record.refused += [str(refusal) for refusal in result.refused]
        return bool(result.applied)

    def after(self, fold: Fold) -> dict[str, Tensor]:
        """The layer's tensors as a fold would leave them, for a trial."""
        copies = {name: tensor.clone() for name, tensor in self.tensors.items()}
        fold(self.structure, copies)
        return copies

    def inputs_of(self, name: str, tensors: dict[str, Tensor], bits: int) -> list[Tensor]:
        """The inputs [1, S, K] of the linear with parameter `name`, for each search window."""
        found: list[Tensor] = []

        def see(x: Tensor) -> None:
            found.append(x.reshape(1, -1, x.shape[-1]))  # OPT flattens tokens before its MLP
            raise Stop

        self.blocks.recorder.bits = bits
        with self.blocks.watching({name: see}):
            for x in self.inputs:
                try:
                    self.blocks.run(self.index, tensors, x)
                except Stop:
                    continue
        return found

    def rounded_weight(self, weight: Tensor) -> Tensor:
        """`weight` [N, K] rounded to nearest in the recipe's format."""
        grid = plain_grid(weight, self.recipe.group_size)
        return grid.values(grid.nearest(weight))

    def rounded_output(self, x: Tensor, ref: LinearRef, tensors: dict[str, Tensor]) -> Tensor:
        """The output for `x` [T, K] with weight, if the product packs it, and input rounded."""
        weight = matrix(tensors, ref)
        if ref.weight not in self.packed:
            return x @ weight.t()
        return rounded_act(x) @ self.rounded_weight(weight).t()


def judged_error(
    work: LayerWork, inputs: Sequence[Tensor], exact: Tensor, ref: LinearRef, own: dict[str, Tensor]
) -> float:
    """The output error of a linear as it will be quantized: the last word on a fold.

    inputs  [1, S, K] each, of the folded linear; own: tensors with the folded weight
    exact   outputs [T, N] before the fold, for all tokens of `inputs`
    Rounding to nearest picks the candidates, but what GPTQ then makes of them may be worse than
    no fold. On a sample of output channels, which GPTQ treats alone; one half of the tokens gives
    the Hessian, the other the error.
    """
    x, weight = torch.cat([part.reshape(-1, part.shape[-1]) for part in inputs]), matrix(own, ref)
    rows = slice(None, None, -(-len(weight) // ROWS))
    weight, expected = weight[rows], exact[:, rows]
    half = len(x) // 2
    if ref.weight in work.packed:
        x = rounded_act(x)
        hessian = Hessian(x.shape[1], ref.weight, x.device)
        hessian.add(x[:half])
        options = dataclasses.replace(work.recipe.weights(), passes=0)
        found = quantize_linear(weight, hessian.matrix(), options, ref.weight)
        weight = dequantize_weight(found.packed)
    return squared_error(x[half:] @ weight.t(), expected[half:])


def flat_sample(inputs: Sequence[Tensor]) -> Tensor:
    """At most TOKENS of the tokens of `inputs` [1, S, K], evenly spread, [T, K]."""
    x = torch.cat([part.reshape(-1, part.shape[-1]) for part in inputs])
    return x[:: max(1, -(-len(x) // TOKENS))]


def squared_error(found: Tensor, expected: Tensor) -> float:
    """The sum of squared differences."""
    return float((found - expected).double().square().sum())


def over_query_heads(values: Tensor, block: AttentionBlock) -> Tensor:
    """The largest of `values` [heads, D] over the query heads of each key head, [kv_heads, D]."""
    index = torch.tensor(block.kv_of, device=values.device)[:, None].expand_as(values)
    found = values.new_zeros(block.kv_heads, values.shape[1])
    return found.scatter_reduce_(0, index, values, "amax")
