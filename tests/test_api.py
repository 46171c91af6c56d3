"""The package as a library: progress, threads, saved segmenters, what is refused."""

import threading

import pytest

from persam_dreambooth import toy
from persam_dreambooth.errors import Cancelled
from persam_dreambooth.progress import Progress, reporting, showing_bars, steps
from persam_dreambooth.segmentation.segment import SegmentOptions, segment

PHOTOS = toy.path("photos") / "duck"
MASK = toy.path("photos") / "duck_mask" / "00.png"


def segmenting(output, encodings):
    return SegmentOptions(
        images=str(PHOTOS), mask=str(MASK), output=str(output), sam_model="toy", segmenter="persam",
        encoding_cache=str(encodings),
    )  # fmt: skip


def test_a_callback_is_told_of_every_photo_and_no_bar_is_shown(tmp_path, encodings, capfd):
    told = []
    with reporting(told.append):
        segment(segmenting(tmp_path / "masks", encodings))
    assert told == [Progress("segmenting", "photo", done, 4) for done in (1, 2, 3, 4)]
    assert "segmenting" not in capfd.readouterr().err


def test_cancelled_work_keeps_what_is_finished(tmp_path, encodings):
    def callback(progress):
        if progress.done == 2:
            raise Cancelled("enough")

    with reporting(callback), pytest.raises(Cancelled, match="enough"):
        segment(segmenting(tmp_path, encodings))
    assert sorted(path.name for path in tmp_path.glob("0*.png")) == ["00.png", "01.png"]


def test_work_in_another_thread_does_not_report_here():
    told = []
    with reporting(told.append):
        thread = threading.Thread(target=lambda: list(steps("ab", "elsewhere", "letter")))
        thread.start()
        thread.join()
        list(steps(iter("ab"), "here", "letter", total=3, initial=1))
    list(steps("ab", "afterwards", "letter"))
    assert told == [Progress("here", "letter", done, 3) for done in (2, 3)]


def test_bars_are_shown_where_they_are_asked_for(capfd):
    with showing_bars():
        assert list(steps("ab", "reading", "letter")) == ["a", "b"]
        list(steps("ab", "in other processes", "letter", hidden=True))
    list(steps("ab", "silently", "letter"))
    shown = capfd.readouterr().err
    assert "reading: 100%" in shown and "2/2" in shown
    assert "other" not in shown and "silently" not in shown
