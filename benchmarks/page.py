"""The HTML page of benchmark runs: charts and tables in one file that needs no network."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from rows import Row, Run

__all__ = ["page", "picture"]

# Replaced by the colour of the page's text, which is light or dark.
INK = "#010203"
GREY = "#808080"
# Okabe and Ito's colours, which differ for colour-blind people, too; hatches and markers differ without any colour.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
HATCHES = ("", "//", "\\\\", "--", "||", "xx")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)))

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
figure { margin: 1rem 0; overflow-x: auto; }
svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: 0.875rem; }
td, th { padding: 0.125rem 0.75rem; text-align: left; border-bottom: 1px solid #8886; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
"""

Labelled = Sequence[tuple[str, Run]]


def page(runs: Sequence[Run], titles: Mapping[str, str]) -> str:
    """Return the page of some runs; ``titles`` are those of the parts, in their order."""
    labelled = [(run.head["interpreter"], run) for run in runs]
    sections = [_section(part, title, labelled) for part, title in titles.items()]
    heads = "".join(f"<h2>{_text(label)}</h2>{_table(run.head.items())}" for label, run in labelled)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Without it a browser asks the server for one.
        '<link rel="icon" href="data:,">'
        f"<title>bgtasks: benchmarks</title><style>{STYLE}</style></head>\n<body><h1>bgtasks: benchmarks</h1>"
        "<p>Each figure is the median of its rounds, in which the contenders took turns; the thin lines show where the "
        "middle half of the rounds lies. Printed by <code>python benchmarks/run.py --html FILE</code>.</p>\n"
        f"{''.join(sections)}{heads}</body></html>\n"
    )


def picture(runs: Sequence[Run]) -> str:
    """Return the first chart of some runs as a file of its own, in grey, which is readable on white and on black."""
    case = next(row.case for run in runs for row in run.rows)
    chosen = [(run.head["interpreter"], [row for row in run.rows if row.case == case]) for run in runs]
    return _drawn(bars([(label, rows) for label, rows in chosen if rows])).replace(INK, GREY)


def _section(part: str, title: str, runs: Labelled) -> str:
    cases = dict.fromkeys(row.case for _, run in runs for row in run.rows if row.part == part)
    if not cases:
        return ""
    return f"<h2>{_text(title)}</h2>\n" + "".join(_figure(part, case, runs) for case in cases)


def _figure(part: str, case: str, runs: Labelled) -> str:
    chosen = [(label, [row for row in run.rows if (row.part, row.case) == (part, case)]) for label, run in runs]
    chosen = [(label, rows) for label, rows in chosen if rows]
    draw = bars if chosen[0][1][0].x is None else lines
    cells = [
        (
            label,
            row.name,
            "" if row.x is None else f"{row.x:,.0f}",
            f"{row.median:,.3f}",
            f"{row.low:,.3f} to {row.high:,.3f}",
        )
        for label, rows in chosen
        for row in rows
    ]
    unit = chosen[0][1][0].unit
    table = _table(cells, ("interpreter", "", "at", unit, "middle half"))
    return (
        f"<h3>{_text(case)}</h3><figure>{_svg(draw(chosen), f'{case}, {unit}')}"
        f"<details><summary>The figures</summary>{table}</details></figure>\n"
    )


def bars(chosen: Sequence[tuple[str, Sequence[Row]]]) -> Figure:
    """Draw rows as bars: a group for each name, and in it a bar for each run."""
    names = list(dict.fromkeys(row.name for _, rows in chosen for row in rows))
    with mpl.rc_context(_settings()):
        figure = Figure(figsize=(9, 0.6 + 0.28 * len(names) * (len(chosen) + 0.5)), layout="constrained")
        axes = figure.subplots()
        height = 0.8 / len(chosen)
        for index, (label, rows) in enumerate(chosen):
            places = [names.index(row.name) + height * (index - (len(chosen) - 1) / 2) for row in rows]
            medians = [row.median for row in rows]
            spread = [[row.median - row.low for row in rows], [row.high - row.median for row in rows]]
            look: dict[str, Any] = {"color": COLORS[index % 6], "hatch": HATCHES[index % 6], "edgecolor": INK}
            drawn = axes.barh(places, medians, height, xerr=spread, label=label, ecolor=INK, linewidth=0.5, **look)
            axes.bar_label(
                drawn, [f"{median:,.3g}" if median < 1000 else f"{median:,.0f}" for median in medians], padding=4
            )
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.margins(x=0.12, y=0.02)
        axes.set_xlabel(chosen[0][1][0].unit)
        axes.spines[["top", "right"]].set_visible(False)
        if len(chosen) > 1:
            axes.legend(frameon=False, loc="lower right")
    return figure


def lines(chosen: Sequence[tuple[str, Sequence[Row]]]) -> Figure:
    """Draw rows as lines: one for each name of each run."""
    with mpl.rc_context(_settings()):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        axes = figure.subplots()
        index = 0
        for label, rows in chosen:
            for name, of_name in groupby(sorted(rows, key=lambda row: row.name), key=lambda row: row.name):
                points = list(of_name)
                xs, medians = [row.x for row in points], [row.median for row in points]
                spread = [[row.median - row.low for row in points], [row.high - row.median for row in points]]
                look: dict[str, Any] = {"color": COLORS[index % 6], "marker": MARKERS[index % 6]}
                look["label"] = f"{name}, {label}" if len(chosen) > 1 else name
                axes.errorbar(xs, medians, spread, linestyle=DASHES[index % 6], capsize=3, elinewidth=1, **look)
                index += 1
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_xlabel(chosen[0][1][0].case)
        axes.set_ylabel(chosen[0][1][0].unit)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    return figure


def _settings() -> dict[str, Any]:
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "hatch.color")
    return {**dict.fromkeys(inked, INK), "svg.fonttype": "none", "svg.hashsalt": "bgtasks", "font.family": "sans-serif"}


def _svg(figure: Figure, title: str) -> str:
    """Return a figure as an element of a page, in the colour of its text, with a title for those who hear it."""
    drawn = _drawn(figure)
    head, _, rest = drawn[drawn.index("<svg") :].replace(INK, "currentColor").partition(">")
    return f'{head} role="img"><title>{_text(title)}</title>{rest}'


def _drawn(figure: Figure) -> str:
    """Return a figure as a file of SVG."""
    target = io.StringIO()
    with mpl.rc_context(_settings()):
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return target.getvalue()


def _table(rows: Any, header: Sequence[str] = ()) -> str:
    def cell(value: str) -> str:
        kind = ' class="number"' if value[:1].isdigit() else ""
        return f"<td{kind}>{_text(value)}</td>"

    top = "<tr>" + "".join(f"<th>{_text(name)}</th>" for name in header) + "</tr>" if header else ""
    return f"<table>{top}{''.join('<tr>' + ''.join(map(cell, row)) + '</tr>' for row in rows)}</table>"


def _text(value: str) -> str:
    return html.escape(value)
