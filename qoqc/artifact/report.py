"""An artifact as one HTML page that needs nothing else: for `qoqc inspect PATH --html FILE`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from qoqc.artifact.manifest import Manifest
from qoqc.artifact.svg import bars, shares

STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 62em; padding: 0 1em;
       color: #222; background: #fff; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; } th, td { padding: .15em .8em .15em 0; text-align: left;
       vertical-align: top; border-bottom: 1px solid #ddd; } td.n { text-align: right; }
summary { cursor: pointer; } details table { white-space: nowrap; margin: .3em 0 1em 1em; }
svg text { font: 12px ui-monospace, monospace; } .scroll { overflow-x: auto; }
"""

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""The page loads nothing and runs nothing, whatever the manifest says."""


def report(manifest: Manifest, name: str, listings: Mapping[str, str] | None = None) -> str:
    """The page about the artifact `name`; `listings` are its graphs as text, by file.

    Every text is escaped.
    """
    sections = [
        _head(manifest, name),
        _section("Accuracy", _accuracy(manifest.gate)),
        _section("Sizes", _sizes(manifest)),
        _section("Passes", _passes(manifest)),
        _section("Left in 16 bit", _refusals(manifest)),
        _section("Graphs", _graphs(manifest, listings or {})),
        _section("Layers", _layers(manifest.recipe)),
        _section("Kernels", _kernels(manifest.kernels)),
        _section("Packed weights", _folded(f"{len(manifest.weights)} linears", _weights(manifest))),
        _section("Made with", _pairs({**manifest.versions, **manifest.options})),
        _section(
            "Files",
            _folded(
                f"{len(manifest.files)} with their SHA-256",
                _table(("file", "SHA-256"), manifest.files.items()),
            ),
        ),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{escape(name)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def _head(manifest: Manifest, name: str) -> str:
    base = f", made from {escape(manifest.base_model)}" if manifest.base_model else ""
    return (
        f"<h1>{escape(name)}</h1><p>{escape(manifest.architecture)}{base}: "
        f"{len(manifest.weights)} linears in 4 bit, int8 activations, "
        f"KV cache in {escape(_kv(manifest.options))} bit.</p>"
    )


def _kv(options: Mapping[str, Any]) -> str:
    bits = options.get("kv_layers") or [options.get("kv_bits")]
    return ", ".join(map(str, sorted(set(bits))))


def _accuracy(gate: Mapping[str, Any] | None) -> str:
    if gate is None:
        return "<p>Not measured when it was compiled.</p>"
    plot = ""
    if all(isinstance(gate.get(key), (int, float)) for key in ("perplexity", "baseline")):
        plot = bars(
            [("16 bit", float(gate["baseline"])), ("this artifact", float(gate["perplexity"]))],
            "perplexity",
        )
    return plot + _pairs(gate)


def _sizes(manifest: Manifest) -> str:
    parts = {"4-bit weights": 0.0, "their scales": 0.0}
    for entry in manifest.weights.values():
        for field, (shape, dtype) in entry.expected().items():
            kind = "4-bit weights" if field == "qweight" else "their scales"
            parts[kind] += math.prod(shape) * dtype.itemsize / 1e6
    parts["16 bit"] = max(manifest.bytes_after / 1e6 - sum(parts.values()), 0.0)
    return shares([("before", {"16 bit": manifest.bytes_before / 1e6}), ("now", parts)], "MB")


def _passes(manifest: Manifest) -> str:
    names = list(dict.fromkeys(key for graph in manifest.graphs for key in graph["counts"]))
    rows = [(name, *(graph["counts"].get(name, "") for graph in manifest.graphs)) for name in names]
    return _table(("pass", *(graph["graph"] for graph in manifest.graphs)), rows)


def _refusals(manifest: Manifest) -> str:
    found = [refusal for graph in manifest.graphs for refusal in graph["refusals"]]
    rows = dict.fromkeys(
        (r["name"], r["reason"], "by a rule" if r["kept"] else "not supported") for r in found
    )
    return _table(("node", "reason", "why"), rows) if rows else "<p>Nothing.</p>"


def _graphs(manifest: Manifest, listings: Mapping[str, str]) -> str:
    """Each graph behind the passes, folded up, and what a decode step launches."""
    parts = [
        _folded(file, f'<div class="scroll"><pre>{escape(text)}</pre></div>')
        for file, text in listings.items()
    ]
    for graph in manifest.graphs:
        found = graph.get("launches")
        if found is not None:
            lines = "\n".join(map(str, found["layers"]))
            parts.append(f"<p>A decode step of one sequence on {escape(str(found['device']))}:</p>")
            parts.append(f'<div class="scroll"><pre>{escape(lines)}</pre></div>')
    return "\n".join(parts) or "<p>Not written out.</p>"


def _layers(recipe: Mapping[str, Any] | None) -> str:
    if recipe is None or not recipe.get("layers"):
        return "<p>Rounded to nearest, all layers alike: nothing was measured.</p>"
    layers: Sequence[Mapping[str, Any]] = recipe["layers"]
    rows = []
    for layer in layers:
        errors = layer.get("errors") or {}
        worst = max(errors, key=lambda name: errors[name], default="")
        kv = layer.get("kv") or {}
        rows.append(
            (
                layer.get("name"),
                kv.get("bits", ""),
                kv.get("reason", ""),
                layer.get("sqnr"),
                worst,
                errors.get(worst, ""),
                "; ".join(layer.get("refused") or ()),
            )
        )
    ratios = [(str(x.get("name")), x["sqnr"]) for x in layers if x.get("sqnr") is not None]
    titles = ("layer", "KV bits", "why", "SQNR dB", "worst linear", "its error", "left out")
    return (bars(ratios, "dB") if ratios else "") + _table(titles, rows)


def _kernels(kernels: Sequence[Mapping[str, Any]]) -> str:
    """A table for each op and spec, folded up: sizes, devices and tiles are many."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for kernel in kernels:
        groups.setdefault((str(kernel.get("op")), _plain(kernel.get("spec"))), []).append(kernel)
    note = (
        "<p>Roofline: the least time that bytes and operations take, over the time the model of "
        "the tile expects; nothing was measured here.</p>"
    )
    titles = ("tokens", "device", "form", "tile", "from", "roofline", "file")
    folded = [
        _folded(f"{op}: {spec}", _table(titles, map(_kernel, found)))
        for (op, spec), found in groups.items()
    ]
    return note + "\n".join(folded)


def _kernel(kernel: Mapping[str, Any]) -> tuple[Any, ...]:
    share = kernel.get("roofline")
    return (
        kernel.get("size"),
        (kernel.get("device") or {}).get("name"),
        kernel.get("form"),
        _plain(kernel.get("tile")),
        "table" if kernel.get("tuned") else "heuristic",
        "" if share is None else f"{100 * share:.0f} %",
        kernel.get("file"),
    )


def _weights(manifest: Manifest) -> str:
    rows = [
        (name, f"{entry.out_features} x {entry.in_features}", entry.group_size, entry.dtype)
        for name, entry in manifest.weights.items()
    ]
    return _table(("weight", "shape", "group", "stands for"), rows)


def _plain(value: Any) -> str:
    if not isinstance(value, Mapping):
        return str(value)
    return ", ".join(f"{key}={item}" for key, item in value.items())


def _section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{body}"


def _folded(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def _pairs(values: Mapping[str, Any]) -> str:
    return _table(("", ""), values.items())


def _table(titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    head = "".join(f"<th>{escape(str(title))}</th>" for title in titles)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"<td>{escape('' if value is None else str(value))}</td>"
    text = str(value) if isinstance(value, int) else f"{value:.4g}"
    return f'<td class="n">{text}</td>'
