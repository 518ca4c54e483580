"""24 decoder families through qoqc.compile: what is rewritten, what is refused, and the numbers.

The numbers come from a second implementation that shares no graph code: the eager model with its
linears replaced by integer arithmetic on the packed weights, and a cache that rounds.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import Cache, DynamicLayer
from transformers.pytorch_utils import Conv1D

import qoqc
from qoqc import pipeline
from qoqc.decode.probe import probe_kv
from qoqc.ir import ops
from qoqc.quant.activation import quantize_act
from qoqc.quant.weight import expand_int8, quantize_weight
from qoqc.runtime.kv_cache import KV4Cache
from qoqc.testing import FAMILIES, VOCAB, sqnr, tiny_model

PREFILL, STEPS = 6, 8
CACHE = 64

HEAD = {"output head": 1}
TIED = {"shares its weight with the embedding": 1}
EXPERTS = {"experts are one 3-D parameter: left in 16 bit": 4}
ROUTERS = {"router of experts": 2}
OWN_ATTENTION = {"read outside SDPA: runs as dequantize + its own attention": 2}
MLA = {"multiplies the whole cache at every step": 2, "router of experts": 1}


class Expected(NamedTuple):
    """Of a decode graph: counts, refusals by reason; and dB of its logits against 16 bit.

    sqnr is the reference's own figure, rounded down: what 4 bits cost these random weights.
    left names the linears that stay in 16 bit, for the reference to do the same.
    """

    linears: int
    attentions: int
    refusals: dict[str, int]
    sqnr: float
    left: tuple[str, ...] = ("lm_head",)


TABLE = {
    "llama": Expected(14, 2, HEAD, 10.0),
    "mistral": Expected(14, 2, HEAD, 10.0),
    "qwen2": Expected(14, 2, HEAD, 11.5),
    "qwen3": Expected(14, 2, HEAD, 10.0),
    "gemma": Expected(14, 2, TIED, 24.5),
    "gemma2": Expected(14, 2, TIED, 20.5),  # soft-capped
    "gemma3_text": Expected(14, 2, TIED, 21.5),
    "phi": Expected(12, 2, HEAD, 14.0),
    "phi3": Expected(8, 2, HEAD, 11.5),
    "gpt_neox": Expected(8, 2, HEAD, 14.0),
    "gpt2": Expected(8, 2, TIED, 15.0),
    "opt": Expected(12, 2, TIED, 13.5),
    "falcon": Expected(8, 2, TIED, 14.0),
    "starcoder2": Expected(12, 2, TIED, 13.0),
    "stablelm": Expected(14, 2, HEAD, 10.0),
    "olmo2": Expected(14, 2, HEAD, 10.0),
    "cohere": Expected(14, 2, TIED, 13.5),
    "granite": Expected(14, 2, HEAD, 7.0),
    "mixtral": Expected(8, 2, {**HEAD, **ROUTERS, **EXPERTS}, 10.0),
    "qwen3_moe": Expected(8, 2, {**HEAD, **ROUTERS, **EXPERTS}, 13.0),
    # one dense layer, one of experts; the cache holds latents, which kv_b_proj expands
    "deepseek_v3": Expected(
        14,
        0,
        {**HEAD, **MLA, **OWN_ATTENTION, "experts are one 3-D parameter: left in 16 bit": 2},
        8.5,
        ("lm_head", "*.kv_b_proj"),
    ),
    "gpt_oss": Expected(8, 2, {**HEAD, **ROUTERS, **EXPERTS}, 10.5),  # attention sinks
    "bloom": Expected(8, 0, {**TIED, **OWN_ATTENTION}, 16.5),  # alibi
    # alibi, sliced by a tensor (see test_mpt): its attention module runs outside every graph
    "mpt": Expected(4, 0, {}, 17.0, ("lm_head", "*.Wqkv", "*.out_proj")),
}

OVER_PAGES = ("gemma2", "gpt_oss")  # no SDPA: a prompt, too, is attended to by a kernel of ours
NO_POSITIONS = ("bloom", "mpt")
NEEDS_MASK = ("opt",)  # without one it makes its own, of a length read off the cache: a break


def expected_of(family: str) -> Expected:
    """The row of TABLE; skips what the installed transformers cannot do.

    Older releases build BLOOM's alibi for the prompt's length, which is a shape error with any
    static cache, also their own.
    """
    release = tuple(map(int, transformers.__version__.split(".")[:2]))
    if family == "bloom" and release < (5, 23):
        pytest.skip(f"transformers {transformers.__version__}: BLOOM fails with any static cache")
    return TABLE[family]


class RoundedLayer(DynamicLayer):
    """Keys and values rounded to 4 bit where KV4Cache says they are, kept as plain tensors."""

    def update(self, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        old = self.keys, self.values
        first = self.keys.numel() == 0
        rounded = ops.kv4_round(key, 4), ops.kv4_round(value, 4)
        self.keys, self.values = (
            new if first else torch.cat((past, new), dim=-2)
            for past, new in zip(old, rounded, strict=True)
        )
        if first:
            return key, value
        if key.shape[2] == 1:
            return self.keys, self.values
        return torch.cat((old[0], key), dim=-2), torch.cat((old[1], value), dim=-2)


def rounded_cache() -> Cache:
    return Cache(layers=[RoundedLayer(), RoundedLayer()])


def fake_quantize(model: Any, left: tuple[str, ...]) -> list[str]:
    """Replace the forwards of all linears but those matching `left`; returns the names replaced."""
    names = []
    for name, module in model.named_modules():
        if not isinstance(module, (torch.nn.Linear, Conv1D)):
            continue
        if any(fnmatch.fnmatch(name, pattern) for pattern in left):
            continue
        weight = module.weight.t() if isinstance(module, Conv1D) else module.weight
        packed = quantize_weight(weight.detach(), 128)
        module.forward = _integer_forward(expand_int8(packed), packed.channel_scale, module.bias)
        names.append(name)
    return names


def _integer_forward(w8: torch.Tensor, channel_scale: torch.Tensor, bias: Any) -> Any:
    def forward(x: torch.Tensor) -> torch.Tensor:
        xq, token_scale, _ = quantize_act(x)
        y = (xq.double() @ w8.double().t()).float() * channel_scale * token_scale[..., None]
        return y if bias is None else y + bias

    return forward


def steps(model: Any, family: str, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """Teacher-forced logits [1, PREFILL + STEPS, vocab]: one prefill, then token by token."""
    logits = []
    with torch.no_grad():
        for start, stop in [(0, PREFILL)] + [(i, i + 1) for i in range(PREFILL, ids.shape[1])]:
            extra: dict[str, Any] = {}
            if family not in NO_POSITIONS:
                extra["position_ids"] = torch.arange(start, stop)[None]
            if family in NEEDS_MASK:
                length = CACHE if isinstance(cache, KV4Cache) else stop
                extra["attention_mask"] = torch.ones(1, length, dtype=torch.long)
            chunk = ids[:, start:stop]
            logits.append(model(chunk, past_key_values=cache, use_cache=True, **extra).logits)
    return torch.cat(logits, dim=1)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(1))


def exact_and_reference(family: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the 16-bit model and of the reference implementation of its quantized form."""
    model, ids = tiny_model(family), tokens(1, PREFILL + STEPS)
    if family in OVER_PAGES:  # releases before 5.23 take SDPA for Gemma 2, which drops its soft cap
        model.set_attn_implementation("eager")
    exact = steps(model, family, ids, Cache(layers=[DynamicLayer(), DynamicLayer()]))
    fake_quantize(model, TABLE[family].left)
    return exact, steps(model, family, ids, rounded_cache())


def compiled(family: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch._dynamo.reset()
    pipeline.reports.clear()
    model = qoqc.compile(tiny_model(family, dtype), glue="eager")
    cache = KV4Cache(model.config, CACHE)
    cache.allocate(1, probe_kv(model), model.device)
    return steps(model, family, tokens(1, PREFILL + STEPS), cache)


def assert_matches(got: torch.Tensor, reference: torch.Tensor) -> None:
    """Equal to fp32 noise, position by position.

    Both sides add the same integers, so only attention sums differ (1e-7). Where that noise moves
    one activation over a rounding border, the positions from there on differ by up to 1e-2; on
    other CPUs that may happen to a few, never to most. A wrong head, mask or bias gives 1e-1.
    """
    error = ((got - reference).norm(dim=-1) / reference.norm(dim=-1)).flatten()
    assert error.max() < 1e-2, error
    assert (error < 1e-5).sum() >= 0.7 * error.numel(), error


@pytest.mark.parametrize("family", [family for family in TABLE if family != "mpt"])
def test_family(family: str) -> None:
    expected = expected_of(family)
    exact, reference = exact_and_reference(family)
    got = compiled(family)
    prefill, decode = pipeline.reports  # no graph break, no recompile: two graphs
    assert prefill.counts["linear"] == decode.counts["linear"] == expected.linears
    prompts = expected.attentions if family in OVER_PAGES else 0
    assert (prefill.counts["attention"], decode.counts["attention"]) == (
        prompts,
        expected.attentions,
    )
    assert Counter(r.reason for r in decode.refusals) == expected.refusals
    assert {r for r in decode.refusals if r not in prefill.refusals} == {
        r for r in decode.refusals if r.reason in OWN_ATTENTION
    }
    assert_matches(got, reference)
    assert sqnr(exact, reference) > expected.sqnr
    assert sqnr(exact, got) > expected.sqnr


def test_mpt() -> None:
    """The break is transformers' own: MptAttention slices its bias by the cache's length.

    The linears of the attention run in 16 bit, those of the MLP in one graph for all layers.
    """
    exact, reference = exact_and_reference("mpt")
    got = compiled("mpt")
    assert_matches(got, reference)
    assert sqnr(exact, got) > TABLE["mpt"].sqnr
    assert max(report.counts["linear"] for report in pipeline.reports) == 2
    assert not any(report.counts["attention"] for report in pipeline.reports)


def test_table_is_complete() -> None:
    assert TABLE.keys() == FAMILIES.keys()
    assert len(TABLE) == 24


@pytest.mark.parametrize("family", ["qwen3", "phi"])
def test_bfloat16(family: str) -> None:
    """16-bit glue adds its own rounding, well below what 4 bits cost."""
    exact, _ = exact_and_reference(family)
    got = compiled(family, torch.bfloat16)
    assert got.dtype == torch.bfloat16
    assert sqnr(exact, got.float()) > TABLE[family].sqnr - 1


class Forced(LogitsProcessor):
    """Makes generate() choose given tokens [B, steps]."""

    def __init__(self, chosen: torch.Tensor, prompt: int) -> None:
        self.chosen, self.prompt = chosen, prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        choice = self.chosen[:, input_ids.shape[1] - self.prompt]
        return torch.full_like(scores, -torch.inf).scatter(1, choice[:, None], 0.0)


def forced_logits(model: Any, padding: int, **kwargs: Any) -> torch.Tensor:
    """Logits [2, STEPS, vocab] from generate() on a batch whose first row is left-padded."""
    ids = tokens(2, PREFILL + STEPS)
    prompt, mask = ids[:, :PREFILL].clone(), torch.ones(2, PREFILL, dtype=torch.long)
    prompt[0, :padding], mask[0, :padding] = 0, 0
    out = model.generate(
        prompt,
        attention_mask=mask,
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        logits_processor=LogitsProcessorList([Forced(ids[:, PREFILL:], PREFILL)]),
        output_logits=True,
        return_dict_in_generate=True,
        do_sample=False,
        **kwargs,
    )
    return torch.stack(out.logits, dim=1)


@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "gpt_oss", "bloom"])
def test_left_padded_generate(family: str) -> None:
    """Masks made by generate(): sliding windows, learned positions, sinks, alibi."""
    torch._dynamo.reset()
    pipeline.reports.clear()
    reference = tiny_model(family)
    fake_quantize(reference, expected_of(family).left)
    expected = forced_logits(reference, 3, past_key_values=rounded_cache())
    got = forced_logits(qoqc.compile(tiny_model(family), glue="eager"), 3)
    assert len(pipeline.reports) == 2
    assert_matches(got, expected)
