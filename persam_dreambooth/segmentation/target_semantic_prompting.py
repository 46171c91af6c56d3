"""Target-guided attention and target-semantic prompting inside SAM's mask decoder (PerSAM, section 3.2, Eq. 7 and 8).

SAM, SAM-HQ, MobileSAM and SAM 2 share the two-way transformer that is guided here. The models of transformers take
`attention_similarity` and `target_embedding`, but they add the similarity before a single softmax and leave the target
out of the last attention, which differs from PerSAM. So this module has its own forward pass with the models' weights.

Shapes: N tokens (IoU, masks, prompts), C channels, n = g x g cells.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from persam_dreambooth.segmentation.target_guided_attention import BiasedAttention


@dataclass(frozen=True, eq=False)
class Guidance:
    """The guidance of one decoder pass.

    Args:
        bias: (n,), added to the token-to-image attention after its softmax; a second softmax follows (Eq. 7).
        target: (C,), the target embedding, not normalized; added to every token (Eq. 8).
        form: `code`: as in the published code, which biases the two blocks but not the final attention, and adds the
            target in place, so that it also enters the tokens' positional encoding. `paper`: bias and target in the
            two blocks and in the final attention, with the positional encoding unchanged.
    """

    bias: torch.Tensor
    target: torch.Tensor
    form: Literal["code", "paper"] = "code"


_guidance: ContextVar[Guidance | None] = ContextVar("guidance", default=None)
"""The guidance of the pass that this thread runs, so that threads can share a model."""


class GuidedTransformer(nn.Module):
    """SAM's or SAM 2's two-way transformer with optional `Guidance`; without it, the output is the original's."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer
        for layer in transformer.layers:
            layer.cross_attn_token_to_image = BiasedAttention(layer.cross_attn_token_to_image)
        transformer.final_attn_token_to_image = BiasedAttention(transformer.final_attn_token_to_image)

    @contextmanager
    def guided_by(self, guidance: Guidance | None) -> Iterator[None]:
        """Guides every pass of this thread inside the `with` block."""
        token = _guidance.set(guidance)
        try:
            yield
        finally:
            _guidance.reset(token)

    def forward(
        self,
        point_embeddings: torch.Tensor,
        image_embeddings: torch.Tensor,
        image_positional_embeddings: torch.Tensor,
        **others: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (1, 1, N, C) and image (1, C, g, g) to attended (1, 1, N, C) and (1, 1, n, C)."""
        guidance = _guidance.get()
        if guidance is None:
            return self.transformer(
                point_embeddings=point_embeddings,
                image_embeddings=image_embeddings,
                image_positional_embeddings=image_positional_embeddings,
                **others,
            )
        bias, target = guidance.bias, guidance.target
        in_code = guidance.form == "code"
        queries = point_embeddings
        query_position = point_embeddings + target if in_code else point_embeddings
        keys = image_embeddings.flatten(2).transpose(1, 2).unsqueeze(1)
        key_position = image_positional_embeddings.flatten(2).transpose(1, 2).unsqueeze(1)

        for layer in self.transformer.layers:
            queries, keys, _ = layer(queries + target, keys, query_position, key_position, attention_similarity=bias)

        attended, _ = self.transformer.final_attn_token_to_image(
            query=queries + query_position + target,
            key=keys + key_position,
            value=keys,
            attention_similarity=None if in_code else bias,
        )
        if not in_code:
            queries = queries + target
        return self.transformer.layer_norm_final_attn(queries + attended), keys
