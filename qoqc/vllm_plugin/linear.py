"""A linear of vLLM that runs on our kernels. Imports vLLM: see register.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.utils import set_weight_attrs

from qoqc.codegen import dispatch
from qoqc.errors import ArtifactError, Unsupported
from qoqc.ir import ops
from qoqc.vllm_plugin.parts import (
    ROWS,
    FieldLoader,
    Part,
    joined,
    require_finite,
    require_one_kind,
)


class PackedParameter(Parameter):
    """A parameter while it is being loaded, by a FieldLoader that it has as `weight_loader`.

    layer_name  whose it is
    """

    layer_name: str

    @property
    def output_dim(self) -> int:
        """Raise Unsupported: who asks is about to reorder rows (Falcon), and tiles hold 128."""
        raise Unsupported(
            f"{self.layer_name}: vLLM reorders the weights of this model while it loads them, "
            "which it cannot do with packed ones; use qoqc serve for this model"
        )


class QoqLinearMethod(LinearMethodBase):
    """One layer's: made for its packed weights, which become one.

    prefix    the layer's name in vLLM
    parts     what it is made of, in the order of the rows
    as_whole  vLLM knows that the artifact holds a layer of several outputs as one weight
    """

    def __init__(self, prefix: str, parts: Sequence[Part], as_whole: bool = False) -> None:
        """Raises Unsupported for parts of different formats."""
        require_one_kind(parts, prefix)
        self.prefix = prefix
        self.parts = tuple(parts)
        self._as_whole = as_whole
        self._loaders = {field: FieldLoader(field, parts) for field in parts[0].entry.expected()}

    def create_weights(
        self,
        layer: Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Give `layer` the parameters of its format, under the names of the stored tensors.

        vLLM's own weight_loader, in `extra_weight_attrs`, is not used: it counts in rows.

        Raises Unsupported on more than one rank, ArtifactError if the sizes are other ones.
        """
        ranks = get_tensor_model_parallel_world_size()
        if ranks > 1:
            raise Unsupported(
                f"{self.prefix}: the plug-in of qoqc does not split packed weights "
                f"(tensor_parallel_size={ranks}); set it to 1, or use qoqc.load(..., tp={ranks})"
            )
        self._require_sizes(input_size, output_partition_sizes)
        for field in ROWS:
            loader = self._loaders.get(field)
            if loader is None:
                layer.register_parameter(field, None)
                continue
            data = torch.empty(loader.shape, dtype=loader.dtype)
            param = PackedParameter(data, requires_grad=False)
            attrs = {"weight_loader": loader.load, "layer_name": self.prefix}
            set_weight_attrs(param, attrs)
            layer.register_parameter(field, param)

    def process_weights_after_loading(self, layer: Module) -> None:
        """Make one packed weight of what was loaded, and put kernels behind the ops on a GPU.

        Raises ArtifactError if a tensor has not come: vLLM does not look.
        """
        for loader in self._loaders.values():
            missing = loader.missing()
            if missing:
                raise ArtifactError(
                    f"{self.prefix}: {missing[0]} was not loaded; copy the artifact again "
                    "(vLLM's load formats that make weights up or read other files do not work)"
                )
        loaded = {field: cast("Parameter", getattr(layer, field)).data for field in self._loaders}
        require_finite(loaded["channel_scale"], self.parts)
        for field, tensor in joined(loaded, self.parts).items():
            setattr(layer, field, Parameter(tensor, requires_grad=False))
        if loaded["qweight"].is_cuda:
            dispatch.install()

    def apply(self, layer: Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] -> [..., N] in the dtype of x: what the artifact's linear computes."""
        held = cast("dict[str, Tensor | None]", layer._parameters)
        return cast(
            "Tensor",
            ops.w4a8_linear(
                *ops.quantize_act(x),
                held["qweight"],
                held["channel_scale"],
                held["group_word"],
                held["channel_zero"],
                bias,
                None,
                x.dtype,
            ),
        )

    def _require_sizes(self, columns: int, rows: list[int]) -> None:
        stored = [part.entry.out_features for part in self.parts]
        if len(stored) == 1 and len(rows) > 1:
            if not self._as_whole:
                raise Unsupported(
                    f"{self.prefix}: the artifact holds it as one weight, vLLM as {len(rows)}, and "
                    "does not say in which order; use qoqc serve for this model"
                )
            rows = [sum(rows)]
        inside = self.parts[0].entry.in_features
        if stored != rows or inside != columns:
            raise ArtifactError(
                f"{self.prefix}: vLLM expects out_features {rows} and in_features {columns}, the "
                f"artifact has {stored} and {inside}; its config.json describes another model"
            )
