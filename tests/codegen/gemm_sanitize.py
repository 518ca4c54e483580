"""Small launches of every form of the GEMM, checked, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck python tests/codegen/gemm_sanitize.py
    compute-sanitizer --tool racecheck python tests/codegen/gemm_sanitize.py

Run it once without the sanitizer first: compiling under it takes long.
"""

from __future__ import annotations

import torch

from qoqc.codegen.build import build
from qoqc.codegen.family import Family, Tile
from qoqc.codegen.kernels.gemm import launch
from qoqc.codegen.kernels.gemm_forms import FORMS
from qoqc.codegen.kernels.gemm_hopper_tiles import tile_of
from qoqc.codegen.kernels.gemm_trial import random_call
from qoqc.ir.reference import int8_linear
from qoqc.ir.spec import LinearSpec
from qoqc.quant.weight import expand_int8
from qoqc.runtime.device import device_key

SPECS = (
    LinearSpec(640, 200, 128, torch.bfloat16, has_bias=True, has_residual=True),
    LinearSpec(640, 200, -1, torch.float16),
)
TOKENS = 19
# a cut tile, ways that add up, two and three rows that share tokens
HOPPER_TILES = (
    tile_of(16, (64, 1, 2), 3, split=2),
    tile_of(128, (64, 2, 1), 3),
    tile_of(128, (64, 3, 1), 3),
)


def tiles(form: Family, spec: LinearSpec) -> tuple[Tile, ...]:
    """What to launch of a form."""
    key = device_key(torch.device("cuda"))
    return HOPPER_TILES if form.name == "gemm_hopper" else (form.heuristic(spec, TOKENS, key),)


def main() -> None:
    """Launch and compare."""
    device = torch.device("cuda")
    for form in FORMS:
        for spec in SPECS:
            if form.refuses(spec, device_key(device)):
                continue
            call = random_call(spec, TOKENS, device)
            want = int8_linear(
                call.xq, call.token_scale, expand_int8(call.packed()), call.channel_scale,
                call.bias, call.residual, spec.dtype,
            )  # fmt: skip
            for tile in tiles(form, spec):
                for _ in range(3):
                    assert torch.equal(launch(build(form, spec, tile), call), want), (form, tile)
            print(f"{form.name} group_size={spec.group_size}: equal to the reference")


if __name__ == "__main__":
    main()
