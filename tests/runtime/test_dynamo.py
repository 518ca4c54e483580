"""The private corners of torch that qoqc leans on: fails loudly when a release moves them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from qoqc.runtime import dynamo
from qoqc.runtime.dynamo import add_static_input, copy_graph, qualified_name
from qoqc.testing import capture


class Source:
    def __init__(self, name: str) -> None:
        self.name = name


class Method:
    def __init__(self, name: str) -> None:
        self._name = name

    def name(self) -> str:
        return self._name


MODULES = "._modules"
LAYER = f"L['self']{MODULES}['model']{MODULES}['layers']{MODULES}['0']"


@pytest.mark.parametrize("kind", [Source, Method])
@pytest.mark.parametrize(
    ("source", "name"),
    [
        (f"{LAYER}{MODULES}['up_proj']._parameters['weight']", "model.layers.0.up_proj.weight"),
        ("L['self']._buffers['inv_freq']", "inv_freq"),
        ("L['kwargs']['past_key_values'].layers[1].k_pages", "past_key_values.layers.1.k_pages"),
        # a module that is called self: roberta
        (
            f"{LAYER}{MODULES}['self']{MODULES}['key']._parameters['bias']",
            "model.layers.0.self.key.bias",
        ),
    ],
)
def test_names(kind: type, source: str, name: str) -> None:
    node = torch.fx.Graph().placeholder("p")
    node._dynamo_source = kind(source)
    assert qualified_name(node) == name


def test_names_without_a_source() -> None:
    assert qualified_name(torch.fx.Graph().placeholder("plain")) == "plain"


def test_names_of_a_real_graph_are_module_paths() -> None:
    class Outer(nn.Module):
        shift: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
            self.register_buffer("shift", torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x + self.shift

    module = Outer()
    gm, _ = capture(module, torch.ones(1, 4))
    names = {qualified_name(n) for n in gm.graph.nodes if n.op == "placeholder"}
    assert names >= {name for name, _ in module.named_parameters()} | {"shift"}


def test_inputs_are_the_real_parameters() -> None:
    module = nn.Linear(4, 4)
    _, inputs = capture(module, torch.ones(1, 4))
    assert any(value is module.weight for value in inputs)
    assert any(value is module.bias for value in inputs)


def test_copy_keeps_sources_and_leaves_the_original_alone() -> None:
    module = nn.Linear(4, 4)
    seen: list[tuple[GraphModule, int]] = []

    def backend(gm: GraphModule, inputs: list[Tensor]) -> GraphModule:
        copy = copy_graph(gm)
        for old, new in zip(gm.graph.nodes, copy.graph.nodes, strict=True):
            assert old.meta.keys() == new.meta.keys()
            assert getattr(old, "_dynamo_source", None) is getattr(new, "_dynamo_source", None)
        size = len(gm.graph.nodes)
        (output,) = [n for n in copy.graph.nodes if n.op == "output"]
        copy.graph.erase_node(output)
        seen.append((gm, size))
        return gm

    torch._dynamo.reset()
    torch.compile(module, backend=backend)(torch.ones(1, 4))
    (gm, size) = seen[0]
    assert len(gm.graph.nodes) == size


def test_static_inputs_stand_last_and_are_marked() -> None:
    gm, _ = capture(nn.Linear(4, 4), torch.ones(1, 4))
    tensors = torch.zeros(2), torch.zeros(3)
    nodes = [add_static_input(gm.graph, "packed", tensor) for tensor in tensors]
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    assert placeholders[-2:] == nodes
    assert nodes[0].name != nodes[1].name
    for node, tensor in zip(nodes, tensors, strict=True):
        assert node.meta["tensor_dict"]["_dynamo_static_input_type"] == "unguarded"
        assert node.meta["example_value"] is tensor


def test_fake_input_outside_of_a_compilation_is_the_tensor() -> None:
    tensor = torch.zeros(2)
    assert dynamo.fake_input(tensor) is tensor
