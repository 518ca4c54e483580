"""Two plots as inline SVG: bars by name, and shares of a whole. No script, no fonts, no network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH = 720
BAR = 16
COLORS = ("#3a6ea5", "#7ba05b", "#c98b3c", "#8a6fa8", "#999999")


def bars(values: Sequence[tuple[str, float]], unit: str) -> str:
    """A horizontal bar for each (name, value), from zero; values that are not finite get none."""
    finite = [value for _, value in values if math.isfinite(value)]
    top = max((abs(value) for value in finite), default=0.0) or 1.0
    label, room = 230, WIDTH - 230 - 90
    rows = []
    for number, (name, value) in enumerate(values):
        y = number * (BAR + 6)
        length = room * abs(value) / top if math.isfinite(value) else 0.0
        shown = f"{value:.3g} {unit}"
        rows.append(
            f'<text x="{label - 8}" y="{y + 13}" text-anchor="end">{escape(name[-34:])}</text>'
            f'<rect x="{label}" y="{y}" width="{length:.1f}" height="{BAR}" fill="{COLORS[0]}">'
            f"<title>{escape(name)}: {escape(shown)}</title></rect>"
            f'<text x="{label + length + 6:.1f}" y="{y + 13}">{escape(shown)}</text>'
        )
    return _svg(max(len(values), 1) * (BAR + 6), rows)


def shares(rows: Sequence[tuple[str, Mapping[str, float]]], unit: str) -> str:
    """A bar for each (name, parts), all to one scale, cut into its parts; with a legend."""
    kinds = list(dict.fromkeys(kind for _, parts in rows for kind in parts))
    top = max((sum(parts.values()) for _, parts in rows), default=0.0) or 1.0
    label, room = 110, WIDTH - 110 - 110
    found = []
    for number, (name, parts) in enumerate(rows):
        y, x = number * (BAR + 10), float(label)
        found.append(f'<text x="{label - 8}" y="{y + 13}" text-anchor="end">{escape(name)}</text>')
        for kind, value in parts.items():
            length = room * value / top
            color = COLORS[kinds.index(kind) % len(COLORS)]
            found.append(
                f'<rect x="{x:.1f}" y="{y}" width="{length:.1f}" height="{BAR}" fill="{color}">'
                f"<title>{escape(kind)}: {value:.4g} {escape(unit)}</title></rect>"
            )
            x += length
        total = f"{sum(parts.values()):.4g} {unit}"
        found.append(f'<text x="{x + 6:.1f}" y="{y + 13}">{escape(total)}</text>')
    y = len(rows) * (BAR + 10) + 4
    for number, kind in enumerate(kinds):
        x = label + number * 150
        color = COLORS[number % len(COLORS)]
        found.append(f'<rect x="{x}" y="{y}" width="10" height="10" fill="{color}"/>')
        found.append(f'<text x="{x + 15}" y="{y + 10}">{escape(kind)}</text>')
    return _svg(y + 20, found)


def _svg(height: float, rows: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
        f'width="{WIDTH}" height="{height:.0f}" role="img">{"".join(rows)}</svg>'
    )
