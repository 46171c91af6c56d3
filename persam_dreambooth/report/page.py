"""HTML pages in one file, with embedded pictures and style, for offline use; light or dark by the browser's setting.

A page consists of blocks of HTML. External text must be escaped with `text`.
"""

import base64
import html
import io
from collections.abc import Sequence

from PIL import Image

TableCell = str | float | None
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


def html_table(headings: Sequence[str], rows: Sequence[Sequence[TableCell]], links: Sequence[str] = ()) -> str:
    """A table that sorts by a column when its heading is clicked.

    Args:
        headings: headings of the columns.
        rows: cells of each row: text, a number (shown with two decimals), or None for an empty cell.
        links: for each row, the name of the section that the first cell links to; empty for no link.
    """
    numeric = [isinstance(value, float) for value in rows[0]]
    head = "".join(
        f'<th scope="col"{_NUMBER if number else ""}><button type="button">{text(heading)}</button></th>'
        for heading, number in zip(headings, numeric, strict=True)
    )
    lines = []
    for number, row in enumerate(rows):
        first, *rest = map(_cell, row)
        if number < len(links) and links[number]:
            first = first.replace("<td>", f'<td><a href="#{text(links[number])}">').replace("</td>", "</a></td>")
        lines.append(f"<tr>{first}{''.join(rest)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _cell(value: TableCell) -> str:
    if value is None:
        return "<td></td>"
    return f"<td>{text(value)}</td>" if isinstance(value, str) else f"<td{_NUMBER}>{value:.2f}</td>"


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
