"""Photos from a data set: on the Hugging Face hub, or a local folder in one of its layouts."""

import hashlib
import json
import os
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from persam_dreambooth.errors import InputError, UnavailableError, may_pass
from persam_dreambooth.photos.images import decode_image, read_image


def photo_folder(name: str, image_column: str, caption_column: str | None) -> Path:
    """Writes the pictures of a data set's `train` split as files, with captions beside them; returns their folder.

    The pictures are converted as by `read_image` and saved as `0000.png`, `0001.png` and so on in the cache of the
    `datasets` library. They are written once for every version of the data set, so a resumed or repeated run reuses
    them.

    Args:
        name: hub id, or a local folder that `datasets` reads.
        image_column: the column of pictures.
        caption_column: the column of captions, saved as `0000.txt` and so on; None for no captions.

    Raises:
        InputError: the data set cannot be loaded, a column is missing, or a picture cannot be read.
        UnavailableError: the hub cannot be reached.
    """
    import datasets

    try:
        data = datasets.load_dataset(name, split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if may_pass(error):
            raise UnavailableError(f"--dataset_name {name} cannot be downloaded ({reason}): try again") from None
        raise InputError(
            f"--dataset_name {name} cannot be loaded ({reason}): name another data set, or use --instance_dir"
        ) from None
    for option, column in (("image_column", image_column), ("caption_column", caption_column)):
        if column and column not in data.column_names:
            raise InputError(f"--{option}: {name} has no {column}: choose among {', '.join(data.column_names)}")
    if not isinstance(data.features[image_column], datasets.Image):
        raise InputError(f"--image_column: {image_column} of {name} holds no pictures: name the column that does")
    data = data.cast_column(image_column, datasets.Image(decode=False))  # `decode_image` decodes it

    key = json.dumps([name, data._fingerprint, image_column, caption_column])
    parent = Path(datasets.config.HF_DATASETS_CACHE) / "persam-dreambooth"
    folder = parent / hashlib.sha1(key.encode(), usedforsecurity=False).hexdigest()
    if folder.is_dir():
        return folder
    parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=parent, ignore_cleanup_errors=True) as temporary:
        aside = Path(temporary) / "photos"
        aside.mkdir()
        for number, row in enumerate(data):
            _read(row[image_column], f"picture {number} of {name}").save(aside / f"{number:04}.png")
            if caption_column:
                (aside / f"{number:04}.txt").write_text(str(row[caption_column] or ""), encoding="utf-8")
        if not folder.is_dir():  # another process of this run may have written it
            os.replace(aside, folder)
    return folder


def _read(stored: dict[str, Any] | None, name: str) -> Image.Image:
    """Reads a picture that `datasets` did not decode, from its bytes or the path of its file."""
    if stored is None or (stored["bytes"] is None and stored["path"] is None):
        raise InputError(f"{name} is missing: remove its row")
    if stored["bytes"] is None:
        return read_image(stored["path"])
    return read_image(decode_image(BytesIO(stored["bytes"]), name), name)
