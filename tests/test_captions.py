"""Captions are found beside photos and read as a user expects, whatever editor or program wrote them."""

import json
from pathlib import Path

import pytest
from PIL import Image

from persam_dreambooth.errors import InputError
from persam_dreambooth.photos.captions import caption_in_name, check_captions, read_prompts
from persam_dreambooth.photos.folder import find_photos


def prompts(folder: Path, *names: str, default: str = "a thing") -> list[str]:
    """The prompts of photos by these names."""
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name, format="PNG")
    return read_prompts(find_photos(folder), default)


@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.caption", "a.jpg.txt", "a.jpg.caption", "a.Caption"])
def test_a_text_beside_a_photo_is_its_caption(tmp_path, name):
    (tmp_path / name).write_text(" a cat\n")
    assert prompts(tmp_path, "a.jpg", "b.jpg") == ["a cat", "a thing"]


def test_photos_of_one_folder_and_another_keep_their_own_texts(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(f"a cat in {folder}")
    assert prompts(tmp_path, "x/a.jpg", "y/a.jpg") == ["a cat in x", "a cat in y"]


def test_the_text_file_is_taken_before_the_caption_file_unless_it_is_blank(tmp_path):
    (tmp_path / "a.txt").write_text("from txt")
    (tmp_path / "a.jpg.txt").write_text("from jpg.txt")
    (tmp_path / "a.caption").write_text("from caption")
    assert prompts(tmp_path, "a.jpg") == ["from txt"]
    (tmp_path / "a.txt").write_text(" \n")
    assert prompts(tmp_path, "a.jpg") == ["from jpg.txt"]
    (tmp_path / "a.jpg.txt").unlink()
    assert prompts(tmp_path, "a.jpg") == ["from caption"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_every_encoding_of_notepad_is_read(tmp_path, encoding):
    mark = "\ufeff" if encoding[-2:] in ("le", "be") else ""
    line = json.dumps({"file_name": "b.jpg", "text": "ein Hündchen"}, ensure_ascii=False)
    (tmp_path / "a.txt").write_bytes((mark + "ein Kätzchen, 猫\r\n").encode(encoding))
    (tmp_path / "metadata.jsonl").write_bytes((mark + line + "\r\n").encode(encoding))
    assert prompts(tmp_path, "a.jpg", "b.jpg") == ["ein Kätzchen, 猫", "ein Hündchen"]


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b"\xff\xfe", b" \r\n\t", b"\xef\xbb\xbf\r\n"])
def test_a_blank_text_is_no_caption(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    assert prompts(tmp_path, "a.jpg") == ["a thing"]


def test_lines_end_as_on_any_system(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a cat,\r\non a sofa\r\n")
    assert prompts(tmp_path, "a.jpg") == ["a cat,\non a sofa"]


@pytest.mark.parametrize(
    "content",
    ["ein Kätzchen".encode("latin-1"), b"\xff\xfea", "a cat".encode("utf-16-le"), "a cat".encode("utf-32")],
)
def test_another_encoding_is_refused(tmp_path, content):
    (tmp_path / "a.caption").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.caption is not text in UTF-8: write what a\.jpg shows into it"):
        prompts(tmp_path, "a.jpg")


def test_a_folder_by_the_name_of_a_caption_is_none(tmp_path):
    (tmp_path / "a.txt").mkdir()
    assert prompts(tmp_path, "a.jpg") == ["a thing"]


def test_texts_in_metadata_may_hold_any_character_and_none(tmp_path):
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "a.jpg", "text": "a cat\u2028on a sofa"}\n\n{"file_name": "b.jpg", "text": null}\n',
        encoding="utf-8",
    )
    assert prompts(tmp_path, "a.jpg", "b.jpg") == ["a cat\u2028on a sofa", "a thing"]


def test_half_a_character_in_metadata_is_refused(tmp_path):
    (tmp_path / "metadata.jsonl").write_text(r'{"file_name": "a.jpg", "text": "a cat \ud83d"}')
    with pytest.raises(InputError, match=r"metadata\.jsonl, line 1, has no file name and text: write lines such as"):
        prompts(tmp_path, "a.jpg")


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        *(("a red cat on a sofa", "a red cat on a sofa"), ("a_red_cat_0001", "a red cat"), ("a cat (2)", "a cat")),
        *(("a cat 12", "a cat"), ("a cat-3", "a cat"), ("a_cat_(2)_(3)", "a cat"), ("a cat in 2024", "a cat in 2024")),
        *(("3 cats", "3 cats"), ("a black-and-white cat", "a black-and-white cat"), ("[V] v1.5", "[V] v1.5")),
        *(("00", ""), ("20240101_120000", ""), ("(1)", ""), ("_", ""), ("cafe\u0301_2", "café"), ("猫_2", "猫")),
    ],
)
def test_the_name_of_a_file_is_its_caption_where_asked(name, caption):
    assert caption_in_name(Path("photos") / f"{name}.jpg") == caption


def test_texts_come_before_names_and_names_before_the_default(tmp_path):
    (tmp_path / "a cat.txt").write_text("a dog")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b cat.jpg", "text": "a bird"}')
    names = ("a cat.jpg", "b cat.jpg", "c cat_2.jpg", "d1.jpg", "04.jpg")
    assert prompts(tmp_path, *names) == ["a thing", "a dog", "a bird", "a thing", "a thing"]  # 04.jpg is first
    assert read_prompts(find_photos(tmp_path), "a thing", from_names=True) == [
        *("a thing", "a dog", "a bird", "c cat", "d1"),
    ]


def test_metadata_of_files_that_are_no_photos_is_told(tmp_path, caplog):
    lines = [json.dumps({"file_name": name, "text": "a cat"}) for name in ("a.jpg", "A.jpg", "b.jpeg", "x/a.jpg")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    prompts(tmp_path, "a.jpg", "b.jpg")
    check_captions(find_photos(tmp_path))
    assert caplog.messages == [
        f"{tmp_path / 'metadata.jsonl'} has captions of no photo: A.jpg, b.jpeg, x/a.jpg; "
        "correct the names or remove the lines"
    ]
    caplog.clear()
    lines = [json.dumps({"file_name": f"{number}.jpg", "text": "a cat"}) for number in range(8)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    check_captions(find_photos(tmp_path))
    assert "no photo: 0.jpg, 1.jpg, 2.jpg, 3.jpg, 4.jpg and 3 more; " in caplog.text


def test_the_longest_name_has_a_caption(tmp_path):
    (tmp_path / f"{'a' * 251}.txt").write_text("a cat")
    assert prompts(tmp_path, f"{'a' * 251}.jpg") == ["a cat"]
