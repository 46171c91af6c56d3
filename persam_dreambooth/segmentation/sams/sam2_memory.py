"""The memory of SAM 2 and 3 on single photos: annotated photos are earlier frames, the photo to segment is the next.

The forward pass of FS-SAM2 (Forni et al. 2025): spatial memory only, without object pointers and temporal positions, so
that the order of the annotated photos does not matter. All functions take batches and are differentiable. They call the
modules of transformers' models directly, since `Sam2VideoModel.forward` runs in inference mode, replaces the masks of
objects that it takes as occluded, and changes the memory of these.

Shapes: B photos (or objects), K annotated photos of each; S pixels a side; g x g cells with C = 256 channels, g * g
memory tokens of M = 64 channels a photo; finer features (B, C / 8, 4 g, 4 g) and (B, C / 4, 2 g, 2 g). For SAM 2, S is
1024 and g is 64; for SAM 3, S is 1008 and g is 72.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import (
    Sam2Config,
    Sam2Model,
    Sam2VideoConfig,
    Sam3TrackerConfig,
    Sam3TrackerModel,
    Sam3TrackerVideoConfig,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.models.sam2_video.modeling_sam2_video import (
    Sam2VideoMemoryAttention,
    Sam2VideoMemoryEncoder,
    Sam2VideoVisionRotaryEmbedding,
)

MASK_SCALE, MASK_BIAS = 20.0, -10.0
"""A mask of 0 and 1 enters the memory encoder as -10 and 10, without the sigmoid that predicted logits pass first."""

STABILITY_MARGIN, LEAST_STABILITY = 0.05, 0.98
"""A mask is stable if its pixels above the margin are this share of those above minus the margin, as in SAM 2."""


class MemoryModel(PreTrainedModel):
    """An image model with the memory attention and the memory encoder of its video model, under the same names.

    The mask decoder does not replace unstable masks by itself. The memories of SAM 2 and SAM 3 have the same layers.
    """

    def add_memory(self, config: Sam2VideoConfig | Sam3TrackerVideoConfig) -> None:
        """Adds the memory; `config` is that of the video model."""
        config._attn_implementation = self.config._attn_implementation
        self.memory_attention = Sam2VideoMemoryAttention(config)
        self.memory_encoder = Sam2VideoMemoryEncoder(config)
        self.mask_decoder.dynamic_multimask_via_stability = False  # see `decode_cells`

    def set_positions(self) -> None:
        """Computes the memory attention's positions and frequencies, which no checkpoint holds."""
        attention = self.memory_attention
        attention.position_ids = attention.precompute_positions(attention.config)
        attention.rotary_emb = Sam2VideoVisionRotaryEmbedding(attention.config)

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Called by `from_pretrained` for modules with weights or buffers that a checkpoint lacks."""
        super()._init_weights(module)
        if isinstance(module, Sam2VideoMemoryAttention):
            self.set_positions()


class Sam2MemoryModel(MemoryModel, Sam2Model):
    """`Sam2Model` with the memory of `Sam2VideoModel`.

    Args:
        config: of the video model; `config` of this model is that of the image model.
    """

    def __init__(self, config: Sam2VideoConfig) -> None:
        super().__init__(Sam2Config.from_dict({**config.to_dict(), "model_type": "sam2"}))
        self.add_memory(config)


class Sam3MemoryModel(MemoryModel, Sam3TrackerModel):
    """`Sam3TrackerModel` with the memory of `Sam3TrackerVideoModel`.

    Args:
        config: of the video model; `config` of this model is that of the image model.
    """

    checkpoint_names: ClassVar[dict[str, str]] = {
        "^detector_model.vision_encoder.backbone.": "vision_encoder.backbone.",
        "^tracker_neck.": "vision_encoder.neck.",
        "^tracker_model.": "",
    }
    """What `from_pretrained` replaces in names of weights; transformers does so only for its own classes."""

    def __init__(self, config: Sam3TrackerVideoConfig) -> None:
        super().__init__(Sam3TrackerConfig.from_dict({**config.to_dict(), "model_type": "sam3_tracker"}))
        self.add_memory(config)


@dataclass(frozen=True, eq=False)
class Memory:
    """The memory of annotated photos.

    Args:
        tokens: (B, K * g * g, M).
        positions: (B, K * g * g, M), the same for each photo.
    """

    tokens: torch.Tensor
    positions: torch.Tensor

    def to(self, device: torch.device) -> Memory:
        """The memory on a device."""
        return Memory(self.tokens.to(device), self.positions.to(device))


def has_memory(model: Any) -> bool:
    """Whether a model has the modules for a memory; the image models of transformers have none."""
    return hasattr(model, "memory_attention") and hasattr(model, "memory_encoder")


def image_features(model: Any, pixels: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Encodes photos: (B, 3, S, S) normalized to finer features and cells (B, C, g, g), without the no-memory vector.

    For SAM 2. The mask decoder's two convolutions of the finer features are applied.
    """
    maps = model.get_image_features(pixels, return_dict=True).fpn_hidden_states
    sizes = [round(len(one) ** 0.5) for one in maps]
    *finer, cells = [one.permute(1, 2, 0).unflatten(2, (side, side)) for one, side in zip(maps, sizes, strict=True)]
    return finer, cells


def encode_memory(model: Any, cells: torch.Tensor, masks: torch.Tensor) -> Memory:
    """The memory of one annotated photo: cells (B, C, g, g) and its mask (B, 1, 16 g, 16 g), 0 to 1."""
    tokens, positions = model.memory_encoder(cells, masks * MASK_SCALE + MASK_BIAS)
    positions = positions.expand_as(tokens)
    return Memory(tokens.flatten(2).transpose(1, 2), positions.flatten(2).transpose(1, 2))


def restore_memory(model: Any, tokens: torch.Tensor) -> Memory:
    """The memory of tokens (B, K * g * g, M); the positions are those of `encode_memory`."""
    side, width = model.prompt_encoder.image_embedding_size[0], tokens.shape[-1]
    encoding = model.memory_encoder.position_encoding
    positions = encoding((1, width, side, side), tokens.device, tokens.dtype).flatten(2).transpose(1, 2)
    return Memory(tokens, positions.repeat(len(tokens), tokens.shape[1] // side**2, 1))


def join_memories(memories: Sequence[Memory]) -> Memory:
    """The memory of several annotated photos."""
    return Memory(*(torch.cat([getattr(one, name) for one in memories], dim=1) for name in ("tokens", "positions")))


def recall(model: Any, cells: torch.Tensor, memory: Memory) -> torch.Tensor:
    """Conditions cells (B, C, g, g) on a memory: (B, C, g, g)."""
    positions = model.vision_encoder.neck.position_encoding(cells.shape, cells.device, cells.dtype)
    conditioned = model.memory_attention(
        current_vision_features=cells.flatten(2).permute(2, 0, 1),
        current_vision_position_embeddings=positions.expand_as(cells).flatten(2).permute(2, 0, 1),
        memory=memory.tokens.transpose(0, 1),
        memory_posision_embeddings=memory.positions.transpose(0, 1),  # transformers spells it so
        num_object_pointer_tokens=0,
    )
    return conditioned[0].transpose(1, 2).reshape(cells.shape)  # from (1, B, g * g, C)


def decode_cells(
    model: Any, cells: torch.Tensor, finer: Sequence[torch.Tensor], replaced: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decodes cells to one mask, without a prompt, which is one padding point.

    Args:
        model: see `has_memory`.
        cells: (B, C, g, g).
        finer: the finer features of the same photos.
        replaced: a mask that is not stable is replaced by the best of the decoder's other three. FS-SAM2 was evaluated
            so: it is the default of SAM 2's program.

    Returns:
        Logits (B, 1, 4 g, 4 g), predicted IoUs (B, 1) and the logit that an object is visible (B, 1).
    """
    count, device = len(cells), cells.device
    points = torch.zeros(count, 1, 1, 2, device=device)
    labels = -torch.ones(count, 1, 1, dtype=torch.int64, device=device)
    sparse, dense = model.prompt_encoder(points, labels, None, None)

    def decoded(multimask: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        masks, scores, _, visible = model.mask_decoder(
            image_embeddings=cells,
            image_positional_embeddings=model.get_image_wide_positional_embeddings().repeat(count, 1, 1, 1),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
            high_resolution_features=list(finer),
        )
        return masks[:, 0], scores[:, 0], visible[:, 0]

    masks, scores, visible = decoded(multimask=False)
    if replaced and (unstable := ~is_stable(masks)).any():  # the decoder returns one mask or three
        three, their_scores, _ = decoded(multimask=True)
        place, best = torch.arange(count, device=device), their_scores.argmax(1)
        masks = torch.where(unstable[..., None, None], three[place, best][:, None], masks)
        scores = torch.where(unstable, their_scores[place, best][:, None], scores)
    return masks, scores, visible


def is_stable(logits: torch.Tensor) -> torch.Tensor:
    """Whether a slightly higher threshold leaves nearly all of a mask, (..., H, W) to (...); true of an empty one."""
    inner, outer = ((logits > limit).sum((-2, -1)) for limit in (STABILITY_MARGIN, -STABILITY_MARGIN))
    return inner >= LEAST_STABILITY * outer
