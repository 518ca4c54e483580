"""The GPU run of a whole model against the CPU's integer reference.

Every op of a generation must give what its reference gives on the same inputs, bit for bit where
the op is integer; norms and activations, whose sums and functions end in other bits, to one step
of int8. Whole token sequences cannot be held to that: the fp32 glue (norms, RoPE, SiLU)
sums in another order on another device, a last-bit difference now and then crosses a rounding
boundary of an int8 or int4 code, and from there on the logits differ by about as much as rounding
itself moves them. So both devices are fed the CPU's tokens, and may choose differently only at a
near tie: where the CPU's own logits of the two tokens are closer than quantization moved the
logits of that step away from the 16-bit model's.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qoqc
from qoqc.codegen import dispatch
from qoqc.codegen.kernels import few_linear
from qoqc.decode.probe import probe_kv

TOKENS = 200
PROMPTS = ("Tell me a story about a brave little fox.", "Write about a lost red ball.")
ATTENTION_LIMIT = {torch.float32: 1e-5, torch.bfloat16: 8e-3}
"""Largest difference over largest value; for bf16 one rounding step of the output (2**-7)."""


def _load(path: Path, device: str, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval().to(device)


def _prompt(path: Path, text: str) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(path)
    chat = [{"role": "user", "content": text}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    assert isinstance(ids, torch.Tensor)
    return ids


def _generate(model: Any, prompt: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole sequence [T] and the logits of each new token [tokens, V], on the CPU."""
    out = model.generate(
        input_ids=prompt.to(model.device),
        attention_mask=torch.ones_like(prompt).to(model.device),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0].cpu(), torch.stack(out.logits)[:, 0].float().cpu()


def _forced(model: Any, sequence: torch.Tensor, start: int, kv_bits: Any) -> torch.Tensor:
    """The logits [T - start, V] that precede each token from `start` on, fed `sequence` [T]."""
    ids = sequence[None].to(model.device)
    cache = qoqc.KV4Cache(model.config, len(sequence), kv_bits)
    cache.allocate(1, probe_kv(model), model.device)
    cuts = [0, *range(start, len(sequence))]
    steps = []
    with torch.no_grad():
        for first, last in itertools.pairwise(cuts):
            out = model(input_ids=ids[:, first:last], past_key_values=cache, use_cache=True)
            steps.append(out.logits[0, -1].float().cpu())
    return torch.stack(steps)


def _assert_differs_only_at_near_ties(
    exact: Any, expected: tuple[torch.Tensor, torch.Tensor], chosen: torch.Tensor, start: int
) -> None:
    """`chosen` [T - start] against the CPU's (sequence [T], logits [T - start, V])."""
    sequence, logits = expected
    own = sequence[start:]
    with torch.no_grad():
        unquantized = exact(input_ids=sequence[None]).logits[0, start - 1 : -1].float()
    noise = (unquantized - logits).abs().amax(1)
    gap = logits.gather(1, own[:, None])[:, 0] - logits.gather(1, chosen[:, None])[:, 0]
    differing = own != chosen
    print(f"{int((~differing).sum())} of {len(own)} tokens equal", end="")
    if differing.any():
        ratio = (gap / noise)[differing]
        print(f"; the others {float(ratio.max()):.2f} of the rounding noise apart at most", end="")
    print()
    assert (gap < noise)[differing].all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize("kv_bits", [4, 8])
def test_gpu_tokens_equal_cpu_tokens(
    model_dir: Path, dtype: torch.dtype, group_size: int, kv_bits: int
) -> None:
    options = {"group_size": group_size, "kv_bits": kv_bits, "glue": "eager"}
    exact = _load(model_dir, "cpu", dtype)
    cpu = qoqc.compile(_load(model_dir, "cpu", dtype), **options)
    gpu = qoqc.compile(_load(model_dir, "cuda", dtype), **options)
    for text in PROMPTS:
        prompt = _prompt(model_dir, text)
        expected = _generate(cpu, prompt, TOKENS)
        start = prompt.shape[1]
        chosen = _forced(gpu, expected[0], start, kv_bits).argmax(-1)
        _assert_differs_only_at_near_ties(exact, expected, chosen, start)


@pytest.mark.gpu
def test_inductor_and_cuda_graphs_give_the_eager_tokens(model_dir: Path) -> None:
    exact = _load(model_dir, "cpu", torch.bfloat16)
    eager = qoqc.compile(_load(model_dir, "cuda", torch.bfloat16), glue="eager")
    graphs = qoqc.compile(_load(model_dir, "cuda", torch.bfloat16))
    prompt = _prompt(model_dir, PROMPTS[0])
    start = prompt.shape[1]
    sequence, logits = _generate(eager, prompt, 64)
    chosen = _forced(graphs, sequence, start, 4).argmax(-1)
    _assert_differs_only_at_near_ties(exact, (sequence, logits), chosen, start)
    repeated = [_generate(graphs, prompt, 64)[0] for _ in range(3)]
    assert torch.equal(repeated[0], repeated[1])
    assert torch.equal(repeated[0], repeated[2])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("group_size", [128, -1])
def test_every_op_of_a_generation_equals_its_reference(
    model_dir: Path, dtype: torch.dtype, group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: dict[str, int] = {}
    for name, kernel in list(dispatch.IMPLEMENTATIONS.items()):
        checked = _checked(name, kernel, calls, ATTENTION_LIMIT[dtype])
        monkeypatch.setitem(dispatch.IMPLEMENTATIONS, name, checked)
    model = qoqc.compile(
        _load(model_dir, "cuda", dtype),
        group_size=group_size,
        glue="eager",
        release=True,
        graphs=False,  # what is compared must run, and wait for the CPU
    )
    _generate(model, _prompt(model_dir, PROMPTS[0]), 20)
    layers = model.config.num_hidden_layers
    # 20 forwards of 4 linears, which read two norms, attention's output and silu(gate) * up;
    # the first is a prefill, which takes two kernels for each of them, a step takes one
    assert calls["norm_linear"] == 20 * 2 * layers
    assert calls["quant_linear"] == 20 * 2 * layers
    assert calls["kv4_rotate_append"] == layers
    assert calls["kv4_decode"] == 19 * layers


def _checked(
    name: str, kernel: Callable[..., Any], calls: dict[str, int], limit: float
) -> Callable[..., Any]:
    """`kernel`, compared at every call with the op's reference on the CPU."""
    op = operator.attrgetter(name)(torch.ops.qoqc).default
    arguments = op._schema.arguments
    written = [i for i, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write]

    def run(*args: Any) -> Any:
        copies = [a.cpu() if isinstance(a, torch.Tensor) else a for a in args]
        result = kernel(*args)
        wanted = op(*copies)
        calls[name] = calls.get(name, 0) + 1
        for index in written:
            assert torch.equal(args[index].cpu(), copies[index]), (name, arguments[index].name)
        if name in ("kv4_attention", "kv4_decode"):
            error = (result.cpu().double() - wanted.double()).abs().max()
            assert error <= limit * wanted.double().abs().max()
            return result
        if name == "w4a8_glu":
            # silu and then the product may each fall to the other side of a border of rounding
            tolerance = 2 * torch.finfo(result.dtype).eps + 1e-5
            torch.testing.assert_close(result.cpu(), wanted, rtol=tolerance, atol=1e-30)
            return result
        if name == "norm_linear":
            # an integer at a border of rounding moves a sum by one of its many terms
            largest = wanted[0].abs().max().item()
            torch.testing.assert_close(
                result[0].cpu(), wanted[0], rtol=0.0, atol=few_linear.TOLERANCE * largest
            )
            assert torch.equal(result[1].cpu(), wanted[1]), "the residual sum"
            assert result[2].shape == wanted[2].shape
            return result
        if name in ("norm_quant", "act_quant"):
            dtype = args[0].dtype
            _assert_one_step_apart([t.cpu() for t in result], wanted, dtype)
            return result
        if name == "kv4_append":
            return result
        outputs = (result,) if isinstance(result, torch.Tensor) else result
        for got, want in zip(outputs, (wanted,) if len(outputs) == 1 else wanted, strict=True):
            assert torch.equal(got.cpu(), want), name
        return result

    return run


def _assert_one_step_apart(
    got: list[torch.Tensor], want: tuple[torch.Tensor, ...], dtype: torch.dtype
) -> None:
    """A value at a border of rounding may fall to its other side, in `dtype` or as an integer."""
    xq, scale, total, *others = got
    assert ((xq.int() - want[0].int()).abs() <= 1).all()
    torch.testing.assert_close(scale, want[1], rtol=torch.finfo(dtype).eps + 1e-5, atol=0.0)
    assert torch.equal(total, xq.sum(-1, dtype=torch.int32))
    if others:
        assert torch.equal(others[0], want[3]), "the residual sum"
        assert others[1].shape == want[4].shape
