"""Pages hold all they show, say what they are given, and sort in a browser; tables in all formats."""

import csv
import re
import shutil
import subprocess

import pytest
from browser import reaches_beyond
from PIL import Image
from training_runs import command

from persam_dreambooth.report import page
from persam_dreambooth.report.tables import Table, csv_tables, latex_tables, markdown_table

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def test_signs_of_html_are_shown_and_not_obeyed():
    made = page.page("a < b", page.paragraph("<script>"), page.html_table(Table("", ["x & y"], [["<b>"]])))
    assert "a &lt; b" in made and "&lt;script&gt;" in made and "x &amp; y" in made and "<b>" not in made


def test_a_picture_is_inside_with_its_size_and_words():
    shown = page.picture(Image.new("RGB", (30, 20)), 'a "duck"', ["00.jpg", "IoU 90 %"])
    assert 'src="data:image/jpeg;base64,/9j/' in shown and 'width="30" height="20"' in shown
    assert 'alt="a &quot;duck&quot;"' in shown and "00.jpg<br>IoU 90 %" in shown


def test_first_cells_lead_to_the_sections_that_are_there():
    made = page.html_table(Table("", ["object", "IoU"], [["cat", 20.0], ["dog", None]]), ["cat"])
    assert '<td><a href="#cat">cat</a></td>' in made and '<td>dog</td><td class="number"></td>' in made


@pytest.mark.skipif(CHROMIUM is None, reason="no browser is here")
def test_a_click_on_a_heading_sorts_by_number_and_another_turns_it_around(tmp_path):
    rows = [["cat", 9.0], ["dog", 80.0], ["ant", 70.0]]

    def order(clicks):
        path = tmp_path / "page.html"
        click = f"<script>for (let i = 0; i < {clicks}; i++) document.querySelectorAll('th button')[1].click()</script>"
        made = page.page("animals", page.html_table(Table("", ["name", "IoU"], rows))).replace(
            "</body>", f"{click}</body>"
        )
        path.write_text(made, encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}"]
        done = subprocess.run(
            [str(CHROMIUM), *options, "--dump-dom", path.as_uri()], capture_output=True, text=True, check=True
        )
        return re.findall(r"<td>(\w+)</td>", done.stdout)

    assert order(0) == ["cat", "dog", "ant"]
    assert order(1) == ["cat", "ant", "dog"]
    assert order(2) == ["dog", "ant", "cat"]


# --- tables

UNTIDY = Table(
    "Objects of persam_f",
    ["object", "IoU", "gain"],
    [["cat_statue", 20.0, "+1.50"], ["R&B 50% #1 {a}", None, "-0.25"], ['a|b, "c" ~^\\ $x$ *', 3.14159, None]],
    "Percent, 90 % ± 2.",
)
"""Names with what means something in one of the formats."""


def test_every_cell_of_a_csv_comes_back_with_two_decimals():
    lines = list(
        csv.reader(csv_tables([UNTIDY, Table("B", ["a", "b", "c", "d"], [["1", 2.0, 3.0, 4.0]])]).splitlines())
    )
    assert {len(line) for line in lines} == {5}  # one width, so that the file is rectangular
    assert lines[:4] == [
        ["Objects of persam_f", "object", "IoU", "gain", ""],
        ["Objects of persam_f", "cat_statue", "20.00", "+1.50", ""],
        ["Objects of persam_f", "R&B 50% #1 {a}", "", "-0.25", ""],
        ["Objects of persam_f", 'a|b, "c" ~^\\ $x$ *', "3.14", "", ""],
    ]
    assert lines[5] == ["B", "1", "2.00", "3.00", "4.00"]


def test_markdown_keeps_its_columns_whatever_the_names():
    lines = [line for line in markdown_table(UNTIDY).splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {4}
    assert lines[2] == "| cat_statue | 20.00 | +1.50 |"
    assert lines[4].startswith('| a\\|b, "c"') and "\\*" in lines[4]


def test_latex_has_as_many_cells_as_columns_and_no_bare_sign():
    text = latex_tables([UNTIDY])
    assert text.startswith("% \\usepackage{booktabs}\n")
    opened, closed = re.findall(r"\\begin\{(\w+)\}", text), re.findall(r"\\end\{(\w+)\}", text)
    assert opened == closed[::-1] == ["table", "tabular"]
    [columns] = re.findall(r"\\begin\{tabular\}\{(l?r*)\}", text)
    body = text.split("\\toprule\n")[1].split("\\bottomrule")[0].replace("\\midrule\n", "")
    rows = [re.split(r"(?<!\\)&", line.removesuffix(" \\\\")) for line in body.splitlines()]
    assert {len(row) for row in rows} == {len(columns)} == {3} and len(rows) == 4
    assert rows[1][0].strip() == r"cat\_statue" and rows[2][0].strip() == r"R\&B 50\% \#1 \{a\}"
    assert [cell.strip() for cell in rows[2][1:]] == ["", "$-$0.25"]
    assert rows[3][0].strip() == r'a\textbar{}b, "c" \textasciitilde{}\textasciicircum{}\textbackslash{} \$x\$ *'
    # Braces balance, and what starts a comment, mathematics or a subscript is escaped.
    bare = re.sub(r"\\[\\{}$&#%_]", "", text.split("\n", 1)[1].replace("$\\pm$", "±").replace("$-$", "-"))
    assert bare.count("{") == bare.count("}") and not set(bare) & set("%$#_^~")


# --- the pages of runs in a browser


@pytest.fixture(scope="module")
def run_pages(complete, photos, filled_sam, tmp_path_factory):
    """The pages of a finished training and of a folder of masks."""
    masks = tmp_path_factory.mktemp("pages") / "masks"
    given = ["--images", photos, "--mask", photos.parent / "masks" / "00.png", "--sam_model", filled_sam]
    assert command("segment", *given, "--output", masks) == 0
    return {"train": complete / "report.html", "segment": masks / "report.html"}


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["train", "segment"])
def test_the_page_of_a_run_fits_a_phone_and_needs_no_network(kind, scheme, run_pages, chromium):
    context = chromium.new_context(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    requests = []
    context.on("request", lambda request: requests.append(request.url))
    shown = context.new_page()
    shown.goto(run_pages[kind].as_uri())
    assert [url for url in requests if not url.startswith("data:")] == [run_pages[kind].as_uri()]
    assert reaches_beyond(shown) == 0
    assert shown.evaluate("[...document.images].every(each => each.alt.trim() && each.naturalWidth)")
    ink, paper = shown.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    brightness = [sum(map(int, re.findall(r"\d+", color)[:3])) for color in (ink, paper)]
    assert (brightness[0] > brightness[1]) == (scheme == "dark")
    outlined = shown.locator("#masks img").count()
    assert outlined == 4
    if kind == "train":
        assert shown.get_by_role("heading", level=2).all_inner_texts() == [
            "Masks", "Loss", "Samples", "Options", "Commands"
        ]  # fmt: skip
        assert shown.locator("#samples img").count() == 2
    context.close()
