"""Compiles kernels for GPUs that are not there; prints a JSON line of facts for each.

A process of its own, because Triton compiles nothing in one that interprets.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import triton

from qoqc.codegen.aot import compile_for
from qoqc.codegen.build import FAMILIES
from qoqc.codegen.kernels.act_quantize import ActSpec
from qoqc.codegen.kernels.few_call import FewSpec
from qoqc.codegen.kernels.kv_round import RoundSpec
from qoqc.codegen.kernels.norm_call import NormSpec
from qoqc.codegen.kernels.quantize import QuantizeSpec
from qoqc.codegen.kernels.rotate_append_call import RotateSpec
from qoqc.codegen.kernels.sampling import SampleSpec
from qoqc.codegen.kernels.step_spec import StepSpec
from qoqc.ir.glue import ActKind
from qoqc.ir.spec import AttentionSpec, KVSpec, LinearSpec, to_json
from qoqc.runtime.device import DeviceKey

DEVICES = (
    DeviceKey("A100", 80, 108, 163 * 1024),
    DeviceKey("L40S", 89, 142, 99 * 1024),
    DeviceKey("H200", 90, 132, 227 * 1024),
)


def cases(arch: int) -> Iterator[tuple[str, Any, int]]:
    """(family, spec, tokens) of what to compile; sm_80 and sm_89 share most of their code."""
    hopper = arch == 90
    formats: tuple[Literal[128, -1], ...] = (128, -1)
    for group_size, tokens in itertools.product(formats, (16, 64, 1024) if hopper else (1024,)):
        yield "gemm_plain", LinearSpec(4096, 6144, group_size, torch.bfloat16), tokens
    for group_size in formats:
        yield "gemm_plain", LinearSpec(4096, 4096, group_size, torch.float16, True, True), 64
        yield "gemm_plain", LinearSpec(328, 201, group_size, torch.bfloat16, True, True), 128
    yield from gemm_ways_cases(hopper)
    if hopper:
        for group_size, tokens in itertools.product(formats, (1, 16, 32, 64, 128, 256, 512, 1024)):
            spec = LinearSpec(4096, 6144, group_size, torch.bfloat16)
            yield "gemm_hopper", spec, tokens
        for group_size, tokens in itertools.product(formats, (64, 1024)):
            spec = LinearSpec(4096, 4096, group_size, torch.float16, True, True)
            yield "gemm_hopper", spec, tokens
        spec = LinearSpec(4096, 28672, 128, torch.bfloat16, has_bias=True, glu=True)
        for name, tokens in (("gemm_plain", 1024), ("gemm_ways", 8), ("gemm_hopper", 1024)):
            yield name, spec, tokens
    yield from few_cases(hopper)
    for features in (128, 300, 4096, 14336, 20000) if hopper else (4096,):
        yield "quantize", QuantizeSpec(features, torch.bfloat16), 1024
    if hopper:
        yield "quantize", QuantizeSpec(4096, torch.bfloat16), 128
        yield "quantize", QuantizeSpec(14336, torch.bfloat16), 16
    yield from glue_cases(hopper)
    yield from attention_cases(hopper)
    yield from rotate_append_cases(hopper)
    yield from step_cases(hopper)
    yield "sample_scores", SampleSpec(128256, True, True, True), 64
    if hopper:
        yield "sample_scores", SampleSpec(50257, has_top_p=True), 1
        yield "sample_scores", SampleSpec(384, has_key=True), 1


def few_cases(hopper: bool) -> Iterator[tuple[str, Any, int]]:
    """Linears of one token with all they can do; on sm_90 short and long tokens too."""
    bf16 = torch.bfloat16
    norm = NormSpec(4096, bf16, round_first=True, has_residual=True)
    yield "few_linear", FewSpec(LinearSpec(4096, 28672, 128, bf16, glu=True), norm), 1
    yield "few_linear", FewSpec(LinearSpec(4096, 4096, -1, torch.float16, True, True)), 1
    if hopper:
        layer = NormSpec(2048, bf16, "layer", has_residual=True, has_bias=True, keep=True)
        yield "few_linear", FewSpec(LinearSpec(2048, 6144, 128, bf16, True), layer), 1
        for k, n in ((328, 201), (8192, 10240), (14336, 4096)):
            yield "few_linear", FewSpec(LinearSpec(k, n, 128, bf16)), 1


def step_cases(hopper: bool) -> Iterator[tuple[str, Any, int]]:
    """A decode step of Llama-3-8B; on sm_90 other heads, masks, norms and 8 bits."""
    kv, bf16 = KVSpec(8, 128, 128), torch.bfloat16
    llama = StepSpec(32, kv, bf16, rotated=128)
    qwen = StepSpec(32, kv, bf16, rotated=128, normed=True, has_mask=True)
    yield "step_append", qwen, 4
    yield "step_attend", llama, 4
    yield "step_attend", qwen, 4
    yield "step_combine", llama, 1
    mistral = StepSpec(32, kv, bf16, rotated=128, has_window=True)
    yield "step_attend", mistral, 4
    yield "step_combine", mistral, 1
    if hopper:
        cohere = StepSpec(8, KVSpec(8, 64, 64), torch.float16, "interleaved", 64)
        gemma = StepSpec(8, KVSpec(4, 256, 256), bf16, rotated=256, has_softcap=True)
        oss = StepSpec(64, KVSpec(8, 64, 64), bf16, rotated=64, has_mask=True, has_sinks=True)
        eight = StepSpec(32, KVSpec(8, 128, 128, 8), bf16, rotated=128, has_mask=True)
        one = StepSpec(16, KVSpec(1, 128, 128), bf16, rotated=128, has_mask=True)
        odd = StepSpec(16, KVSpec(1, 96, 96), torch.float16, rotated=96)
        for spec in (cohere, gemma, oss, eight, one, odd):
            yield "step_append", spec, 4
            yield "step_attend", spec, 4


def rotate_append_cases(hopper: bool) -> Iterator[tuple[str, Any, int]]:
    """Rotation with the append; on sm_90 every form, wide heads and fp32 too."""
    bf16 = torch.bfloat16
    for tokens in (1, 512):
        yield "kv_rotate_append", RotateSpec(32, KVSpec(8, 128, 128), bf16, "half", 128), tokens
    yield "kv_rotate_append", RotateSpec(32, KVSpec(8, 128, 128), bf16, "half", 128, True), 512
    if hopper:
        for spec in (
            RotateSpec(64, KVSpec(1, 64, 64), bf16, "interleaved", 64),
            RotateSpec(32, KVSpec(32, 80, 80), bf16, "half", 20),
            RotateSpec(16, KVSpec(8, 256, 256), bf16, "half", 256, True, 1.0, False),
            RotateSpec(16, KVSpec(16, 192, 128), torch.float16, "none", 0),
            RotateSpec(32, KVSpec(8, 128, 128, 8), torch.float32, "interleaved", 128, True),
        ):
            yield "kv_rotate_append", spec, 512


def glue_cases(hopper: bool) -> Iterator[tuple[str, Any, int]]:
    """Norms and activations in front of linears; on sm_90 every form, and tails and loops."""
    llama = NormSpec(4096, torch.bfloat16, round_first=True, has_residual=True)
    full = NormSpec(8192, torch.bfloat16, "layer", has_residual=True, has_bias=True, keep=True)
    yield "norm_quantize", llama, 1024
    yield "norm_quantize", full, 16
    yield "act_quantize", ActSpec(14336, torch.bfloat16), 1024
    if hopper:
        yield "norm_quantize", llama, 128
        yield "norm_quantize", NormSpec(3584, torch.bfloat16, offset=1.0), 1024
        yield "norm_quantize", NormSpec(201, torch.float16, "centred", has_residual=True), 1024
        yield "norm_quantize", NormSpec(16384, torch.bfloat16, "layer", has_bias=True), 1024
        kinds: tuple[ActKind, ...] = ("gelu", "gelu_tanh", "relu")
        for kind in kinds:
            yield "act_quantize", ActSpec(16384, torch.bfloat16, kind, gated=False), 1024
        yield "act_quantize", ActSpec(29568, torch.bfloat16), 16


def gemm_ways_cases(hopper: bool) -> Iterator[tuple[str, Any, int]]:
    """Few tokens: whole steps and k tiles that the ways do not share evenly, with tails."""
    formats: tuple[Literal[128, -1], ...] = (128, -1)
    for group_size, tokens in itertools.product(formats, (1, 16, 32) if hopper else (16,)):
        yield "gemm_ways", LinearSpec(4096, 4096, group_size, torch.bfloat16), tokens
    for group_size in formats:
        yield "gemm_ways", LinearSpec(4224, 28672, group_size, torch.float16, True, True), 16
        yield "gemm_ways", LinearSpec(1096, 201, group_size, torch.bfloat16, True, True), 8


def mma_warps(ttgir: str) -> list[list[int]]:
    """How many warps lie along each axis of the tensor core layouts."""
    found = re.findall(r"#ttg\.nvidia_mma<.*?warpsPerCTA = \[([\d, ]+)\]", ttgir)
    return [[int(count) for count in text.split(",")] for text in sorted(set(found))]


def async_copies(ttgir: str) -> list[str]:
    """Shapes and types of what is copied to shared memory while the block computes."""
    found = re.findall(
        r"ttg\.async_copy_global_to_local.* : tensor<([x\d]+)x!tt\.ptr<(\w+)>", ttgir
    )
    return sorted({f"{shape}x{kind}" for shape, kind in found})


def ptx_layouts(ttgir: str) -> list[str]:
    """The layouts that inline PTX gets its operands in."""
    found = re.findall(
        r"tt\.elementwise_inline_asm.* -> \(?tensor<\w+, (#ttg\.\w+<.*?>|#\w+)>", ttgir
    )
    return sorted(set(found))


def tiny_layouts(ttgir: str) -> list[str]:
    """The layouts in which nibbles become tiny fp16 codes, two of each four changing places."""
    found = re.findall(
        r"tt\.elementwise_inline_asm \"([^\"]*)\".* -> \(?tensor<\w+, (#ttg\.\w+<.*?>|#\w+)>", ttgir
    )
    return sorted({layout for text, layout in found if "0x00f000f0" in text})


def attention_cases(hopper: bool) -> Iterator[tuple[str, Any, int]]:
    """KV-cache kernels for groups of four heads of 128 channels; on sm_90 other shapes too."""
    kv = KVSpec(8, 128, 128)
    for tokens in (1, 512):
        yield "kv_append", kv, tokens
    for bits in (4, 8):
        yield "kv_round", RoundSpec(128, bits, torch.bfloat16), 512
    plain = AttentionSpec(32, kv, torch.bfloat16)
    full = AttentionSpec(32, kv, torch.bfloat16, has_mask=True, has_chunk=True)
    yield "attention_combine", plain, 1
    window = AttentionSpec(32, kv, torch.bfloat16, has_window=True)
    for spec, tokens in itertools.product((plain, full, window), (1, 4)):
        yield "attention_decode", spec, tokens
    for chunk in (False, True):
        spec = AttentionSpec(32, kv, torch.bfloat16, has_chunk=chunk, causal=True)
        yield "attention_prefill", spec, 1024
        yield "attention_prefill", dataclasses.replace(spec, has_window=True), 1024
        if hopper:
            yield "attention_hopper", spec, 1024
            yield "attention_unpack", spec, 1024
    if hopper:
        narrow = AttentionSpec(14, KVSpec(2, 64, 64), torch.float16, has_chunk=True, has_sinks=True)
        yield "attention_hopper", narrow, 1024
        yield "attention_unpack", narrow, 1024
        # sm_80 and sm_89 hold the mask in 160 to 340 bytes of local memory: less harm than
        # the smaller tiles that would avoid it
        yield "attention_prefill", full, 1024
        shapes = ((KVSpec(8, 192, 128), 8), (KVSpec(8, 64, 64), 32), (KVSpec(8, 128, 128, 8), 32))
        for kv, heads in shapes:
            yield "kv_append", kv, 512
            spec = AttentionSpec(heads, kv, torch.float16, has_mask=True, has_chunk=True)
            yield "attention_decode", spec, 1
            yield "attention_prefill", spec, 1024
        flags = {"has_chunk": True, "causal": True, "has_softcap": True, "has_sinks": True}
        masked = AttentionSpec(64, KVSpec(8, 64, 64), torch.bfloat16, has_mask=True, **flags)
        yield "attention_prefill", masked, 1024
        # 256 channels with a soft cap (Gemma 2) hold 8 to 16 bytes in local memory: less harm
        # than half the rows would do
        kv = KVSpec(8, 256, 256)
        yield "attention_decode", AttentionSpec(16, kv, torch.bfloat16, has_mask=True), 1


def usage(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local bytes per thread."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.check_output([tool, "-res-usage", str(path)], text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    assert found is not None, text
    return dict(zip(("registers", "stack", "local"), map(int, found.groups()), strict=True))


def goes_back(address: int, instruction: str) -> int | None:
    """Where a backward branch of SASS leads to; None for other instructions."""
    jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", instruction)
    target = None if jump is None else int(jump.group(1), 16)
    return target if target is not None and target < address else None


def spills_in_loops(cubin: bytes) -> int:
    """Accesses to local memory within the loops that multiply matrices."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.check_output([tool, "-sass", str(path)], text=True)
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", text, re.MULTILINE)
    code = [(int(address, 16), instruction) for address, instruction in found]
    spills = set()
    for end, instruction in code:
        start = goes_back(end, instruction)
        if start is None:
            continue
        inside = [(a, text) for a, text in code if start <= a <= end]
        # of nested loops the innermost: those around it run rarely
        if any(goes_back(*line) is not None for line in inside[:-1]):
            continue
        if any("MMA" in text for _, text in inside):
            spills |= {a for a, text in inside if re.match(r"(@!?U?P\d+ )?(LDL|STL)", text)}
    return len(spills)


def facts_of(case: tuple[DeviceKey, tuple[str, Any, int]]) -> str:
    """Compile one case; what its machine code looks like, as a JSON line."""
    device, (name, spec, size) = case
    family = FAMILIES[name]
    tile = family.heuristic(spec, size, device)
    compiled = compile_for(family, spec, tile, min(size, 4), device.arch)
    ptx = compiled.asm["ptx"]
    facts = {
        "family": name,
        "arch": device.arch,
        "spec": to_json(spec),
        "tile": dict(tile.constexprs),
        "num_warps": tile.num_warps,
        "shared": compiled.metadata.shared,
        "shared_limit": device.shared_bytes,
        "shared_estimate": family.shared_bytes(spec, tile) if family.shared_bytes else None,
        "fma": len(re.findall(r"\bfma\.rn\.f32", ptx)),
        "flush": ptx.count(".ftz."),
        "wgmma": len(re.findall(r"wgmma\.mma_async\S*\.s32\.s8\.s8", ptx)),
        "mma": len(re.findall(r"mma\.sync\.aligned\.m16n8k32.*\.s32\.s8\.s8\.s32", ptx)),
        "ptx_layouts": ptx_layouts(compiled.asm["ttgir"]),
        "tiny_layouts": tiny_layouts(compiled.asm["ttgir"]),
        "mma_warps": mma_warps(compiled.asm["ttgir"]),
        "ldmatrix": ptx.count("ldmatrix.sync"),
        "global_loads": sorted(set(re.findall(r"ld\.global\.(\S+)", ptx))),
        "async_copies": ptx.count("cp.async.c"),
        "async_shapes": async_copies(compiled.asm["ttgir"]),
        "spills_in_loops": spills_in_loops(compiled.asm["cubin"]),
        **usage(compiled.asm["cubin"]),
    }
    return json.dumps(facts)


def main() -> None:
    """Compile every case for every device, on all cores."""
    torch.set_num_threads(1)
    work = [(device, case) for device in DEVICES for case in cases(device.arch)]
    # fork: a fresh interpreter would import torch again, which takes longer than a compilation
    with multiprocessing.get_context("fork").Pool(min(os.cpu_count() or 1, 8)) as pool:
        for line in pool.imap(facts_of, work):
            print(line, flush=True)


if __name__ == "__main__":
    main()
