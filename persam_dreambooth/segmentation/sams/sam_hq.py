"""SAM-HQ."""

from typing import Any

import torch

from persam_dreambooth.segmentation.sams.sam import Sam


class SamHQ(Sam):
    """SAM-HQ with its three masks in SAM's order, from whole to subpart; transformers sorts them by predicted IoU.

    PerSAM-F learns a weight for each scale, so the order must be the same for every photo. SAM-HQ's decoder fuses early
    features of the encoder into its masks.
    """

    def embed(self, pixels: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        """See `Sam.embed`; `Encoding.extra` holds the early features."""
        embedding, intermediate = self.model.get_image_embeddings(pixels)
        return embedding.float(), {"intermediate_embeddings": [early.float() for early in intermediate]}

    def decode(self, *arguments: Any, multimask: bool = True, **prompts: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Sam.decode`."""
        seen: list[torch.Tensor] = []
        head = self.model.mask_decoder.iou_prediction_head
        hook = head.register_forward_hook(lambda module, inputs, output: seen.append(output[0, 0, 1:]))
        try:
            logits, scores = super().decode(*arguments, multimask=multimask, **prompts)
        finally:
            hook.remove()
        if not multimask:
            return logits, scores
        order = torch.sort(seen[0], descending=True).indices.argsort()
        return logits[order], scores[order]
