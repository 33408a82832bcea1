"""A comparison as a page: which tensors differ, by how much, and where in each the differences lie."""

from collections.abc import Iterator
from html import escape
from itertools import groupby

import numpy as np

from reshard.comparison.difference import Difference, DiffReport
from reshard.comparison.heat import Heat
from reshard.page import page, rows
from reshard.text import count, human

#: tensors in the table, and maps: those with most differing elements
_SHOWN, _MAPS = 200, 40
_STYLE = """
.map { display: block; width: min(100%, 24rem); height: auto; border: 1px solid var(--line); } .maps { columns: 2 20rem; gap: 2rem; }
.maps figure { break-inside: avoid; margin: 0 0 1.5rem; } figcaption { font-size: .85rem; overflow-wrap: anywhere; }
""" + "".join(f".h{level} {{ fill: var(--bad); fill-opacity: {0.2 + level / 10:.1f} }} " for level in range(1, 9))


def diff_page(report: DiffReport, a: str, b: str) -> str:
    """The page of a comparison of the checkpoints named `a` and `b`, made with maps (``compare(…, maps=True)``)."""
    verdict = "equal" if report.equal else "different"
    kind = "ok" if report.equal else "bad"
    body = [
        f'<h1>reshard diff: <span class="{kind}">{verdict}</span></h1>',
        f"<p><code>{escape(a)}</code> and <code>{escape(b)}</code>: {len(report.differing)} of {count(report.tensors, 'tensor')} differ.</p>",
    ]
    for side, names, size in ((a, report.missing_in_a, report.bytes_missing_in_a), (b, report.missing_in_b, report.bytes_missing_in_b)):
        if names:
            some = "".join(f"<li><code>{escape(name)}</code>" for name in names[:_SHOWN])
            body.append(f"<h2>Missing in {escape(side)}: {count(len(names), 'tensor')}, {human(size)}</h2><ul>{some}</ul>")
    if report.differing:
        shown = report.differing[:_SHOWN]
        drawn = sorted((d for d in report.differing if d.heat is not None), key=lambda d: -d.elements)[:_MAPS]
        maps = "".join(map(_figure, drawn))
        words = "Each map is the tensor in its own axes: the first dimension runs down, the others across; the stronger, the more elements differ. "
        words += f"Those of {count(len(drawn), 'tensor')} with most differing elements are drawn."
        body.append(f"<h2>Where</h2><p>{words}</p><div class=maps>{maps}</div>")
        body += ["<h2>What differs</h2>", rows(["tensor", "elements", "max |a−b|", ""], map(_row, shown)), _rest(report)]
    return page("reshard diff", body, _STYLE)


def _rest(report: DiffReport) -> str:
    more = len(report.differing) - _SHOWN
    return f"<p>… and {count(more, 'more tensor')}</p>" if more > 0 else ""


def _row(d: Difference) -> list[str]:
    gap = "-" if d.max_abs_diff is None else f"{d.max_abs_diff:.3g}"
    return [
        f"<td><code>{escape(d.name)}</code></td>",
        f"<td class=n>{d.elements}</td>",
        f"<td class=n>{gap}</td>",
        f"<td>{escape(d.why)}</td>",
    ]


def _runs(line: list[int]) -> Iterator[tuple[int, int, int]]:
    """(first cell, cells, level) of neighbours of one level, none where nothing differs."""
    x = 0
    for level, same in groupby(line):
        n = len(list(same))
        if level:
            yield x, n, level
        x += n


def _figure(d: Difference) -> str:
    heat: Heat = d.heat
    (down, across), (high, wide) = heat.cells, heat.size
    levels = np.ceil(8 * np.minimum(1, heat.counts * (down * across) / max(high * wide, 1))).astype(int)
    cells = "".join(
        f'<rect x="{x}" y="{y}" width="{n}" height="1" class="h{level}"/>'
        for y, line in enumerate(levels.tolist())
        for x, n, level in _runs(line)
    )
    label = f"{d.name}: {d.elements} of {high} × {wide} elements differ"
    ratio = "none" if across > 1 and down > 1 else "xMinYMin"
    svg = f'<svg class=map viewBox="0 0 {across} {down}" preserveAspectRatio={ratio} role=img aria-label="{escape(label)}">{cells}</svg>'
    return f"<figure>{svg}<figcaption>{escape(label)}</figcaption></figure>"
