"""The `main()` of generated sampling kernels: compare with torch, then time."""

SELFCHECK = """
def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {name: TILE[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    v, parts = SPEC["vocabulary"], triton.cdiv(SPEC["vocabulary"], TILE["PART"])
    torch.manual_seed(0)
    for rows in (1, 3) if device == "cpu" else (1, 64, 256):
        scores = 3 * torch.randn(rows, v)
        temperature = torch.linspace(0.7, 1.0, rows)
        top_p = torch.linspace(0.9, 1.0, rows)
        x = scores / temperature[:, None] if SPEC["has_temperature"] else scores
        given = [t.to(device) for t in (scores, temperature, top_p)]
        key = torch.zeros(rows, dtype=torch.int32, device=device)
        out = torch.empty_like(given[0])
        top = out.new_empty(rows, parts)
        base = out.new_empty(5, rows, dtype=torch.int32)
        sums = out.new_empty(5, rows, parts, 16)
        cut = SPEC["has_top_p"]

        def run():
            for step in range(7) if cut else [6]:
                sample_kernel[(rows * parts,)](
                    *given, key, out, top, base, sums, float("-inf"), rows, step, **options
                )

        run()
        ordered, order = x.double().sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        # sums of exp end in other bits than those of fp64
        limit = torch.where(top_p < 1, top_p, 2.0)[:, None] if cut else torch.tensor(2.0)
        kept = out.cpu().gather(-1, order) > float("-inf")
        differ = (kept != (before < limit)) & ((before - limit).abs() > 1e-5)
        assert not differ.any(), f"{rows} rows: the nucleus is another"
        same = torch.where(kept, x.gather(-1, order), float("-inf"))
        assert torch.equal(out.cpu().gather(-1, order), same), f"{rows} rows: wrong scores"
        key.fill_(7)
        run()
        noise = (out.cpu() - x)[out.cpu() > float("-inf")]
        drawn = noise.abs().max() > 0.1 and noise.isfinite().all()
        assert drawn == SPEC["has_key"], f"{rows} rows: wrong noise"
        took = f"{triton.testing.do_bench(run) * 1e3:.1f} us" if device == "cuda" else "interpreted"
        print(f"{rows} rows of {v}: equal to torch, {took}")
"""
