"""Tables of figures, written as Markdown, CSV, LaTeX (booktabs) and, by `report.page`, HTML."""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

TableCell = str | float | None
"""Text, a number, or None for an empty cell."""


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        title: its name in one line.
        headings: headings of the columns; the first column names the rows.
        rows: cells of each row.
        note: what the figures are, with their units.
        decimals: decimals of numbers.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[TableCell]]
    note: str = ""
    decimals: int = 2

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.headings) for row in self.rows), self.title


def cell_text(cell: TableCell, table: Table) -> str:
    """A cell of a table as text."""
    return "" if cell is None else cell if isinstance(cell, str) else f"{cell:.{table.decimals}f}"


def markdown_table(table: Table) -> str:
    """The table under a heading, with its note."""
    lines = [f"## {table.title}", "", *([_in_markdown(table.note), ""] if table.note else [])]
    lines += [_markdown_row(table.headings), f"|{'---|' * len(table.headings)}"]
    lines += [_markdown_row([cell_text(cell, table) for cell in row]) for row in table.rows]
    return "\n".join([*lines, ""])


def csv_tables(tables: Sequence[Table]) -> str:
    """All tables in one CSV; each line begins with its table's title, and a table's first line has its headings.

    Lines are padded to one length, so that the file is rectangular.
    """
    width = max(len(table.headings) for table in tables)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for table in tables:
        for row in (table.headings, *table.rows):
            cells = [cell_text(cell, table) for cell in row]
            writer.writerow([table.title, *cells, *[""] * (width - len(cells))])
    return text.getvalue()


def latex_tables(tables: Sequence[Table]) -> str:
    """All tables as LaTeX floats with `tabular`; the document loads the package booktabs."""
    return "\n".join(["% \\usepackage{booktabs}", *map(_latex_table, tables), ""])


def _latex_table(table: Table) -> str:
    alignment = "l" + "r" * (len(table.headings) - 1)
    caption = " ".join(filter(None, [f"\\textbf{{{_in_latex(table.title)}.}}", _in_latex(table.note)]))
    return "\n".join(
        [
            "",
            "\\begin{table}",
            "\\centering",
            f"\\caption{{{caption}}}",
            f"\\begin{{tabular}}{{{alignment}}}",
            "\\toprule",
            _latex_row(table.headings),
            "\\midrule",
            *(_latex_row([cell_text(cell, table) for cell in row]) for row in table.rows),
            "\\bottomrule",
            "\\end{tabular}",
            "\\end{table}",
        ]
    )


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_in_markdown, cells))} |"


def _latex_row(cells: Sequence[str]) -> str:
    """The cells with the minus of negative numbers, which would be a hyphen."""
    return " & ".join(re.sub(r"^-(?=\d)", "$-$", _in_latex(cell)) for cell in cells) + " \\\\"


def _in_markdown(words: str) -> str:
    return words.replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*").replace("\n", " ")


_LATEX = {
    "\\": "\\textbackslash{}", "{": "\\{", "}": "\\}", "$": "\\$", "&": "\\&", "#": "\\#", "%": "\\%", "_": "\\_",
    "^": "\\textasciicircum{}", "~": "\\textasciitilde{}", "<": "\\textless{}", ">": "\\textgreater{}",
    "|": "\\textbar{}", "±": "$\\pm$", "[": "{[}", "]": "{]}", "\n": " ",
}  # fmt: skip


def _in_latex(words: str) -> str:
    """Escapes text; brackets are grouped, since they are an option after a line break."""
    return "".join(_LATEX.get(sign, sign) for sign in words)
