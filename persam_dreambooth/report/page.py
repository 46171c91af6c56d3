"""HTML pages in one file, with embedded pictures and style, for offline use; light or dark by the browser's setting.

A page consists of blocks of HTML. External text must be escaped with `text`.
"""

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from urllib.parse import quote

from PIL import Image

from persam_dreambooth.report.tables import Table, TableCell, cell_text

_NUMBER = ' class="number"'


def page(title: str, *blocks: str) -> str:
    """A whole page: the title as its heading, then the blocks."""
    return PAGE.format(title=text(title), style=STYLE, body="\n".join(blocks), script=SCRIPT)


def text(words: str) -> str:
    """Escapes text for HTML."""
    return html.escape(words)


def paragraph(words: str) -> str:
    """A paragraph of plain text; what stands between backticks, as in Markdown, is code."""
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", text(words))
    return f"<p>{marked}</p>"


def command(words: str) -> str:
    """A command line, or several lines."""
    return f"<pre><code>{text(words)}</code></pre>"


def facts(named: Mapping[str, str]) -> str:
    """A list of names and values."""
    lines = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in named.items())
    return f'<dl class="facts">{lines}</dl>'


def details(summary: str, *blocks: str) -> str:
    """Blocks that are closed at first."""
    return f"<details><summary>{text(summary)}</summary>{''.join(blocks)}</details>"


def picture(
    image: Image.Image,
    says: str,
    caption: Sequence[str] = (),
    kind: str = "JPEG",
    *,
    alarm: str = "",
    drawing: bool = False,
) -> str:
    """A picture embedded in the page.

    Args:
        image: RGB.
        says: alternative text.
        caption: lines below the picture.
        kind: `JPEG` for photos, `PNG` for pictures with sharp edges.
        alarm: one more line below the picture, which stands out; it needs a caption.
        drawing: whether it is a drawing on white paper, which is inverted in dark mode.
    """
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=80, optimize=True)
    data = f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    looks = ' class="drawing"' if drawing else ""
    shown = f'<img{looks} src="{data}" width="{image.width}" height="{image.height}" alt="{text(says)}">'
    lines = [*map(text, caption), *([f"<strong>{text(alarm)}</strong>"] if alarm else [])]
    return f"<figure>{shown}<figcaption>{'<br>'.join(lines)}</figcaption></figure>" if lines else shown


def row(pictures: Sequence[str]) -> str:
    """Pictures beside one another, in as many lines as they need."""
    return f'<div class="row">{"".join(pictures)}</div>'


def subheading(words: str) -> str:
    """A heading within a section."""
    return f"<h3>{text(words)}</h3>"


def section(name: str, title: str, *blocks: str) -> str:
    """Blocks under a heading; `name` is their anchor for links."""
    return f'<section id="{text(name)}"><h2>{text(title)}</h2>{"".join(blocks)}</section>'


def html_table(table: Table, links: Sequence[str] = ()) -> str:
    """A table, with its note as its caption, that sorts by a column when its heading is clicked.

    Args:
        table: the table.
        links: for each row, the name of the section that the first cell links to; empty for no link.
    """
    columns = list(zip(*table.rows, strict=True))
    numeric = [any(isinstance(value, float) for value in column) for column in columns]
    head = "".join(
        f'<th scope="col"{_NUMBER if number else ""}><button type="button">{text(heading)}</button></th>'
        for heading, number in zip(table.headings, numeric, strict=True)
    )
    lines = []
    for place, row in enumerate(table.rows):
        first, *rest = [_cell(value, number, table) for value, number in zip(row, numeric, strict=True)]
        if place < len(links) and links[place]:
            first = first.replace("<td>", f'<td><a href="#{quote(links[place])}">').replace("</td>", "</a></td>")
        lines.append(f"<tr>{first}{''.join(rest)}</tr>")
    said = f"<strong>{text(table.title)}.</strong> {text(table.note)}" if table.title else text(table.note)
    title = f"<caption>{said}</caption>" if said else ""
    return (
        f'<div class="wide"><table>{title}<thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def _cell(value: TableCell, number: bool, table: Table) -> str:
    return f"<td{_NUMBER if number else ''}>{text(cell_text(value, table))}</td>"


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style></head><body>
<main>
<h1>{title}</h1>
{body}
</main>
<script>{script}</script>
</body></html>
"""

STYLE = """
:root { color-scheme: light dark; --ink: #222; --soft: #5a5a5a; --paper: #fff; --raised: #f4f2f3; --line: #ddd;
        --link: #a3004f; --alarm: #b00020 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ddd; --soft: #a5a5a5; --paper: #181818; --raised: #242424; --line: #444; --link: #ff8ac4;
          --alarm: #ff8a80 }
  img { filter: brightness(.85) }
  img.drawing { filter: invert(.88) hue-rotate(180deg) }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); overflow-wrap: anywhere }
main { max-width: 75rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; line-height: 1.25 }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem }
p { max-width: 50rem }
a { color: var(--link) }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; border-radius: 2px }
img, svg { max-width: 100%; height: auto; display: block }
table { border-collapse: collapse; margin: 1rem 0 2rem }
caption { text-align: left; padding-bottom: .3rem; max-width: 50rem }
.wide td:last-child:not(.number) { min-width: 15rem }
.wide { overflow-x: auto; overflow-wrap: normal }
th, td { text-align: left; vertical-align: top; padding: .25rem .8rem; border-bottom: 1px solid var(--line) }
td { max-width: 30rem; overflow-wrap: break-word }
.number { text-align: right; font-variant-numeric: tabular-nums }
th button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 0;
            text-align: inherit; cursor: pointer }
th[aria-sort] button::after { content: " \\25B2" }
th[aria-sort=descending] button::after { content: " \\25BC" }
.row { display: flex; flex-wrap: wrap; gap: 1rem .6rem }
figure { margin: 0; max-width: 100% }
figcaption { font-size: .8rem; line-height: 1.35; padding-top: .2rem; width: min-content; min-width: 100%;
             overflow-wrap: break-word }
figcaption strong { color: var(--alarm) }
code { font: .9em ui-monospace, monospace }
pre { background: var(--raised); border: 1px solid var(--line); border-radius: 4px; padding: .6rem .8rem;
      margin: .3rem 0 1rem; white-space: pre-wrap }
.facts { margin: 1rem 0 }
.facts div { display: flex; flex-wrap: wrap; gap: 0 1rem; padding: .2rem 0; border-bottom: 1px solid var(--line) }
.facts dt { flex: 0 0 11rem; color: var(--soft) }
.facts dd { flex: 1 1 14rem; margin: 0 }
summary { cursor: pointer; padding: .3rem 0; color: var(--link) }
.plot { width: 36rem; font: 12px system-ui, sans-serif; fill: var(--ink) }
.plot .axis { stroke: var(--line); fill: none }
.plot .each { stroke: var(--soft); stroke-width: 1; fill: none; opacity: .6 }
.plot .mean { stroke: var(--link); stroke-width: 2; fill: none }
.bars { display: grid; grid-template-columns: max-content 1fr; gap: .4rem .8rem; align-items: center; margin: 1rem 0 }
.bars svg { width: 100%; height: 1.2rem; background: var(--raised); outline: 1px solid var(--line) }
"""

SCRIPT = """
for (const head of document.querySelectorAll("th")) head.firstChild.addEventListener("click", () => {
  const column = head.cellIndex, body = head.closest("table").tBodies[0];
  const up = head.getAttribute("aria-sort") !== "ascending";
  const key = row => row.cells[column].textContent;
  const order = (a, b) => (Number(key(a)) - Number(key(b))) || key(a).localeCompare(key(b));
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  body.append(...[...body.rows].sort((a, b) => up ? order(a, b) : order(b, a)));
});
"""
