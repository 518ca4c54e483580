"""One quantized linear of a foreign checkpoint."""

from __future__ import annotations

import dataclasses

import torch

from qoqc.errors import Unsupported
from qoqc.formats.files import TensorFiles
from qoqc.ir.spec import GROUP
from qoqc.quant.weight import PackedWeight


@dataclasses.dataclass(frozen=True)
class Found:
    """The weight of a linear as its source means it.

    values  fp32 [N, K], exact
    packed  the same integers in our form, where our grid has them
    scale   fp32 [N, K/128], of which the values are whole multiples, at most 15 apart in a group;
            None where the source's groups are smaller than 128, or not neighbours
    """

    values: torch.Tensor
    packed: PackedWeight | None = None
    scale: torch.Tensor | None = None


def per_group(scale: torch.Tensor, k: int) -> torch.Tensor | None:
    """Scales [N, G] of equal groups of K input channels as ones of groups of 128, if they are."""
    size = k // scale.shape[1]
    return None if size % GROUP else scale.repeat_interleave(size // GROUP, dim=1)


class Layer:
    """The tensors of one quantized linear: those whose names begin with its module's name."""

    def __init__(self, files: TensorFiles, module: str) -> None:
        """The linear `module`, such as model.layers.0.mlp.up_proj."""
        self.files = files
        self.module = module

    def has(self, suffix: str) -> bool:
        """Whether the linear has a tensor of that name."""
        return f"{self.module}.{suffix}" in self.files

    def take(
        self, suffix: str, dtypes: tuple[torch.dtype, ...], *shape: int | None
    ) -> torch.Tensor:
        """The tensor of that name; see TensorFiles.take."""
        return self.files.take(f"{self.module}.{suffix}", dtypes, shape)

    def wrong(self, suffix: str, reason: str) -> Unsupported:
        """The error for a tensor whose values cannot be right."""
        return Unsupported(f"{self.files.directory}: {self.module}.{suffix} {reason}")
