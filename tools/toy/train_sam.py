"""Trains the toy SAM on pairs of pictures with true masks: at 256 pixels, then 512, then 1024.

    python -m tools.toy.train_sam --output FOLDER [--textures FOLDER ...] [--seed 0] [--device cpu]
        [--workers 0] [--steps256 N] [--steps512 N] [--steps1024 N] [--minutes512 M] [--initial SAM]

writes FOLDER/sam, a `SamModel`, after each stage; FOLDER/stage-256 and so on contain the runs and their `eval.json`.
The same command resumes an interrupted training. With --initial, a new run starts from trained weights. SAM is trained
as in Kirillov et al. 2023, appendix A (focal and Dice loss of the best of three masks, predicted IoU), with the prompts
of PerSAM's refinement. In addition, its encoder is trained so that the mean embedding of a subject in one picture finds
the subject in another picture, and not the objects beside it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import SamModel

from persam_dreambooth.errors import InputNotFoundError
from persam_dreambooth.files import write_aside, write_json
from persam_dreambooth.toy import scenes
from tools.toy import pairs
from tools.toy.build import SAM_GLOBAL_LAYERS, SAM_IMAGE_SIZE, SAM_LAYERS, random_sam, rewrite_config, sam_config
from tools.toy.collages import Collages
from tools.toy.fused_attention import fuse_attention
from tools.toy.pairs import PhotoObject
from tools.toy.sam_losses import (
    PRIOR_WEIGHT,
    PriorScale,
    best_of_three,
    decode,
    encode,
    mask_ious,
    prior_losses,
    refinement,
    total_loss,
)
from tools.toy.sam_prompts import Batch, to_batch
from tools.toy.training import Run, run_stages, weights_fingerprint, with_batches

# Queries and keys of the decoder's cross-attention start equal and this much larger, so that a point looks at its own
# place from the first step; otherwise masks collapse to empty ones.
CROSS_ATTENTION_GAIN = 2.5
# The first stage starts with class-balanced cross entropy; between these parts of it focal and Dice loss take over.
BALANCED_UNTIL, FOCAL_FROM = 0.2, 0.4
EVALUATION_PAIRS = 12


@dataclass(frozen=True)
class Stage:
    """Training at one size.

    Args:
        size: side of the pictures in pixels.
        window: side of the local attention's windows in cells; 16 divides the smaller grids, 14 is SAM's.
        pairs: pairs of pictures in a batch that are drawn one by one, see `pairs`.
        collages: further pairs with objects of photos, where there are any, see `collages`. At 256 pixels there is
            little to see of them.
        prompts: objects to segment in each picture.
        learning_rate: the peak.
        steps: how many by default.
    """

    size: int
    window: int
    pairs: int
    collages: int
    prompts: int
    learning_rate: float
    steps: int


STAGES = (
    Stage(256, window=16, pairs=4, collages=0, prompts=2, learning_rate=8e-4, steps=4000),
    Stage(512, window=16, pairs=6, collages=18, prompts=2, learning_rate=6e-4, steps=1250),
    Stage(1024, window=14, pairs=1, collages=7, prompts=2, learning_rate=3e-4, steps=270),
)


def train(
    output: Path,
    *,
    textures: Sequence[Path] = (),
    masks: Path | None = None,
    steps: Sequence[int],
    minutes: Sequence[float],
    seed: int = 0,
    initial: Path | None = None,
    device: str = "cpu",
    workers: int = 0,
) -> dict[str, float]:
    """Starts or resumes training and writes `output`/sam; returns the scores of the last stage.

    Args:
        textures: folders of photos for composites; without any, all pictures are scenes of the world.
        masks: of some of these photos, see `pairs.load_objects`.
        steps: of each of `STAGES`; a stage of 0 steps is left out.
        minutes: the most that each of `STAGES` may take.
        seed: draws weights, pictures and prompts.
        initial: a toy SAM that a new run starts from.
        workers: processes that draw the pictures.
    """
    scenes.check_seed(seed)
    torch.set_float32_matmul_precision("high")  # on a GPU; a CPU computes as before
    photos, objects = pairs.load_textures(textures), pairs.load_objects(textures, masks)
    sam = first_sam(seed, STAGES[0]) if initial is None else read_sam(initial)
    scores: dict[str, float] = {}
    for stage, count, limit in zip(STAGES, steps, minutes, strict=True):
        if count:
            folder = output / f"stage-{stage.size}"
            sam, scores = train_stage(folder, stage, count, limit, sam, photos, objects, seed, device, workers)
            save(sam, output / "sam")
    return scores


def train_stage(
    folder: Path,
    stage: Stage,
    steps: int,
    minutes: float,
    sam: SamModel,
    photos: list[Image.Image],
    objects: list[list[PhotoObject]],
    seed: int,
    device: str,
    workers: int,
) -> tuple[SamModel, dict[str, float]]:
    """Trains one stage from `sam`'s weights; returns the averaged model at the stage's size, and its scores.

    With each checkpoint, the averaged model is also written beside the folder, as `train` does in the end.
    """
    model = nn.ModuleDict({"sam": resized(sam, stage.size, stage.window), "prior": PriorScale()}).to(device)
    # As in segment-anything, the frequencies of the positions are drawn once and stay.
    model["sam"].shared_image_embedding.positional_embedding.requires_grad_(False)
    config = {
        **asdict(stage),
        "steps": steps,
        "seed": seed,
        "renders": scenes.fingerprint(seed),
        "photos": len(photos),
        "textures": pairs.fingerprint(photos),
        "masks": pairs.fingerprint([shown.mask for album in objects for shown in album]),
        "prior_weight": PRIOR_WEIGHT,
        "initial": weights_fingerprint(sam),
    }

    def saving(average: Mapping[str, torch.Tensor]) -> None:
        shown = resized(sam, stage.size, stage.window)
        shown.load_state_dict({name[4:]: value for name, value in average.items() if name.startswith("sam.")})
        save(shown, folder.parent / "sam")

    run = Run(folder, config, model, learning_rate=stage.learning_rate, steps=steps, minutes=minutes, saving=saving)
    collages = Collages(objects, device) if objects and stage.collages else None
    for step, batch in with_batches(run, partial(draw, stage, photos, seed), workers, device):
        focal = focal_share(run.progress) if stage == STAGES[0] else 1.0
        rng = np.random.default_rng([seed, stage.size, step, 1])
        shown = batch.on(device)
        if collages:
            points = shown.points.shape[2]
            shown = shown.joined(collages.batch(rng, stage.collages, stage.size, stage.prompts, points > 1))
        loss, figures = total_loss(rng, model, shown, focal)
        run.update(loss, **figures)
    trained = run.averaged()["sam"]
    if minutes < math.inf:  # on a machine that is lent for minutes, they are for training
        return trained.cpu(), {}
    path = folder / "eval.json"
    if not path.exists():
        write_json(path, evaluate(trained, stage.size, photos, device))
        print(f"{folder.name} {json.dumps(json.loads(path.read_text(encoding='utf-8')))}", flush=True)
    return trained.cpu(), json.loads(path.read_text(encoding="utf-8"))


def focal_share(progress: float) -> float:
    """The share of focal and Dice loss, 0 to 1, in the first stage, of which a part of 0 to 1 is done."""
    return float(np.clip((progress - BALANCED_UNTIL) / (FOCAL_FROM - BALANCED_UNTIL), 0, 1))


def draw(stage: Stage, photos: list[Image.Image], seed: int, step: int) -> Batch:
    """What is drawn one by one of a step's batch."""
    rng = np.random.default_rng([seed, stage.size, step])
    pictures = [picture for _ in range(stage.pairs) for picture in pairs.random_album(rng, stage.size, photos)]
    return to_batch(rng, pictures, stage.prompts, "cpu")


def read_sam(folder: Path) -> SamModel:
    """Loads a toy SAM; one with fewer encoder layers gets the missing ones, which change nothing yet.

    Raises:
        InputNotFoundError: the folder holds none.
    """
    if not (folder / "model.safetensors").is_file():
        raise InputNotFoundError(f"{folder} holds no SAM: name a folder that this program wrote")
    sam = SamModel.from_pretrained(folder).float()
    layers = sam.vision_encoder.layers
    if len(layers) < SAM_LAYERS:
        grown = random_sam(seed=0).vision_encoder.layers[len(layers) :]
        with torch.no_grad():
            for layer in grown:
                for last in (layer.attn.proj, layer.mlp.lin2):
                    last.weight.zero_()
                    last.bias.zero_()
                layer.attn.rel_pos_h.zero_()
                layer.attn.rel_pos_w.zero_()
        layers.extend(grown)
    return sam


def first_sam(seed: int, stage: Stage) -> SamModel:
    """The weights that training starts from: as `build_sam` draws them, but for what training needs."""
    sam = random_sam(seed, stage.size, stage.window)
    generator = torch.Generator().manual_seed(seed)
    transformer = sam.mask_decoder.transformer
    crossing = [transformer.final_attn_token_to_image]
    for layer in transformer.layers:
        crossing += [layer.cross_attn_token_to_image, layer.cross_attn_image_to_token]
    with torch.no_grad():
        for attention in crossing:
            attention.q_proj.weight.mul_(CROSS_ATTENTION_GAIN)
            attention.k_proj.weight.copy_(attention.q_proj.weight)
        for layer in sam.vision_encoder.layers:
            layer.attn.rel_pos_h.zero_()
            layer.attn.rel_pos_w.zero_()
        for token in (sam.mask_decoder.iou_token, sam.mask_decoder.mask_tokens, *sam.prompt_encoder.point_embed):
            nn.init.normal_(token.weight, std=0.4, generator=generator)
    return sam


def resized(sam: SamModel, size: int, window: int) -> SamModel:
    """A copy of `sam` for pictures of another size.

    Positions are interpolated, and so are the relative ones of global attention, since objects grow with the picture.
    Local attention sees the same distances in cells as before: what lies beyond a smaller window is cut off, and beyond
    a larger one the farthest known distance stands in.
    """
    # In windows and in bfloat16, the library's plain attention takes three quarters of the time of its fused one.
    other = SamModel._from_config(sam_config(size, window), attn_implementation="eager")
    fuse_attention(other.vision_encoder)
    target = other.state_dict()
    state = {}
    for name, value in sam.state_dict().items():
        wanted = target[name].shape
        if value.shape == wanted:
            state[name] = value
        elif name.endswith("pos_embed"):
            channels_first = value.permute(0, 3, 1, 2)
            state[name] = F.interpolate(channels_first, wanted[1:3], mode="bicubic").permute(0, 2, 3, 1)
        elif int(name.split("layers.")[1].split(".")[0]) in SAM_GLOBAL_LAYERS:
            state[name] = F.interpolate(value.T[None], wanted[0], mode="linear")[0].T
        else:
            missing = (wanted[0] - len(value)) // 2  # negative where there is too much
            state[name] = F.pad(value.T[None], (missing, missing), mode="replicate" if missing > 0 else "constant")[0].T
    other.load_state_dict(state)
    return other


def save(sam: SamModel, folder: Path) -> None:
    """Writes the model at 1024 pixels, in half precision; it loads in single precision."""
    whole = resized(sam.cpu(), SAM_IMAGE_SIZE, STAGES[-1].window).half()
    with write_aside(folder) as aside:
        whole.save_pretrained(aside)
        rewrite_config(aside, dtype="float32")


@torch.no_grad()
def evaluate(sam: SamModel, size: int, photos: list[Image.Image], device: str) -> dict[str, float]:
    """Scores on pairs that training never draws: IoU of one point, IoU after refinement, and how often the prior hits.

    With photos the scores of composites come as well; their photos are those of the training.
    """
    sam.eval()
    scores: dict[str, float] = {}
    for kind, share in {"world": 0.0, "composites": 1.0}.items():
        if share and not photos:
            continue
        first, last, hits = [], [], []
        for index in range(EVALUATION_PAIRS):
            rng = np.random.default_rng([scenes.HELD_OUT_SEED, index])
            batch = to_batch(rng, pairs.random_album(rng, size, photos, share), 1, device)
            embeddings = encode(sam, batch.pixels)
            one_point = decode(sam, embeddings, batch.points[:, :, :1], batch.labels[:, :, :1])
            first += mask_ious(best_of_three(*one_point)[:, None], batch.masks)[:, 0].tolist()
            final = best_of_three(*refinement(rng, sam, embeddings, batch)[-1])
            last += mask_ious(final[:, None], batch.masks)[:, 0].tolist()
            hits.append(prior_losses(embeddings, batch.coverage, batch.others, torch.zeros((), device=device))[2])
        named = {"one_point_iou": first, "refined_iou": last, "prior_hits": hits}
        scores.update({f"{kind}_{name}": round(float(np.mean(values)), 4) for name, values in named.items()})
    return scores


def main(arguments: list[str] | None = None) -> int:
    """Trains the model; returns the exit code."""
    return run_stages("train_sam", "sam", STAGES, train, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
