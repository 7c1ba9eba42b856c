"""A self-contained HTML page: no script, no outside request, light and dark, phone and print."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_STYLE = """
:root{color-scheme:light dark;--back:#fff;--fore:#1c2024;--soft:#60646c;--line:#d9d9e0;
--card:#f7f7f9;--good:#18794e;
--bad:#ce2c31;--c0:#0d74ce;--c1:#e5630a;--c2:#218358;--c3:#8145b5;--c4:#b8860b;
--c5:#c2298a;--c6:#107d98;--c7:#6b7078}
@media (prefers-color-scheme:dark){:root{--back:#111113;--fore:#edeef0;--soft:#b0b4ba;
--line:#363a3f;
--card:#191a1c;--good:#3dd68c;--bad:#ff9592;--c0:#70b8ff;--c1:#ffa057;--c2:#3dd68c;--c3:#d19dff;
--c4:#f5d90a;--c5:#ff8dcc;--c6:#4ccce6;--c7:#a0a5ad}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:72rem;background:var(--back);color:var(--fore);
font:1rem/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;margin:.5rem 0}h2{font-size:1.2rem;margin:2rem 0 .5rem}
p{margin:.5rem 0;max-width:48rem}.soft{color:var(--soft)}
.good{color:var(--good)}.bad{color:var(--bad)}
.charts{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,23rem),1fr));
align-items:start}
figure{margin:0;padding:.75rem;background:var(--card);border:1px solid var(--line);
border-radius:.5rem}
figcaption{font-weight:600;margin-bottom:.25rem}svg{display:block;width:100%;height:auto}
.label{fill:var(--fore);font-size:11px}.grid{stroke:var(--line);fill:none}
.mark{stroke:var(--fore);fill:none;stroke-width:1.2}
.rule{stroke:var(--bad);fill:none;stroke-dasharray:4 3;stroke-width:1.4}
.roof{stroke:var(--soft);fill:none;stroke-width:2}.line{fill:none!important;stroke-width:2}
.s0{fill:var(--c0)}.s1{fill:var(--c1)}.s2{fill:var(--c2)}.s3{fill:var(--c3)}.s4{fill:var(--c4)}
.s5{fill:var(--c5)}.s6{fill:var(--c6)}.s7{fill:var(--c7)}.line.s0{stroke:var(--c0)}
.line.s1{stroke:var(--c1)}.line.s2{stroke:var(--c2)}.line.s3{stroke:var(--c3)}
.line.s4{stroke:var(--c4)}.line.s5{stroke:var(--c5)}.line.s6{stroke:var(--c6)}
.line.s7{stroke:var(--c7)}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem}
th,td{padding:.2rem .6rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child,.left{text-align:left}thead th{color:var(--soft);font-weight:600}
@media print{:root{color-scheme:light;--back:#fff;--fore:#000;--soft:#444;--line:#bbb;--card:#fff;
--good:#060;--bad:#a00}body{max-width:none;padding:0;font-size:10pt}figure,tr{break-inside:avoid}
.charts{grid-template-columns:1fr 1fr}.wide{overflow:visible}table{font-size:7.5pt}
th,td{padding:.1rem .25rem}h2{break-after:avoid}}
"""


def page(title: str, body: Iterable[str]) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        # what the browser would ask the server for otherwise
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str, style: str = "") -> str:
    return f'<p class="{style}">{escape(text)}</p>' if style else f"<p>{escape(text)}</p>"


def charts(figures: Iterable[str]) -> str:
    return '<div class="charts">' + "\n".join(figures) + "</div>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells as text; one that begins with a check mark or a cross is coloured."""
    heads = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return (
        f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody>'
        "</table></div>"
    )


def _cell(text: str) -> str:
    style = {"✓": ' class="good"', "✗": ' class="bad"'}.get(text[:1], "")
    return f"<td{style}>{escape(text)}</td>"
