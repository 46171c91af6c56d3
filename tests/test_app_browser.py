"""The page in a real browser: a first visit, hard cases of uploads, several tabs, a killed server, the keyboard."""

import json
import re
import shutil
import time
from pathlib import Path

import httpx
import pytest
from browser import SIZES, AppServer, drop_files, need, open_step, reaches_beyond, reload, screenshots, until
from PIL import Image

from persam_dreambooth import toy
from persam_dreambooth.app.app_options import AppOptions
from persam_dreambooth.app.desk import Desk
from persam_dreambooth.errors import InputError
from persam_dreambooth.photos.mask_folder import MASK_INDEX

pytestmark = pytest.mark.browser

TOY = ("--pretrained_model_name_or_path", "toy", "--sam_model", "toy", "--resolution", "64", "--max_train_steps", "20")
DUCK = sorted((toy.path("photos") / "duck").glob("*.jpg"))
TABS = ("Photos", "First mask", "Masks", "Train", "Pictures")

CONTROLS = "button, input, textarea, select, a[href], [role=button], [tabindex='0']"

NAMELESS = """controls => [...document.querySelectorAll(controls)].filter(one => {
    if (!one.checkVisibility({visibilityProperty: true}) || one.disabled) return false;
    const by = (one.getAttribute("aria-labelledby") || "").split(" ").map(id => document.getElementById(id));
    const alts = [...one.querySelectorAll("img")].map(image => image.alt);
    const says = [one.ariaLabel, one.title, ...alts, ...[...(one.labels || []), ...by].map(part => part?.textContent)];
    if (!one.matches("input, textarea, select")) says.push(one.textContent);
    return !says.some(text => text?.trim());
}).map(one => one.outerHTML)"""
"""The visible controls without a name for screen readers."""

UNREACHED = """controls => [...document.querySelectorAll(controls)].filter(one =>
    one.checkVisibility({visibilityProperty: true}) && one.getClientRects().length && !one.disabled && !one.reached
    && one.type !== "file" && !(one.type === "radio" && document.querySelector(`[name="${one.name}"]:checked`) !== one)
    && one.tabIndex >= 0).map(one => one.outerHTML)"""
"""The visible controls that had no focus; of radio buttons, the chosen one stands for all."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    need("gradio")
    server = AppServer(tmp_path_factory.mktemp("app") / "workspace", *TOY)
    yield server
    server.end()


def make_subject(page, name):
    page.locator("#subject-new input, #subject-new textarea").first.fill(name)
    page.locator("#subject-make").click()
    page.wait_for_url(f"**/*subject={name}")


def drop_photos(page, paths):
    drop_files(page.locator("#photos-drop [role=button], #photos-drop button").first, paths)


def most_memory(server):
    """The most memory that the server has had, in 10^6 bytes; 0 if the system does not tell."""
    told = Path(f"/proc/{server.process.pid}/status")
    return int(re.search(r"VmHWM:\s+(\d+)", told.read_text())[1]) / 1e3 if told.is_file() else 0


def test_photos_are_dropped_and_a_click_makes_the_first_mask(page, server, faults):
    asked = time.monotonic()
    page.goto(server.url)
    print(f"from the start to the address {server.seconds:.1f} s, to the page {time.monotonic() - asked:.1f} s more")
    make_subject(page, "duck")
    subject = server.workspace / "duck"
    drop_photos(page, DUCK)
    until(lambda: len(list(subject.glob("photos/*.jpg"))) == len(DUCK))
    page.locator("#photos-gallery img").nth(len(DUCK) - 1).wait_for()
    screenshots(page, "photos")
    assert reaches_beyond(page) == 0
    open_step(page, "First mask")
    page.locator("#first-canvas img").click()
    until(lambda: list(subject.glob("first/*_mask.png")))
    screenshots(page, "first-mask")
    reload(page, faults, page.locator("#photos-gallery img").first)
    assert page.url.endswith("subject=duck")
    page.locator("#photos-gallery img").nth(len(DUCK) - 1).wait_for()


def test_what_is_no_photo_is_a_line_and_the_good_photos_of_the_drop_are_kept(page, server, tmp_path):
    files = [tmp_path / name for name in ("text.jpg", "huge.png", "cut.jpg", "empty.jpg", "large.png")]
    files[0].write_text("hello")
    Image.new("1", (20_000, 10_000)).save(files[1])
    files[2].write_bytes(DUCK[0].read_bytes()[:2000])
    files[3].touch()
    with files[4].open("wb") as stream:
        stream.truncate(61_000_000)
    page.goto(server.url)
    make_subject(page, "bad")
    before = most_memory(server)
    page.locator("#photos-drop input[type=file]").first.set_input_files([*files, *DUCK[:2]])
    page.locator("#photos-gallery img").nth(1).wait_for()
    status = page.locator("#status-photos").get_by_role("alert").inner_text()
    lines = [line for line in status.splitlines() if line.strip()]
    assert [sum(file.name in line for line in lines) for file in files] == [1] * 5, status
    assert "huge.png is 20000 x 10000 (200 megapixels): reduce it to at most 120" in status
    kept = [path.name for path in (server.workspace / "bad" / "photos").iterdir()]
    assert sorted(kept) == [path.name for path in DUCK[:2]]
    assert most_memory(server) - before < 250  # 200 megapixels have 600


def test_a_request_that_no_page_sends_reaches_no_file_outside(server, tmp_path):
    outside = tmp_path / "outside.jpg"
    outside.write_bytes(DUCK[0].read_bytes())
    with httpx.Client(base_url=f"{server.url}/gradio_api", timeout=30) as client:
        setup = httpx.get(f"{server.url}/config").json()
        numbers = {part["props"].get("elem_id"): part["id"] for part in setup["components"]}

        def send(part, event, *data):
            """An event of the page, as its script sends it: whether it succeeded, and its answer."""
            target = [numbers[part], event]
            [number] = [each["id"] for each in setup["dependencies"] if target in map(list, each["targets"])]
            asked = {"data": data, "fn_index": number, "session_hash": "visitor", "trigger_id": target[0]}
            assert client.post("/queue/join", json=asked).status_code == 200
            with client.stream("GET", "/queue/data", params={"session_hash": "visitor"}) as answers:
                said = (json.loads(line[5:]) for line in answers.iter_lines() if line.startswith("data:"))
                end = next(each for each in said if each["msg"] == "process_completed")
            return end["success"], json.dumps(end["output"])

        assert send("subject-make", "click", "forged")[0]
        photos = server.workspace / "forged" / "photos"
        mark = {"meta": {"_type": "gradio.FileData"}}
        for file in (
            {"path": str(outside), **mark}, {"path": "/etc/passwd", **mark}, str(outside),
            {"path": "x", "url": f"file://{outside}", **mark}, {"path": f"{photos}/../../../outside.jpg", **mark},
        ):  # fmt: skip
            assert not send("photos-drop", "upload", None, [file])[0], file
        assert not photos.exists()

        [path] = client.post("/upload", files={"files": ("../../../up.jpg", DUCK[0].read_bytes())}).json()
        assert Path(path).name == "up.jpg"
        assert send("photos-drop", "upload", None, [{"path": path, **mark}])[0]
        assert [file.name for file in photos.iterdir()] == ["up.jpg"]

        before = sorted(server.workspace.parent.rglob("*"))
        for name in ("../x", "/tmp/x", "a/../../x", ["../x"], "x" * 300):
            succeeded, said = send("subject-make", "click", name)
            assert succeeded and "cannot be a subject" in said, name
        assert sorted(server.workspace.parent.rglob("*")) == before


def test_a_page_for_other_machines_takes_no_folder_outside_of_its_workspace(tmp_path):
    need("gradio")
    from persam_dreambooth.app.steps.photos import use_folder

    desk = Desk(AppOptions(workspace=str(tmp_path / "workspace"), listen=True, auth="anna:9f2c"))
    subject, inside = desk.new_subject("cat"), desk.workspace / "shots"
    inside.mkdir()
    (desk.workspace / "link").symlink_to(DUCK[0].parent)
    for outside in (DUCK[0].parent, desk.workspace / "link", f"{inside}/../../"):
        with pytest.raises(InputError, match="with --listen, only folders inside it are shown"):
            use_folder(desk, subject, str(outside))
    assert subject.photos_dir is None
    shutil.copy(DUCK[0], inside)
    use_folder(desk, subject, str(inside))
    assert subject.photos_dir == inside.resolve()


def test_two_tabs_see_the_same_subject(page, server):
    page.goto(server.url)
    make_subject(page, "shared")
    other = page.context.new_page()
    other.goto(f"{server.url}?subject=shared")
    drop_photos(page, DUCK[:1])
    page.locator("#photos-gallery img").first.wait_for()
    open_step(other, "Train")
    other.locator("#train-photos").get_by_text("1 photo,").wait_for()
    open_step(other, "Photos")
    drop_photos(other, DUCK[1:2])
    other.locator("#photos-gallery img").nth(1).wait_for()
    open_step(page, "Train")
    page.locator("#train-photos").get_by_text("2 photos,").wait_for()


def test_the_keyboard_reaches_every_control_and_each_has_a_name(page, server):
    page.goto(server.url)
    make_subject(page, "keys")
    drop_photos(page, DUCK[:1])
    page.locator("#photos-gallery img").first.wait_for()
    page.evaluate("document.addEventListener('focusin', event => { event.target.reached = true; })")
    page.locator("#subject-chooser input").focus()
    for title in TABS:
        tab = page.get_by_role("tab", name=title, exact=True)
        tab.focus()
        page.keyboard.press("Enter")
        assert tab.get_attribute("aria-selected") == "true"
        page.wait_for_timeout(700)
        for accordion in page.locator("[role=tabpanel] button.label-wrap:visible").all():
            if "open" not in accordion.get_attribute("class").split():
                accordion.click()
        tab.focus()
        for _ in range(60):
            page.keyboard.press("Tab")
            if not (left := page.evaluate(UNREACHED, f"[role=tabpanel] :is({CONTROLS})")):
                break
        assert left == [], title
        assert page.evaluate(NAMELESS, CONTROLS) == [], title


def test_all_steps_are_reached_on_a_phone(page, server):
    page.set_viewport_size(dict(zip(("width", "height"), SIZES["phone"], strict=True)))
    page.goto(server.url)
    page.get_by_role("tab", name=TABS[0], exact=True).wait_for()
    for title in TABS:
        tab = page.get_by_role("tab", name=title, exact=True)
        if not tab.is_visible():
            page.get_by_role("button", name="More tabs").click()
            tab = page.locator(".overflow-dropdown").get_by_text(title, exact=True)
        tab.click()
        assert page.get_by_role("tab", selected=True).inner_text() == title
        assert reaches_beyond(page) == 0, title


@pytest.mark.slow
def test_jobs_of_two_tabs_wait_for_each_other_and_outlive_reload_and_server(page, app_server, faults):
    """Masks are made twice; in the middle, a tab is reloaded, and the server is killed and started again."""
    server = app_server(*TOY)
    page.goto(server.url)
    make_subject(page, "duck")
    subject = server.workspace / "duck"
    drop_photos(page, DUCK[:2])
    page.locator("#photos-gallery img").nth(1).wait_for()
    open_step(page, "First mask")
    page.locator("#first-canvas img").click()
    until(lambda: list(subject.glob("first/*_mask.png")))
    other = page.context.new_page()
    other.goto(f"{server.url}?subject=duck")
    for tab in (page, other):
        open_step(tab, "Masks")
        tab.locator("#masks-make:enabled").wait_for()
    for tab in (page, other):
        tab.locator("#masks-make").click(force=True)

    def jobs():
        return [json.loads(path.read_text()) for path in sorted(subject.glob("jobs/*.json"))]

    until(lambda: len(jobs()) == 2 and "started" in jobs()[0])
    assert "started" not in jobs()[1]
    reload(page, faults, page.locator("#photos-gallery img").first)
    assert page.url.endswith("subject=duck")
    open_step(page, "Masks")
    page.locator("#progress-masks").get_by_text("of 2 photos").wait_for()
    other.close()
    page.goto("about:blank")
    server.kill()
    assert "code" not in jobs()[0]
    server.start()
    until(lambda: all(job.get("code") == 0 for job in jobs()), seconds=120)
    assert jobs()[1]["started"] >= jobs()[0]["ended"]
    page.goto(f"{server.url}?subject=duck")
    open_step(page, "Masks")
    page.locator("#progress-masks").get_by_text("2 of 2 photos have masks").wait_for()
    faults.clear()  # of the tabs that were closed, and of the server that was gone
    assert (subject / "masks" / MASK_INDEX).is_file()
    assert len(list(subject.glob("masks/*.png"))) == 2
