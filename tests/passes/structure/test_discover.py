"""discover: what is found in every family, and what is reported where something is not known."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from qoqc.errors import Unsupported
from qoqc.passes.structure.discover import discover, structure_of
from qoqc.passes.structure.facts import LinearRef, ModelStructure, index_of
from qoqc.testing import FAMILIES, capture, tiny_model


class Expected(NamedTuple):
    """Facts of the first layer and of the stream; defaults are those of a Llama."""

    kv_of: tuple[int, ...] = (0, 0, 1, 1)
    rope: tuple[str, int] = ("half", 32)
    norm: tuple[str, float] | None = ("rms", 0.0)
    post_norm: bool = False
    head_norm: tuple[tuple[int, ...], bool] | None = None  # (shape of the weight, spans heads)
    bias: str = ""  # of q, k, v, o
    mlp: tuple[str, bool, int] = ("silu", True, 256)  # (activation, gated, intermediate)
    mlp_bias: bool = False
    experts: int = 0
    parallel: bool = False
    tied: bool = False
    tables: int = 1
    softcap: float | None = None
    windows: tuple[int | None, ...] = (None, None)
    stream_norms: int = 0


MHA = (0, 1, 2, 3)
GPT: dict[str, Any] = {"kv_of": MHA, "bias": "qkvo", "mlp_bias": True, "norm": ("layer", 0.0)}
GEMMA: dict[str, Any] = {"norm": ("rms", 1.0), "mlp": ("gelu_tanh", True, 256), "tied": True}
LAYER: Any = ("layer", 0.0)

TABLE = {
    "llama": Expected(),
    "mistral": Expected(windows=(8, 8)),
    "qwen2": Expected(bias="qkv"),
    "qwen3": Expected(head_norm=((32,), False)),
    "phi": Expected(
        rope=("half", 16),
        norm=LAYER,
        bias="qkvo",
        mlp=("gelu_tanh", False, 256),
        mlp_bias=True,
        parallel=True,
    ),
    "phi3": Expected(),
    "falcon": Expected(
        kv_of=(0, 0, 0, 0), norm=LAYER, mlp=("gelu", False, 512), parallel=True, tied=True
    ),
    "stablelm": Expected(rope=("half", 8), norm=LAYER),
    "olmo2": Expected(norm=None, post_norm=True, head_norm=((128,), True)),
    "cohere": Expected(rope=("interleaved", 32), norm=LAYER, parallel=True, tied=True),
    "granite": Expected(),
    "gemma": Expected(**GEMMA),
    "gemma2": Expected(**GEMMA, post_norm=True, softcap=50.0, windows=(8, None)),
    "gemma3_text": Expected(**GEMMA, post_norm=True, head_norm=((32,), False), windows=(8, None)),
    "gpt_neox": Expected(**GPT, rope=("half", 8), mlp=("gelu", False, 256), parallel=True),
    "gpt2": Expected(**GPT, rope=("none", 0), mlp=("gelu_tanh", False, 512), tied=True, tables=2),
    "opt": Expected(**GPT, rope=("none", 0), mlp=("relu", False, 256), tied=True, tables=2),
    "starcoder2": Expected(
        norm=LAYER,
        bias="qkvo",
        mlp=("gelu_tanh", False, 256),
        mlp_bias=True,
        tied=True,
        windows=(8, 8),
    ),
    "mixtral": Expected(experts=4),
    "qwen3_moe": Expected(head_norm=((32,), False), experts=4, mlp=("silu", True, 64)),
    "bloom": Expected(
        **GPT, rope=("none", 0), mlp=("gelu_tanh", False, 512), tied=True, stream_norms=1
    ),
    "mpt": Expected(kv_of=MHA, rope=("none", 0), norm=LAYER, mlp=("gelu", False, 512), tied=True),
}
PARTIAL = {"deepseek_v3", "gpt_oss"}
"""Families with parts that are not recognised; they have tests of their own."""


def test_every_family_is_tested() -> None:
    assert TABLE.keys() | PARTIAL == FAMILIES.keys()


@pytest.mark.parametrize("family", TABLE)
def test_family(family: str) -> None:
    expected, structure = TABLE[family], structure_of(tiny_model(family))
    assert structure.problems == structure.stream.problems == ()
    assert [layer.name.rpartition(".")[2] for layer in structure.layers] == ["0", "1"]
    attentions = [layer.attention for layer in structure.layers]
    layer, attention = structure.layers[0], attentions[0]
    assert attention is not None
    (mlp,) = layer.mlps
    head_norm = attention.q_norm
    found = Expected(
        kv_of=attention.kv_of,
        rope=(attention.rope, attention.rotary_dim),
        norm=None if mlp.norm is None else (mlp.norm.kind, mlp.norm.offset),
        post_norm=mlp.post_norm is not None,
        head_norm=None if head_norm is None else (head_norm.norm.shape, head_norm.spans_heads),
        bias="".join(n for n in "qkvo" if getattr(attention, n).bias is not None),
        mlp=(mlp.activation, mlp.gate is not None, mlp.down.in_features),
        mlp_bias=mlp.up.bias is not None and mlp.down.bias is not None,
        experts=mlp.down.experts,
        parallel=layer.parallel,
        tied=structure.stream.tied,
        tables=len(structure.stream.embeddings),
        softcap=attention.softcap,
        windows=tuple(None if a is None else a.window for a in attentions),
        stream_norms=len(structure.stream.stream_norms),
    )
    assert found == expected
    assert (attention.norm is None) == (expected.norm is None)
    assert (attention.post_norm is not None) == expected.post_norm
    assert (attention.k_norm is not None) == (attention.q_norm is not None)
    assert (attention.heads, attention.head_dim, attention.value_dim) == (4, 32, 32)
    assert structure.stream.width == 128
    assert len(structure.stream.producers) == 4
    assert structure.stream.final_norm is not None


def all_refs(structure: ModelStructure) -> list[LinearRef]:
    stream = structure.stream
    refs = [ref for consumer in stream.consumers for ref in consumer.linears]
    refs += [producer.linear for producer in stream.producers]
    for layer in structure.layers:
        blocks: list[Any] = [b for b in (layer.attention, *layer.mlps) if b is not None]
        fields = [getattr(b, f.name) for b in blocks for f in dataclasses.fields(b)]
        refs += [value for value in fields if isinstance(value, LinearRef)]
    assert stream.head is not None
    return [*refs, stream.head]


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_sizes_are_the_models(family: str) -> None:
    model = tiny_model(family)
    parameters = dict(model.named_parameters())
    structure = structure_of(model)
    assert set(structure.stream.embeddings) <= parameters.keys()
    read = set()
    for ref in all_refs(structure):
        sizes = [ref.parameter_rows, ref.in_features]
        sizes = sizes[::-1] if ref.transposed else sizes
        assert list(parameters[ref.weight].shape) == [ref.experts, *sizes][not ref.experts :]
        assert ref.index().max() < ref.parameter_rows
        read.add(ref.weight)
        if ref.bias is not None:
            assert parameters[ref.bias].shape[-1] == ref.parameter_rows
            read.add(ref.bias)
    # every matrix of a model whose attentions are all known is some linear of its structure
    if family != "deepseek_v3":
        matrices = {name for name, p in parameters.items() if p.dim() > 1}
        assert matrices <= read | set(structure.stream.embeddings)


def rows(family: str, part: str) -> Tensor:
    attention = structure_of(tiny_model(family)).layers[1].attention
    assert attention is not None
    ref: LinearRef = getattr(attention, part)
    return ref.index()


def test_rows_of_fused_weights() -> None:
    whole = torch.arange(256)
    assert torch.equal(rows("phi3", "q"), whole[:128])
    assert torch.equal(rows("phi3", "v"), whole[192:])
    per_head = torch.arange(384).view(4, 3, 32)  # [heads, q/k/v, channel]
    assert torch.equal(rows("gpt_neox", "k"), per_head[:, 1].flatten())
    assert torch.equal(rows("bloom", "v"), per_head[:, 2].flatten())
    assert torch.equal(rows("falcon", "k"), torch.arange(128, 160))
    assert torch.equal(rows("gpt2", "v"), torch.arange(256, 384))


def test_grouped_heads_of_falcon() -> None:
    changes = {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}
    attention = structure_of(tiny_model("falcon", **changes)).layers[0].attention
    assert attention is not None
    grouped = torch.arange(256).view(2, 4, 32)  # [kv heads, 2 queries + key + value, channel]
    assert torch.equal(attention.q.index(), grouped[:, :2].flatten())
    assert torch.equal(attention.k.index(), grouped[:, 2].flatten())
    assert attention.kv_of == (0, 0, 1, 1)
    # this class adds the bias with a sum of its own
    assert attention.o.bias == "transformer.h.0.self_attention.dense.bias"


def test_experts() -> None:
    (mlp,) = structure_of(tiny_model("mixtral")).layers[0].mlps
    assert mlp.gate is not None
    assert mlp.gate.weight == mlp.up.weight == "model.layers.0.mlp.experts.gate_up_proj"
    assert (mlp.gate.rows, mlp.up.rows) == (((0, 256),), ((256, 512),))
    assert mlp.router is not None
    assert mlp.router.weight == "model.layers.0.mlp.gate.weight"


def test_shared_experts_and_latent_attention() -> None:
    structure = structure_of(tiny_model("deepseek_v3"))
    routed, shared = structure.layers[1].mlps
    assert (routed.down.experts, shared.down.experts) == (4, 0)
    assert shared.router is None
    assert [layer.attention for layer in structure.layers] == [None, None]
    assert "2 of 2 attentions not recognised" in structure.problems
    first = "model.layers.0.self_attn.o_proj.weight: the keys before it do not come from one linear"
    assert structure.problems[0] == first
    # what reads and writes the stream is known all the same
    assert structure.stream.problems == ()
    assert len(structure.stream.producers) == 5


def test_clamped_experts_with_biases() -> None:
    structure = structure_of(tiny_model("gpt_oss"))
    assert [layer.mlps for layer in structure.layers] == [(), ()]
    assert "model.layers.0.mlp.experts.down_proj: its input is not" in structure.problems[0]
    (producer,) = [
        p
        for p in structure.stream.producers
        if p.linear.weight == "model.layers.1.mlp.experts.down_proj"
    ]
    assert producer.linear.bias == "model.layers.1.mlp.experts.down_proj_bias"
    assert producer.linear.transposed


def test_norms_of_gemma() -> None:
    structure = structure_of(tiny_model("gemma3_text"))
    assert {c.norm.offset for c in structure.stream.consumers if c.norm is not None} == {1.0}
    attention = structure.layers[0].attention
    assert attention is not None
    assert attention.k_norm is not None
    assert torch.equal(attention.k_norm.index(), torch.arange(32).expand(2, 32))


def test_multipliers_of_the_embedding_and_the_branches() -> None:
    structure = structure_of(
        tiny_model("granite", embedding_multiplier=12.0, residual_multiplier=0.5)
    )
    assert structure.stream.multipliers == (12.0, 0.5)


def test_post_norm_architecture_is_reported() -> None:
    stream = structure_of(tiny_model("opt", do_layer_norm_before=False)).stream
    # two norms per layer are added to; behind the last one there is only the head
    assert len(stream.stream_norms) == 3
    assert stream.final_norm is not None
    assert stream.final_norm.weight == "model.decoder.layers.1.final_layer_norm.weight"


def test_the_graph_is_left_alone() -> None:
    model = tiny_model("llama")
    gm, inputs = capture(model, input_ids=torch.arange(6)[None], use_cache=False)
    before = str(gm.graph)
    assert discover(gm, inputs) == structure_of(model)
    assert str(gm.graph) == before


class Small(nn.Module):
    """As little of a decoder as can be captured."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(384, 16)
        self.head = nn.Linear(16, 384)

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        return self.head(self.table(input_ids))


def test_capturing_again_does_not_run_into_limits() -> None:
    model = Small()
    # Dynamo's limit is 8 graphs per function
    found = {structure_of(model) for _ in range(9)}
    assert [s.stream.embeddings for s in found] == [("table.weight",)]


def test_a_graph_break_is_an_error() -> None:
    class Broken(Small):
        def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
            x = self.table(input_ids)
            torch._dynamo.graph_break()
            return self.head(x)

    with pytest.raises(Unsupported, match="captured 2 graphs of its forward"):
        structure_of(Broken())


def test_columns_of_o_are_the_heads_in_order() -> None:
    attention = structure_of(tiny_model("gemma2")).layers[0].attention
    assert attention is not None
    assert torch.equal(index_of(attention.columns), torch.arange(128))
