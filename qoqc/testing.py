"""Tiny random decoders of many families and small tools to look into graphs, for tests."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule
from transformers import AutoConfig, AutoModelForCausalLM

from qoqc.config import Options
from qoqc.passes.context import Context
from qoqc.runtime.dynamo import copy_graph
from qoqc.runtime.weights import WeightStore

VOCAB = 384
"""Differs from every other size of the tiny models, so that an output head is told by its rows."""

_SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_MOE: dict[str, Any] = {"num_experts_per_tok": 2, "head_dim": 32}
_MLA: dict[str, Any] = {
    **{"num_key_value_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 64},
    **{"qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32},
}
_EXPERTS: dict[str, Any] = {
    **{"moe_intermediate_size": 64, "num_experts_per_tok": 2, "n_shared_experts": 1},
    **{"n_group": 2, "topk_group": 1},
}
_ALTERNATING = ["sliding_attention", "full_attention"]

_PLAIN = ("llama", "qwen2", "phi", "phi3", "falcon", "stablelm", "olmo2", "cohere", "granite")

FAMILIES: dict[str, dict[str, Any]] = {
    **{family: {} for family in _PLAIN},
    "mistral": {"head_dim": 32, "sliding_window": 8},
    "qwen3": {"head_dim": 32},
    "gemma": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "sliding_window": 8},
    "gemma3_text": {"head_dim": 32, "sliding_window": 8, "layer_types": _ALTERNATING},
    "gpt_neox": {"rotary_pct": 0.25},
    "gpt2": {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "opt": {"ffn_dim": 256, "word_embed_proj_dim": 128},
    "starcoder2": {"sliding_window": 8},
    "mixtral": {"num_local_experts": 4, **_MOE},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 64, **_MOE},
    "deepseek_v3": {**_MLA, "n_routed_experts": 4, "first_k_dense_replace": 1, **_EXPERTS},
    "gpt_oss": {"num_local_experts": 4, "sliding_window": 8, "layer_types": _ALTERNATING, **_MOE},
    "bloom": {"hidden_size": 128, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 128, "n_layers": 2, "n_heads": 4, "max_seq_len": 512, "expansion_ratio": 2},
}
"""Config changes by transformers model type. Sliding windows are short enough to matter."""

_OWN_NAMES = frozenset({"gpt2", "bloom", "mpt"})


def tiny_config(family: str, **changes: Any) -> Any:
    """The two-layer config of a family; KeyError for a family that is not in FAMILIES."""
    sizes = {} if family in _OWN_NAMES else _SIZES
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    values = {**sizes, **tokens, "vocab_size": VOCAB, **FAMILIES[family], **changes}
    return AutoConfig.for_model(family, **values)


def tiny_model(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model of a family on the CPU: the same weights every time, no dead directions."""
    with torch.random.fork_rng():  # what scramble() only jitters starts the same every time too
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **changes)).eval()
    scramble(model)
    return model.to(dtype)


@torch.no_grad()
def scramble(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights of std 1/sqrt(fan_in), tables of std 0.3; norms and biases jittered where they are.

    So a unit activation stays near unit size and the logits are neither flat nor one-hot.
    """
    generator = torch.Generator().manual_seed(seed)
    tables = {
        id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)
    }
    for param in model.parameters():
        noise = torch.randn(param.shape, generator=generator)
        if id(param) in tables:
            param.copy_(noise * 0.3)
        elif param.dim() == 1:
            param.nan_to_num_().clamp_(-1, 1).add_(noise * 0.1)
        else:
            param.copy_(noise / math.sqrt(param.shape[-1]))


def sqnr(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Signal to quantization noise of `other` against `reference`, in dB; inf if equal."""
    noise = (other.double() - reference.double()).square().sum()
    signal = reference.double().square().sum()
    return float(10 * torch.log10(signal / noise))


def capture(model: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[GraphModule, list[Any]]:
    """The one graph Dynamo hands to a backend for `model(...)`, and the objects it passes.

    The graph is a copy and may be edited. Runs the model once, without gradients.
    """
    found: list[tuple[GraphModule, list[Any]]] = []

    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        found.append((copy_graph(gm), list(inputs)))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(*args, **kwargs)
    (graph,) = found
    return graph


def context(gm: GraphModule, inputs: Sequence[Any], **options: Any) -> Context:
    """A Context for `gm` with a weight store of its own."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    ctx = Context.of(placeholders, inputs, Options.parse(options))
    ctx.store = WeightStore()
    return ctx


def run_graph(gm: GraphModule, ctx: Context) -> Any:
    """The outputs of `gm` on its context's values and the tensors that passes bound."""
    gm.graph.lint()
    gm.recompile()
    nodes = [node for node in gm.graph.nodes if node.op == "placeholder"]
    with torch.no_grad():
        return gm(*[ctx.bound[n] if n in ctx.bound else ctx.values[n] for n in nodes])


def targets(gm: GraphModule) -> Counter[str]:
    """How often each function or method is called, by short name: `w4a8_linear`, `view`."""
    return Counter(
        node.target
        if isinstance(node.target, str)
        else getattr(node.target, "_opname", node.target.__name__)
        for node in gm.graph.nodes
        if node.op in ("call_function", "call_method")
    )
