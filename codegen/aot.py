"""Compile kernels for a GPU that is not there: for artifacts, and to look at the machine code."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from qoqc.codegen.build import build
from qoqc.codegen.family import Family, Tile

_POINTERS = {
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
}


@dataclasses.dataclass
class Recorder:
    """Stands in for a kernel: keeps the grid and the arguments of the launch."""

    tile: Tile
    grid: tuple[int, ...] = ()
    arguments: tuple[Any, ...] = ()

    def __call__(self, grid: tuple[int, ...], *args: Any) -> None:
        """Remember the launch."""
        self.grid, self.arguments = grid, args


def compile_for(family: Family, spec: Any, tile: Tile, size: int, arch: int) -> Any:
    """Triton's CompiledKernel of `family` for compute capability `arch` (90 = sm_90).

    The argument types are those of a launch on `size` tokens from the family's trial, pointers
    taken as aligned to 16 bytes. Its `asm` holds "ptx" and "cubin", its `metadata.shared` bytes.
    Raises RuntimeError where Triton interprets, ValueError for a family without a trial.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("nothing is compiled under TRITON_INTERPRET=1: unset it")
    if family.trial is None:
        raise ValueError(f"family {family.name} has no trial to take argument types from")
    recorder = Recorder(tile)
    family.trial(spec, size, torch.device("cpu"))(recorder)
    kernel = build(family, spec, tile)
    signature, attributes = {}, {}
    for index, (param, value) in enumerate(zip(kernel.fn.params, recorder.arguments, strict=True)):
        signature[param.name] = _type_of(value)
        whole = isinstance(value, int) and value % 16 == 0 and not param.do_not_specialize
        if isinstance(value, torch.Tensor) or whole:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = GluonASTSource if kernel.fn.is_gluon() else ASTSource
    return triton.compile(
        source(kernel.fn, signature, {}, attributes),
        target=GPUTarget("cuda", arch, 32),
        options=family.options(tile),
    )


def _type_of(value: Any) -> str:
    """The type of a launch argument in Triton's signature language."""
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, TensorDescriptor):
        element = _POINTERS[value.base.dtype].removeprefix("*")
        return f"tensordesc<{element}{list(value.block_shape)},{value.layout!r}>"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"
