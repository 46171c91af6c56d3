"""Several subjects in one photo, also alike ones: every region that is found belongs to one of them.

A SAM often takes two alike subjects that touch as one. So regions are cut where another subject is more similar, and
each subject is then prompted again, with the others as negative points.

Shapes: H W photo; n subjects. Points and boxes are xy in pixels of the photo.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from persam_dreambooth.errors import InputError
from persam_dreambooth.photos.mask_folder import PackedMask
from persam_dreambooth.segmentation.found import ABSENT, Found
from persam_dreambooth.segmentation.location_prior import at_photo_size, likeness, presence
from persam_dreambooth.segmentation.prompts import tight_box
from persam_dreambooth.segmentation.sams.sam import Encoding, ImageLike, Sam
from persam_dreambooth.segmentation.segmenter import Segmenter, decoder_step, sized_mask

SMOOTHING = 1 / 32
"""Standard deviation of the smoothing of likeness, as a fraction of the SAM's input."""

SMALLEST_PART = 0.25
"""Minimum fraction of a connected region that another subject has, and of the smaller of two masks that they share."""

REGION_IOU = 0.2
"""Minimum IoU of a region and the mask that the SAM makes of it; below, the mask shows something else and is not used.
It is low, since a region is cut roughly: 0.5 lost masks that were right."""

SAME = 0.5
"""Two regions that share more than this fraction of the smaller one are one instance."""


@dataclass(frozen=True, eq=False)
class Companion:
    """Another subject of the same photos, which must not be taken for the one that is searched.

    Args:
        segmenter: fitted to it; None if it is only in photos with known masks.
        known: its known masks, (H, W) bool, by the hashes of their photos.
        photos: the hashes of the photos that may show it; None for all photos.
    """

    segmenter: Segmenter | None
    known: Mapping[str, PackedMask]
    photos: frozenset[str] | None = None


@dataclass(frozen=True, eq=False)
class Region:
    """A candidate for an instance.

    Args:
        mask: (H, W) bool.
        cut: whether something was cut off that belongs to another subject.
        source: what a segmenter found, of any subject, in which the mask lies.
    """

    mask: np.ndarray
    cut: bool
    source: Found


def find_subjects(segmenters: Sequence[Segmenter], photo: ImageLike, taken: Sequence[np.ndarray] = ()) -> list[Found]:
    """Finds several subjects in a photo, which may be alike; no pixel belongs to two of them.

    The regions that the segmenters find are pooled. They are assigned to the subjects so that the sum of their
    similarities to the references is highest. A pixel in the masks of two subjects goes to the one to whose
    references its surroundings are more similar.

    Args:
        segmenters: a fitted segmenter of each subject, all with the same SAM.
        photo: as for `Segmenter.fit`; it is encoded once.
        taken: masks, (H, W) bool, of further subjects that are known in this photo.

    Returns:
        What is found of each subject. A subject without a region has the flag `absent` and an empty mask.

    Raises:
        InputError, InputNotFoundError: a photo that cannot be read, or masks of another size.
        RuntimeError: a segmenter is not fitted.
    """
    if not segmenters:
        raise InputError("no segmenter: give one for each subject")
    encoding = segmenters[0].sam.encode(photo)
    known = [sized_mask(mask, encoding) for mask in taken]
    free = ~np.any([np.zeros(encoding.size, bool), *known], axis=0)
    cells = min(len(segmenter.target.cells) for segmenter in segmenters)
    alike = torch.stack([likeness(segmenter.target, encoding, cells) for segmenter in segmenters]).cpu().numpy()
    smooth = ndimage.gaussian_filter(alike, (0, *[SMOOTHING * encoding.grid] * 2))
    alike, smooth = (_at_photo_size(maps, segmenters[0].sam, encoding) for maps in (alike, smooth))
    finds = [segmenter.instances(encoding, len(segmenters) + len(known)) for segmenter in segmenters]
    regions = _pool(finds, free, smooth)
    chosen = _assign(regions, segmenters, encoding, alike)
    places = [region.mask for region in chosen if region] + known
    results = []
    for segmenter, own, region in zip(segmenters, finds, chosen, strict=True):
        found = own[0] if own else segmenter.predict(encoding)
        if region is None:
            results.append(replace(found, mask=np.zeros(encoding.size, bool)))
            continue
        source = region.source  # maybe of another subject, so only what is of the region itself
        found = replace(found, score=source.score, points=source.points, box=source.box, steps=source.steps)
        others = [mask for mask in places if mask is not region.mask]
        if region.cut or any((mask & region.mask).any() for mask in others):
            found = _prompt_again(segmenter, encoding, found, region.mask, others)
        else:
            found = replace(found, mask=region.mask)
        results.append(replace(found, mask=found.mask & free))
    masks = np.stack([found.mask for found in results])
    nearest = np.where(masks, smooth, -np.inf).argmax(axis=0)
    return [
        _described(replace(found, mask=found.mask & (nearest == number)), segmenter, encoding)
        for number, (found, segmenter) in enumerate(zip(results, segmenters, strict=True))
    ]


def find_beside(
    segmenter: Segmenter, photo: ImageLike, photo_sha256: str, companions: Sequence[Companion]
) -> Found | None:
    """Finds a subject in a photo beside its companions, see `find_subjects`; None if it has none there."""
    there = [one for one in companions if one.photos is None or photo_sha256 in one.photos]
    taken = [np.asarray(one.known[photo_sha256]) for one in there if photo_sha256 in one.known]
    others = [one.segmenter for one in there if one.segmenter and photo_sha256 not in one.known]
    return find_subjects([segmenter, *others], photo, taken)[0] if taken or others else None


def _pool(finds: list[list[Found]], free: np.ndarray, smooth: np.ndarray) -> list[Region]:
    """The different regions in what is found of each subject.

    A mask is cut if it shares much with the first mask of another subject, since it may show both: each pixel goes to
    the subject with the highest smoothed likeness.

    Args:
        finds: what is found of each subject, the most similar first.
        free: (H, W) bool, pixels outside of known masks.
        smooth: (n, H, W) the smoothed likeness to each subject.
    """
    nearest = smooth.argmax(axis=0)
    regions: list[Region] = []
    for subject, source in [(subject, source) for subject, own in enumerate(finds) for source in own]:
        mask = source.mask
        others = [own[0].mask for number, own in enumerate(finds) if own and number != subject]
        if not any(other.any() and _shared(mask, other) > SMALLEST_PART for other in others if mask.any()):
            if (mask & free).any():
                regions.append(Region(mask & free, not free[mask].all(), source))
            continue
        labels, count = ndimage.label(mask & free)
        owner = nearest.copy()
        mixed = False
        for number in range(1, count + 1):
            inside = labels == number
            shares = np.bincount(nearest[inside], minlength=len(smooth)) / inside.sum()
            if (shares >= SMALLEST_PART).sum() < 2:
                owner[inside] = shares.argmax()
            else:
                mixed = True
        parts = [labels.astype(bool) & (owner == number) for number in range(len(smooth))]
        cut = mixed or not free[mask].all()
        regions += [Region(part, cut, source) for part in parts if part.any()]
    different: list[Region] = []
    for region in sorted(regions, key=lambda region: region.mask.sum(), reverse=True):
        if not any(_shared(region.mask, other.mask) > SAME for other in different):
            different.append(region)
    return different


def _assign(
    regions: list[Region], segmenters: Sequence[Segmenter], encoding: Encoding, alike: np.ndarray
) -> list[Region | None]:
    """The region of each subject, or None; no region is that of two subjects."""
    chosen: list[Region | None] = [None] * len(segmenters)
    if not regions:
        return chosen
    similar = np.array([[float(one[region.mask].mean()) for one in alike] for region in regions])
    absent = np.array(
        [
            [
                presence(region.mask, encoding, segmenter.target, segmenter.target_coverage)
                < segmenter.absent_threshold
                for segmenter in segmenters
            ]
            for region in regions
        ]
    )
    for place, number in zip(*linear_sum_assignment(np.where(absent, -10, similar), maximize=True), strict=True):
        if not absent[place, number]:
            chosen[number] = regions[place]
    return chosen


def _prompt_again(
    segmenter: Segmenter, encoding: Encoding, found: Found, mask: np.ndarray, others: list[np.ndarray]
) -> Found:
    """What the SAM finds in the box of a mask, with the innermost point of it, and of other masks as negative ones.

    The mask stays if that is something else: see `REGION_IOU`.
    """
    points = np.stack([_innermost(one) for one in (mask, *others)])
    box = tight_box(_core(mask))
    logits, scores = segmenter.sam.decode(encoding, points, np.array([1, *[0] * len(others)]), box)
    step = decoder_step(logits, scores, box)
    better = (segmenter.sam.upscale(logits[step.best][None], encoding)[0] > 0).cpu().numpy()
    if (better & mask).sum() < REGION_IOU * (better | mask).sum():
        return replace(found, mask=mask)
    return replace(
        found,
        mask=better,
        score=float(step.scores[step.best]),
        points=points,
        box=box,
        steps=(*found.steps, step),
    )


def _described(found: Found, segmenter: Segmenter, encoding: Encoding) -> Found:
    """The presence and the flag `absent` of the final mask."""
    similar = presence(found.mask, encoding, segmenter.target, segmenter.target_coverage)
    flags = [flag for flag in found.flags if flag != ABSENT]
    if similar < segmenter.absent_threshold or not found.mask.any():
        flags.insert(0, ABSENT)
    return replace(found, presence=similar, flags=tuple(flags))


def _at_photo_size(maps: np.ndarray, sam: Sam, encoding: Encoding) -> np.ndarray:
    """Maps of cells (n, g, g), upsampled like SAM's masks: (n, H, W)."""
    cells = torch.from_numpy(maps).to(encoding.embedding.device)
    return torch.stack([at_photo_size(one, sam, encoding) for one in cells]).cpu().numpy()


def _core(mask: np.ndarray) -> np.ndarray:
    """A mask without its thin parts; the mask itself if nothing is left."""
    opened = ndimage.binary_opening(mask, iterations=max(1, max(mask.shape) // 170))
    labels, count = ndimage.label(opened)
    if not count:
        return mask
    sizes = np.bincount(labels.ravel())[1:]
    return np.isin(labels, 1 + np.flatnonzero(sizes >= 0.1 * sizes.max()))


def _innermost(mask: np.ndarray) -> np.ndarray:
    """The pixel, (2,) xy, that is farthest from the outside of a mask."""
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    return np.array([depth.argmax() % mask.shape[1], depth.argmax() // mask.shape[1]])


def _shared(one: np.ndarray, other: np.ndarray) -> float:
    """The shared fraction of the smaller of two masks, neither empty."""
    return float((one & other).sum() / min(one.sum(), other.sum()))
