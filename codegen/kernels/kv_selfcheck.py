"""The `main()` of generated KV-cache kernels: check against torch, then time."""

from __future__ import annotations

_DEVICE = """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if TILE.get("PTX", "REGISTERS" in TILE) and device == "cpu":
        raise SystemExit("this kernel holds PTX: run it on a machine with a GPU")
    options = {name: TILE[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
"""

_REPORT = """
        took = f"{triton.testing.do_bench(run) * 1e3:.1f} us" if device == "cuda" else "interpreted"
"""

# the definition of the append: codes and words of vectors, and where they go
_APPENDED = """
def grid(x, top):
    low = x.amin(-1).half()
    scale = ((x.amax(-1) - low.float()) / top).clamp(min=0).half()
    inverse = torch.where(scale > 0, 1 / scale.float(), 0)
    codes = torch.round((x - low.float()[..., None]) * inverse[..., None]).clamp(0, top)
    bits = [y.view(torch.int16).int() for y in (scale, low)]
    return codes.to(torch.uint8), (bits[0] & 0xFFFF) | (bits[1] << 16)


def append(k_pages, v_pages, words, table, start, k, v, bits):
    (k_codes, k_words), (v_codes, v_words) = (grid(x.float(), 2**bits - 1) for x in (k, v))
    half = k.shape[-1] // 2
    for b in range(k.shape[0]):
        for i in range(k.shape[2]):
            page, slot = table[b, (start[b] + i) // 64], (start[b] + i) % 64
            words[page, :, 0, slot] = k_words[b, :, i]
            words[page, :, 1, slot] = v_words[b, :, i]
            key, value = k_codes[b, :, i], v_codes[b, :, i]
            if bits == 4:
                k_pages[page, :, slot] = key[:, :half] | (key[:, half:] << 4)
                v_pages[page, :, :, slot % 32] |= value << (4 * (slot // 32))
            else:
                k_pages[page, :, slot] = key
                v_pages[page, :, :, slot] = value


def empty(pages, heads, k_dim, v_dim, bits):
    k_pages = torch.zeros(pages, heads, 64, k_dim * bits // 8, dtype=torch.uint8)
    v_pages = torch.zeros(pages, heads, v_dim, 8 * bits, dtype=torch.uint8)
    return k_pages, v_pages, torch.zeros(pages, heads, 2, 64, dtype=torch.int32)
"""

APPEND_SELFCHECK = (
    _APPENDED
    + """

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
        want = empty(3 * batch, heads, k_dim, v_dim, bits)
        got = [x.to(device, copy=True) for x in want]
        append(*want, table, start, k, v, bits)
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

ROTATE_APPEND_SELFCHECK = (
    _APPENDED
    + """

def defined(x, weight, cos, sin):
    if SPEC["normed"]:
        unit = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        if SPEC["round_first"]:
            x = weight * unit.to(x.dtype)
        else:
            x = (unit * (weight.float() + SPEC["offset"])).to(x.dtype)
    width = SPEC["rotated"]
    if SPEC["form"] == "none":
        return x
    y = x[..., :width].float()
    if SPEC["form"] == "half":
        other = torch.cat((-y[..., width // 2 :], y[..., : width // 2]), -1)
    else:
        other = torch.stack((-y[..., 1::2], y[..., ::2]), -1).flatten(-2)
    turned = (y * cos[:, None] + other * sin[:, None]).to(x.dtype)
    return torch.cat((turned, x[..., width:]), -1)


def main():"""
    + _DEVICE
    + """
    heads, kv_heads = SPEC["heads"], SPEC["kv.kv_heads"]
    bits, k_dim, v_dim = (SPEC[f"kv.{n}"] for n in ("bits", "k_dim", "v_dim"))
    dtype, seq = getattr(torch, SPEC["dtype"]), 1 if TILE["SINGLE"] else 100
    for batch in (2,) if device == "cpu" else (2, 64):
        table = torch.randperm(3 * batch).view(batch, 3)
        start = torch.arange(batch) * 37 % 64
        q, k, v = (
            torch.randn(batch, seq, n, dim).to(dtype).transpose(1, 2)
            for n, dim in ((heads, k_dim), (kv_heads, k_dim), (kv_heads, v_dim))
        )
        weights = torch.rand(2, k_dim).to(dtype) + 0.5
        turns = torch.rand(batch, seq, max(1, SPEC["rotated"])) * 6
        cos, sin = turns.cos(), turns.sin()
        wanted = [defined(x, w, cos, sin) for x, w in zip((q, k), weights)]
        pages = empty(3 * batch, kv_heads, k_dim, v_dim, bits)
        got = [x.to(device, copy=True) for x in pages]
        outputs = [torch.empty(x.shape, dtype=dtype, device=device) for x in (q, k)]
        moved = [x.to(device) for x in (q, k, v)]
        angles = [(x.to(device), *x.stride()[:2]) for x in (cos, sin)]
        arguments = (
            *(y for x in moved for y in (x, *x.stride()[:3])),
            *weights.to(device), *angles[0], *angles[1],
            *got, table.int().to(device), 3, start.to(device), 1, *outputs, 1e-6, seq, 3,
        )
        blocks = 1 if TILE["SINGLE"] else -(-(seq + 63) // 64) * (32 // TILE["BLOCK_J"])
        turns = -(-seq // TILE["BLOCK_T"]) * -(-heads // TILE["BLOCK_H"])
        programs = blocks * kv_heads + turns
        arguments += (-(-(blocks * kv_heads << 31) // programs),)

        def run():
            kv_rotate_append[(programs, batch)](*arguments, **options)

        run()
        # a norm sums in another order, which may move what it gives by one step of the dtype
        step = torch.finfo(dtype).eps * 2 if SPEC["normed"] else 0.0
        for name, a, b in zip(("q", "k"), outputs, wanted):
            torch.testing.assert_close(a.cpu(), b, rtol=step, atol=step * 4, msg=f"wrong {name}")
        append(*pages, table, start, outputs[1].cpu(), v, bits)
        for name, a, b in zip(("k_pages", "v_pages", "kv_words"), got, pages):
            assert torch.equal(a.cpu(), b), f"batch={batch}: wrong {name}"
"""
    + _REPORT
    + """
        print(f"batch={batch} seq={seq} heads={heads} bits={bits}: as torch has it, {took}")
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
        sinks, softcap, window = torch.randn(heads), 2.0, 70 if SPEC["has_window"] else 0
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
            if window:
                seen &= torch.arange(n) > (n - seq + torch.arange(seq))[:, None] - window
            scores = q[b].double() @ exact[0].transpose(-1, -2) * scale
            if SPEC["has_softcap"]:
                scores = softcap * torch.tanh(scores / softcap)
            scores = scores.masked_fill(~seen, float("-inf"))
            if SPEC["has_sinks"]:
                column = sinks.double().view(-1, 1, 1).expand(-1, seq, 1)
                scores = torch.cat((scores, column), -1)
            want[b] = scores.softmax(-1).nan_to_num(0)[..., :n] @ exact[1]
        tensors = (q, k_bytes, v_bytes.contiguous(), words, table.int(), length)
        q, k_pages, v_pages, words, table, length = (x.to(device) for x in tensors)
        mask, k_chunk, v_chunk = (x.to(device) for x in (mask.byte(), k_chunk, v_chunk))
        arguments = (
            *(q, *q.stride()[:3], k_pages, v_pages, words, table, pages, length, 1),
            *(mask, mask.stride(0), 0, mask.stride(2), longest),
            *(k_chunk, *k_chunk.stride()[:3], v_chunk, *v_chunk.stride()[:3]),
        )
        rows = seq * (heads // kv_heads)
        tiles = -(-rows // TILE.get("BLOCK_R", 128))
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
            tail = (part, stat, scale, seq, pages, splits, window)
            attention_decode[grid](*arguments, *tail, **options)

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
            tail = (out, scale, seq, pages, softcap, sinks.to(device), window)
            attention_prefill[grid](*arguments, *tail, **options)

        def finish():
            return out
"""
    + _COMPARE
)

UNPACK_SELFCHECK = (
    """
def main():"""
    + _DEVICE
    + """
    heads, dim, dtype = SPEC["kv.kv_heads"], SPEC["kv.k_dim"], getattr(torch, SPEC["dtype"])
    for batch, pages, seq in ((2, 2, 30),) if device == "cpu" else ((2, 2, 30), (2, 64, 1024)):
        codes = torch.randint(0, 16, (2, batch * pages, heads, 64, dim), dtype=torch.uint8)
        grids = torch.rand(2, 2, batch * pages, heads, 64).half()
        words = grids.view(torch.int16).int()
        words = ((words[0] & 0xFFFF) | (words[1] << 16)).permute(1, 2, 0, 3).contiguous()
        turned = codes[1].transpose(-1, -2)
        k_pages = codes[0, ..., : dim // 2] | (codes[0, ..., dim // 2 :] << 4)
        v_pages = (turned[..., :32] | (turned[..., 32:] << 4)).contiguous()
        table = torch.randperm(batch * pages).view(batch, pages)
        length = pages * 64 - 9 * torch.arange(batch)
        chunk = torch.randn(2, batch, heads, seq, dim).to(dtype)
        exact = (codes.double() * grids[0, ..., None] + grids[1, ..., None])[:, table]
        want = exact.transpose(2, 3).flatten(3, 4).half()
        for b in range(batch):
            if SPEC["has_chunk"]:
                want[:, b, :, length[b] - seq : length[b]] = chunk[:, b].half()
            want[:, b, :, length[b] :] = 0
        rows = pages * 64
        tensors = (k_pages, v_pages, words, table.int(), length, chunk)
        k_pages, v_pages, words, table, length, chunk = (x.to(device) for x in tensors)
        tokens = torch.empty(want.shape, dtype=torch.float16, device=device)
        arguments = (
            *(k_pages, v_pages, words, table, pages, length, 1),
            *(y for x in chunk for y in (x, *x.stride()[:3])), tokens, seq, pages, heads, rows,
        )

        def run():
            attention_unpack[(pages, batch * heads, 2)](*arguments, **options)

        run()
        torch.testing.assert_close(tokens.cpu(), want, rtol=1e-3, atol=1e-6)
"""
    + _REPORT
    + """
        print(f"batch={batch} tokens={rows} heads={heads}: as torch has it, {took}")
"""
)

HOPPER_SELFCHECK = (
    """
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


def main():"""
    + _DEVICE
    + """
    heads, kv_heads, dim = SPEC["heads"], SPEC["kv.kv_heads"], SPEC["kv.k_dim"]
    dtype, scale, group = getattr(torch, SPEC["dtype"]), dim**-0.5, heads // kv_heads
    for batch, seq, rows in ((2, 70, 256), (2, 1024, 2048)):
        length = rows - 9 * torch.arange(batch)
        tokens = torch.randn(2, batch, kv_heads, rows, dim).half()
        q, sinks = torch.randn(batch, heads, seq, dim).to(dtype), torch.randn(heads)
        want = torch.empty(q.shape, dtype=torch.float64)
        for b in range(batch):
            n = int(length[b])
            k, v = (x[b, :, :n].double().repeat_interleave(group, 0) for x in tokens)
            scores = q[b].double() @ k.transpose(-1, -2) * scale
            if SPEC["causal"]:
                seen = torch.arange(n) <= (n - seq + torch.arange(seq))[:, None]
                scores = scores.masked_fill(~seen, float("-inf"))
            if SPEC["has_sinks"]:
                column = sinks.double().view(-1, 1, 1).expand(-1, seq, 1)
                scores = torch.cat((scores, column), -1)
            want[b] = scores.softmax(-1)[..., :n] @ v
        q, length, tokens, sinks = (x.to(device) for x in (q, length, tokens, sinks))
        out = torch.empty_like(q)
        items = batch * kv_heads * -(-seq * group // 128)
        box = [TILE["TOKENS"], dim]
        layout = gl.NVMMASharedLayout.get_default_for(box, gl.float16)
        boxes = TensorDescriptor.from_tensor(tokens.view(-1, dim), box, layout)
        arguments = (
            *(q, *q.stride()[:3], boxes, length, 1),
            *(out, sinks, scale, seq, rows, kv_heads, rows, batch * kv_heads, items),
        )

        def run():
            attention_hopper_kernel[(items,)](*arguments, **options)

        def finish():
            return out

        longest = rows
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
