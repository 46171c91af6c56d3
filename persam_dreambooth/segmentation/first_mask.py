"""`mask`: the first mask of a subject, from points, a box or a text on one photo.

SAM gives three masks of a prompt: whole, part and subpart. As SAM's authors advise for its predictor, of one point the
mask with the highest predicted IoU is taken, and of a box or several points, which say more, SAM's single mask.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from persam_dreambooth.errors import InputError
from persam_dreambooth.files import check_writable
from persam_dreambooth.models import log_device
from persam_dreambooth.options import option, require, takes_options
from persam_dreambooth.photos.folder import Photo
from persam_dreambooth.photos.images import is_own_picture
from persam_dreambooth.photos.mask_folder import MaskRecord, MaskWriter, PhotoMask, noted_record, write_mask
from persam_dreambooth.photos.mask_prompts import PROMPTED, SCALES, MaskPrompts, PromptOptions
from persam_dreambooth.report.pictures import TILE, cell_grid, grid, outlined, save_picture
from persam_dreambooth.segmentation.clean import SMALLEST_REGION, clean_mask
from persam_dreambooth.segmentation.segmenters import SamOptions

if TYPE_CHECKING:
    from persam_dreambooth.segmentation.sams.sam import Encoding, ImageLike, Sam

logger = logging.getLogger(__name__)

SINGLE_MASK = "single"
"""The name of SAM's single mask, beside `SCALES`."""

OVERLAY_SIDE = 1024
"""Longer side of the overlay, in pixels."""


@dataclass(frozen=True, eq=False)
class MaskChoice:
    """One of the masks that a model offers for a prompt.

    Args:
        name: one of `SCALES`, `single`, or for a text the instance's number from 1, the highest score first.
        mask: (H, W) bool.
        score: predicted IoU, or the score of an instance, 0 to 1.
    """

    name: str
    mask: np.ndarray
    score: float

    def __repr__(self) -> str:
        return f"MaskChoice({self.name}, covers {self.mask.mean():.1%}, score={self.score:.3f})"


@dataclass(frozen=True, eq=False)
class FirstMask:
    """The mask of a prompt, and the other masks that the model offers.

    Args:
        chosen: the mask.
        others: in the order of `SCALES`, or of their scores for a text.
        prompts: where the subject is.
        model: name of the SAM.
        smallest_region: as for `first_mask`.
    """

    chosen: MaskChoice
    others: tuple[MaskChoice, ...]
    prompts: MaskPrompts
    model: str
    smallest_region: float

    def __str__(self) -> str:
        """One line: coverage and score, and the coverages of the other masks."""
        score = "score" if self.prompts.text else "predicted IoU"
        told = f"{_percent(self.mask)} covered ({self.chosen.name}, {score} {self.score:.2f})"
        if self.others:
            told += "; others: " + ", ".join(f"{other.name} {_percent(other.mask)}" for other in self.others)
        return told

    @property
    def mask(self) -> np.ndarray:
        """The chosen mask, (H, W) bool."""
        return self.chosen.mask

    @property
    def score(self) -> float:
        """Predicted IoU of the chosen mask, or the score of an instance, 0 to 1."""
        return self.chosen.score

    def drawn_on(self, image: Image.Image, choice: MaskChoice, side: int = TILE) -> Image.Image:
        """The photo (RGB) with one of the masks and the prompts, as a tile of this width and height in pixels."""
        points = np.array([*self.prompts.points, *self.prompts.negative_points], np.float64).reshape(-1, 2)
        return outlined(image, choice.mask, points, self.prompts.box, len(self.prompts.points), side)

    def of(self, photo: Photo) -> PhotoMask:
        """The mask with its record, for a mask folder."""
        record = MaskRecord(
            photo=photo.name,
            photo_sha256=photo.sha256,
            method=self.prompts.method,
            coverage=float(self.mask.mean()),
            model=self.model,
            score=self.score,
            smallest_region=self.smallest_region,
        )
        return PhotoMask(photo, self.mask, record)


def first_mask(sam: Sam, photo: ImageLike, prompts: MaskPrompts, smallest_region: float = SMALLEST_REGION) -> FirstMask:
    """Makes a mask of one photo from prompts.

    Args:
        sam: see `open_sam`; a text needs a SAM 3.
        photo: as for `Sam.encode`, or its encoding by the same SAM.
        prompts: where the subject is.
        smallest_region: fraction of a mask below which its islands and holes are removed and filled, 0 to below 1.

    Raises:
        InputError, InputNotFoundError: a photo that cannot be read, a place outside of it, a text without SAM 3, or no
            mask at the prompts; the message says what to do.
    """
    if prompts.text:
        return _named_mask(sam, photo, prompts, smallest_region)
    encoding = sam.encode(photo)
    prompts.check_inside(encoding.size[::-1])
    points = np.array([*prompts.points, *prompts.negative_points], np.float64).reshape(-1, 2)
    labels = np.array([1] * len(prompts.points) + [0] * len(prompts.negative_points), np.int64)
    box = None if prompts.box is None else np.array(prompts.box, np.float64)

    def decoded(multimask: bool) -> list[tuple[np.ndarray, float]]:
        logits, scores = sam.decode(encoding, points, labels, box=box, multimask=multimask)
        masks = (sam.upscale(logits, encoding) > 0).cpu().numpy()
        return [(clean_mask(mask, smallest_region), score) for mask, score in zip(masks, scores.tolist(), strict=True)]

    by_size = sorted(decoded(multimask=True), key=lambda made: int(made[0].sum()))
    scales = [MaskChoice(name, *made) for name, made in zip(SCALES, by_size, strict=True)]
    rows, columns = encoding.photo_cells
    least = scales[0].mask.size / (rows * columns)  # a cell of the SAM; a smaller subject could not be found again
    shown = [scale for scale in scales if scale.mask.sum() >= least]
    if not shown:
        raise InputError(f"{sam.name} finds nothing at {prompts}: {_empty_advice(prompts)}")
    if prompts.scale:
        chosen = next(scale for scale in scales if scale.name == prompts.scale)
        if not chosen.mask.any():
            names = " or ".join(scale.name for scale in shown)
            raise InputError(f"{sam.name} finds no {prompts.scale} at {prompts}: give --scale {names}")
    else:
        chosen = max(shown, key=lambda scale: scale.score)
        single = (
            MaskChoice(SINGLE_MASK, *decoded(multimask=False)[0]) if len(points) != 1 or box is not None else chosen
        )
        chosen = single if single.mask.sum() >= least else chosen
    return FirstMask(chosen, tuple(scale for scale in shown if scale is not chosen), prompts, sam.name, smallest_region)


def prompted_reference(
    photo: Photo, prompts: MaskPrompts, sam: Sam, known: dict[str, PhotoMask], smallest_region: float
) -> tuple[PhotoMask, dict[Path, Encoding]]:
    """The mask of prompts as a reference, and the encoding of its photo by its path, unless the mask was known.

    A mask that is known, of an interrupted run or corrected by the user since, is kept.

    Args:
        photo: the photo of the prompts.
        prompts: where the subject is.
        sam: see `first_mask`.
        known: masks of the mask folder, by their photos' names.
        smallest_region: see `first_mask`.

    Raises:
        InputError: see `first_mask`.
    """
    kept = known.get(photo.name)
    if kept and kept.photo.path == photo.path and kept.mask.any():
        return kept, {}
    if prompts.text:  # loaded first, so that the encoding holds the output of the backbone that the search shares
        getattr(sam, "concepts", None)
    encoding = sam.encode(photo.read())
    made = first_mask(sam, encoding, prompts, smallest_region)
    logger.info("the first mask, of %s: %s", photo.path, made)
    return made.of(photo), {photo.path: encoding}


def save_reference(item: PhotoMask, photos: list[Photo], folder: Path, known: dict[str, PhotoMask]) -> None:
    """Writes the mask of prompts to a mask folder and adds it to `known`, if its photo is among the folder's photos."""
    if item.photo.name not in known and any(photo.path == item.photo.path for photo in photos):
        with MaskWriter(folder, known.values()) as writer:
            record = writer.save(item.record, item.mask)
        known[item.photo.name] = PhotoMask(item.photo, item.mask, record)


def _named_mask(sam: Sam, photo: ImageLike, prompts: MaskPrompts, smallest_region: float) -> FirstMask:
    """The instance of the text with the highest score among those that fit the points."""
    from persam_dreambooth.segmentation.sams.sam3_concepts import no_text

    concepts = getattr(sam, "concepts", None)
    if concepts is None:
        raise InputError(no_text(sam.name))
    found = concepts.find(photo, prompts.text)
    prompts.check_inside(found.masks.shape[:0:-1])
    instances = [
        MaskChoice(str(number), clean_mask(mask, smallest_region), float(score))
        for number, (mask, score) in enumerate(zip(found.masks, found.scores, strict=True), 1)
        if mask.any()
    ]
    if not instances:
        raise InputError(
            f'{sam.name} finds no "{prompts.text}" (presence {found.presence:.2f}): give another --text, or --point'
        )
    fitting = [
        instance
        for instance in instances
        if all(instance.mask[y, x] for x, y in prompts.points)
        and not any(instance.mask[y, x] for x, y in prompts.negative_points)
    ]
    if not fitting:
        raise InputError(
            f'none of {len(instances)} "{prompts.text}" that {sam.name} finds fits the points: move them, or leave '
            "--text out"
        )
    others = tuple(instance for instance in instances if instance is not fitting[0])
    return FirstMask(fitting[0], others, prompts, sam.name, smallest_region)


def _empty_advice(prompts: MaskPrompts) -> str:
    if prompts.box and not prompts.points:
        return "add --point on the subject, or use another --sam_model"
    return "move the point, add --box around the subject, or use another --sam_model"


def _percent(mask: np.ndarray) -> str:
    """The coverage, with a decimal if it is small."""
    return f"{mask.mean():.{0 if mask.mean() >= 0.1 else 1}%}".replace("%", " %")


# The command


@dataclass(frozen=True)
class MaskOptions(SamOptions, PromptOptions):
    """A mask of one photo, from a point, a box or a text."""

    photo: str | None = option(None, "the photo", path=True, elsewhere=("image", "input"))
    output: str | None = option(
        None,
        "file for the mask, .png, or a folder; default: <name>_mask.png in the working folder",
        path=True,
    )
    grid: bool = option(
        False, "also write <name>_grid.jpg: the photo with a grid of named cells, for --point C4 or --box B2,E7"
    )

    def check(self) -> None:
        """Raises `InputError` for options that are missing or in conflict."""
        require(self, "photo")
        super().check()
        if not (self.is_prompted or self.grid):
            raise InputError(
                "nothing says where the subject is: give --point x,y or --box x0,y0,x1,y1 in pixels, --text (its name, "
                "for SAM 3), or --grid to see the names of places"
            )
        if Path(str(self.photo)).is_dir():
            raise InputError(f"{self.photo} is a folder: name one photo in it")
        if self.mask_file.suffix.lower() != ".png":
            raise InputError(f"--output is {self.output}: give a name that ends in .png, or a folder that exists")

    @property
    def makes_masks(self) -> bool:
        """Whether the command uses the SAM."""
        return self.is_prompted

    @property
    def mask_file(self) -> Path:
        """The file of the mask."""
        name = f"{Path(str(self.photo)).stem}_mask.png"
        if not self.output:
            return Path(name)
        return (
            Path(self.output) / name if self.output.endswith("/") or Path(self.output).is_dir() else Path(self.output)
        )

    @property
    def grid_file(self) -> Path:
        """The picture of the grid."""
        return self.mask_file.with_name(f"{Path(str(self.photo)).stem}_grid.jpg")

    @property
    def overlay_file(self) -> Path:
        """The picture of the photo with the mask."""
        return self.mask_file.with_name(f"{self.mask_file.stem}_overlay.jpg")

    @property
    def others_file(self) -> Path:
        """The picture of all masks that the model offers."""
        return self.mask_file.with_name(f"{self.mask_file.stem}_{'instances' if self.text else 'scales'}.jpg")


@takes_options(MaskOptions, positional="photo")
def mask_photo(options: MaskOptions) -> FirstMask | None:
    """Makes the mask of one photo, with an overlay and a picture of the other masks; None for a grid alone.

    Raises:
        InputError, InputNotFoundError: input that cannot be used, or a file that would be overwritten and is not an
            earlier result for this photo; nothing is written then.
        SaveError: a file cannot be written.
    """
    options.check()
    photo = Photo.open(Path(str(options.photo)))
    prompts = options.prompts_for(photo) if options.is_prompted else None
    pictures = [options.grid_file] if options.grid else []
    if prompts:
        _check_replaceable(options.mask_file, photo)
        pictures += [options.overlay_file, options.others_file]
    check_writable(options.mask_file.parent)
    for path in pictures:
        if path.exists() and not is_own_picture(path):
            raise InputError(
                f"{path} exists and is not a picture of this command: remove it, or choose another --output"
            )
    image = photo.read()
    made = first_mask(_open_sam(options), image, prompts) if prompts else None
    if options.grid:
        save_picture(cell_grid(image), options.grid_file, is_photo=False)
    if made:
        item = made.of(photo)
        write_mask(options.mask_file, item.record, made.mask)
        save_picture(made.drawn_on(image, made.chosen, OVERLAY_SIDE), options.overlay_file, is_photo=False)
        choices = [made.chosen, *made.others]
        tiles = [made.drawn_on(image, choice) for choice in choices]
        captions = [_caption(choice, made) for choice in choices]
        save_picture(grid(tiles, captions), options.others_file, is_photo=False)
    return made


def _open_sam(options: MaskOptions) -> Sam:
    from persam_dreambooth.segmentation.sams.checkpoints import open_sam
    from persam_dreambooth.segmentation.sams.sam3_concepts import check_reads_text

    if options.reads_text:
        check_reads_text(options.sam_model)
    sam = open_sam(options.sam_model, dtype=options.sam_dtype, encoding_cache=options.encoding_cache)
    log_device(str(sam.device), str(sam.dtype))
    return sam


def _check_replaceable(path: Path, photo: Photo) -> None:
    """Raises `InputError` if a file is neither new nor an unchanged mask that this command made for the photo."""
    if not path.exists():
        return
    if path.resolve() == photo.path.resolve():
        raise InputError(f"{path} is the photo itself: choose another --output")
    record = noted_record(path, photo)
    if record is None or record.method not in PROMPTED:
        raise InputError(
            f"{path} exists and is not a mask that this command made of {photo.path}: remove it, or choose another "
            f"--output, such as {photo.path.resolve().parent.name}_mask/"
        )


def _caption(choice: MaskChoice, made: FirstMask) -> list[str]:
    name = f"{made.prompts.text} {choice.name}" if made.prompts.text else choice.name
    chosen = "the mask" if choice is made.chosen else f"--scale {choice.name}"
    if choice is not made.chosen and made.prompts.text:
        chosen = "for this one, add --point on it"
    score = "score" if made.prompts.text else "predicted IoU"
    return [f"{name}: {_percent(choice.mask)} covered", f"{score} {choice.score:.2f}", chosen]
