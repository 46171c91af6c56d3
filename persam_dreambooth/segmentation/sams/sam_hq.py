"""SAM-HQ."""

from typing import Any

import torch

from persam_dreambooth.segmentation.sams.sam import Sam


class SamHQ(Sam):
    """SAM-HQ. transformers sorts its three masks by predicted IoU; here they keep SAM's order, whole to part.

    PerSAM-F's weights are weights of scales, so the order must be the same for every photo. Its decoder fuses early
    features of its encoder into its masks.
    """

    def embed(self, pixels: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        """As `Sam.embed`; the early features are for the decoder."""
        embedding, intermediate = self.model.get_image_embeddings(pixels)
        return embedding.float(), {"intermediate_embeddings": [early.float() for early in intermediate]}

    def decode(self, *arguments: Any, multimask: bool = True, **prompts: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Sam.decode`."""
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
