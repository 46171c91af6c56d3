"""A small network that predicts the attributes and the mask of the subject in images of the toy world.

Shapes: B images, S pixels per side (`world.SIZE`), A attributes (`CLASSES`, in order), F features of each.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from persam_dreambooth.errors import InputError, InputNotFoundError
from persam_dreambooth.files import write_aside, write_json
from persam_dreambooth.toy import scenes, world

_COLORS = tuple(world.COLORS)
CLASSES = {
    "kind": world.KINDS,
    "background": world.BACKGROUNDS,
    "color": _COLORS,
    "second": _COLORS,
    "pattern": world.PATTERNS,
    "pattern_color": _COLORS,
    "accessory": world.ACCESSORIES,
    "accessory_color": _COLORS,
}
"""The predicted attributes and their classes. Colors that are not visible are predicted too, without meaning."""

# Channels at 64, 32, 16, 8 and 4 cells per side.
WIDTHS = (16, 32, 64, 96, 112)
FEATURES = 64
WEIGHTS = "model.safetensors"


class Evaluator(nn.Module):
    """Predicts attributes and the subject's mask from images of 64 x 64 pixels.

    A convolutional network goes down to 4 x 4 cells and back up. Each attribute has its own attention over the 16 x 16
    cells, which pools them to one vector; two layers map the vector to logits.
    """

    def __init__(self, widths: Sequence[int] = WIDTHS, features: int = FEATURES) -> None:
        super().__init__()
        self.widths, self.features = tuple(widths), features
        first, second, third, fourth, fifth = self.widths
        self.down = nn.ModuleList(
            [
                _convolution(3, first),
                nn.Sequential(_convolution(first, second, stride=2), _Residual(second)),
                nn.Sequential(_convolution(second, third, stride=2), _Residual(third)),
                nn.Sequential(_convolution(third, fourth, stride=2), _Residual(fourth)),
                nn.Sequential(_convolution(fourth, fifth, stride=2), _convolution(fifth, fifth)),
            ]
        )
        # From coarse to fine: channels of the upsampled features, of the skip connection, and of the result.
        ways = [(fifth, fourth, third), (third, third, third), (third, second, second), (second, first, first)]
        self.rise = nn.ModuleList([nn.Conv2d(coarse, width, 1) for coarse, _, width in ways])
        self.bridge = nn.ModuleList([nn.Conv2d(fine, width, 1) for _, fine, width in ways])
        self.mix = nn.ModuleList([_convolution(width, width) for _, _, width in ways])
        self.mask = nn.Conv2d(first, 1, 1)
        self.attention = nn.Conv2d(third, len(CLASSES), 1)
        self.value = nn.Conv2d(third, third, 1)
        self.hidden = nn.ModuleDict({name: nn.Linear(third, features) for name in CLASSES})
        self.heads = nn.ModuleDict({name: nn.Linear(features, len(classes)) for name, classes in CLASSES.items()})

    def forward(self, pictures: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        """Predicts from images (B, 3, S, S) in [-1, 1].

        Returns:
            Logits (B, classes) of each attribute, mask logits (B, S, S) and features (B, A, F).
        """
        ways = [pictures]
        for stage in self.down:
            ways.append(stage(ways[-1]))
        current, cells = ways.pop(), None
        for rise, bridge, mix in zip(self.rise, self.bridge, self.mix, strict=True):
            current = F.interpolate(rise(current), scale_factor=2.0, mode="nearest")
            current = mix(F.relu(current + bridge(ways.pop())))
            cells = current if current.shape[-1] == pictures.shape[-1] // 4 else cells
        attention = self.attention(cells).flatten(2).softmax(-1)  # (B, A, cells)
        pooled = attention @ self.value(cells).flatten(2).mT  # (B, A, width)
        features = {name: F.relu(self.hidden[name](pooled[:, index])) for index, name in enumerate(CLASSES)}
        logits = {name: self.heads[name](feature) for name, feature in features.items()}
        return logits, self.mask(current).squeeze(1), torch.stack(list(features.values()), dim=1)

    @torch.no_grad()
    def read(self, batches: Iterable[torch.Tensor]) -> dict[str, np.ndarray]:
        """Predicts from batches of images (B, 3, S, S) in [-1, 1]; returns the same as `judge`."""
        device = next(self.parameters()).device
        labels: dict[str, list[np.ndarray]] = {name: [] for name in CLASSES}
        masks, features = [np.empty((0, world.SIZE, world.SIZE), bool)], [self._no_features()]
        confidence = [np.empty(0, np.float32)]
        for batch in batches:
            logits, mask, feature = self(batch.to(device))
            for name, classes in CLASSES.items():
                labels[name].append(np.array(classes)[logits[name].argmax(1).cpu().numpy()])
            masks.append((mask > 0).cpu().numpy())
            features.append(feature.float().cpu().numpy())
            confidence.append(logits["background"].softmax(1).amax(1).float().cpu().numpy())
        read = {name: np.concatenate([np.empty(0, str), *found]) for name, found in labels.items()}
        return {
            **read,
            "mask": np.concatenate(masks),
            "features": np.concatenate(features),
            "background_confidence": np.concatenate(confidence),
        }

    def judge(self, images: Sequence[Image.Image], batch: int = 64) -> dict[str, np.ndarray]:
        """Predicts from images of any size, resized to 64 x 64.

        Returns:
            For each attribute of `CLASSES` the predicted classes (B,); "mask", bool (B, S, S); "features", float32
            (B, A, F): the inputs of the last layer of each attribute, in the order of `CLASSES`; and
            "background_confidence", float32 (B,): the probability of the predicted background.
        """
        size = (world.SIZE, world.SIZE)
        arrays = [np.asarray(image.convert("RGB").resize(size, Image.Resampling.BOX)) for image in images]
        return self.read(scenes.batches(np.stack(arrays), batch))

    def save(self, folder: Path) -> None:
        """Saves the weights in half precision and `config.json` to `folder`, created if missing."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {
            name: (value.half() if value.is_floating_point() else value).cpu().contiguous()
            for name, value in self.state_dict().items()
        }
        with write_aside(folder / WEIGHTS) as aside:
            save_file(weights, aside)
        classes = {name: list(names) for name, names in CLASSES.items()}
        write_json(folder / "config.json", {"widths": self.widths, "features": self.features, "classes": classes})

    @classmethod
    def load(cls, folder: Path | str) -> Evaluator:
        """Loads what `save` saved, in float32 and evaluation mode.

        Raises:
            InputNotFoundError: `folder` holds no evaluator.
            InputError: it was trained for a world with other attributes.
        """
        folder = Path(folder)
        if not (folder / "config.json").is_file() or not (folder / WEIGHTS).is_file():
            raise InputNotFoundError(f"{folder} holds no evaluator: write one with python -m tools.toy.train_evaluator")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if config.get("classes") != {name: list(names) for name, names in CLASSES.items()}:
            raise InputError(f"{folder} reads another world: train it again")
        evaluator = cls(config["widths"], config["features"])
        evaluator.load_state_dict(load_file(folder / WEIGHTS))
        return evaluator.float().eval()

    def _no_features(self) -> np.ndarray:
        return np.empty((0, len(CLASSES), self.features), np.float32)


class _Residual(nn.Module):
    """Two convolutions with a skip connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = _convolution(width, width), _convolution(width, width)

    def forward(self, cells: torch.Tensor) -> torch.Tensor:
        return cells + self.second(self.first(cells))


def _convolution(inner: int, outer: int, stride: int = 1) -> nn.Sequential:
    """A 3 x 3 convolution with batch normalization and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inner, outer, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outer), nn.ReLU()
    )
