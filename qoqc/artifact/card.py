"""The model card of an artifact, README.md: what it is, how good it is, how to load it."""

from __future__ import annotations

import json
import re
from typing import Any

from qoqc.artifact.manifest import Manifest

STEPS = ("rotate", "smooth_attention", "smooth_output", "reorder", "clip")
"""The steps of a recipe by their names in calibrate.recipe.Recipe, in the order they happen."""

FIGURES = {
    "perplexity": "perplexity {:.4f}",
    "baseline": "{:.4f} in 16 bit",
    "increase": "{:+.2f} %",
    "kl": "KL {:.5f}",
    "agreement": "same first choice for {:.2%} of the tokens",
}
"""What the accuracy gate found, by its names in the manifest."""

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def card(manifest: Manifest) -> str:
    """The text, with the Hub's metadata in front. Nothing in it is taken for granted from a user:
    names are quoted where YAML or Markdown would read something into them."""
    options = manifest.options
    name = _plain(manifest.base_model or manifest.architecture)
    group = options["group_size"]
    weights = "a scale per channel" if group == -1 else f"groups of {group} in two levels"
    before, after = manifest.bytes_before / 1e6, manifest.bytes_after / 1e6
    left = sorted({r["name"] for graph in manifest.graphs for r in graph["refusals"]})
    lines = [
        "---",
        *_metadata(manifest),
        "---",
        f"# {name} in W4A8KV{options['kv_bits']}",
        "",
        f"{name} ({manifest.architecture}), quantized by "
        f"qoqc {manifest.versions['qoqc']} as in QServe "
        "(arXiv:2405.04532).",
        "",
        "| | |",
        "|---|---|",
        f"| weights | {len(manifest.weights)} linears in 4 bit, {weights} |",
        "| activations | int8, a scale per token, found while running |",
        f"| KV cache | {_kv(options)} |",
        f"| left in 16 bit | {', '.join(map(_plain, left)) or 'no linear'} |",
        f"| size | {after:,.1f} MB, {before:,.1f} MB before |",
        f"| recipe | {_recipe(manifest.recipe)} |",
        f"| accuracy | {_gate(manifest.gate)} |",
        "",
        "## Use",
        "",
        "```python",
        "import qoqc",
        "from transformers import AutoModelForCausalLM",
        "",
        "model = AutoModelForCausalLM.from_pretrained(PATH)   # runs as it is, slowly",
        "model = qoqc.load(PATH)                              # compiled, with the 4-bit KV cache",
        "```",
        "",
        "`PATH` is this directory; `qoqc inspect PATH` shows everything qoqc/manifest.json knows.",
        "",
    ]
    return "\n".join(lines)


def _metadata(manifest: Manifest) -> list[str]:
    found = ["library_name: transformers", "pipeline_tag: text-generation"]
    if manifest.base_model is not None and _HUB_NAME.fullmatch(manifest.base_model):
        found += [
            f"base_model: {json.dumps(manifest.base_model)}",
            "base_model_relation: quantized",
        ]
    return [*found, "tags:", *(f"- {tag}" for tag in ("qoqc", "quantized", "w4a8kv4", "4-bit"))]


def _plain(text: str) -> str:
    """Without what Markdown reads as markup, and on one line."""
    return re.sub(r"[|<>`*\[\]\s]+", " ", text).strip()


def _kv(options: dict[str, Any]) -> str:
    bits = options.get("kv_layers") or [options["kv_bits"]]
    if set(bits) == {16}:
        return "the model's own, in 16 bit"
    counts = {b: list(bits).count(b) for b in sorted(set(bits))}
    if len(counts) == 1:
        return f"{next(iter(counts))} bit, per token and head"
    return ", ".join(f"{b} bit in {n} layers" for b, n in counts.items())


def _recipe(recipe: dict[str, Any] | None) -> str:
    if recipe is None:
        return "rounded to nearest"
    steps = recipe.get("recipe", {})
    names = [name.replace("_", " ") for name in STEPS if steps.get(name)]
    method = str(steps.get("method", "rtn")).upper()
    text = f"{recipe.get('samples')} windows of {recipe.get('seq')} tokens"
    return f"QoQ: {', '.join([*names, method])}; calibrated on {text}"


def _gate(gate: dict[str, Any] | None) -> str:
    if gate is None:
        return "not measured; `qoqc eval PATH --text FILE --baseline MODEL` does"
    found = [form.format(gate[name]) for name, form in FIGURES.items() if name in gate]
    return "; ".join(found) + f" ({_plain(str(gate.get('text', 'text unknown')))})"
