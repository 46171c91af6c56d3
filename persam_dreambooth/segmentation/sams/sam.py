"""SAM for PerSAM: encodes a photo once, then decodes prompts with or without guidance.

Shapes: H W photo, S x S padded input, g x g cells with C channels, 4 g x 4 g low-resolution masks. S is 1024 and g is
64; for SAM 3, they are 1008 and 72.
Points and boxes are xy in pixels of the photo; a box is x0, y0, x1, y1 with inclusive bounds.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from persam_dreambooth.errors import InputError, is_out_of_memory
from persam_dreambooth.photos.images import read_image
from persam_dreambooth.segmentation.sams.encoding_cache import EncodingCache
from persam_dreambooth.segmentation.target_semantic_prompting import Guidance, GuidedTransformer

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)

SAMPLED = 1024
"""Values of each weight that `fingerprint` reads."""

BATCH = 4
"""Photos that `Sam.encode_each` encodes at once on an accelerator."""

OwnSam = TypeVar("OwnSam", bound="Sam")


@dataclass(frozen=True, eq=False)
class Encoding:
    """The encoding of a photo by SAM's image encoder.

    Args:
        embedding: (1, C, g, g) float32, padding included.
        size: (H, W) of the photo.
        resized: (h, w) of the photo inside the padded input; the longer side is `padded`.
        padded: side S of the padded input.
        extra: what else this SAM encodes; see `Sam.decoder_features`.
        sam: the fingerprint of the SAM that made it; None if unknown.
    """

    embedding: torch.Tensor
    size: tuple[int, int]
    resized: tuple[int, int]
    padded: int
    extra: dict[str, Any] = field(default_factory=dict)
    sam: str | None = None

    def __repr__(self) -> str:
        height, width = self.size
        return f"Encoding({width} x {height} photo, {self.embedding.shape[1]} channels, {self.embedding.device})"

    def to(self, device: torch.device | str) -> Encoding:
        """The encoding on a device."""
        extra = {name: [value.to(device) for value in values] for name, values in self.extra.items()}
        return replace(self, embedding=self.embedding.to(device), extra=extra)

    @property
    def grid(self) -> int:
        """Cells along one side of the embedding, g."""
        return self.embedding.shape[-1]

    @property
    def scale(self) -> np.ndarray:
        """The factors (2,), xy, from pixels of the photo to pixels of the padded input."""
        return np.array([self.resized[1] / self.size[1], self.resized[0] / self.size[0]])

    @property
    def photo_cells(self) -> tuple[float, float]:
        """Rows and columns of the embedding that the photo covers; the rest is padding."""
        height, width = self.resized
        return height * self.grid / self.padded, width * self.grid / self.padded


ImageLike = str | Path | Image.Image | np.ndarray | Encoding


class Sam:
    """A frozen `SamModel` from transformers whose decoder can be guided.

    Args:
        model: the model, in evaluation mode, on its device.
        name: the name that the user gave; recorded with every mask.
        dtype: precision of the image encoder, which is nearly all of a SAM. The rest stays float32: it is small, and
            a coordinate in bfloat16 would be off by pixels.
        cache: folder of the encoding cache; None for no cache.
    """

    logit_limit = math.inf
    """Mask logits that prompt a pass are clipped to this."""

    decoder_options: ClassVar[dict[str, Any]] = {}
    """Other arguments of this SAM's mask decoder."""

    decoder_features: ClassVar[tuple[str, ...]] = ()
    """The names in `Encoding.extra` of what this SAM's mask decoder reads."""

    revision: str | None = None
    """The branch, tag or commit that `open_sam` loaded from the hub, if it was named."""

    def __init__(self, model: Any, name: str, dtype: torch.dtype = torch.float32, cache: Path | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self.dtype = dtype
        transformer = model.mask_decoder.transformer
        wrapped = isinstance(transformer, GuidedTransformer)
        if wrapped and (used := next(self.encoder.parameters()).dtype) != dtype:
            raise InputError(f"another Sam uses this model in {used}: load it again to use {dtype}")
        loaded = list(model.state_dict().values())
        self.encoder.to(dtype)
        self.cache = EncodingCache(cache, model) if cache else None
        self.padded: int = model.config.prompt_encoder_config.image_size
        self.transformer = transformer if wrapped else GuidedTransformer(transformer)
        model.mask_decoder.transformer = self.transformer
        # Wrapping changed names of weights, but not their order.
        self.loaded_fingerprint = tensors_sha256(zip(model.state_dict(), loaded, strict=True))

    @classmethod
    def from_pretrained(
        cls: type[OwnSam],
        name: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str = torch.float32,
        encoding_cache: Path | str | None = None,
        revision: str | None = None,
    ) -> OwnSam:
        """The same as `open_sam`; also raises `InputError` if the model is not of this class."""
        from persam_dreambooth.segmentation.sams.checkpoints import open_sam

        sam = open_sam(name, device, dtype, encoding_cache, revision)
        if not isinstance(sam, cls):
            raise InputError(f"{name} is a {type(sam).__name__}, not a {cls.__name__}: use Sam.from_pretrained")
        return sam

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{type(self).__name__}({self.name!r}, {dtype}, {self.device})"

    @property
    def device(self) -> torch.device:
        """The device of the model; encodings and targets are moved to it when they are used."""
        device: torch.device = self.model.device
        return device

    def to(self: OwnSam, device: torch.device | str) -> OwnSam:
        """Moves the model to a device; returns the SAM. Raises `InputError` if this machine has no such device."""
        self.model.to(find_device(device))
        return self

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the weights, see `fingerprint`; it identifies a SAM in encodings and in saved segmenters.

        `loaded_fingerprint` is that of the weights before the image encoder was converted to `dtype`; it identifies the
        SAM that an adapter was trained on.
        """
        return tensors_sha256(self.model.state_dict().items())

    @property
    def encoder(self) -> torch.nn.Module:
        """The part of the model that computes in `dtype`."""
        return self.model.vision_encoder

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """Size (h, w) of a photo of (H, W) in the padded input: its longer side is S."""
        scale = self.padded / max(width, height)
        return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))

    def encode(self, image: ImageLike) -> Encoding:
        """Encodes a photo: resized to `input_size` (Pillow bilinear), normalized, zero-padded.

        Args:
            image: a path, a PIL image, or an array such as (H, W, 3) uint8 RGB; see `read_image`. An encoding of this
                SAM is returned, on the SAM's device.

        Raises:
            InputError, InputNotFoundError: an image that cannot be read, or an encoding of another SAM.
        """
        return self.encode_batch([image])[0]

    @torch.no_grad()
    def encode_batch(self, images: Sequence[ImageLike]) -> list[Encoding]:
        """Encodes photos in one pass of the image encoder, which is faster on an accelerator; see `encode`.

        The photos can have different sizes. Memory grows with their number.

        Raises:
            InputError, InputNotFoundError: as for `encode`; also for one image that is not in a list.
        """
        if isinstance(images, (str, Path, Image.Image, np.ndarray, Encoding)):
            raise InputError(f"images is one {type(images).__name__}: give a list of images")
        encodings: dict[int, Encoding] = {}
        left: dict[int, tuple[tuple[int, int], np.ndarray]] = {}
        for place, image in enumerate(images):
            if isinstance(image, Encoding):
                self.check_own(image)
                encodings[place] = image if image.embedding.device == self.device else image.to(self.device)
                continue
            photo = read_image(image)
            size = photo.size[::-1]
            pixels = np.asarray(photo.resize(self.input_size(*size)[::-1], Image.Resampling.BILINEAR))
            kept = self.cache.read(pixels, self.device) if self.cache else None
            if kept:
                encodings[place] = self._encoding(size, pixels, *kept)
            else:
                left[place] = size, pixels
        if left:
            inputs = torch.cat([self.padded_input(pixels) for _, pixels in left.values()])
            # A training's autocast would put encodings of another precision into the cache.
            with without_autocast(self.device):
                embeddings, extras = self.embed(inputs)
            for number, (place, (size, pixels)) in enumerate(left.items()):
                own = slice(number, number + 1)
                # In one memory layout, computed and cached encodings give the same bits.
                embedding = embeddings[own].contiguous()
                extra = {name: [value[own].contiguous() for value in values] for name, values in extras.items()}
                if self.cache:
                    self.cache.keep(pixels, embedding, extra)
                encodings[place] = self._encoding(size, pixels, embedding, extra)
        return [encodings[place] for place in range(len(images))]

    def encode_each(self, images: Iterable[ImageLike]) -> Iterator[Encoding]:
        """Encodes photos in their order: `BATCH` at once on an accelerator if memory allows, else one by one."""
        at_once = 1 if self.device.type == "cpu" else BATCH
        left = iter(images)
        while group := list(islice(left, at_once)):
            try:
                batch = self.encode_batch(group) if at_once > 1 else None
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                at_once, batch = 1, None
            yield from batch or map(self.encode, group)

    def check_own(self, encoding: Encoding) -> None:
        """Raises `InputError` for an encoding of another SAM."""
        if encoding.sam not in (None, self.fingerprint):
            raise InputError(
                f"this encoding was made by another SAM than {self.name}: encode the photo with {self.name}"
            )

    def _encoding(
        self, size: tuple[int, int], pixels: np.ndarray, embedding: torch.Tensor, extra: dict[str, Any]
    ) -> Encoding:
        height, width, _ = pixels.shape
        return Encoding(embedding, size, (height, width), self.padded, extra, self.fingerprint)

    def padded_input(self, photo: np.ndarray) -> torch.Tensor:
        """A resized photo (h, w, 3) uint8 as the encoder's input: (1, 3, S, S), normalized, zero-padded."""
        pixels = (torch.from_numpy(photo.astype(np.float32)) - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
        height, width, _ = photo.shape
        pixels = F.pad(pixels.permute(2, 0, 1), (0, self.padded - width, 0, self.padded - height))
        return pixels[None].to(self.device, self.dtype)

    def embed(self, pixels: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        """Runs the image encoder: padded inputs (B, 3, S, S) to (B, C, g, g) and `Encoding.extra`, float32."""
        return self.model.get_image_embeddings(pixels).float(), {}

    def features(self, encoding: Encoding) -> dict[str, Any]:
        """The photo's inputs of the model's decoder, by argument name."""
        finer = {name: value for name, value in encoding.extra.items() if name in self.decoder_features}
        return {"image_embeddings": encoding.embedding, **finer}

    @torch.no_grad()
    def decode(
        self,
        encoding: Encoding,
        points: np.ndarray,
        labels: np.ndarray,
        box: np.ndarray | None = None,
        mask_logits: torch.Tensor | np.ndarray | None = None,
        multimask: bool = True,
        guidance: Guidance | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs one pass of the mask decoder.

        Args:
            encoding: the photo.
            points: (n, 2) xy.
            labels: (n,), 1 for the subject and 0 for the background.
            box: (4,) or None.
            mask_logits: (4 g, 4 g) low-resolution logits of an earlier pass, or None.
            multimask: returns three masks (whole, part, subpart), else the single-mask output.
            guidance: target-guided attention and target-semantic prompting for this pass.

        Returns:
            Logits (masks, 4 g, 4 g) and predicted IoUs (masks,), float32; masks is 3 or 1.
        """
        self.check_own(encoding)
        device = self.device
        prompts: dict[str, Any] = {
            "input_points": torch.from_numpy((points * encoding.scale).astype(np.float32)).to(device)[None, None],
            "input_labels": torch.from_numpy(labels.astype(np.int64)).to(device)[None, None],
        }
        if box is not None:
            corners = (box.reshape(2, 2) * encoding.scale).astype(np.float32).reshape(4)
            prompts["input_boxes"] = torch.from_numpy(corners).to(device)[None, None]
        if mask_logits is not None:
            logits = torch.as_tensor(mask_logits, dtype=torch.float32).clamp(-self.logit_limit, self.logit_limit)
            prompts["input_masks"] = logits.to(device)[None, None]
        with self.transformer.guided_by(guidance):
            return self.run_decoder(multimask, {**prompts, **self.features(encoding)})

    def run_decoder(self, multimask: bool, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the model on its inputs by argument name; other arguments and the result as in `decode`."""
        output = self.model(multimask_output=multimask, **inputs)
        return output.pred_masks[0, 0], output.iou_scores[0, 0]

    def upscale(self, maps: torch.Tensor, encoding: Encoding) -> torch.Tensor:
        """SAM's mask post-processing: (n, 4 g, 4 g) to the padded input, padding cropped, to the photo: (n, H, W)."""
        maps = F.interpolate(maps[None], (self.padded, self.padded), mode="bilinear", align_corners=False)
        maps = maps[..., : encoding.resized[0], : encoding.resized[1]]
        return F.interpolate(maps, encoding.size, mode="bilinear", align_corners=False)[0]

    def mask_box(self, logits: torch.Tensor, encoding: Encoding) -> np.ndarray | None:
        """The tight box (4,) of logits (4 g, 4 g) above 0 at the photo's size; None if the mask is empty."""
        mask = self.upscale(logits[None], encoding)[0] > 0
        rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
        if len(rows) == 0:
            return None
        return torch.stack([columns[0], rows[0], columns[-1], rows[-1]]).flatten().cpu().numpy()


def check_sam(sam: Sam) -> None:
    """Raises `InputError` for anything but a `Sam`."""
    if not isinstance(sam, Sam):
        raise InputError(f"sam is a {type(sam).__name__}: open it with open_sam")


def tensors_sha256(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A hash of the names, types and shapes of weights and of `SAMPLED` values of each; it takes milliseconds."""
    digest = hashlib.sha256()
    for name, value in weights:
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        if not value.is_meta:
            flat = value.flatten()
            some = flat[:: max(1, len(flat) // SAMPLED)].contiguous().cpu()
            digest.update(some.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A block without autocast, on a device of any type."""
    known = torch.amp.autocast_mode.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def find_device(name: torch.device | str | None) -> torch.device:
    """A device of this machine; None is the accelerator if there is one."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name is None:
        return accelerator or torch.device("cpu")
    try:
        return torch.zeros((), device=name).device
    except (RuntimeError, AssertionError) as error:  # unknown, absent, or torch is built without it
        found = f"the accelerator is {accelerator}" if accelerator else "torch finds no accelerator"
        raise InputError(f"device {str(name)!r} cannot be used, {found}: use cpu, or leave it out") from error
