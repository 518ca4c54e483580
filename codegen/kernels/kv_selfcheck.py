"""The `main()` of generated KV-cache kernels: check against torch, then time."""

from __future__ import annotations

_DEVICE = """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if TILE.get("PTX") and device == "cpu":
        raise SystemExit("this kernel holds PTX: run it on a machine with a GPU")
    options = {name: TILE[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
"""

_REPORT = """
        took = f"{triton.testing.do_bench(run) * 1e3:.1f} us" if device == "cuda" else "interpreted"
"""

APPEND_SELFCHECK = (
    """
def grid(x, top):
    low = x.amin(-1).half()
    scale = ((x.amax(-1) - low.float()) / top).clamp(min=0).half()
    inverse = torch.where(scale > 0, 1 / scale.float(), 0)
    codes = torch.round((x - low.float()[..., None]) * inverse[..., None]).clamp(0, top)
    bits = [y.view(torch.int16).int() for y in (scale, low)]
    return codes.to(torch.uint8), (bits[0] & 0xFFFF) | (bits[1] << 16)


def main():"""
    + _DEVICE
    + """
    heads, bits, k_dim, v_dim = (SPEC[n] for n in ("kv_heads", "bits", "k_dim", "v_dim"))
    seq = 1 if TILE["SINGLE"] else 100
    for batch in (2,) if device == "cpu" else (2, 64):
        # every sequence has three pages and starts at another token of the first
        table = torch.randperm(3 * batch).view(batch, 3)
        start = torch.arange(batch) * 37 % 64
        k, v = (torch.randn(batch, heads, seq, dim).bfloat16() for dim in (k_dim, v_dim))
        k_pages = torch.zeros(3 * batch, heads, 64, k_dim * bits // 8, dtype=torch.uint8)
        v_pages = torch.zeros(3 * batch, heads, v_dim, 8 * bits, dtype=torch.uint8)
        words = torch.zeros(3 * batch, heads, 2, 64, dtype=torch.int32)
        want = [x.clone() for x in (k_pages, v_pages, words)]
        (k_codes, k_words), (v_codes, v_words) = (grid(x.float(), 2**bits - 1) for x in (k, v))
        for b in range(batch):
            for i in range(seq):
                page, slot = table[b, (start[b] + i) // 64], (start[b] + i) % 64
                want[2][page, :, 0, slot] = k_words[b, :, i]
                want[2][page, :, 1, slot] = v_words[b, :, i]
                key, value = k_codes[b, :, i], v_codes[b, :, i]
                if bits == 4:
                    half = k_dim // 2
                    want[0][page, :, slot] = key[:, :half] | (key[:, half:] << 4)
                    want[1][page, :, :, slot % 32] |= value << (4 * (slot // 32))
                else:
                    want[0][page, :, slot] = key
                    want[1][page, :, :, slot] = value
        got = [x.to(device) for x in (k_pages, v_pages, words)]
        table, start, k, v = (x.to(device) for x in (table.int(), start, k, v))
        arguments = (*got, table, 3, start, 1, k, *k.stride()[:3], v, *v.stride()[:3], seq, 3)
        blocks = 1 if TILE["SINGLE"] else -(-(seq + 63) // 64) * (32 // TILE["BLOCK_J"])

        def run():
            kv_append[(blocks, heads, batch)](*arguments, **options)

        run()
        for name, a, b in zip(("k_pages", "v_pages", "kv_words"), got, want):
            assert torch.equal(a.cpu(), b), f"batch={batch}: wrong {name}"
"""
    + _REPORT
    + """
        print(f"batch={batch} seq={seq} heads={heads} bits={bits}: equal to torch, {took}")
"""
)

# data and definition that the two attention kernels share
_ATTENTION = (
    """
def main():"""
    + _DEVICE
    + """
    heads, kv_heads = SPEC["heads"], SPEC["kv.kv_heads"]
    bits, k_dim, v_dim = (SPEC[f"kv.{n}"] for n in ("bits", "k_dim", "v_dim"))
    dtype, top, scale = getattr(torch, SPEC["dtype"]), 2**bits - 1, k_dim**-0.5
    for batch, seq, pages in CASES_CPU if device == "cpu" else CASES:
        k_codes, v_codes = (
            torch.randint(0, top + 1, (batch * pages, kv_heads, 64, dim), dtype=torch.uint8)
            for dim in (k_dim, v_dim)
        )
        grids = torch.rand(2, batch * pages, kv_heads, 2, 64) + 0.5
        grids = torch.stack((grids[0] * 4 / top, -2 * grids[1])).half()
        words = grids.view(torch.int16).int()
        words = (words[0] & 0xFFFF) | (words[1] << 16)
        v_bytes = v_codes.transpose(-1, -2)
        if bits == 4:
            k_bytes = k_codes[..., : k_dim // 2] | (k_codes[..., k_dim // 2 :] << 4)
            v_bytes = v_bytes[..., :32] | (v_bytes[..., 32:] << 4)
        else:
            k_bytes = k_codes
        table = torch.randperm(batch * pages).view(batch, pages)
        length = torch.tensor([pages * 64 - 9 * b for b in range(batch)]).clamp(min=seq)
        longest = pages * 64
        q = torch.randn(batch, heads, seq, k_dim).to(dtype)
        k_chunk, v_chunk = (
            torch.randn(batch, kv_heads, seq, dim).to(dtype) for dim in (k_dim, v_dim)
        )
        mask = torch.rand(batch, 1, seq, longest) < 0.7
        mask[..., 0] = True
        want = torch.empty(batch, heads, seq, v_dim, dtype=torch.float64)
        for b in range(batch):
            n, seen = int(length[b]), torch.ones(seq, int(length[b]), dtype=torch.bool)
            exact = []
            for row, (codes, chunk) in enumerate(((k_codes, k_chunk), (v_codes, v_chunk))):
                s, low = (g[table[b], :, row].double()[..., None] for g in grids)
                x = (codes[table[b]].double() * s + low).transpose(0, 1).flatten(1, 2)[:, :n]
                if SPEC["has_chunk"]:
                    x[:, n - seq :] = chunk[b].double()
                exact.append(x.repeat_interleave(heads // kv_heads, 0))
            if SPEC["has_mask"]:
                seen &= mask[b, 0, :, :n]
            if SPEC["causal"]:
                seen &= torch.arange(n) <= (n - seq + torch.arange(seq))[:, None]
            scores = q[b].double() @ exact[0].transpose(-1, -2) * scale
            scores = scores.masked_fill(~seen, float("-inf"))
            want[b] = scores.softmax(-1).nan_to_num(0) @ exact[1]
        tensors = (q, k_bytes, v_bytes.contiguous(), words, table.int(), length)
        q, k_pages, v_pages, words, table, length = (x.to(device) for x in tensors)
        mask, k_chunk, v_chunk = (x.to(device) for x in (mask.byte(), k_chunk, v_chunk))
        arguments = (
            *(q, *q.stride()[:3], k_pages, v_pages, words, table, pages, length, 1),
            *(mask, mask.stride(0), 0, mask.stride(2), longest),
            *(k_chunk, *k_chunk.stride()[:3], v_chunk, *v_chunk.stride()[:3]),
        )
        rows = seq * (heads // kv_heads)
        tiles = -(-rows // TILE["BLOCK_R"])
"""
)

_COMPARE = (
    """
        run()
        error = ((finish().double().cpu() - want).norm() / want.norm()).item()
        assert error < 4e-3, f"batch={batch}: relative error {error}"
"""
    + _REPORT
    + """
        print(f"batch={batch} seq={seq} tokens={longest}: relative error {error:.1e}, {took}")
"""
)

DECODE_SELFCHECK = (
    "CASES_CPU, CASES = ((2, 2, 3),), ((2, 1, 5), (16, 1, 64))\n\n"
    + _ATTENTION
    + """
        splits = 4
        part = torch.empty(batch, heads, seq, splits, v_dim, device=device)
        stat = torch.empty(batch, heads, seq, splits, 2, device=device)

        def run():
            grid = (batch * kv_heads, splits, tiles)
            attention_decode[grid](*arguments, part, stat, scale, seq, pages, splits, **options)

        def finish():
            peak, total = stat.double().unbind(-1)
            weight = torch.exp2(peak - peak.amax(-1, keepdim=True)) * (total != 0)
            part[total == 0] = 0
            numerator = (part.double() * weight[..., None]).sum(-2)
            return numerator / (weight * total).sum(-1, keepdim=True)
"""
    + _COMPARE
)

PREFILL_SELFCHECK = (
    "CASES_CPU, CASES = ((2, 70, 2),), ((2, 70, 3), (2, 1024, 32))\n\n"
    + _ATTENTION
    + """
        out = torch.empty(batch, heads, seq, v_dim, dtype=dtype, device=device)

        def run():
            grid = (tiles, kv_heads, batch)
            attention_prefill[grid](*arguments, out, scale, seq, pages, **options)

        def finish():
            return out
"""
    + _COMPARE
)

COMBINE_SELFCHECK = (
    """
def main():"""
    + _DEVICE
    + """
    heads, v_dim, dtype = SPEC["heads"], SPEC["kv.v_dim"], getattr(torch, SPEC["dtype"])
    for batch, splits in ((2, 5),) if device == "cpu" else ((2, 5), (64, 12)):
        part = torch.randn(batch, heads, 1, splits, v_dim, device=device)
        stat = torch.rand(batch, heads, 1, splits, 2, device=device) + 0.5
        length = torch.full((batch,), 64, device=device)
        out = torch.empty(batch, heads, 1, v_dim, dtype=dtype, device=device)

        def run():
            grid = (batch * heads,)
            attention_combine[grid](part, stat, length, 1, out, 1, 64, splits, **options)

        run()
        weight = torch.exp2(stat[..., 0].double())
        want = (part * weight[..., None]).sum(-2) / (weight * stat[..., 1]).sum(-1, keepdim=True)
        error = ((out.double() - want).norm() / want.norm()).item()
        assert error < 4e-3, f"batch={batch}: relative error {error}"
"""
    + _REPORT
    + """
        print(f"batch={batch} splits={splits}: relative error {error:.1e}, {took}")
"""
)
