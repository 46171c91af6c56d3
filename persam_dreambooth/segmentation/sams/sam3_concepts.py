"""SAM 3's concept search on single photos (Carion et al. 2025, arXiv 2511.16719): all instances of a text or of boxes.

It calls the modules of transformers' `Sam3Model`. `Sam3Processor` and the pooling of boxes need torchvision, which this
package does not, so both are here; a photo is resized as for SAM 2.

Shapes: H W photo; S = 1008 pixels a side, a photo is stretched to a square; 72 x 72 cells with C = 256 channels; n
found instances, masks of 288 x 288. Boxes are x0, y0, x1, y1 in pixels of the photo.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPTokenizer, Sam3Config, Sam3Model
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.sam3.modeling_sam3 import Sam3GeometryEncoder, Sam3VisionEncoderOutput, box_cxcywh_to_xyxy

from persam_dreambooth import models
from persam_dreambooth.errors import InputError
from persam_dreambooth.photos.images import read_image
from persam_dreambooth.segmentation.sams.sam import Encoding, ImageLike, find_device, without_autocast

INPUT_PIXELS = "pixels"
"""The name in `Encoding.extra` of the photo at the size of the input, (S, S, 3) uint8."""

BACKBONE = "backbone"
"""The name in `Encoding.extra` of the backbone's output for the photo, (1, 5184, 1024); both parts of SAM 3 read it."""

NO_TEXT = "visual"
"""The text that SAM 3 reads if it is given boxes alone."""

MOST_TOKENS = 32
"""Tokens of the longest text, the marks of its start and its end included."""

SCORE_THRESHOLD = 0.3
"""Scores of instances to keep, the default of transformers."""


@dataclass(frozen=True, eq=False)
class Concepts:
    """The instances of a concept in one photo, the highest score first.

    Args:
        masks: (n, H, W) bool, or of another size that was asked for; they can overlap.
        boxes: (n, 4) float32, x0, y0, x1, y1 in pixels of the photo.
        scores: (n,) float32, 0 to 1: the instance's own probability times `presence`.
        presence: the probability that the photo shows the concept at all, 0 to 1.
    """

    masks: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    presence: float

    def __repr__(self) -> str:
        best = f", best score {self.scores[0]:.3f}" if len(self.scores) else ""
        return f"Concepts({len(self.scores)} instances{best}, presence={self.presence:.3f})"


class BoxEncoder(Sam3GeometryEncoder):
    """`Sam3GeometryEncoder` with `pool_box` in place of torchvision's `roi_align`."""

    def _encode_boxes(
        self, boxes: torch.Tensor, boxes_mask: torch.Tensor, boxes_labels: torch.Tensor, vision_features: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Boxes (1, n, 4), center and size from 0 to 1, to tokens (1, n, C); other arguments as in transformers."""
        height, width = vision_features.shape[-2:]
        scale = torch.tensor([width, height, width, height], dtype=boxes.dtype, device=boxes.device)
        corners = (box_cxcywh_to_xyxy(boxes) * scale)[0]
        pooled = torch.stack([pool_box(vision_features[0], box, self.roi_size) for box in corners])
        places = self._encode_box_coordinates(*boxes[0].unbind(-1))
        tokens = (
            self.boxes_direct_project(boxes)
            + self.boxes_pool_project(pooled).flatten(1)
            + self.boxes_pos_enc_project(places)
        )
        return self.label_embed(boxes_labels.long()) + tokens, boxes_mask


class ConceptDetector(Sam3Model):
    """`Sam3Model` that reads boxes without torchvision; it loads the same checkpoints."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.geometry_encoder = BoxEncoder(self.config.geometry_encoder_config)


class ConceptModel:
    """A frozen `Sam3Model` from transformers: all instances of a concept in a photo.

    Args:
        model: the model, on its device.
        tokenizer: CLIP's tokenizer of the checkpoint.
        name: the name that the user gave.
        dtype: precision of the image encoder without its neck; the rest stays float32, as for `Sam`.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str, dtype: torch.dtype = torch.float32) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.dtype = dtype
        self.model.vision_encoder.backbone.to(dtype)
        self._texts: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {str(self.dtype).removeprefix('torch.')}, {self.device})"

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        device: torch.device = self.model.device
        return device

    @property
    def side(self) -> int:
        """S, the pixels of one side of the input."""
        return int(self.model.config.image_size)

    def share_backbone(self, backbone: torch.nn.Module) -> None:
        """Uses the backbone of the checkpoint's tracker, which has the same weights, in place of an own one."""
        self.model.vision_encoder.backbone = backbone

    def find(
        self,
        image: ImageLike,
        text: str | None = None,
        boxes: np.ndarray | Sequence[Sequence[float]] | None = None,
        box_labels: np.ndarray | Sequence[int] | None = None,
        threshold: float = SCORE_THRESHOLD,
        mask_size: tuple[int, int] | None = None,
    ) -> Concepts:
        """Finds all instances of a concept: of a text, of what the boxes show, or of both.

        The same as transformers' `Sam3Processor`, `Sam3Model` and `post_process_instance_segmentation`, except that
        instances are sorted.

        Args:
            image: as for `Sam.encode`; an `Encoding` must be of a SAM 3.
            text: a noun phrase such as "cat" or "striped shoe".
            boxes: (k, 4) instances in the photo, x0, y0, x1, y1 in pixels.
            box_labels: (k,), 1 for a box of an instance, 0 for a box of something else; by default 1.
            threshold: instances with a higher score are returned, 0 to 1.
            mask_size: (h, w) of the masks, by default that of the photo.

        Raises:
            InputError, InputNotFoundError: an image that cannot be read, neither text nor boxes, a long text, or boxes
                of another shape.
        """
        pixels, hidden, size = self._read(image)
        given, labels = read_boxes(boxes, box_labels, size)
        if not text and given is None:
            raise InputError("neither a text nor boxes: name what to find, such as text='cat'")
        with torch.no_grad(), without_autocast(self.device):
            words, word_mask = self._embed_text(text or NO_TEXT)
            output = self.model(
                vision_embeds=self._encode(pixels, hidden),
                text_embeds=BaseModelOutputWithPooling(pooler_output=words),
                attention_mask=word_mask,
                input_boxes=None if given is None else given.to(self.device),
                input_boxes_labels=None if labels is None else labels.to(self.device),
            )
        return read_concepts(output, size, threshold, mask_size or size)

    def _read(self, image: ImageLike) -> tuple[np.ndarray, torch.Tensor | None, tuple[int, int]]:
        """The photo stretched to (S, S, 3) uint8, the backbone's output if it is known, and the photo's size (H, W)."""
        if isinstance(image, Encoding):
            if INPUT_PIXELS not in image.extra:
                raise InputError("this encoding was not made by a SAM 3: give the photo")
            [hidden] = image.extra.get(BACKBONE, [None])
            return image.extra[INPUT_PIXELS][0].cpu().numpy(), hidden, image.size
        photo = read_image(image)
        return np.asarray(photo.resize((self.side, self.side), Image.Resampling.BILINEAR)), None, photo.size[::-1]

    def _encode(self, pixels: np.ndarray, hidden: torch.Tensor | None = None) -> Sam3VisionEncoderOutput:
        """The features of a photo (S, S, 3) uint8, or of the backbone's output for it."""
        encoder = self.model.vision_encoder
        if hidden is None:
            inputs = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
            hidden = encoder.backbone(inputs.to(self.device, self.dtype)).last_hidden_state
        cells = self.side // encoder.config.backbone_config.patch_size
        states, positions = encoder.neck(hidden.to(self.device).transpose(1, 2).unflatten(2, (cells, cells)))
        return Sam3VisionEncoderOutput(fpn_hidden_states=states, fpn_position_encoding=positions)

    def _embed_text(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The features (1, 32, C) of a text and which of them are words (1, 32); kept for the next photo."""
        if text not in self._texts:
            tokens = self.tokenizer(text, padding="max_length", max_length=MOST_TOKENS, return_tensors="pt")
            if (count := tokens.input_ids.shape[1]) > MOST_TOKENS:
                raise InputError(f"the text has {count} tokens, SAM 3 reads {MOST_TOKENS}: shorten {text[:40]!r}...")
            tokens = tokens.to(self.device)
            features = self.model.get_text_features(**tokens).pooler_output
            self._texts[text] = features, tokens.attention_mask
        words, mask = self._texts[text]
        return words.to(self.device), mask.to(self.device)


def open_concepts(
    name: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = torch.float32,
    revision: str | None = None,
) -> ConceptModel:
    """Loads the concept search of a SAM 3 checkpoint.

    Args:
        name: hub id such as `facebook/sam3`, or a local folder.
        device, dtype, revision: as for `open_sam`.

    Raises:
        InputNotFoundError: the model is not available.
        InputError: the model is not a SAM 3 with concept search, or this machine has no such device.
        UnavailableError: the hub cannot be reached.
    """
    from persam_dreambooth.segmentation.sams.checkpoints import precision

    name, place = str(name), find_device(device)
    source = models.resolve(name, "sam", revision)
    with models.loading(name):
        config = _detector_config(source, revision)
        if config is None:
            raise InputError(no_concepts(name))
        tokenizer = CLIPTokenizer.from_pretrained(source, revision=revision)
        model, found = ConceptDetector.from_pretrained(
            source, revision=revision, config=config, output_loading_info=True
        )
    if found["missing_keys"]:
        raise InputError(
            f"{name} lacks weights ({min(found['missing_keys'])}, ...): download it again, or name another model"
        )
    return ConceptModel(model.to(place, torch.float32), tokenizer, name, precision(dtype, place))


def _detector_config(source: str, revision: str | None = None) -> Sam3Config | None:
    """The configuration of a checkpoint's concept search; None if it has none."""
    from transformers import AutoConfig

    if Path(source).is_file():
        return None
    config = AutoConfig.from_pretrained(source, revision=revision)
    # The hub's checkpoints are of type sam3_video: a detector and a tracker.
    config = getattr(config, "detector_config", config)
    return config if isinstance(config, Sam3Config) else None


def check_reads_text(name: str) -> None:
    """Raises `InputError` for a SAM that `--text` cannot use, from its configuration, before weights are loaded."""
    source = models.resolve(name, "sam")
    with models.loading(name):
        if _detector_config(source) is None:
            raise InputError(no_text(name))


def no_text(name: str) -> str:
    """The message for a SAM that cannot read text."""
    return f"--text needs SAM 3, and {name} cannot read text: use --sam_model facebook/sam3, or --point"


def no_concepts(name: str) -> str:
    """The message for a SAM that cannot search for concepts."""
    return f"{name} is a SAM without concept search: name a SAM 3, such as facebook/sam3"


def read_boxes(
    boxes: np.ndarray | Sequence[Sequence[float]] | None,
    labels: np.ndarray | Sequence[int] | None,
    size: tuple[int, int],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Boxes (k, 4) of a photo (H, W) as the model's center and size from 0 to 1 (1, k, 4), and their labels (1, k)."""
    if boxes is None or len(boxes) == 0:
        return None, None
    corners = np.array(boxes, dtype=np.float32)
    if corners.ndim != 2 or corners.shape[1] != 4:
        raise InputError(f"boxes are of shape {corners.shape}: give (k, 4), x0, y0, x1, y1 of each")
    marks = np.ones(len(corners), int) if labels is None else np.asarray(labels, int)
    if marks.shape != (len(corners),) or not np.isin(marks, (0, 1)).all():
        raise InputError(f"box_labels are {marks.tolist()}: give 0 or 1 for each of the {len(corners)} boxes")
    corners /= np.array([*size[::-1], *size[::-1]], np.float32)
    center, extent = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
    return torch.from_numpy(np.concatenate([center, extent], axis=1))[None], torch.from_numpy(marks)[None]


def read_concepts(output: Any, size: tuple[int, int], threshold: float, mask_size: tuple[int, int]) -> Concepts:
    """The instances of a model's output above a score, for a photo of a size (H, W); see `ConceptModel.find`."""
    presence = output.presence_logits[0, 0].sigmoid()
    scores = output.pred_logits[0].sigmoid() * presence
    order = scores.argsort(descending=True, stable=True)
    kept = order[scores[order] > threshold]
    # One by one: at the size of a photo, many masks of floats take gigabytes.
    probabilities = (output.pred_masks[0, place].sigmoid()[None, None] for place in kept)
    masks = [F.interpolate(one, mask_size, mode="bilinear")[0, 0] > 0.5 for one in probabilities]
    boxes = output.pred_boxes[0, kept] * torch.tensor([*size[::-1], *size[::-1]]).to(output.pred_boxes)
    return Concepts(
        masks=np.stack([mask.cpu().numpy() for mask in masks]) if masks else np.zeros((0, *mask_size), bool),
        boxes=boxes.cpu().numpy(),
        scores=scores[kept].cpu().numpy(),
        presence=float(presence),
    )


def pool_box(features: torch.Tensor, box: torch.Tensor, side: int) -> torch.Tensor:
    """Averages features inside a box, in side x side bins, as torchvision's `roi_align` with its default arguments.

    A bin's value is the mean of bilinear samples at a regular grid, so it is a product of weights of rows and columns.

    Args:
        features: (C, h, w).
        box: (4,) x0, y0, x1, y1 in cells.
        side: bins of a side.

    Returns:
        (C, side, side).
    """
    x0, y0, x1, y1 = box.tolist()
    rows = bin_weights(y0, y1, features.shape[1], side).to(features)
    columns = bin_weights(x0, x1, features.shape[2], side).to(features)
    return torch.einsum("ph,chw,qw->cpq", rows, features, columns)


def bin_weights(start: float, end: float, cells: int, bins: int) -> torch.Tensor:
    """The weight of each cell in each bin of an interval from `start` to `end`, (bins, cells); see `pool_box`.

    Samples are at least one cell apart on average; an interval shorter than a cell counts as one cell. Cell 0 has its
    center at 0. Samples outside of the cells count as 0, up to one cell outside as the outermost cell.
    """
    length = max(end - start, 1.0)
    samples = int(np.ceil(length / bins))
    at = start + (torch.arange(bins * samples, dtype=torch.float64) + 0.5) * length / (bins * samples)
    inside = (at >= -1) & (at <= cells)
    at = at.clamp(0, cells - 1)
    low = at.floor().long()
    part, high = at - low, (low + 1).clamp(max=cells - 1)
    weights = F.one_hot(low, cells) * (1 - part)[:, None] + F.one_hot(high, cells) * part[:, None]
    return (weights * inside[:, None]).view(bins, samples, cells).mean(dim=1)
