"""The `main()` of generated decode-step kernels: check against torch, then time."""

from __future__ import annotations

_DEVICE = """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if TILE.get("PTX") and device == "cpu":
        raise SystemExit("this kernel holds PTX: run it on a machine with a GPU")
    options = {name: TILE[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    heads, kv_heads, v_dim = (SPEC[n] for n in ("heads", "kv.kv_heads", "kv.v_dim"))
    dtype = getattr(torch, SPEC["dtype"])
"""

_DEFINITIONS = """
def turned_by_torch(x, weight, cos, sin):
    dtype = x.dtype
    if SPEC["normed"]:
        unit = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        if SPEC["round_first"]:
            x = weight * unit.to(dtype)
        else:
            x = (unit * (weight.float() + SPEC["offset"])).to(dtype)
    width = SPEC["rotated"]
    if SPEC["form"] == "none":
        return x
    y = x[..., :width].float()
    if SPEC["form"] == "half":
        other = torch.cat((-y[..., width // 2 :], y[..., : width // 2]), -1)
    else:
        other = torch.stack((-y[..., 1::2], y[..., ::2]), -1).flatten(-2)
    return torch.cat(((y * cos[:, None] + other * sin[:, None]).to(dtype), x[..., width:]), -1)


def quantized(x, top):
    low = x.amin(-1).half()
    scale = ((x.amax(-1) - low.float()) / top).clamp(min=0).half()
    inverse = torch.where(scale > 0, 1 / scale.float(), 0)
    codes = torch.round((x - low.float()[..., None]) * inverse[..., None]).clamp(0, top)
    return codes.double() * scale.double()[..., None] + low.double()[..., None]
"""

APPEND_SELFCHECK = (
    _DEFINITIONS
    + """

def main():"""
    + _DEVICE
    + """
    bits, k_dim = SPEC["kv.bits"], SPEC["kv.k_dim"]
    top = 2**bits - 1
    for batch in (3,) if device == "cpu" else (3, 64):
        q, k, v = (
            torch.randn(batch, n, 1, dim).to(dtype)
            for n, dim in ((heads, k_dim), (kv_heads, k_dim), (kv_heads, v_dim))
        )
        weights = torch.randn(2, k_dim).to(dtype)
        turns = torch.rand(batch, 1, max(1, SPEC["rotated"])) * 6
        cos, sin = turns.cos(), turns.sin()
        length = torch.arange(batch) * 37 % 128
        table = torch.randperm(2 * batch).view(batch, 2).int()
        k_pages = torch.zeros(2 * batch, kv_heads, 64, k_dim * bits // 8, dtype=torch.uint8)
        v_pages = torch.zeros(2 * batch, kv_heads, v_dim, 8 * bits, dtype=torch.uint8)
        words = torch.zeros(2 * batch, kv_heads, 2, 64, dtype=torch.int32)
        wanted_q = turned_by_torch(q, weights[0], cos, sin)[:, :, 0]
        wanted = [
            quantized(x.float()[:, :, 0], top)
            for x in (turned_by_torch(k, weights[1], cos, sin), v)
        ]
        tensors = (q, k, v, weights, cos, sin, k_pages, v_pages, words, table, length)
        q, k, v, weights, cos, sin, k_pages, v_pages, words, table, length = (
            x.to(device) for x in tensors
        )
        tiny = TILE["PTX"] and bits == 4 and k_dim % 8 == 0 and dtype != torch.float32
        kind = torch.float16 if tiny else dtype
        turned = torch.empty(batch, heads, k_dim, dtype=kind, device=device)
        sums = torch.empty(batch, heads, device=device)
        units = torch.ones(batch, kv_heads, device=device)

        def run():
            step_append[(batch * kv_heads, 3)](
                q, *q.stride()[:2], k, *k.stride()[:2], v, *v.stride()[:2], *weights,
                cos, cos.stride(0), sin, sin.stride(0), k_pages, v_pages, words, table, 2,
                length, 1, turned, sums, units, 1e-6, 2, **options
            )

        run()
        page = table.gather(1, (length // 64)[:, None])[:, 0].long().cpu()
        slot = (length % 64).cpu()
        half = slot % 32
        found = []
        for b in range(batch):
            scale, low = words[page[b], :, :, slot[b]].cpu().view(kv_heads, 2, 1).contiguous().view(
                torch.float16
            ).double().unbind(-1)
            key = k_pages[page[b], :, slot[b]].cpu()
            value = v_pages[page[b], :, :, slot[b] if bits == 8 else half[b]].cpu()
            if bits == 4:
                key = torch.cat((key & 15, key >> 4), -1)
                value = (value >> (4 * (slot[b] // 32))) & 15
            found.append(
                [codes.double() * scale[:, i : i + 1] + low[:, i : i + 1]
                 for i, codes in enumerate((key, value))]
            )
        limits = (0.0 if not SPEC["normed"] else 0.3, 0.0)
        for i, name in enumerate(("k", "v")):
            error = (torch.stack([f[i] for f in found]) - wanted[i]).abs().max().item()
            assert error <= limits[i], f"batch={batch}: {name} is off by {error}"
        found_q = turned.double().cpu()
        if tiny:
            # of four channels two change places; codes are n * 2**-24, of high nibbles n * 2**-20
            found_q = found_q.view(batch, heads, 2, -1, 2, 2).transpose(-1, -2).flatten(3)
            unit = units.double().cpu().repeat_interleave(heads // kv_heads, 1)[..., None, None]
            found_q = (found_q * unit * torch.tensor([[1.0], [16.0]]) * 2.0**-24).flatten(2)
        wanted_q = wanted_q.double()
        for name, x, want in (("q", found_q, wanted_q), ("sums", sums.cpu(), wanted_q.sum(-1))):
            error = ((x - want).norm() / want.norm()).item()
            assert error < 4e-3, f"batch={batch}: relative error of {name} {error}"
        took = f"{triton.testing.do_bench(run) * 1e3:.1f} us" if device == "cuda" else "interpreted"
        print(f"batch={batch}: keys, values and queries as in torch, {took}")
"""
)

ATTEND_SELFCHECK = (
    _DEFINITIONS
    + """

def main():"""
    + _DEVICE
    + """
    bits, k_dim = SPEC["kv.bits"], SPEC["kv.k_dim"]
    top, scale, softcap = 2**bits - 1, k_dim**-0.5, 20.0 if SPEC["has_softcap"] else 0.0
    for batch, pages in ((3, 3),) if device == "cpu" else ((3, 40), (64, 17)):
        k_codes, v_codes = (
            torch.randint(0, top + 1, (batch * pages, kv_heads, 64, dim), dtype=torch.uint8)
            for dim in (k_dim, v_dim)
        )
        grids = torch.rand(2, batch * pages, kv_heads, 2, 64) + 0.5
        grids = torch.stack((grids[0] * 4 / top, -2 * grids[1])).half()
        words = grids.view(torch.int16).int()
        words = (words[0] & 0xFFFF) | (words[1] << 16)
        k_bytes, v_bytes = k_codes, v_codes.transpose(-1, -2)
        if bits == 4:
            k_bytes = k_codes[..., : k_dim // 2] | (k_codes[..., k_dim // 2 :] << 4)
            v_bytes = v_bytes[..., :32] | (v_bytes[..., 32:] << 4)
        table = torch.randperm(batch * pages).view(batch, pages)
        before = torch.tensor([(pages * 64 - 1) // (b + 1) for b in range(batch)])
        q, k, v = (
            torch.randn(batch, n, 1, dim).to(dtype)
            for n, dim in ((heads, k_dim), (kv_heads, k_dim), (kv_heads, v_dim))
        )
        weights, sinks = torch.randn(2, k_dim).to(dtype), torch.randn(heads)
        turns = torch.rand(batch, 1, max(1, SPEC["rotated"])) * 6
        cos, sin = turns.cos(), turns.sin()
        if TILE["FUSED"]:
            turned = turned_by_torch(q, weights[0], cos, sin)
            new = turned_by_torch(k, weights[1], cos, sin), v
            new = [quantized(x.float()[:, :, 0], top) for x in new]
        else:
            turned = q
        mask = torch.rand(batch, 1, 1, pages * 64) < 0.7
        window = 70 if SPEC["has_window"] else 0
        want = torch.empty(batch, heads, 1, v_dim, dtype=torch.float64)
        for b in range(batch):
            n, exact = int(before[b]), []
            for row, codes in enumerate((k_codes, v_codes)):
                s, low = (g[table[b], :, row].double()[..., None] for g in grids)
                x = (codes[table[b]].double() * s + low).transpose(0, 1).flatten(1, 2)
                if TILE["FUSED"]:
                    x[:, n] = new[row][b]
                exact.append(x[:, : n + 1].repeat_interleave(heads // kv_heads, 0))
            scores = turned[b].double() @ exact[0].transpose(-1, -2) * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            if SPEC["has_mask"]:
                scores = scores.masked_fill(~mask[b, 0, :, : n + 1], float("-inf"))
            if window:
                scores[..., : max(0, n + 1 - window)] = float("-inf")
            if SPEC["has_sinks"]:
                scores = torch.cat((scores, sinks.double().view(-1, 1, 1)), -1)
            want[b] = scores.softmax(-1).nan_to_num(0)[..., : n + 1] @ exact[1]
        length = before.clone()  # the kernel counts in it
        sums = q[:, :, 0].float().sum(-1)
        units = torch.ones(batch, kv_heads)
        tiny = TILE["PTX"] and bits == 4 and k_dim % 8 == 0 and dtype != torch.float32
        if tiny and not TILE["FUSED"]:
            # of four channels two change places; codes are n * 2**-24, of high nibbles n * 2**-20
            units *= 2.0**24
            q = q.view(batch, heads, 2, -1, 2, 2).transpose(-1, -2).flatten(3)
            q = (q.float() * torch.tensor([[1.0], [1 / 16]])).flatten(2).half()
        tensors = (
            sums, units, q, k, v, weights, cos, sin, k_bytes, v_bytes.contiguous(), words,
            table.int(), length, mask.byte(), sinks,
        )
        (
            sums, units, q, k, v, weights, cos, sin, k_pages, v_pages, words,
            table, length, mask, sinks,
        ) = (x.to(device) for x in tensors)
        grid = (max(1, min(1320, batch * kv_heads * pages // 2)),)
        out = torch.empty(batch, heads, 1, v_dim, dtype=dtype, device=device)
        part = torch.empty(*grid, 2, heads // kv_heads, v_dim, device=device)
        stat = torch.empty(*grid, 2, heads // kv_heads, 2, device=device)
        counters = torch.zeros(33 + batch * kv_heads, dtype=torch.int32, device=device)

        def run():
            length.copy_(before)
            step_attend[grid](
                q, *q.stride()[:2], sums, units, k, *k.stride()[:2], v, *v.stride()[:2], *weights,
                cos, cos.stride(0), sin, sin.stride(0), k_pages, v_pages, words,
                table, pages, length, 1, mask, mask.stride(0), pages * 64, sinks,
                out, part, stat, counters, 1e-6, scale, softcap, batch, pages, 1, window, **options
            )

        run()
        error = ((out.double().cpu() - want).norm() / want.norm()).item()
        assert error < 4e-3, f"batch={batch}: relative error {error}"
        assert torch.equal(length.cpu(), before + 1), f"batch={batch}: tokens not counted"
        took = f"{triton.testing.do_bench(run) * 1e3:.1f} us" if device == "cuda" else "interpreted"
        print(f"batch={batch} tokens={pages * 64}: relative error {error:.1e}, {took}")
"""
)

COMBINE_SELFCHECK = (
    """
def main():"""
    + _DEVICE
    + """
    group = heads // kv_heads
    for batch in (2,) if device == "cpu" else (2, 16):
        # 20 pages each, or the last 20, for workers of two: ten parts, all where a worker begins
        workers = 10 * batch * kv_heads
        part = torch.randn(batch, kv_heads, 10, 2, group, v_dim, device=device)
        stat = torch.rand(batch, kv_heads, 10, 2, group, 2, device=device) + 0.5
        weight = torch.exp2(stat[:, :, :, 0, :, 0].double())
        want = (part[:, :, :, 0] * weight[..., None]).sum(2)
        want /= (weight * stat[:, :, :, 0, :, 1]).sum(2)[..., None]
        out = torch.empty(batch, kv_heads, group, v_dim, dtype=dtype, device=device)
        window, pages = (1280, 41) if SPEC["has_window"] else (0, 21)
        tokens = 64 * pages - 65
        # the newest one counted
        length = torch.full((batch,), tokens + 1, dtype=torch.int32, device=device)
        grid = (batch * heads, -(-v_dim // TILE["COLUMNS"]))

        def run():
            step_combine[grid](
                part, stat, out, length, 1, batch, pages, workers, window, **options
            )

        run()
        error = ((out.double() - want).norm() / want.norm()).item()
        assert error < 4e-3, f"batch={batch}: relative error {error}"
        took = f"{triton.testing.do_bench(run) * 1e3:.1f} us" if device == "cuda" else "interpreted"
        print(f"batch={batch}: relative error {error:.1e}, {took}")
"""
)
