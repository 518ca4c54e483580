"""The `main()` of a generated GEMM file: check against torch, then time. For every form."""

from __future__ import annotations

import textwrap

_MAIN = """
def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if TILE.get("PTX", 1) and device == "cpu":
        raise SystemExit("this kernel holds PTX: run it on a machine with a GPU")
    n, k, grouped = SPEC["out_features"], SPEC["in_features"], SPEC["group_size"] == 128
    dtype = getattr(torch, SPEC["dtype"])
    n_tiles, k_tiles = -(-n // 128), -(-k // 128)
    options = {name: TILE[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    w = torch.randint(0, 256, (n_tiles, k_tiles, 128, 64), dtype=torch.uint8)
    q4 = torch.stack((w & 15, w >> 4), 3).permute(0, 2, 1, 3, 4).reshape(n_tiles * 128, -1)[:n]
    if grouped:
        # scale * zero <= 128 and scale * (15 - zero) <= 127
        scale = torch.randint(1, 17, (k_tiles, n), dtype=torch.int32)
        zero = torch.where(scale == 16, 8, 7).int()
        word = scale | ((128 - scale * zero) << 8)
        w8 = (q4 - zero.T.repeat_interleave(128, 1)) * scale.T.repeat_interleave(128, 1)
    else:
        word = torch.randint(0, 16, (n,), dtype=torch.int32)
        w8 = q4.int() - word[:, None]
    channel_scale = torch.rand(n) * 0.01
    bias = torch.randn(n).to(dtype)
    for m in (1, 5) if device == "cpu" else (1, 16, 64, 1024):
        xq = torch.randint(-127, 128, (m, k), dtype=torch.int8)
        token_scale, residual = torch.rand(m) * 0.01, torch.randn(m, n).to(dtype)
        want = (xq.double() @ w8[:, :k].double().T).float() * channel_scale * token_scale[:, None]
        if SPEC["has_bias"]:
            want += bias.float()
        if SPEC["has_residual"]:
            want += residual.float()
        if SPEC["glu"]:
            # exp differs in its last bits: silu(gate) may round to the neighbour
            pairs = want.to(dtype).view(m, -1, 2, 8)
            gate, up = pairs[:, :, 0].flatten(1), pairs[:, :, 1].flatten(1)
            want, bound = torch.nn.functional.silu(gate) * up, 2 * torch.finfo(dtype).eps
        else:
            bound = 0.0
        y = torch.empty(*want.shape, dtype=dtype, device=device)
        tensors = (xq, token_scale, xq.sum(1, dtype=torch.int32), w, channel_scale, word, bias)
        arguments = [t.to(device) for t in (*tensors, residual)]

        def run():
            # launch

        run()
        torch.testing.assert_close(y.cpu(), want.to(dtype), rtol=bound, atol=0.0)
        took = f"{triton.testing.do_bench(run) * 1e3:.1f} us" if device == "cuda" else "interpreted"
        print(f"m={m} n={n} k={k} group_size={SPEC['group_size']}: equal to torch, {took}")
"""


def selfcheck(launch: str) -> str:
    """The source of `main()` for a form.

    `launch` are the lines that run the kernel on `arguments` (xq, token_scale, token_sum, qweight,
    channel_scale, group words or channel zeros, bias, residual; the last two always given), `y`,
    `m` with Triton's `options`; they see `n`, `k`, `grouped`, SPEC and TILE too.
    """
    return _MAIN.replace("            # launch\n", textwrap.indent(launch.lstrip("\n"), " " * 12))
