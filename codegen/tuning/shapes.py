"""The linears of well-known models, as they run after q, k, v and gate, up are merged."""

from __future__ import annotations

from collections.abc import Sequence

from qoqc.shapes import SHAPES, linears

TUNED = ("llama-3-8b", "llama-2-7b", "qwen2.5-72b")
"""The models of SHAPES whose linears benchmarks/gemm.py and benchmarks/tune_gemm.py take."""

MODELS: dict[str, dict[str, tuple[int, int]]] = {
    **{name: linears(SHAPES[name]) for name in TUNED},
    "qwen3-30b-a3b-expert": {"gate_up": (1536, 2048), "down": (2048, 768)},
}
"""(out_features, in_features) by model and name, on one GPU (TP1)."""


def shapes_of(names: Sequence[str]) -> dict[tuple[int, int], str]:
    """Distinct shapes of models (keys of MODELS) or of words like 4096x14336, with a label each.

    Raises ValueError for a word that is neither.
    """
    found: dict[tuple[int, int], str] = {}
    for name in names:
        if name in MODELS:
            for linear, shape in MODELS[name].items():
                found.setdefault(shape, f"{name} {linear}")
            continue
        sizes = name.split("x")
        if len(sizes) != 2 or not all(size.isdecimal() and int(size) for size in sizes):
            known = ", ".join(MODELS)
            raise ValueError(f"shape {name!r}: expected one of {known}, or a size like 4096x14336")
        found.setdefault((int(sizes[0]), int(sizes[1])), name)
    return found
