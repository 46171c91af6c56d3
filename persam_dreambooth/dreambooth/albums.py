"""What a run is given of each subject: photos, and what is known of their masks; read before anything is written."""

import logging
from dataclasses import dataclass
from pathlib import Path

from persam_dreambooth.dreambooth.subject_options import SubjectOptions, mask_folders
from persam_dreambooth.dreambooth.training_options import TrainingOptions
from persam_dreambooth.errors import InputError
from persam_dreambooth.photos.captions import read_prompts
from persam_dreambooth.photos.datasets import photo_folder
from persam_dreambooth.photos.folder import Photo, check_shapes, find_photos
from persam_dreambooth.photos.mask_folder import PhotoMask, check_names, load_masks
from persam_dreambooth.photos.references import Reference, find_reference

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Album:
    """One subject's photos, and what is known of their masks.

    Args:
        subject: as given.
        photos: all photos.
        reference: the photo whose mask was given, where masks are to be made.
        drawn: the masks of all photos, where a folder of them was given.
        mask_dir: where its masks are in the run's folder.
        label: what messages about it begin with; nothing where it is the only one.
    """

    subject: SubjectOptions
    photos: list[Photo]
    reference: Reference | None
    drawn: list[PhotoMask]
    mask_dir: Path
    label: str


def read_albums(options: TrainingOptions) -> list[Album]:
    """Reads the photos and masks of all subjects.

    Raises:
        InputError, InputNotFoundError: photos, masks or captions that cannot be used.
    """
    run_dir, subjects = options.run_dir, options.each_subject
    apart = [("masks", Path(subject.mask_dir)) for subject in subjects if subject.mask_dir]
    apart += [("class pictures", options.class_dir), ("backgrounds", options.background_folder)]
    no_photos = (*(Path(subject.mask) for subject in subjects if subject.mask), run_dir)
    albums = [
        read_album(subject, run_dir / folder, apart, no_photos, f"{subject.word}: " if len(subjects) > 1 else "")
        for subject, folder in zip(subjects, mask_folders(subjects), strict=True)
    ]
    _check_captions(albums)
    return albums


def read_album(
    subject: SubjectOptions, mask_dir: Path, apart: list[tuple[str, Path]], no_photos: tuple[Path, ...], label: str
) -> Album:
    """Looks at a subject's photos and masks.

    Args:
        subject: as given.
        mask_dir: as of `Album`.
        apart: what else lies in which folder, of any subject; none of these may be the photos' own.
        no_photos: files and folders beside them that hold no photos either.
        label: as of `Album`.
    """
    folder = Path(str(subject.instance_dir))
    if subject.dataset_name:
        folder = photo_folder(subject.dataset_name, subject.image_column, subject.caption_column)
    for what, other in apart:
        if other.resolve() == folder.resolve():
            raise InputError(f"{other} is the folder of the photos too: put the {what} into a folder of their own")
    photos = find_photos(folder, (*no_photos, *(other for _, other in apart)))
    check_names(photos)
    check_shapes(photos)
    read_prompts(photos, "")  # broken captions are told of before anything is written
    reference = find_reference(photos, folder, Path(subject.mask), subject.reference_image) if subject.mask else None
    drawn = load_masks(Path(subject.mask_dir), photos) if subject.mask_dir else []
    return Album(subject, photos, reference, drawn, mask_dir, label)


def _check_captions(albums: list[Album]) -> None:
    """Raises `InputError` for a caption of several subjects' photo that says [V], since it would name each of them."""
    for album in albums:
        named = [other.subject.word for other in albums if other.subject.folder == album.subject.folder]
        for photo, text in zip(album.photos, read_prompts(album.photos, ""), strict=True):
            if len(named) > 1 and "[V]" in text:
                words = " or ".join(named)
                raise InputError(f"the caption of {photo.path} says [V], which may be {words}: write which is meant")
