"""The dress of every page: style, head, tables and bars. Text from outside is escaped by whoever puts it in."""

from collections.abc import Iterable
from html import escape

STYLE = """
:root { color-scheme: light dark; --ok: #2a7f4f; --bad: #c0392b; --line: #8884; --bar: #4a78b5; --soft: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; } h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
.ok { color: var(--ok); } .bad { color: var(--bad); }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line); }
td.n { text-align: right; font-variant-numeric: tabular-nums; } td.w { width: 45%; }
.bar { display: block; height: .7rem; background: var(--bar); } .bar.bad { background: var(--bad); }
.scale { position: relative; } .limit { position: absolute; top: 0; bottom: 0; border-left: 2px dashed var(--bad); }
code { font-size: .9em; }
"""


def page(title: str, body: Iterable[str], style: str = "", script: str = "") -> str:
    """A whole page; `script` runs after the body."""
    end = f"<script>{script}</script>" if script else ""
    head = (
        f'<meta charset=utf-8><meta name=viewport content="width=device-width"><title>{escape(title)}</title><style>{STYLE}{style}</style>'
    )
    return f"<!doctype html><html lang=en>{head}<body><main>{''.join(body)}</main>{end}</body></html>\n"


def rows(head: list[str], cells: Iterable[list[str]]) -> str:
    """A table of finished cells (``<td>…``)."""
    top = "<tr>" + "".join(f"<th scope=col>{escape(cell)}</th>" for cell in head) + "</tr>" if head else ""
    return f"<table>{top}{''.join('<tr>' + ''.join(row) + '</tr>' for row in cells)}</table>"


def bar(share: float) -> str:
    """A bar of `share` (0 to 1) of the place it stands in."""
    return f'<span class=bar style="width:{100 * share:.1f}%"></span>'
