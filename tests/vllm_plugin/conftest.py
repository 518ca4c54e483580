"""What of vLLM 0.32 the plug-in uses, rebuilt small: classes, and how weights reach a layer."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Module, Parameter

PLUGIN = ("qoqc.vllm_plugin.config", "qoqc.vllm_plugin.linear")


class QuantizationConfig:
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}


class LinearMethodBase:
    pass


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(
        self, layer: Module, columns: int, rows: list[int], *_: Any, **attrs: Any
    ) -> None:
        layer.register_parameter("weight", Parameter(torch.empty(sum(rows), columns)))

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.nn.functional.linear(x, layer.weight, bias)


class LinearBase(Module):
    """LinearBase with the constructor of MergedColumnParallelLinear."""

    def __init__(self, config: Any, prefix: str, columns: int, rows: list[int]) -> None:
        super().__init__()
        self.quant_method = config.get_quant_method(self, prefix)
        # by position in ReplicatedLinear, by name in the others
        self.quant_method.create_weights(
            self, columns, rows, columns, sum(rows), torch.bfloat16, weight_loader=self.own
        )
        self.register_parameter("bias", None)

    def own(self, *_: Any) -> None:
        raise AssertionError("vLLM's own weight_loader counts in rows")

    def load(self, name: str, tensor: Tensor, *shard: int | str) -> None:
        """As a model's load_weights does it."""
        param: Any = getattr(self, name)
        param.weight_loader(param, tensor, *shard)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.quant_method.apply(self, x, self.bias)
        return found


class VocabParallelEmbedding(Module):
    pass


class RoutedExperts(Module):
    pass


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The stub, with the plug-in registered: `methods`, `Config`, `LinearBase`, ...

    ranks  what get_tensor_model_parallel_world_size says
    """
    stub = SimpleNamespace(
        ranks=1,
        methods={},
        LinearBase=LinearBase,
        VocabParallelEmbedding=VocabParallelEmbedding,
        RoutedExperts=RoutedExperts,
        UnquantizedLinearMethod=UnquantizedLinearMethod,
    )

    def register_quantization_config(name: str) -> Callable[[type], type]:
        def wrapper(config: type) -> type:
            if not issubclass(config, QuantizationConfig):
                raise ValueError("The quantization config must be a subclass")
            stub.methods[name] = config
            return config

        return wrapper

    def set_weight_attrs(weight: Tensor, attrs: dict[str, Any]) -> None:
        for key, value in attrs.items():
            assert not hasattr(weight, key), f"Overwriting existing tensor attribute: {key}"
            setattr(weight, key, value)

    names: dict[str, dict[str, Any]] = {
        "distributed": {"get_tensor_model_parallel_world_size": lambda: stub.ranks},
        "model_executor.utils": {"set_weight_attrs": set_weight_attrs},
        "model_executor.layers.fused_moe": {"RoutedExperts": RoutedExperts},
        "model_executor.layers.linear": {
            "LinearBase": LinearBase,
            "LinearMethodBase": LinearMethodBase,
            "UnquantizedLinearMethod": UnquantizedLinearMethod,
        },
        "model_executor.layers.quantization": {
            "register_quantization_config": register_quantization_config
        },
        "model_executor.layers.quantization.base_config": {
            "QuantizationConfig": QuantizationConfig
        },
        "model_executor.layers.vocab_parallel_embedding": {
            "VocabParallelEmbedding": VocabParallelEmbedding
        },
    }
    for folder in ("", "model_executor", "model_executor.layers"):
        path = f"vllm.{folder}".rstrip(".")
        monkeypatch.setitem(sys.modules, path, ModuleType(path))
    for name, contents in names.items():
        module = ModuleType(f"vllm.{name}")
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in PLUGIN:
        monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.import_module("qoqc.vllm_plugin.register").register()
    stub.Config = stub.methods["qoq"]
    yield stub
    for name in PLUGIN:
        sys.modules.pop(name, None)
