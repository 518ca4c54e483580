"""The `main()` of a generated few-token linear: check against torch, then time."""

from __future__ import annotations

SELFCHECK = """
def main():
    if not torch.cuda.is_available():
        raise SystemExit("this kernel holds PTX: run it on a machine with a GPU")
    linear = {name[7:]: value for name, value in SPEC.items() if name.startswith("linear.")}
    norm = {name[5:]: value for name, value in SPEC.items() if name.startswith("norm.")}
    n, k, grouped = linear["out_features"], linear["in_features"], linear["group_size"] == 128
    dtype = getattr(torch, linear["dtype"])
    n_tiles, k_tiles = -(-n // 128), -(-k // 128)
    options = {name: TILE[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    torch.manual_seed(0)
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
    channel_scale, bias = torch.rand(n) * 0.01, torch.randn(n).to(dtype)
    norm_weight, norm_bias = torch.randn(k).to(dtype), torch.randn(k).to(dtype)
    for m in (1, 2):
        x, more = torch.randn(m, k).to(dtype), torch.randn(m, k).to(dtype)
        residual = torch.randn(m, n).to(dtype)
        total = x + more if norm.get("has_residual") else x
        z = total.float()
        if norm:
            if norm["kind"] != "rms":
                z = z - z.mean(1, keepdim=True)
            z = z * torch.rsqrt(z.square().mean(1, keepdim=True) + norm["eps"])
            if norm["round_first"]:
                z = z.to(dtype).float()
            if norm["has_weight"]:
                z = z * (norm_weight.float() + norm["offset"])
            if norm["has_bias"]:
                z = z + norm_bias.float()
            z = z.to(dtype).float()
        absmax = z.abs().amax(1)
        xq = (z * (absmax.reciprocal() * 127)[:, None]).round()
        want = (xq.double() @ w8[:, :k].double().T).float() * channel_scale
        want *= (absmax / 127)[:, None]
        if linear["has_bias"]:
            want += bias.float()
        if linear["has_residual"]:
            want += residual.float()
        if linear["glu"]:
            pairs = want.to(dtype).view(m, -1, 2, 8)
            gate, up = pairs[:, :, 0].flatten(1), pairs[:, :, 1].flatten(1)
            want = torch.nn.functional.silu(gate) * up
        y = torch.empty(*want.shape, dtype=dtype, device="cuda")
        out, normed = (torch.empty(m, k, dtype=dtype, device="cuda") for _ in range(2))
        tokens = [t.cuda() for t in (x, more, norm_weight, norm_bias)]
        w32 = w.cuda().view(torch.int32)
        rest = [t.cuda() for t in (word, channel_scale, bias, residual)]
        steps = -(-n // TILE["ROWS"])

        def run():
            grid = (min(steps, 264), m)
            few_linear_kernel[grid](
                tokens[0], k, tokens[1], k, *tokens[2:], w32, *rest, y, out, normed, 0, steps,
                **options,
            )

        run()
        # sums of a norm are in another order: an integer at a border of rounding may differ
        bound = 2e-2 if norm else 2 * torch.finfo(dtype).eps if linear["glu"] else 0.0
        largest = float(want.float().abs().max())
        torch.testing.assert_close(y.cpu(), want.to(dtype), rtol=bound, atol=bound * largest)
        if norm.get("has_residual"):
            assert torch.equal(out.cpu(), total), f"m={m}: wrong residual sums"
        print(f"m={m} n={n} k={k}: as torch, {triton.testing.do_bench(run) * 1e3:.1f} us")
"""
