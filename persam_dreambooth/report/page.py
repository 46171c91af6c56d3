"""HTML pages in one file, with embedded pictures and style, for offline use; light or dark by the browser's setting.

A page consists of blocks of HTML. External text must be escaped with `text`.
"""

import base64
import html
import io
from collections.abc import Sequence
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
    """A paragraph of plain text."""
    return f"<p>{text(words)}</p>"


def picture(image: Image.Image, says: str, caption: Sequence[str] = (), kind: str = "JPEG") -> str:
    """A picture embedded in the page.

    Args:
        image: RGB.
        says: alternative text.
        caption: lines below the picture.
        kind: `JPEG` for photos, `PNG` for pictures with sharp edges.
    """
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=80, optimize=True)
    data = f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    shown = f'<img src="{data}" width="{image.width}" height="{image.height}" alt="{text(says)}">'
    return f"<figure>{shown}<figcaption>{'<br>'.join(map(text, caption))}</figcaption></figure>" if caption else shown


def section(name: str, heading: str, pictures: Sequence[str]) -> str:
    """A row of pictures under a heading; `name` is its anchor for links."""
    return f'<section id="{text(name)}"><h2>{text(heading)}</h2><div class="row">{"".join(pictures)}</div></section>'


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
<h1>{title}</h1>
{body}
<script>{script}</script>
</body></html>
"""

STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --line: #ddd; --link: #a3004f }
@media (prefers-color-scheme: dark) { :root { --ink: #ddd; --paper: #181818; --line: #444; --link: #ff8ac4 } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 75rem; margin: 2rem auto; padding: 0 1rem }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
p { max-width: 50rem }
a { color: var(--link) }
img { max-width: 100%; height: auto; display: block }
table { border-collapse: collapse; margin: 1rem 0 2rem }
caption { text-align: left; padding-bottom: .3rem; max-width: 50rem }
.wide { overflow-x: auto }
th, td { text-align: left; padding: .25rem .8rem; border-bottom: 1px solid var(--line) }
.number { text-align: right; font-variant-numeric: tabular-nums }
th button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 0;
            text-align: inherit; cursor: pointer }
th[aria-sort] button::after { content: " \\25B2" }
th[aria-sort=descending] button::after { content: " \\25BC" }
.row { display: flex; flex-wrap: wrap; gap: .6rem }
figure { margin: 0 }
figcaption { font-size: .8rem; line-height: 1.3; padding-top: .2rem }
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
