"""Trains the toy SAM 2 on albums and clips with true masks: at 256 pixels, then 512, and 1024 if asked for.

    python -m tools.toy.train_sam2 --output FOLDER [--textures FOLDER ...] [--masks FOLDER] [--seed 0] [--device cpu]
        [--workers 0] [--steps256 N] [--steps512 N] [--steps1024 N] [--initial SAM2]

writes FOLDER/sam2, a `Sam2VideoModel`, after each stage; FOLDER/stage-256 and so on contain the runs and their
`eval.json`. The same command resumes an interrupted training. With --initial, a new run starts from trained weights.

SAM 2 learns what the toy SAM learns (see `train_sam`), and in addition to find the subject of one to three annotated
pictures of an album in another picture by its memory, as Ravi et al. 2024 train on short clips. The annotated pictures
are other photos of the subject or earlier frames of a video; their masks are grown or shrunk at times, like predicted
ones. In one of ten cases they show another subject: then the mask is empty, and no object is visible.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers import Sam2VideoModel

from persam_dreambooth.errors import InputNotFoundError
from persam_dreambooth.files import write_aside, write_json
from persam_dreambooth.segmentation.sams.sam2_memory import (
    Memory,
    Sam2MemoryModel,
    encode_memory,
    image_features,
    join_memories,
    recall,
)
from persam_dreambooth.toy import scenes
from tools.toy import pairs
from tools.toy.build import sam2_config
from tools.toy.sam_losses import (
    PRIOR_WEIGHT,
    PriorScale,
    best_of_three,
    decode,
    decoder_loss,
    mask_ious,
    mask_losses,
    prior_losses,
    refinement,
)
from tools.toy.sam_prompts import Batch, to_batch
from tools.toy.train_sam import CROSS_ATTENTION_GAIN, focal_share
from tools.toy.training import Run, run_stages, weights_fingerprint, with_batches

ALBUM = 4
"""Pictures of an album; the memory of up to three of them finds the subject in the fourth."""
CLIPS = 0.5
"""Share of the world's albums that are clips."""
MEMORY_WEIGHT = 2.0
VISIBLE_WEIGHT = 0.2
ABSENT = 0.1
EVALUATION_ALBUMS = 8
DISTURBED = 0.3
"""Share of the annotated pictures whose masks are grown or shrunk."""


@dataclass(frozen=True)
class Stage:
    """Training at one size.

    Args:
        size: side of the pictures in pixels.
        albums: albums of `ALBUM` pictures in a batch.
        prompts: objects to segment in each picture.
        learning_rate: the peak.
        steps: how many by default.
    """

    size: int
    albums: int
    prompts: int
    learning_rate: float
    steps: int


STAGES = (
    Stage(256, albums=12, prompts=2, learning_rate=1e-3, steps=560),
    Stage(512, albums=6, prompts=2, learning_rate=5e-4, steps=780),
    Stage(1024, albums=2, prompts=2, learning_rate=2.5e-4, steps=0),
)


@dataclass(frozen=True)
class Sources:
    """What pictures are made of; see `pairs.random_album`."""

    photos: list[Any]
    objects: list[list[pairs.PhotoObject]]


def draw(stage: Stage, sources: Sources, seed: int, step: int) -> tuple[Batch, torch.Tensor]:
    """The batch of a step with the subjects' masks (B, 1, S, S) uint8."""
    rng = np.random.default_rng([seed, stage.size, step])
    pictures = []
    for _ in range(stage.albums):
        pictures += pairs.random_album(
            rng, stage.size, sources.photos, objects=sources.objects, count=ALBUM, clips=CLIPS
        )
    return to_batch(rng, pictures, stage.prompts, "cpu"), subject_masks(pictures)


def subject_masks(pictures: Sequence[pairs.Picture]) -> torch.Tensor:
    """The masks of the subjects: (B, 1, S, S) uint8."""
    return torch.from_numpy(np.stack([picture.subject for picture in pictures]).astype(np.uint8))[:, None]


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
    """Starts or resumes training and writes `output`/sam2; returns the scores of the last stage.

    Args:
        textures: folders of photos for composites; without any, all pictures are scenes of the world.
        masks: of some of these photos, see `pairs.load_objects`.
        steps: of each of `STAGES`; a stage of 0 steps is skipped.
        minutes: the most that each of `STAGES` may take.
        seed: draws weights, pictures and prompts.
        initial: a toy SAM 2 that a new run starts from.
        workers: processes that draw the pictures.
    """
    scenes.check_seed(seed)
    torch.set_float32_matmul_precision("high")  # on a GPU; a CPU computes as before
    sources = Sources(pairs.load_textures(textures), pairs.load_objects(textures, masks))
    sam = first_sam2(seed) if initial is None else read_sam2(initial)
    scores: dict[str, float] = {}
    for stage, count, limit in zip(STAGES, steps, minutes, strict=True):
        if count:
            folder = output / f"stage-{stage.size}"
            sam, scores = train_stage(folder, stage, count, limit, sam, sources, seed, device, workers)
            save(sam, output / "sam2")
    return scores


def train_stage(
    folder: Path,
    stage: Stage,
    steps: int,
    minutes: float,
    sam: Sam2MemoryModel,
    sources: Sources,
    seed: int,
    device: str,
    workers: int,
) -> tuple[Sam2MemoryModel, dict[str, float]]:
    """Trains one stage from `sam`'s weights; returns the averaged model at the stage's size, and its scores."""
    model = nn.ModuleDict({"sam": resized(sam, stage.size), "prior": PriorScale()}).to(device)
    config = {
        **asdict(stage),
        "steps": steps,
        "seed": seed,
        "renders": scenes.fingerprint(seed),
        "photos": len(sources.photos),
        "textures": pairs.fingerprint(sources.photos),
        "masks": pairs.fingerprint([shown.mask for album in sources.objects for shown in album]),
        "initial": weights_fingerprint(sam),
    }
    run = Run(folder, config, model, learning_rate=stage.learning_rate, steps=steps, minutes=minutes)
    for step, (batch, subjects) in with_batches(run, partial(draw, stage, sources, seed), workers, device):
        focal = focal_share(run.progress) if stage == STAGES[0] else 1.0
        rng = np.random.default_rng([seed, stage.size, step, 1])
        loss, figures = total_loss(rng, model, batch.on(device), subjects.to(device).float(), focal)
        run.update(loss, **figures)
    trained = run.averaged()["sam"]
    path = folder / "eval.json"
    if not path.exists():
        write_json(path, evaluate(trained, stage.size, sources, device))
        print(f"{folder.name} {json.dumps(json.loads(path.read_text(encoding='utf-8')))}", flush=True)
    return trained.cpu(), json.loads(path.read_text(encoding="utf-8"))


def total_loss(
    rng: np.random.Generator, model: nn.ModuleDict, batch: Batch, subjects: torch.Tensor, focal: float
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The loss of a batch and the figures to log.

    Args:
        subjects: (B, 1, S, S) masks, 0 or 1.
        focal: as for `sam_losses.total_loss`.
    """
    sam = model["sam"]
    finer, cells = encode(sam, batch.pixels)
    embeddings = cells + sam.no_memory_embedding.view(1, -1, 1, 1)
    prompts = len(batch.masks) // len(batch.pixels)
    shared = [features.repeat_interleave(prompts, dim=0) for features in (*finer, embeddings)]
    loss, figures = cells.new_zeros(()), {}
    for number, (logits, scores) in enumerate(refinement(rng, sam, shared, batch), start=1):
        part, figures[f"iou{number}"] = decoder_loss(logits, scores, batch.masks, focal)
        loss = loss + part / 3
    near, argmax, found = prior_losses(embeddings, batch.coverage, batch.others, model["prior"].threshold)
    memory, recalled = memory_loss(rng, sam, finer, cells, subjects, focal)
    loss = loss + PRIOR_WEIGHT * (near + argmax) + MEMORY_WEIGHT * memory
    return loss, {**figures, "recalled": recalled, "found": found, "memory": memory.item()}


def encode(sam: Sam2MemoryModel, pixels: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """`image_features`; in bfloat16 during training."""
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=sam.training):
        finer, cells = image_features(sam, pixels)
    return [features.float() for features in finer], cells.float()


def memory_loss(
    rng: np.random.Generator,
    sam: Sam2MemoryModel,
    finer: list[torch.Tensor],
    cells: torch.Tensor,
    subjects: torch.Tensor,
    focal: float,
) -> tuple[torch.Tensor, float]:
    """Each picture is segmented by the memory of other pictures of its album: the loss, and the mean IoU where visible.

    Args:
        finer, cells: the pictures' features; pictures 4i to 4i + 3 are an album.
        subjects: (B, 1, S, S) masks.
    """
    count = len(cells)
    given = torch.stack([_disturbed(rng, mask) if rng.random() < DISTURBED else mask for mask in subjects])
    with torch.autocast(cells.device.type, torch.bfloat16, enabled=sam.training):
        memories = encode_memory(sam, cells, given)
    known = int(rng.integers(1, ALBUM))
    albums = np.arange(count // ALBUM)
    others = np.roll(albums, 1)
    places = np.empty((known, count), int)
    absent = np.zeros(count, bool)
    for picture in range(count):
        album, own = divmod(picture, ALBUM)
        absent[picture] = len(albums) > 1 and rng.random() < ABSENT
        source = others[album] if absent[picture] else album
        candidates = [place for place in range(ALBUM) if place != own]
        places[:, picture] = source * ALBUM + rng.permutation(candidates)[:known]
    chosen = [Memory(memories.tokens[index], memories.positions[index]) for index in torch.from_numpy(places)]
    with torch.autocast(cells.device.type, torch.bfloat16, enabled=sam.training):
        conditioned = recall(sam, cells, join_memories(chosen)).float()
    logits, scores, visible = decode_all(sam, [*finer, conditioned])
    shown = torch.from_numpy(~absent).to(cells.device)
    side = logits.shape[-1]
    truth = (F.adaptive_avg_pool2d(subjects, side)[:, 0] > 0.5).float() * shown[:, None, None]
    loss, _ = decoder_loss(logits[shown], scores[shown], truth[shown], focal)
    if not shown.all():
        loss = loss + mask_losses(logits[~shown], truth[~shown], focal).mean() * (~shown).float().mean()
    loss = loss + VISIBLE_WEIGHT * F.binary_cross_entropy_with_logits(visible[:, 0], shown.float())
    return loss, mask_ious(logits[shown, :1], truth[shown]).mean().item()


def decode_all(sam: Sam2MemoryModel, features: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decodes features without a prompt: logits (B, 4, m, m) and scores (B, 4), see `decode`, and visibility (B, 1)."""
    kept: dict[str, torch.Tensor] = {}
    head = sam.mask_decoder.pred_obj_score_head
    hook = head.register_forward_hook(lambda module, inputs, output: kept.__setitem__("visible", output[:, 0]))
    try:
        count, device = len(features[-1]), features[-1].device
        points = torch.zeros(count, 1, 1, 2, device=device)
        logits, scores = decode(sam, features, points, -torch.ones(count, 1, 1, dtype=torch.int64, device=device))
    finally:
        hook.remove()
    return logits, scores, kept["visible"]


def _disturbed(rng: np.random.Generator, mask: torch.Tensor) -> torch.Tensor:
    """A mask (1, S, S) grown or shrunk by up to a thirtieth of the picture's side."""
    width = 2 * int(rng.integers(1, max(2, mask.shape[-1] // 60))) + 1
    grown = F.max_pool2d(mask, width, stride=1, padding=width // 2)
    shrunk = -F.max_pool2d(-mask, width, stride=1, padding=width // 2)
    return shrunk if rng.random() < 0.5 and shrunk.any() else grown


def first_sam2(seed: int) -> Sam2MemoryModel:
    """The weights that training starts from; see `train_sam.first_sam`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sam = Sam2MemoryModel(sam2_config(STAGES[0].size))
        with torch.no_grad():
            frequencies = torch.randn_like(sam.shared_image_embedding.positional_embedding)
            for module in (sam.shared_image_embedding, sam.prompt_encoder.shared_embedding):
                module.positional_embedding.copy_(frequencies)
            transformer = sam.mask_decoder.transformer
            crossing = [transformer.final_attn_token_to_image]
            for layer in transformer.layers:
                crossing += [layer.cross_attn_token_to_image, layer.cross_attn_image_to_token]
            for attention in crossing:
                nn.init.xavier_uniform_(attention.q_proj.weight, gain=CROSS_ATTENTION_GAIN)
                attention.k_proj.weight.copy_(attention.q_proj.weight)
            decoder, prompts = sam.mask_decoder, sam.prompt_encoder
            for token in (decoder.iou_token, decoder.mask_tokens, decoder.obj_score_token, prompts.point_embed):
                nn.init.normal_(token.weight, std=0.4)
            for block in sam.memory_encoder.memory_fuser.layers:
                block.scale.fill_(0.1)
    return sam


def resized(sam: Sam2MemoryModel, size: int) -> Sam2MemoryModel:
    """A copy for pictures of another size; the weights are the same."""
    other = Sam2MemoryModel(sam2_config(size))
    other.load_state_dict(sam.state_dict())
    return other


def read_sam2(folder: Path) -> Sam2MemoryModel:
    """Loads a toy SAM 2; raises `InputNotFoundError` if the folder holds none."""
    if not (folder / "model.safetensors").is_file():
        raise InputNotFoundError(f"{folder} holds no SAM 2: name a folder that this program wrote")
    return Sam2MemoryModel.from_pretrained(folder, config=sam2_config()).float()


def save(sam: Sam2MemoryModel, folder: Path) -> None:
    """Writes a `Sam2VideoModel` at 512 pixels, in half precision; it loads in single precision.

    Its weights for object pointers and temporal positions, which are not trained, are zero.
    """
    config = sam2_config()
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in Sam2VideoModel(config).state_dict().items()}
    trained = sam.cpu().state_dict()
    weights = {name: trained.get(name, torch.zeros(shape)) for name, shape in shapes.items()}
    assert not trained.keys() - shapes.keys()
    with write_aside(folder) as aside:
        aside.mkdir()
        save_file({name: value.half().contiguous() for name, value in weights.items()}, aside / "model.safetensors")
        config.architectures, config.dtype = ["Sam2VideoModel"], "float32"
        config.save_pretrained(aside)


@torch.no_grad()
def evaluate(sam: Sam2MemoryModel, size: int, sources: Sources, device: str) -> dict[str, float]:
    """Scores on albums that training never draws.

    IoU of one point, IoU after refinement, how often the prior hits, IoU by the memory of one and of three pictures:
    in scenes, in clips (the next frame), and with photos in composites, whose photos are those of the training.
    """
    sam.eval()
    scores: dict[str, float] = {}
    draw: dict[str, Callable[[np.random.Generator], list[pairs.Picture]]] = {
        "world": lambda rng: pairs.world_album(rng, size, ALBUM),
        "clip": lambda rng: pairs.clip(rng, size, ALBUM),
    }
    if sources.photos:
        draw["composites"] = lambda rng: pairs.composite_album(rng, size, sources.photos, ALBUM)
    for kind, album in draw.items():
        values: dict[str, list[float]] = {}
        for index in range(EVALUATION_ALBUMS):
            rng = np.random.default_rng([scenes.HELD_OUT_SEED, index])
            pictures = album(rng)
            batch = to_batch(rng, pictures, 1, device)
            finer, cells = encode(sam, batch.pixels)
            embeddings = cells + sam.no_memory_embedding.view(1, -1, 1, 1)
            features = [*finer, embeddings]
            one_point = decode(sam, features, batch.points[:, :, :1], batch.labels[:, :, :1])
            own = {"one_point_iou": mask_ious(best_of_three(*one_point)[:, None], batch.masks)[:, 0].tolist()}
            final = best_of_three(*refinement(rng, sam, features, batch)[-1])
            own["refined_iou"] = mask_ious(final[:, None], batch.masks)[:, 0].tolist()
            hits = prior_losses(embeddings, batch.coverage, batch.others, torch.zeros((), device=device))[2]
            own["prior_hits"] = [hits]
            memories = encode_memory(sam, cells, subject_masks(pictures).to(device).float())
            asked = [features[-1:] for features in (*finer, cells)]
            for known in (1, ALBUM - 1):
                places = range(ALBUM - 1)[-known:]
                each = [Memory(memories.tokens[[place]], memories.positions[[place]]) for place in places]
                logits, _, _ = decode_all(sam, [*asked[:-1], recall(sam, asked[-1], join_memories(each))])
                own[f"memory{known}_iou"] = mask_ious(logits[:, :1], batch.masks[-1:])[:, 0].tolist()
            for name, figures in own.items():
                values.setdefault(name, []).extend(figures)
        scores.update({f"{kind}_{name}": round(float(np.mean(figures)), 4) for name, figures in values.items()})
    return scores


def main(arguments: list[str] | None = None) -> int:
    """Trains the model; returns the exit code."""
    return run_stages("train_sam2", "sam2", STAGES, train, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
