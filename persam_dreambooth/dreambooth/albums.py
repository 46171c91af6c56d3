"""The input of a run for each subject, photos and their masks, read before anything is written."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from persam_dreambooth.dreambooth.subject_options import SubjectOptions, mask_folders
from persam_dreambooth.dreambooth.training_options import TrainingOptions
from persam_dreambooth.errors import InputError
from persam_dreambooth.photos.captions import check_captions, read_prompts
from persam_dreambooth.photos.datasets import photo_folder
from persam_dreambooth.photos.folder import Photo, check_shapes, find_photos
from persam_dreambooth.photos.mask_folder import PhotoMask, check_names, cut_out, load_masks
from persam_dreambooth.photos.mask_prompts import MaskPrompts
from persam_dreambooth.photos.references import Reference, find_others, find_prompted, find_reference

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Album:
    """One subject's photos and the masks given for them.

    Args:
        subject: its options.
        photos: all photos.
        reference: the photo with the given mask, if the other masks will be made from it.
        prompted: the photo of the user's prompts, if all masks will be made from them.
        drawn: the masks of all photos, if a mask folder was given.
        mask_dir: the folder of its masks in the run's folder.
        label: prefix of messages about this subject; empty if it is the only one.
        others: photos with masks of alike subjects that are not trained.
    """

    subject: SubjectOptions
    photos: list[Photo]
    reference: Reference | None
    prompted: tuple[Photo, MaskPrompts] | None
    drawn: list[PhotoMask]
    mask_dir: Path
    label: str
    others: Sequence[Reference] = ()

    @property
    def makes_masks(self) -> bool:
        """Whether masks will be made from a given mask or from prompts."""
        return bool(self.reference or self.prompted)


def read_albums(options: TrainingOptions) -> list[Album]:
    """Reads the photos and masks of all subjects.

    Raises:
        InputError, InputNotFoundError: photos, masks or captions that cannot be used.
    """
    run_dir, subjects = options.run_dir, options.each_subject
    apart = [("masks", Path(subject.mask_dir)) for subject in subjects if subject.mask_dir]
    apart += [("class pictures", options.class_dir), ("backgrounds", options.background_folder)]
    given = [path for subject in subjects for path in (subject.mask, *(subject.other_mask or ())) if path]
    no_photos = (*map(Path, given), run_dir)
    albums = [
        read_album(
            subject,
            run_dir / folder,
            apart,
            no_photos,
            label=f"{subject.word}: " if len(subjects) > 1 else "",
            soft=options.soft_masks,
        )
        for subject, folder in zip(subjects, mask_folders(subjects), strict=True)
    ]
    _check_captions(albums)
    return albums


def read_album(
    subject: SubjectOptions,
    mask_dir: Path,
    apart: list[tuple[str, Path]],
    no_photos: tuple[Path, ...],
    label: str,
    soft: bool,
) -> Album:
    """Reads a subject's photos and masks.

    Args:
        subject: its options.
        mask_dir: as in `Album`.
        apart: other folders of the run, of any subject, and what they hold; none may be the photos' folder.
        no_photos: further files and folders that hold no photos.
        label: as in `Album`.
        soft: whether gray levels of masks are weights.
    """
    folder = Path(str(subject.instance_dir))
    if subject.dataset_name:
        folder = photo_folder(subject.dataset_name, subject.image_column, subject.caption_column)
    for what, other in apart:
        own_masks = bool(subject.mask_dir) and other == Path(str(subject.mask_dir))
        if other.resolve() == folder.resolve() and not own_masks:
            raise InputError(f"{other} is the folder of the photos too: put the {what} into a folder of their own")
    photos = find_photos(folder, (*no_photos, *(other for _, other in apart)))
    check_names(photos)
    check_shapes(photos)
    check_captions(photos)
    reference, prompted, drawn = None, None, list[PhotoMask]()
    if subject.mask:
        mask_path = Path(subject.mask)
        reference = find_reference(photos, folder, mask_path, subject.reference_image, subject.invert_mask)
    elif subject.is_prompted:
        prompted = find_prompted(photos, folder, subject, subject.reference_image)
    elif subject.mask_dir:
        drawn = load_masks(Path(subject.mask_dir), photos, subject.invert_mask, soft)
    elif subject.mask_from == "alpha":
        drawn = [cut_out(photo, soft) for photo in photos]
    others = find_others(photos, folder, subject.other_mask or (), subject.reference_image, subject.invert_mask)
    return Album(subject, photos, reference, prompted, drawn, mask_dir, label, others)


def own_captions(subject: SubjectOptions, photos: list[Photo]) -> list[str]:
    """The caption of each photo of a subject, with [V] as it is written; empty for the instance prompt."""
    return read_prompts(photos, "", from_names=subject.caption_from == "filename")


def _check_captions(albums: list[Album]) -> None:
    """Raises `InputError` for [V] in the caption of a photo of several subjects, where [V] is ambiguous."""
    for album in albums:
        named = [other.subject.word for other in albums if other.subject.folder == album.subject.folder]
        for photo, text in zip(album.photos, own_captions(album.subject, album.photos), strict=True):
            if len(named) > 1 and "[V]" in text:
                words = " or ".join(named)
                raise InputError(f"the caption of {photo.path} says [V], which may be {words}: write which is meant")
