"""PerSAM and PerSAM-F on videos: objects of the first frame, followed through all others (Zhang et al. 2023, 4.2).

Each object keeps the target embedding, and for PerSAM-F the scale weights, that it has in the first frame. Every other
frame is encoded once and prompted for each object with the highest places of the location prior, with the box that the
object had in the frame before, and with that box's center. So a frame follows from the first one and the one before.

Shapes: H W frame; 256 x 256 low-resolution logits. Points and boxes are xy in pixels of the frame. A label map is
(H, W) uint8: 0 for background, else the object's number.
"""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from persam_dreambooth.errors import InputError
from persam_dreambooth.files import check_writable, note_settings
from persam_dreambooth.options import SEGMENTERS, VideoOptions
from persam_dreambooth.photos.labels import read_first_mask, read_labels, save_labels
from persam_dreambooth.report.pictures import painted, save_picture
from persam_dreambooth.segmentation.frames import Frame, Video, open_video
from persam_dreambooth.segmentation.location_prior import (
    Target,
    at_photo_size,
    cell_weights,
    embed_target,
    location_prior,
    presence,
)
from persam_dreambooth.segmentation.persam import ImageLike
from persam_dreambooth.segmentation.sams.checkpoints import open_named_sam
from persam_dreambooth.segmentation.sams.sam import Encoding, Sam
from persam_dreambooth.segmentation.scale_weights import fit_scale_weights

logger = logging.getLogger(__name__)

MARGIN = 10
"""By how many pixels the box of the frame before is grown on every side."""
POINTS = {"persam": 2, "persam-f": 1}
"""How many of the highest places of the location prior are prompts."""
FIT_STEPS, LEARNING_RATE = 800, 4e-4
"""Of PerSAM-F's fit to an object of the first frame."""
OWN = 0.05
"""Least part of a find's cells that are more like its object than like any other, else it is of another object."""


@dataclass(frozen=True)
class Known:
    """An object as it is in the first frame.

    Args:
        number: its number in label maps.
        target: its embedding.
        weights: (3,) scale weights, for PerSAM-F.
    """

    number: int
    target: Target
    weights: np.ndarray | None = None


class VideoSegmenter:
    """Follows objects through a video, as the published code does where paper and code differ.

    That is: the target embedding is the mean of mean and maximum for both variants, attention is not guided, and
    PerSAM-F learns at 4e-4 (the paper prints 4^-4). Other than in the published code, the largest of three masks is
    that with most pixels (theirs are counted modulo 256), and objects may leave and return: one that is absent has no
    mask, keeps its number and its target, and is looked for in the whole frame (theirs passes its box to the next). It
    is absent where `presence` says so, as in photos, or where what is found is another object, see `OWN`.

    Args:
        sam: see `open_sam`.
        variant: `persam` takes the largest mask of the first pass; `persam-f` weighs the three by learned weights.
        target_coverage: as for `PerSAM`.
        fit_steps: optimizer steps of PerSAM-F's fit.
    """

    def __init__(
        self, sam: Sam, variant: SEGMENTERS = "persam-f", target_coverage: float = 0.5, fit_steps: int = FIT_STEPS
    ) -> None:
        self.sam = sam
        self.variant = variant
        self.target_coverage = target_coverage
        self.fit_steps = fit_steps
        self.objects: tuple[Known, ...] = ()

    def fit(self, image: ImageLike, labels: np.ndarray) -> "VideoSegmenter":
        """Learns every object of the first frame.

        Args:
            image: as for `PerSAM.fit`.
            labels: its label map.

        Raises:
            InputError: a label map of another size, or without objects.
        """
        encoding = self._encoded(image)
        _check_labels(labels, encoding)
        if not labels.any():
            raise InputError("the mask of the first frame marks no object: give each object a number from 1")
        self.objects = tuple(self._learn(encoding, labels, int(number)) for number in np.unique(labels[labels > 0]))
        return self

    def predict(self, image: ImageLike, before: np.ndarray) -> np.ndarray:
        """The label map of a frame; where objects meet, the highest logit decides.

        Args:
            image: as for `PerSAM.fit`.
            before: the label map of the frame before.

        Raises:
            InputError: a label map of another size.
        """
        encoding = self._encoded(image)
        _check_labels(before, encoding)
        nearest = torch.stack([location_prior(known.target.mean, encoding) for known in self.objects]).argmax(dim=0)
        highest = torch.zeros(encoding.size, device=nearest.device)
        labels = torch.zeros(encoding.size, dtype=torch.uint8, device=nearest.device)
        for place, known in enumerate(self.objects):
            logits = self._find(encoding, known, before == known.number)
            if self._is_present((logits > 0).cpu().numpy(), encoding, known.target, nearest == place):
                labels[logits > highest] = known.number
                highest = torch.maximum(logits, highest)
        return labels.cpu().numpy()

    def _is_present(self, mask: np.ndarray, encoding: Encoding, target: Target, own: torch.Tensor) -> bool:
        """Whether a mask, (H, W) bool, holds its object; `own` (64, 64) are the cells most like it of all objects."""
        if presence(mask, encoding, target, self.target_coverage) <= target.background_similarity:
            return False
        weights, _ = cell_weights(mask, encoding, self.target_coverage)
        return float(weights[own].sum()) >= OWN

    def _learn(self, encoding: Encoding, labels: np.ndarray, number: int) -> Known:
        mask = labels == number
        target = embed_target(mask, encoding, self.target_coverage)
        if self.variant == "persam":
            return Known(number, target)
        points, box = self._prompts(encoding, target, mask)
        logits, _ = self._decode(encoding, points, box)
        problem = self.sam.upscale(logits, encoding), mask
        weights, _ = fit_scale_weights([problem], self.fit_steps, LEARNING_RATE)
        return Known(number, target, weights)

    def _prompts(self, encoding: Encoding, target: Target, before: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Points (n, 2) and a box (4,): the prior's highest places; the box of the mask before, and its center."""
        prior = location_prior((target.peak + target.mean) / 2, encoding)
        places = at_photo_size(prior, self.sam, encoding).flatten().topk(POINTS[self.variant]).indices.cpu().numpy()
        points = np.stack([places % encoding.size[1], places // encoding.size[1]], axis=1)
        if not before.any():
            return points, None
        box = grown_box(before)
        center = (box[:2] + box[2:]) // 2
        return np.concatenate([points, center[None]]), box

    def _find(self, encoding: Encoding, known: Known, before: np.ndarray) -> torch.Tensor:
        """Logits (H, W) of an object whose mask in the frame before was `before`."""
        points, box = self._prompts(encoding, known.target, before)
        logits, scores = self._decode(encoding, points, box)
        if known.weights is None:
            sizes = (self.sam.upscale(logits, encoding) > 0).sum(dim=(1, 2))
            chosen, box = logits[sizes.argmax()], None
        else:
            chosen = torch.tensordot(torch.as_tensor(known.weights).to(logits), logits, dims=1)
            box = self.sam.mask_box(chosen, encoding)
            if box is None:
                chosen = logits[scores.argmax()]
                box = self.sam.mask_box(chosen, encoding)
        for _ in range(2):  # cascaded post-refinement, the second time with a tight box
            logits, scores = self._decode(encoding, points, box, chosen)
            chosen = logits[scores.argmax()]
            tight = self.sam.mask_box(chosen, encoding)
            box = box if tight is None else tight
        return self.sam.upscale(chosen[None], encoding)[0]

    def _decode(
        self, encoding: Encoding, points: np.ndarray, box: np.ndarray | None, mask_logits: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Three masks (3, 256, 256) and their predicted IoUs (3,); every point is the subject's."""
        return self.sam.decode(encoding, points, np.ones(len(points), int), box, mask_logits)

    def _encoded(self, image: ImageLike) -> Encoding:
        return image if isinstance(image, Encoding) else self.sam.encode(image)


def segment_video(options: VideoOptions) -> int:
    """Writes OUTPUT/NNNNN.png, a palette PNG, for every frame of a video; returns how many frames there are.

    Raises:
        InputError, InputNotFoundError: input that cannot be used. Nothing is written then, but where a later frame is
            broken, the masks before it stay, and the next call goes on from them.
    """
    options.check()
    source, mask, output = (Path(str(path)) for path in (options.frames, options.mask, options.output))
    check_writable(output)
    labels, video = read_first_mask(mask), open_video(source, leave_out=mask)
    check_first_mask(labels, mask, video)
    sam = open_named_sam(options)
    settings = {
        **{
            name: getattr(options, name)
            for name in ("frames", "segmenter", "sam_model", "sam_dtype", "target_coverage")
        },
        "mask_sha256": hashlib.sha256(mask.read_bytes()).hexdigest(),
    }
    note_settings(output, settings, "masks of a video", "--output")
    segmenter = VideoSegmenter(sam, options.segmenter, options.target_coverage)
    overlay = output / "overlay" if options.overlay else None
    steps = follow(video, labels, segmenter, output, overlay)
    return sum(1 for _ in tqdm(steps, desc="segmenting", total=video.count, unit="frame"))


def check_first_mask(labels: np.ndarray, mask: Path, video: Video) -> None:
    """Raises `InputError` for the label map of a video's first frame, read from `mask`, that cannot be followed."""
    image = video.first.read()
    if labels.shape != image.size[::-1]:
        raise InputError(f"{mask} is {_size(labels)}, {video.first.name} {_size(image)}: give the mask of this frame")
    if not labels.any():
        raise InputError(f"{mask} marks no object: give each object a color of its own")


def follow(
    video: Video, first: np.ndarray, segmenter: VideoSegmenter, output: Path, overlay: Path | None = None
) -> Iterator[np.ndarray]:
    """Writes the label map of every frame, and yields it; what is there already is not made again.

    A frame follows from the first one and the label map before, so nothing else is kept, however long the video is, and
    an interrupted one goes on from what it wrote.

    Args:
        video: its frames are decoded as they come.
        first: the label map of the first frame, which is written as it is.
        segmenter: not fitted yet.
        output: folder for the label maps, NNNNN.png.
        overlay: folder for the frames with their objects painted over them, NNNNN.jpg.

    Raises:
        InputError: a frame, or a label map that is there, that cannot be decoded or is of another size than the first.
    """
    reference, before = video.first.read(), first
    for frame in chain([video.first], video.others):
        path = output / f"{frame.number:05}.png"
        if frame is video.first:
            labels = first
            save_labels(path, labels)
        elif path.is_file():
            labels = read_labels(path)
            if labels.shape != first.shape:
                raise InputError(f"{path} is {_size(labels)}, the frames {_size(first)}: remove it")
        else:
            if not segmenter.objects:
                segmenter.fit(reference, first)
            labels = segmenter.predict(_read(frame, reference), before)
            save_labels(path, labels)
        _tell_changes(frame, before, labels)
        if overlay and not (overlay / f"{frame.number:05}.jpg").is_file():
            save_picture(painted(_read(frame, reference), labels), overlay / f"{frame.number:05}.jpg")
        yield labels
        before = labels


def _read(frame: Frame, reference: Image.Image) -> Image.Image:
    image = frame.read()
    if image.size != reference.size:
        raise InputError(f"{frame.name} is {_size(image)}, the first frame {_size(reference)}: give frames of one size")
    return image


def _size(picture: Image.Image | np.ndarray) -> str:
    width, height = picture.size if isinstance(picture, Image.Image) else picture.shape[::-1]
    return f"{width} x {height}"


def _tell_changes(frame: Frame, before: np.ndarray, labels: np.ndarray) -> None:
    """Logs which objects left and which returned."""
    then, now = set(np.unique(before).tolist()), set(np.unique(labels).tolist())
    for number in sorted((then ^ now) - {0}):
        logger.info("%s: object %d %s", frame.name, number, "returned" if number in now else "left")


def grown_box(mask: np.ndarray) -> np.ndarray:
    """The box (4,) of a mask, (H, W) bool with a pixel at least, grown by `MARGIN` inside the frame."""
    (height, width), rows, columns = mask.shape, np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
    left, top = max(0, columns[0] - MARGIN), max(0, rows[0] - MARGIN)
    return np.array([left, top, min(width, columns[-1] + MARGIN), min(height, rows[-1] + MARGIN)])


def _check_labels(labels: np.ndarray, encoding: Encoding) -> None:
    if labels.shape != encoding.size:
        raise InputError(f"the label map is {labels.shape}, the frame {encoding.size} (H, W): give it this size")
