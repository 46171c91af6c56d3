"""The prompt learning module (PLM) between a frozen SAM's prompt encoder and its mask decoder.

Kim et al. 2024, "Task-Specific Adaptation of Segmentation Foundation Model via Prompt Learning" (arXiv 2403.09199),
section 4.1. A prompt is as in `prompts`.

Shapes: B prompts, N prompt tokens with C channels, g x g cells, 4 g x 4 g low-resolution logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from persam_dreambooth.errors import InputError
from persam_dreambooth.files import write_aside
from persam_dreambooth.segmentation.adapters import Adapter, read_adapter
from persam_dreambooth.segmentation.sams.sam import Encoding, Sam, without_autocast

PLM_WEIGHTS = "plm.safetensors"
"""The file in an adapter's folder."""

MLP_RATIO = 8
"""Hidden channels of the PLM's MLP, relative to its width."""


class PromptLearning(nn.Module):
    """Adds a learned offset to prompt features: 1,578,752 parameters at SAM's width of 256.

    As in the paper: self-attention over the prompt tokens, then attention from the prompts to the image, then an MLP,
    whose output is the offset. Its last layer starts at zero, so that an untrained PLM leaves SAM unchanged.

    The paper leaves open the following, and these are our choices: one block; `heads` heads; layer normalization before
    each part; an MLP of 2048 channels with GELU; the image's positional encoding added to the keys, as in SAM's own
    decoder. With these, the number of parameters matches the paper's 1.6 million.

    Args:
        width: channels of the SAM's prompt features.
        heads: number of attention heads.
        mlp: whether the offset is the MLP's output; without it, a linear layer's (for ablations).
    """

    def __init__(self, width: int, heads: int = 8, mlp: bool = True) -> None:
        super().__init__()
        self.norm_self, self.norm_image, self.norm_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.self_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.image_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        hidden = MLP_RATIO * width
        layers = [nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)] if mlp else [nn.Linear(width, width)]
        self.mlp = nn.Sequential(*layers)
        nn.init.zeros_(self.mlp[-1].weight)
        nn.init.zeros_(self.mlp[-1].bias)

    def forward(self, prompts: torch.Tensor, image: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Prompt features (B, N, C) for the mask decoder, from those of the prompt encoder.

        Args:
            prompts: (B, N, C).
            image: (B, C, g, g), SAM's embedding.
            position: (1, C, g, g), its positional encoding.
        """
        values = image.flatten(2).transpose(1, 2)
        keys = values + position.flatten(2).transpose(1, 2)
        tokens = self.norm_self(prompts)
        state = prompts + self.self_attention(tokens, tokens, tokens, need_weights=False)[0]
        state = state + self.image_attention(self.norm_image(state), keys, values, need_weights=False)[0]
        return prompts + self.mlp(self.norm_mlp(state))


def make_plm(sam: Sam, seed: int = 0, mlp: bool = True) -> PromptLearning:
    """An untrained PLM for a SAM, on its device; its weights depend only on the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PromptLearning(sam.model.config.prompt_encoder_config.hidden_size, mlp=mlp).to(sam.device)


def save_plm(plm: PromptLearning, folder: Path) -> None:
    """Writes a PLM's weights into a folder, for `load_plm`; the adapter's description is written beside them."""
    with write_aside(folder / PLM_WEIGHTS) as aside:
        save_file({name: value.cpu().contiguous() for name, value in plm.state_dict().items()}, aside)


def load_plm(folder: Path, sam: Sam) -> tuple[PromptLearning, Adapter]:
    """The PLM of a folder that `adapt plm` wrote, for a SAM, and its description.

    Raises:
        InputNotFoundError: the folder holds no adapter.
        InputError: a broken file, an adapter of another method, or for another SAM.
    """
    adapter, path = read_adapter(folder, "plm", sam), folder / PLM_WEIGHTS
    plm = make_plm(sam)
    try:
        plm.load_state_dict(load_file(path, device=str(sam.device)))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise InputError(f"{path} holds no PLM ({str(error).splitlines()[0]}): train it again") from error
    return plm.eval().requires_grad_(False), adapter


def decode_prompts(
    sam: Sam,
    encodings: Sequence[Encoding],
    prompts: Sequence[np.ndarray],
    plm: PromptLearning | None = None,
    decoder: nn.Module | None = None,
    multimask: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the mask decoder on a batch of prompts, with gradients for the PLM or the decoder.

    Args:
        sam: the SAM, of any kind; its weights stay frozen.
        encodings: the photo of each prompt.
        prompts: the prompts, all points or all boxes.
        plm: adjusts the prompts; None for none.
        decoder: a copy of the SAM's mask decoder to run instead of it.
        multimask: returns three masks (whole, part, subpart), else the single-mask output.

    Returns:
        Logits (B, masks, 4 g, 4 g) and predicted IoUs (B, masks); masks is 3 or 1.
    """
    # In half precision, a coordinate would be off by pixels.
    with torch.no_grad(), without_autocast(sam.device):
        tokens, dense = _embed(sam, encodings, prompts)
        image = torch.cat([encoding.embedding for encoding in encodings])
        position = sam.model.get_image_wide_positional_embeddings()
        extra: dict[str, Any] = {
            name: [torch.cat(level) for level in zip(*(encoding.extra[name] for encoding in encodings), strict=True)]
            for name in sam.decoder_features
        }
    if plm is not None:
        tokens = plm(tokens[:, 0], image, position)[:, None]
    logits, scores, *_ = (decoder or sam.model.mask_decoder)(
        image_embeddings=image,
        image_positional_embeddings=position.expand(len(image), -1, -1, -1),
        sparse_prompt_embeddings=tokens,
        dense_prompt_embeddings=dense,
        multimask_output=multimask,
        **extra,
        **sam.decoder_options,
    )
    return logits[:, 0], scores[:, 0]


def _embed(sam: Sam, encodings: Sequence[Encoding], prompts: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """SAM's prompt features: tokens (B, 1, N, C) and dense (B, C, g, g)."""
    placed = [
        prompt.reshape(-1, 2) * encoding.scale for encoding, prompt in zip(encodings, prompts, strict=True)
    ]  # each (1, 2) or (2, 2), in pixels of the padded input
    places = torch.from_numpy(np.stack(placed).astype(np.float32)).to(sam.device)[:, None]
    if len(placed[0]) == 1:
        given = {"input_points": places, "input_labels": torch.ones_like(places[..., 0], dtype=torch.int64)}
        given["input_boxes"] = None
    else:
        given = {"input_points": None, "input_labels": None, "input_boxes": places.flatten(2)}
    return sam.model.prompt_encoder(**given, input_masks=None)
