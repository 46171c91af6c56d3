"""The page in a real browser: photos of a duck are dropped, a click makes the first mask, a reload keeps both."""

import time

import pytest
from browser import drop_files, reaches_beyond, screenshots

from persam_dreambooth import toy

pytestmark = pytest.mark.browser

TOY = ("--pretrained_model_name_or_path", "toy", "--sam_model", "toy", "--resolution", "64")
DUCK = sorted((toy.path("photos") / "duck").glob("*.jpg"))


def open_step(page, title):
    page.get_by_role("tab", name=title, exact=True).click()


def make_subject(page, name):
    page.locator("#subject-new input, #subject-new textarea").first.fill(name)
    page.locator("#subject-make").click()
    page.wait_for_url(f"**/*subject={name}")


def reload(page, faults):
    """Reloads the page; Gradio reports the requests that this ends as errors, which are no faults of the page."""
    seen = len(faults)
    page.reload()
    page.locator("#photos-gallery img").first.wait_for()
    faults[seen:] = [said for said in faults[seen:] if "AbortError" not in said and "errored out" not in said]


def until(happened, seconds=60):
    ends = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < ends
        time.sleep(0.1)
    return found


def test_photos_are_dropped_and_a_click_makes_the_first_mask(page, app_server, faults):
    server = app_server(*TOY, "--max_train_steps", "20")
    asked = time.monotonic()
    page.goto(server.url)
    page.locator("#subject-make").wait_for()
    print(f"from the start to the address {server.seconds:.1f} s, to the page {time.monotonic() - asked:.1f} s more")
    make_subject(page, "duck")
    subject = server.workspace / "duck"
    drop_files(page.locator("#photos-drop [role=button], #photos-drop button").first, DUCK)
    until(lambda: len(list(subject.glob("photos/*.jpg"))) == len(DUCK))
    page.locator("#photos-gallery img").nth(len(DUCK) - 1).wait_for()
    screenshots(page, "photos")
    assert reaches_beyond(page) == 0
    open_step(page, "First mask")
    picture = page.locator("#first-canvas img").first
    picture.click()
    until(lambda: list(subject.glob("first/*_mask.png")))
    screenshots(page, "first-mask")
    reload(page, faults)
    assert page.url.endswith("subject=duck")
    page.locator("#photos-gallery img").nth(len(DUCK) - 1).wait_for()
