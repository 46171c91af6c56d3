"""Albums: pictures of one subject with true masks, two for the toy SAM's training, more for that of the toy SAM 2.

There are four kinds: scenes of the toy world; clips of it, where the subject moves; composites (shapes filled with one
photo's texture, or subjects of the world, on another photo); and objects in photos with masks. The random generator
argument determines all of them.

Shapes: S pixels a side. Pictures are RGB, masks bool (S, S).
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from persam_dreambooth.errors import InputError, InputNotFoundError
from persam_dreambooth.toy import world

TEXTURE_SIDE = 512
"""Photos are reduced to this longer side in pixels when they are loaded."""

SHAPE_SIDE = 256
"""Side in pixels at which the shapes and the textures of pasted objects are drawn."""

MARGIN = 8
"""Texture around a pasted shape, so that its soft edge has the texture's colors."""

OBJECTS = 0.25
"""Share of the albums that show an object of a photo, where there are any."""

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SMALLEST = 0.005
"""No subject is less than this part of its picture."""


@dataclass(frozen=True)
class Picture:
    """A picture with truth.

    Args:
        image: (S, S, 3) uint8 RGB.
        subject: (S, S) bool, what is visible of the subject.
        others: visible masks of other objects, (S, S) bool each.
        extent: (height, width) in pixels of the photo inside the picture; what lies right of it or below is padding.
    """

    image: np.ndarray
    subject: np.ndarray
    others: tuple[np.ndarray, ...]
    extent: tuple[int, int]


@dataclass(frozen=True)
class Cutout:
    """An object without its surroundings: colors (RGB) and shape (L) of the same size, `MARGIN` around the shape."""

    colors: Image.Image
    shape: Image.Image


@dataclass(frozen=True)
class PhotoObject:
    """A photo (RGB) and the mask (L, 0 or 255) of an object in it."""

    photo: Image.Image
    mask: Image.Image


def load_objects(textures: Sequence[Path], masks: Path | None) -> list[list[PhotoObject]]:
    """Loads the photos that have masks, reduced to `TEXTURE_SIDE`, subject by subject.

    Args:
        textures: folders of photos, each named as its subject.
        masks: holds <subject>/<photo's stem>.png; None for no objects.

    Raises:
        InputError, InputNotFoundError: a mask without its photo, or no masks at all.
    """
    if masks is None:
        return []
    albums = []
    for folder in sorted(path for path in masks.iterdir() if path.is_dir()) if masks.is_dir() else []:
        album = []
        for path in sorted(folder.glob("*.png")):
            beside = [one for place in textures if place.name == folder.name for one in place.glob(f"{path.stem}.*")]
            if not beside:
                raise InputNotFoundError(f"{path} has no photo: name the folder {folder.name} with --textures")
            photo, mask = Image.open(beside[0]).convert("RGB"), Image.open(path).convert("L")
            photo.thumbnail((TEXTURE_SIDE, TEXTURE_SIDE), Image.Resampling.BOX)
            mask = mask.resize(photo.size, Image.Resampling.BILINEAR).point([0] * 128 + [255] * 128)
            album.append(PhotoObject(photo, mask))
        albums.append(album)
    if not any(albums):
        raise InputError(f"{masks} holds no masks: name a folder with <subject>/<photo>.png")
    return [album for album in albums if album]


def load_textures(folders: Sequence[Path]) -> list[Image.Image]:
    """Loads all photos below the folders, reduced to `TEXTURE_SIDE`, in the order of their paths below each folder.

    Raises:
        InputNotFoundError: a folder that is not there.
        InputError: fewer than three photos, or a file that is no picture.
    """
    photos = []
    for folder in folders:
        if not folder.is_dir():
            raise InputNotFoundError(f"there is no folder {folder}: name a folder of photos")
        for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES):
            try:
                with Image.open(path) as image:
                    photo = image.convert("RGB")
            except OSError as error:
                raise InputError(f"{path} cannot be read as a picture ({error}): remove it") from error
            photo.thumbnail((TEXTURE_SIDE, TEXTURE_SIDE), Image.Resampling.BOX)
            photos.append(photo)
    if folders and len(photos) < 3:
        raise InputError(f"the texture folders hold {len(photos)} photos: composites need at least three")
    return photos


def fingerprint(photos: Sequence[Image.Image]) -> str:
    """Names what the photos look like, so that a run notices other ones."""
    digest = hashlib.sha256()
    for photo in photos:
        digest.update(photo.tobytes())
    return digest.hexdigest()[:12]


def random_album(
    rng: np.random.Generator,
    size: int,
    photos: Sequence[Image.Image],
    composites: float = 0.4,
    objects: Sequence[Sequence[PhotoObject]] = (),
    count: int = 2,
    clips: float = 0.0,
) -> list[Picture]:
    """Pictures of one subject.

    Args:
        size: their side in pixels.
        photos: textures; without any, all albums are of the world.
        composites: share of the other albums that are composites.
        objects: photos with masks, subject by subject; `OBJECTS` of the albums show one.
        count: the number of pictures.
        clips: share of the world's albums that are frames of a video, in order.
    """
    if objects and rng.random() < OBJECTS:
        return object_album(rng, size, photos, objects, count)
    if photos and rng.random() < composites:
        return composite_album(rng, size, photos, count)
    if clips and rng.random() < clips:
        return clip(rng, size, count)
    return world_album(rng, size, count)


def world_album(rng: np.random.Generator, size: int, count: int = 2) -> list[Picture]:
    """The same subject in scenes of the world, often among others of its kind."""
    subject = world.random_subject(rng)
    return [world_picture(rng, size, subject) for _ in range(count)]


def clip(rng: np.random.Generator, size: int, count: int) -> list[Picture]:
    """Frames of a video: the subject and the objects beside it move, turn and grow at a steady pace."""
    side = _canvas_side(rng, size)
    while True:
        scene = world.random_scene(rng, distractors=int(rng.choice(3, p=(0.1, 0.6, 0.3))))
        poses = [scene.pose, *(pose for _, pose in scene.distractors)]
        speeds = rng.normal(0, (0.06, 0.02, 0.02, 0.04, 0.1), (len(poses), 5))
        pictures = []
        for frame in range(count):
            moved = [_moved(pose, frame * speed) for pose, speed in zip(poses, speeds, strict=True)]
            beside = tuple(zip((subject for subject, _ in scene.distractors), moved[1:], strict=True))
            shown = dataclasses.replace(scene, pose=moved[0], distractors=beside)
            rendered = world.render(shown, side)
            image, masks = rendered.image, rendered.objects
            if side != size:
                image = image.resize((size, size), Image.Resampling.BILINEAR)
                masks = [_resized_mask(mask, size, None) for mask in masks]
            others = tuple(mask for mask in masks[1:] if mask.mean() > SMALLEST)
            pictures.append(Picture(np.asarray(image), masks[0], others, (size, size)))
        if min(picture.subject.mean() for picture in pictures) > SMALLEST:
            return pictures


def _moved(pose: world.Pose, by: np.ndarray) -> world.Pose:
    """A pose moved by (5,): x, y, size relative to its own, tilt, gait."""
    x, y, size, tilt, gait = (float(value) for value in by)
    return world.Pose(
        pose.x + x,
        pose.y + y,
        pose.size * math.exp(size),
        pose.flip,
        pose.tilt + tilt,
        (float(np.clip(pose.gait[0] + gait, 0, 1)), float(np.clip(pose.gait[1] - gait, 0, 1))),
    )


def world_picture(rng: np.random.Generator, size: int, subject: world.Subject) -> Picture:
    """A subject in a scene of the world; in four of ten it is smaller than the world's photos show it."""
    while True:
        scene = world.random_scene(rng, subject, distractors=int(rng.choice(3, p=(0.1, 0.6, 0.3))))
        if rng.random() < 0.4:
            side = rng.uniform(0.2, 0.5)
            x, y = rng.uniform(0.4 * side, 1 - 0.4 * side, 2)
            scene = dataclasses.replace(scene, pose=dataclasses.replace(scene.pose, x=x, y=y, size=side))
        rendered = world.render(scene, _canvas_side(rng, size))
        if rendered.mask.mean() > SMALLEST:
            return _photographed(rng, size, rendered.image, rendered.objects)


def composite_album(
    rng: np.random.Generator, size: int, photos: Sequence[Image.Image], count: int = 2
) -> list[Picture]:
    """The same cutout, posed anew, on photos; or one subject of the world, drawn anew, on photos."""
    first, second, *fillings = rng.choice(len(photos), min(len(photos), 5), replace=False)
    backgrounds = [first, second, *rng.integers(len(photos), size=count - 2)][:count]
    subject = world.random_subject(rng) if rng.random() < 0.3 else None
    cutout = None if subject else textured(rng, random_shape(rng), photos[fillings[0]], photos[fillings[-1]])
    pictures = []
    for place in backgrounds:
        while True:
            canvas = texture(rng, photos[place], (_canvas_side(rng, size),) * 2, whole=0.5)
            shown = cutout or world_cutout(rng, subject or world.random_subject(rng))
            objects = [_posed(rng, shown, canvas.width, (0.02, 0.6), turn=0.1 if subject else 0.5)]
            for _ in range(rng.integers(0, 3)):
                other = _other_cutout(rng, shown, subject, [photos[index] for index in rng.permutation(fillings)])
                objects.append(_posed(rng, other, canvas.width, (0.01, 0.2), turn=0.2))
            image, masks = _pasted(rng, canvas, objects)
            if masks[0].mean() > SMALLEST:
                pictures.append(_photographed(rng, size, image, masks))
                break
    return pictures


def object_album(
    rng: np.random.Generator,
    size: int,
    photos: Sequence[Image.Image],
    objects: Sequence[Sequence[PhotoObject]],
    count: int = 2,
) -> list[Picture]:
    """One subject in its photos, or cut out of them and pasted on others; at times recolored in all."""
    album = objects[int(rng.integers(len(objects)))]
    chosen = [album[int(index)] for index in rng.choice(len(album), count, replace=len(album) < count)]
    if rng.random() < 0.3:
        turn = int(rng.integers(256))
        chosen = [PhotoObject(_turned_hue(shown.photo, turn), shown.mask) for shown in chosen]
    return [object_picture(rng, size, photos, shown) for shown in chosen]


def object_picture(rng: np.random.Generator, size: int, photos: Sequence[Image.Image], shown: PhotoObject) -> Picture:
    """An object in its photo, framed anew, or pasted on another one among other shapes."""
    side = _canvas_side(rng, size)
    if rng.random() < 0.5:
        box = _frame(rng, shown.mask)
        photo, mask = (
            image.resize((side, side), Image.Resampling.BILINEAR, box=box) for image in (shown.photo, shown.mask)
        )
        if rng.random() < 0.5:
            photo, mask = (image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in (photo, mask))
        return _photographed(rng, size, photo, [np.asarray(mask) >= 128])
    box = shown.mask.getbbox() or (0, 0, *shown.mask.size)
    box = (box[0] - MARGIN, box[1] - MARGIN, box[2] + MARGIN, box[3] + MARGIN)
    colors = _unevenly_lit(rng, shown.photo.crop(box), 0.4) if rng.random() < 0.5 else shown.photo.crop(box)
    cutout = Cutout(colors, shown.mask.crop(box).filter(ImageFilter.MinFilter(3)))
    while True:
        canvas = texture(rng, photos[int(rng.integers(len(photos)))], (side, side), whole=0.5)
        objects = [_posed(rng, cutout, side, (0.02, 0.6), turn=0.15)]
        for _ in range(rng.integers(0, 3)):
            filling, patch = (photos[int(index)] for index in rng.integers(len(photos), size=2))
            other = textured(rng, random_shape(rng), filling, patch)
            objects.append(_posed(rng, other, side, (0.01, 0.2), turn=0.2))
        image, masks = _pasted(rng, canvas, objects)
        if masks[0].mean() > SMALLEST:
            return _photographed(rng, size, image, masks)


def texture(rng: np.random.Generator, photo: Image.Image, size: tuple[int, int], whole: float = 0.0) -> Image.Image:
    """A crop of a photo at `size` (width, height): a fifth to all of its shorter side, flipped at times.

    Args:
        whole: chance that at least three quarters of the shorter side are in it.
    """
    shorter = min(photo.size) * rng.uniform(0.75 if rng.random() < whole else 0.2, 1)
    scale = shorter / max(size)
    width, height = size[0] * scale, size[1] * scale
    x, y = rng.uniform(0, photo.width - width), rng.uniform(0, photo.height - height)
    crop = photo.resize(size, Image.Resampling.BILINEAR, box=(x, y, x + width, y + height))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop


def random_shape(rng: np.random.Generator) -> Image.Image:
    """A shape (L, 0 or 255), cut to its bounding box: one of the world's, a smooth blob or a polygon."""
    if rng.random() < 0.4:
        kind = str(rng.choice(world.KINDS))
        pose = world.Pose(0.5, 0.5, 0.9, False, 0.0, (rng.random(), rng.random()))
        shape = Image.fromarray(world.silhouette(kind, pose, SHAPE_SIDE // 2).astype(np.uint8) * 255)
    else:
        shape = _random_outline(rng)
    return shape.crop(shape.getbbox())


def textured(rng: np.random.Generator, shape: Image.Image, photo: Image.Image, patch: Image.Image) -> Cutout:
    """A shape filled with a crop of a photo, at times with a patch of another one; shaded at times."""
    framed = Image.new("L", (shape.width + 2 * MARGIN, shape.height + 2 * MARGIN))
    framed.paste(shape, (MARGIN, MARGIN))
    colors = texture(rng, photo, framed.size)
    if rng.random() < 0.4:
        part = random_shape(rng)
        scale = rng.uniform(0.3, 0.8) * max(framed.size) / max(part.size)
        part = part.resize((max(2, round(part.width * scale)), max(2, round(part.height * scale))))
        place = (int(rng.integers(framed.width)) - part.width // 2, int(rng.integers(framed.height)) - part.height // 2)
        colors.paste(texture(rng, patch, part.size), place, part)
    return Cutout(_surface(rng, colors), framed)


def world_cutout(rng: np.random.Generator, subject: world.Subject) -> Cutout:
    """A subject of the world, cut out of a scene without others."""
    rendered = world.render(world.random_scene(rng, subject, distractors=0), SHAPE_SIDE)
    shape = Image.fromarray(rendered.mask.astype(np.uint8) * 255)
    left, top, right, bottom = shape.getbbox() or (0, 0, *shape.size)
    box = (left - MARGIN, top - MARGIN, right + MARGIN, bottom + MARGIN)
    return Cutout(rendered.image.crop(box), shape.crop(box).filter(ImageFilter.MinFilter(3)))


def _surface(rng: np.random.Generator, colors: Image.Image) -> Image.Image:
    """An object's colors (RGB), at times in another hue, at times lit unevenly: what is one is seldom of one color."""
    if rng.random() < 0.3:
        colors = _turned_hue(colors, int(rng.integers(256)))
    return _unevenly_lit(rng, colors, 0.4) if rng.random() < 0.5 else colors


def _turned_hue(image: Image.Image, turn: int) -> Image.Image:
    """A picture (RGB) with all hues turned by `turn` of 256 parts of the circle."""
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point([(level + turn) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def _unevenly_lit(rng: np.random.Generator, image: Image.Image, contrast: float) -> Image.Image:
    """Multiplies a picture (RGB) by a smooth field of light.

    Args:
        contrast: standard deviation of the light's logarithm at the nodes of the field, 2 to 5 a side.
    """
    nodes = np.exp(rng.normal(0, contrast, (int(rng.integers(2, 6)), int(rng.integers(2, 6)))))
    light = Image.fromarray((128 * nodes).clip(16, 255).astype(np.uint8)).resize(image.size, Image.Resampling.BICUBIC)
    lit = np.asarray(image, np.uint16) * np.asarray(light, np.uint16)[..., None] // 128
    return Image.fromarray(lit.clip(0, 255).astype(np.uint8))


def _other_cutout(
    rng: np.random.Generator, cutout: Cutout, subject: world.Subject | None, fillings: Sequence[Image.Image]
) -> Cutout:
    """An object to be told from `cutout`: often of the same shape, or the same kind, but with another surface."""
    if subject and rng.random() < 0.6:
        return world_cutout(rng, world.random_subject(rng, subject.kind if rng.random() < 0.6 else None))
    same = subject is None and rng.random() < 0.4
    shape = cutout.shape.crop(cutout.shape.getbbox()) if same else random_shape(rng)
    return textured(rng, shape, fillings[0], fillings[-1])


def _random_outline(rng: np.random.Generator) -> Image.Image:
    """A blob with a wavy outline, or a polygon; at times with limbs or a hole."""
    side = SHAPE_SIDE
    angles = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    if rng.random() < 0.3:
        angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(4, 9)))
        radii = rng.uniform(0.5, 1, len(angles))
    else:
        waves = np.arange(1, 6)
        phases, heights = rng.uniform(0, 2 * np.pi, 5), rng.normal(0, 0.3, 5) / waves
        radii = np.maximum(1 + (heights * np.cos(waves * angles[:, None] + phases)).sum(axis=1), 0.25)
    stretch = np.array([1.0, rng.uniform(0.4, 1)])
    points = radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1) * stretch
    points = side / 2 + points / np.abs(points).max() * side * 0.4
    image = Image.new("L", (side, side))
    brush = ImageDraw.Draw(image)
    brush.polygon([tuple(point) for point in points], fill=255)
    if rng.random() < 0.3:
        for angle in rng.uniform(0, 2 * np.pi, rng.integers(1, 5)):
            end = side / 2 * (1 + rng.uniform(0.7, 0.95) * np.array([np.cos(angle), np.sin(angle)]))
            brush.line([(side / 2, side / 2), tuple(end)], fill=255, width=int(rng.integers(8, 28)))
    if rng.random() < 0.15:
        x, y = side / 2 + rng.uniform(-20, 20, 2)
        radius = rng.uniform(10, 30)
        brush.ellipse([x - radius, y - radius, x + radius, y + radius], fill=0)
    return image


def _posed(
    rng: np.random.Generator, cutout: Cutout, side: int, areas: tuple[float, float], turn: float
) -> tuple[Cutout, tuple[int, int]]:
    """Turns, flips and scales a cutout; returns it with the place of its upper left corner on a canvas of `side`.

    Args:
        areas: its smallest and largest part of the canvas; logarithmically uniform.
        turn: the largest angle in half turns.
    """
    degrees = float(rng.uniform(-180, 180) * turn)
    flipped = rng.random() < 0.5
    parts = []
    area = np.exp(rng.uniform(*np.log(areas))) * side**2
    covered = max(1.0, np.asarray(cutout.shape).sum() / 255)
    scale = (area / covered) ** 0.5
    for part in (cutout.colors, cutout.shape):
        if flipped:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        part = part.rotate(degrees, Image.Resampling.BILINEAR, expand=True)
        size = (max(1, round(part.width * scale)), max(1, round(part.height * scale)))
        parts.append(part.resize(size, Image.Resampling.BILINEAR))
    colors, shape = parts
    if rng.random() < 0.5:
        shape = shape.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.0)))
    x, y = (
        int(rng.uniform(min(-0.15 * length, side - length), max(side - 0.85 * length, 0)))
        for length in (shape.width, shape.height)
    )
    return Cutout(colors, shape), (x, y)


def _pasted(
    rng: np.random.Generator, canvas: Image.Image, objects: list[tuple[Cutout, tuple[int, int]]]
) -> tuple[Image.Image, list[np.ndarray]]:
    """Pastes objects in a random order, in which the first keeps at least half of itself; their visible masks."""
    covers = []
    for cutout, place in objects:
        cover = Image.new("L", canvas.size)
        cover.paste(cutout.shape, place)
        covers.append(np.asarray(cover) >= 128)
    order = list(rng.permutation(len(objects)))
    above = [covers[index] for index in order[order.index(0) + 1 :]]
    if above and (covers[0] & ~np.any(above, axis=0)).sum() < 0.5 * covers[0].sum():
        order = [index for index in order if index != 0] + [0]
    image, masks = canvas.copy(), list(covers)
    for position, index in enumerate(order):
        cutout, place = objects[index]
        image.paste(cutout.colors, place, cutout.shape)
        for below in order[:position]:
            masks[below] = masks[below] & ~covers[index]
    return image, masks


def _canvas_side(rng: np.random.Generator, size: int) -> int:
    """The side to draw at: half of the pictures are drawn at half their size, for real photos are soft at 1024."""
    return size if rng.random() < 0.5 else size // 2


def _photographed(rng: np.random.Generator, size: int, image: Image.Image, masks: list[np.ndarray]) -> Picture:
    """Crops at times, brings to `size`, changes the light, blurs, adds noise and padding at times."""
    if rng.random() < 0.15:
        box = _close_crop(rng, masks[0])
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
        masks = [_resized_mask(mask, size, box) for mask in masks]
    elif image.width != size:
        image = image.resize((size, size), Image.Resampling.BILINEAR)
        masks = [_resized_mask(mask, size, None) for mask in masks]
    if rng.random() < 0.25:
        image = _unevenly_lit(rng, image, 0.25)
    if rng.random() < 0.5:
        image = ImageEnhance.Color(image).enhance(rng.uniform(0.7, 1.3))
        gains = rng.uniform(0.85, 1.15) * rng.uniform(0.96, 1.04, 3)
        levels = (gains[:, None] * np.arange(256) + rng.uniform(-12, 12)).clip(0, 255).astype(int)
        image = image.point(levels.flatten().tolist())
    if rng.random() < 0.25:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.7) * (size / 256) ** 0.5))
    pixels = np.asarray(image)
    if rng.random() < 0.25:
        noise = rng.standard_normal(pixels.shape, dtype=np.float32) * np.float32(rng.uniform(1, 8))
        pixels = (pixels + noise).clip(0, 255).astype(np.uint8)
    extent = _random_extent(rng, masks[0])
    inside = np.zeros((size, size), bool)
    inside[: extent[0], : extent[1]] = True
    masks = [mask & inside for mask in masks]
    return Picture(pixels, masks[0], tuple(mask for mask in masks[1:] if mask.mean() > SMALLEST), extent)


def _close_crop(rng: np.random.Generator, mask: np.ndarray) -> tuple[float, float, float, float]:
    """A square (x0, y0, x1, y1) inside the picture which a mask (S, S) fills from side to side, or nearly so."""
    y, x = np.nonzero(mask)
    side = min(len(mask), max(int(np.ptp(x)), int(np.ptp(y)), 15) * rng.uniform(0.9, 1.25) + 1)
    x0, y0 = (
        float(np.clip((place.min() + place.max() - side) / 2 + side * rng.uniform(-0.08, 0.08), 0, len(mask) - side))
        for place in (x, y)
    )
    return x0, y0, x0 + side, y0 + side


def _frame(rng: np.random.Generator, mask: Image.Image) -> tuple[float, float, float, float]:
    """A square (x0, y0, x1, y1) inside a photo that holds what is marked in its mask (L), as far as it fits."""
    left, top, right, bottom = mask.getbbox() or (0, 0, *mask.size)
    most = min(mask.size)
    side = rng.uniform(min(most, 1.05 * max(right - left, bottom - top)), most)
    corner = []
    for low, high, length in ((left, right, mask.width), (top, bottom, mask.height)):
        first, last = sorted((high - side, low))
        corner.append(float(np.clip(rng.uniform(first, last), 0, length - side)))
    x0, y0 = corner
    return x0, y0, x0 + side, y0 + side


def _resized_mask(mask: np.ndarray, size: int, box: tuple[float, float, float, float] | None) -> np.ndarray:
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box)) >= 128


def _random_extent(rng: np.random.Generator, mask: np.ndarray) -> tuple[int, int]:
    """(height, width) of a photo in its padded picture: three in ten are not square, if the subject (S, S) allows."""
    size = len(mask)
    if rng.random() < 0.3:
        length = int(size * rng.uniform(0.55, 0.95))
        extent = (length, size) if rng.random() < 0.5 else (size, length)
        if mask[: extent[0], : extent[1]].sum() > 0.6 * mask.sum() and mask[: extent[0], : extent[1]].any():
            return extent
    return size, size
