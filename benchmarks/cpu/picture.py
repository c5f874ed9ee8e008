"""The picture: bars of every engine, cell by cell, with the roof as a line. SVG, written here."""

from __future__ import annotations

from html import escape

from .engines import ENGINES, OURS
from .table import Row, number

_WIDTH, _LABEL, _BAR, _GAP, _TITLE = 900, 170, 16, 4, 30
_COLORS = ("#1a6b54", "#8fa3b8", "#b8a98f", "#a08fb8", "#b88f9b", "#8fb8b0", "#c4b274", "#9a9a9a")
_STYLE = "font-family:system-ui,sans-serif;font-size:12px;fill:#222"


def draw(rows: list[Row], title: str) -> str:
    """An SVG document: a panel for each row, bars as long as the value is of the panel's largest."""
    parts: list[str] = []
    y = 2 * _TITLE
    for row in rows:
        if row.values:
            parts.append(
                _text(10, y, f"{row.cell.name} ({row.cell.unit}{'' if row.cell.is_rate else ', less is better'})", 600)
            )
            y += 8
            y = _panel(parts, row, y) + _TITLE
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y}" width="{_WIDTH}" height="{y}">'
    ground = f'<rect width="{_WIDTH}" height="{y}" fill="#fff"/>'
    return "\n".join([head, ground, _text(10, 24, title, 700), *parts, "</svg>"]) + "\n"


def _panel(parts: list[str], row: Row, y: int) -> int:
    longest = max([*row.values.values(), row.roof or 0.0])
    room = _WIDTH - _LABEL - 170
    top = y
    for index, engine in enumerate(ENGINES):
        if engine.name not in row.values:
            continue
        value = row.values[engine.name]
        told = number(value)
        if engine.name == OURS and row.ratio is not None:
            told += f"  ({row.ratio:.2f}× the best rival)"
        elif engine.name in row.fractions:
            told += f"  ({row.fractions[engine.name]:.0%} of its roof)"
        length = room * value / longest
        parts.append(_text(_LABEL - 8, y + 12, engine.name, 700 if engine.name == OURS else 400, "end"))
        parts.append(
            f'<rect x="{_LABEL}" y="{y}" width="{length:.1f}" height="{_BAR}" fill="{_COLORS[index % len(_COLORS)]}"/>'
        )
        parts.append(_text(int(_LABEL + length + 6), y + 12, told, 400))
        y += _BAR + _GAP
    if row.roof is not None:
        x = _LABEL + room * row.roof / longest
        parts.append(f'<path d="M{x:.1f} {top - 3}V{y}" stroke="#c03" stroke-dasharray="4 3"/>')
        parts.append(_text(int(x + 4), top - 6, f"roof {number(row.roof)}", 400))
    return y


def _text(x: int, y: int, text: str, weight: int, anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" style="{_STYLE};font-weight:{weight}" text-anchor="{anchor}">{escape(text)}</text>'
