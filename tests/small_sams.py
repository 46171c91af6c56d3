"""Small SAMs of every kind with the real geometry, 1024 pixels and 64 x 64 cells, but few channels.

Their weights are `seeded_weights`, so every layer does something, and no photo means anything to them.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from seeded_weights import seeded_weights
from transformers import (
    Sam2Config,
    Sam2Model,
    Sam2VideoConfig,
    Sam2VideoModel,
    Sam3Model,
    Sam3TrackerConfig,
    Sam3TrackerModel,
    Sam3VideoConfig,
    Sam3VideoModel,
    SamConfig,
    SamHQConfig,
    SamHQModel,
    SamModel,
)
from transformers.models.sam2_video.configuration_sam2_video import Sam2VideoMaskDecoderConfig

from persam_dreambooth.segmentation.target_semantic_prompting import Guidance, GuidedTransformer
from tools.toy.build import build_tokenizer

GOLDEN = Path(__file__).parent / "golden" / "published_files"
SMALL_SAM = str(Path(__file__).parent / "golden" / "weights" / "hf")
SAM_2 = {
    "vision_config": {
        "backbone_config": {
            "model_type": "sam2_hiera_det_model",
            "hidden_size": 16,
            "blocks_per_stage": [1, 1, 3, 1],
            "embed_dim_per_stage": [16, 32, 64, 128],
            "global_attention_blocks": [3],
        },
        "backbone_channel_list": [128, 64, 32, 16],
        "fpn_hidden_size": 64,
    },
    "prompt_encoder_config": {"hidden_size": 64},
    "mask_decoder_config": {"hidden_size": 64, "mlp_dim": 128, "iou_head_hidden_dim": 64},
}
MEMORY = {
    "memory_attention_hidden_size": 64,
    "memory_attention_num_layers": 1,
    "memory_attention_feed_forward_hidden_size": 128,
    "memory_encoder_hidden_size": 64,
    "mask_downsampler_embed_dim": 64,
    "memory_fuser_embed_dim": 64,
    "memory_fuser_intermediate_dim": 128,
}
"""The memory of `SAM_2`."""
SMALLEST_SAM_2 = {
    "image_size": 128,
    "vision_config": {
        "backbone_config": {**SAM_2["vision_config"]["backbone_config"], "image_size": [128, 128]},
        "backbone_channel_list": [128, 64, 32, 16],
        "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
        "fpn_hidden_size": 32,
    },
    "prompt_encoder_config": {"hidden_size": 32, "image_size": 128},
    "mask_decoder_config": {"hidden_size": 32, "mlp_dim": 64, "iou_head_hidden_dim": 32},
    "memory_attention_hidden_size": 32,
    "memory_attention_feed_forward_hidden_size": 64,
    "memory_attention_rope_feat_sizes": [8, 8],
    "memory_encoder_hidden_size": 32,
    "mask_downsampler_embed_dim": 32,
    "memory_fuser_embed_dim": 32,
    "memory_fuser_intermediate_dim": 64,
}
SAM_HQ = {
    "vision_config": {
        "hidden_size": 48,
        "mlp_dim": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "global_attn_indexes": [1],
        "output_channels": 64,
        "num_pos_feats": 32,
    },
    "prompt_encoder_config": {"hidden_size": 64},
    "mask_decoder_config": {"hidden_size": 64, "mlp_dim": 128, "iou_head_hidden_dim": 64, "vit_dim": 48},
}
SAM_3_WIDTH = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}


def fill(model):
    """The model with weights from a seed."""
    weights = model.state_dict()
    shapes = ["x".join(map(str, value.shape)) for value in weights.values()]
    model.load_state_dict(seeded_weights(weights, shapes))
    return model


def save_sam2(folder):
    """A SAM 2 as transformers saves it: the folder."""
    fill(Sam2Model(Sam2Config(**SAM_2))).save_pretrained(folder)
    return folder


def sam2_video_config(side):
    """The architecture of `SAM_2` with its memory, for an input of `side` pixels."""
    vision, cells = SAM_2["vision_config"], [side // 4, side // 8, side // 16]
    return Sam2VideoConfig(
        image_size=side,
        vision_config={
            **vision,
            "backbone_config": {**vision["backbone_config"], "image_size": [side, side]},
            "backbone_feature_sizes": [[count, count] for count in cells],
        },
        prompt_encoder_config={**SAM_2["prompt_encoder_config"], "image_size": side},
        # transformers 5.17 reads a dictionary as the prompt encoder's.
        mask_decoder_config=Sam2VideoMaskDecoderConfig(**SAM_2["mask_decoder_config"]),
        memory_attention_rope_feat_sizes=[cells[-1], cells[-1]],
        **MEMORY,
    )


def save_sam2_video(folder, side=1024):
    """A SAM 2 as the hub's are saved, with the memory of videos: the folder, and the model.

    With an input of fewer pixels, such as 256, it is a tenth of the work.
    """
    model = fill(Sam2VideoModel(sam2_video_config(side)))
    model.save_pretrained(folder)
    return folder, model


def save_smallest_sam2(folder):
    """A SAM 2 of 128 pixels and 8 x 8 cells with the memory of videos: its folder, as `--sam_model` takes it."""
    fill(Sam2VideoModel(Sam2VideoConfig(**SMALLEST_SAM_2))).save_pretrained(folder)
    return str(folder)


def sam3_config(side):
    """A small SAM 3 for an input of `side` pixels, a multiple of 14: a detector and a tracker, one image encoder."""
    cells = side // 14
    vision = {
        "backbone_config": {
            "model_type": "sam3_vit_model",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": side,
            "pretrain_image_size": 56,
            "window_size": 4,
            "global_attn_indexes": [1],
        },
        "fpn_hidden_size": 32,
        "backbone_feature_sizes": [[4 * cells] * 2, [2 * cells] * 2, [cells] * 2],
    }
    detector = {
        "model_type": "sam3",
        "vision_config": vision,
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": len(sam3_tokenizer()),
            "bos_token_id": sam3_tokenizer().bos_token_id,
            "eos_token_id": sam3_tokenizer().eos_token_id,
            "hidden_size": 16,
            "intermediate_size": 32,
            "projection_dim": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
        },
        "geometry_encoder_config": {**SAM_3_WIDTH, "num_layers": 1},
        "detr_encoder_config": {**SAM_3_WIDTH, "num_layers": 1},
        "detr_decoder_config": {**SAM_3_WIDTH, "num_layers": 1, "num_queries": 12},
        "mask_decoder_config": {"hidden_size": 32, "num_attention_heads": 2},
    }
    tracker = {
        "model_type": "sam3_tracker_video",
        "vision_config": vision,
        "image_size": side,
        "prompt_encoder_config": {"hidden_size": 32, "image_size": side},
        "mask_decoder_config": {"hidden_size": 32, "mlp_dim": 64, "iou_head_hidden_dim": 32, "num_attention_heads": 2},
        "memory_attention_hidden_size": 32,
        "memory_attention_num_layers": 1,
        "memory_attention_feed_forward_hidden_size": 64,
        "memory_attention_rope_feat_sizes": [cells, cells],
        "memory_encoder_hidden_size": 32,
        "mask_downsampler_embed_dim": 32,
        "memory_fuser_embed_dim": 32,
        "memory_fuser_intermediate_dim": 64,
    }
    return Sam3VideoConfig(detector_config=detector, tracker_config=tracker)


def sam3_tokenizer():
    """A tokenizer of few words, with the marks of CLIP's."""
    return build_tokenizer(["cat", "dog", "visual"])


def save_sam3(folder, side=112):
    """A SAM 3 as the hub's is saved, a detector and a tracker in one file: the folder, and the model."""
    model = fill(Sam3VideoModel(sam3_config(side)))
    model.config.save_pretrained(folder)
    sam3_tokenizer().save_pretrained(folder)
    # Not by save_pretrained, which writes the tracker's names with its prefix twice.
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    return folder, model


def save_sam3_tracker(folder, side=126):
    """The tracker of a SAM 3 alone, without its memory, as transformers saves it: the folder."""
    config = Sam3TrackerConfig.from_dict({**sam3_config(side).tracker_config.to_dict(), "model_type": "sam3_tracker"})
    fill(Sam3TrackerModel(config)).save_pretrained(folder)
    return folder


def save_sam3_detector(folder, side=112):
    """The detector of a SAM 3 alone, as transformers saves it: the folder."""
    fill(Sam3Model(sam3_config(side).detector_config)).save_pretrained(folder)
    sam3_tokenizer().save_pretrained(folder)
    return folder


def save_sam_hq(folder):
    """A SAM-HQ as transformers saves it: the folder."""
    fill(SamHQModel(SamHQConfig(**SAM_HQ))).save_pretrained(folder)
    return folder


def save_mobile_sam(path):
    """A quarter as wide as the published MobileSAM, as its authors save it: the file."""
    with np.load(GOLDEN / "mobile_sam.npz") as golden:
        names, shapes = golden["names"].tolist(), golden["shapes"].tolist()
    torch.save(seeded_weights(names, map(_narrower, names, shapes)), path)
    return path


def save_every_kind(folder):
    """What to give `open_sam`, by kind."""
    return {
        "sam": SMALL_SAM,
        "sam-hq": str(save_sam_hq(folder / "sam_hq")),
        "sam-2": str(save_sam2(folder / "sam2")),
        "mobile-sam": str(save_mobile_sam(folder / "mobile_sam.pt")),
    }


def _narrower(name, shape):
    """Numbers of channels shrink; heads, windows and kernels do not."""
    sides = [int(side) for side in shape.split("x") if side]
    return "x".join(str(side // 4 if side >= 32 and "attention_biases" not in name else side) for side in sides)


def assert_guided_as_sam(theirs, cells, form, **sizes):
    """With the same weights and the same guidance, a decoder's transformer answers as that of a SAM of these sizes.

    `theirs` has two layers, and sees `cells` x `cells` cells. Its weights have the names of SAM 2 and 3.
    """
    width = sizes["hidden_size"]
    model = SamModel(
        SamConfig(
            vision_config={"num_hidden_layers": 0, "output_channels": width, "num_pos_feats": width // 2},
            prompt_encoder_config={"hidden_size": width},
            mask_decoder_config={**sizes, "num_hidden_layers": 2, "layer_norm_eps": 1e-5},
        )
    )
    ours = model.mask_decoder.transformer.eval()
    weights = {
        name.replace(".o_proj.", ".out_proj.").replace("mlp.proj_in.", "mlp.lin1.").replace("proj_out.", "lin2."): value
        for name, value in theirs.state_dict().items()
    }
    ours.load_state_dict(weights)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, 1, 9, width, generator=generator)
    image, positions = torch.randn(2, 1, width, cells, cells, generator=generator)
    prior, target = 3 * torch.rand(cells**2, generator=generator), torch.randn(width, generator=generator)
    seen = []
    for transformer in (GuidedTransformer(theirs), GuidedTransformer(ours)):
        for guided in (None, Guidance(prior, target, form)):
            with torch.no_grad(), transformer.guided_by(guided):
                seen.append(transformer(tokens, image, positions, attention_similarity=None))
    plain, guided, plain_in_sam, guided_in_sam = seen
    for one, other in ((plain, plain_in_sam), (guided, guided_in_sam)):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, other, strict=True))
    assert (guided[0] - plain[0]).abs().max() > 0.1
