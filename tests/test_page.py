"""Pages hold all they show, say what they are given, and sort in a browser."""

import re
import shutil
import subprocess

import pytest
from PIL import Image

from persam_dreambooth.report import page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def test_signs_of_html_are_shown_and_not_obeyed():
    made = page.page("a < b", page.paragraph("<script>"), page.html_table(["x & y"], [["<b>"]]))
    assert "a &lt; b" in made and "&lt;script&gt;" in made and "x &amp; y" in made and "<b>" not in made


def test_a_picture_is_inside_with_its_size_and_words():
    shown = page.picture(Image.new("RGB", (30, 20)), 'a "duck"', ["00.jpg", "IoU 90 %"])
    assert 'src="data:image/jpeg;base64,/9j/' in shown and 'width="30" height="20"' in shown
    assert 'alt="a &quot;duck&quot;"' in shown and "00.jpg<br>IoU 90 %" in shown


def test_first_cells_lead_to_the_sections_that_are_there():
    made = page.html_table(["object", "IoU"], [["cat", 20.0], ["dog", None]], ["cat"])
    assert '<td><a href="#cat">cat</a></td>' in made and "<td>dog</td><td></td>" in made


@pytest.mark.skipif(CHROMIUM is None, reason="no browser is here")
def test_a_click_on_a_heading_sorts_by_number_and_another_turns_it_around(tmp_path):
    rows = [["cat", 9.0], ["dog", 80.0], ["ant", 70.0]]

    def order(clicks):
        path = tmp_path / "page.html"
        click = f"<script>for (let i = 0; i < {clicks}; i++) document.querySelectorAll('th button')[1].click()</script>"
        made = page.page("animals", page.html_table(["name", "IoU"], rows)).replace("</body>", f"{click}</body>")
        path.write_text(made, encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}"]
        done = subprocess.run(
            [str(CHROMIUM), *options, "--dump-dom", path.as_uri()], capture_output=True, text=True, check=True
        )
        return re.findall(r"<td>(\w+)</td>", done.stdout)

    assert order(0) == ["cat", "dog", "ant"]
    assert order(1) == ["cat", "ant", "dog"]
    assert order(2) == ["dog", "ant", "cat"]
