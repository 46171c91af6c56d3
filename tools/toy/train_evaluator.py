"""Trains the evaluator of toy world pictures, on renders and on a VAE's reconstructions of them.

    python -m tools.toy.train_evaluator [--vae FOLDER/vae] --output FOLDER [--steps N] [--scenes N]

writes FOLDER/evaluator, with `scores.json` beside the weights. The same command resumes an interrupted training.

Shapes: N scenes, B pictures, S pixels a side (64), A attributes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from persam_dreambooth.errors import InputError
from persam_dreambooth.files import check_writable, write_aside, write_json
from persam_dreambooth.toy import scenes, world
from persam_dreambooth.toy.evaluator import CLASSES, Evaluator
from tools.toy.train_unet import read_vae
from tools.toy.training import Run, options_parser

STEPS = 3000
SCENES = 24000
HELD_OUT_SCENES = 1000
BATCH = 32
LEARNING_RATE = 2e-3
MASK_WEIGHT = 3.0
# Noise on the latents before they are decoded, in their standard deviations: the most, drawn for each picture.
LATENT_NOISE = 0.2
UNSEEN = -100
"""The label of what a picture does not show; torch's cross entropy passes over it."""


def train(
    output: Path,
    vae_folder: Path | None = None,
    *,
    steps: int = STEPS,
    scene_count: int = SCENES,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, dict[str, float]]:
    """Starts or resumes training and writes `output`/evaluator; returns its scores on held-out renders.

    Args:
        vae_folder: a trained VAE; half of each batch then are its reconstructions of renders.
    """
    scenes.check_seed(seed)
    vae, fingerprint = (None, None) if vae_folder is None else read_vae(vae_folder)
    torch.manual_seed(seed)
    evaluator = Evaluator().to(device)
    config = {
        "steps": steps,
        "scenes": scene_count,
        "seed": seed,
        "renders": scenes.fingerprint(seed),
        "vae": fingerprint,
        "widths": evaluator.widths,
        "features": evaluator.features,
        "batch": BATCH,
        "learning_rate": LEARNING_RATE,
        "mask_weight": MASK_WEIGHT,
        "latent_noise": LATENT_NOISE,
    }
    run = Run(output / "train-evaluator", config, evaluator, learning_rate=LEARNING_RATE, steps=steps)
    renders = scenes.pool(output, seed, scene_count)
    labels = np.array([scene_labels(scenes.scene(seed, index)) for index in range(scene_count)])  # (N, A)
    decoded = None
    if vae is not None:
        decoded = decode_pool(run.folder / "decoded.npy", vae.to(device), renders[: scene_count // 2], seed)
    for step in run:
        rng = scenes.step_rng(seed, step)
        pictures, masks, truth = draw_batch(renders, decoded, labels, rng)
        pictures = degrade(pictures, scenes.noise_generator(rng)).to(device)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            logits, mask_logits, _ = evaluator(pictures)
        reading = sum(
            F.cross_entropy(logits[name].float(), truth[:, index].to(device)) for index, name in enumerate(CLASSES)
        )
        masking = F.binary_cross_entropy_with_logits(mask_logits.float(), masks.to(device))
        run.update(reading + MASK_WEIGHT * masking, reading=reading.item(), masking=masking.item())
    run.averaged()
    evaluator.save(output / "evaluator")
    scores = score(Evaluator.load(output / "evaluator").to(device), vae)
    write_json(output / "evaluator" / "scores.json", scores)
    return scores


def scene_labels(scene: world.Scene) -> list[int]:
    """The class of each attribute (A,), `UNSEEN` where the picture does not show it."""
    subject = scene.subject
    shown = {"background": scene.background}
    if not scene.empty:
        shown |= {name: getattr(subject, name) for name in ("kind", "color", "second", "pattern", "accessory")}
        if subject.pattern != "plain":
            shown["pattern_color"] = subject.pattern_color
        if subject.accessory != "none":
            shown["accessory_color"] = subject.accessory_color
    return [classes.index(shown[name]) if name in shown else UNSEEN for name, classes in CLASSES.items()]


def draw_batch(
    renders: np.ndarray, decoded: np.ndarray | None, labels: np.ndarray, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draws pictures, half of them as decoded by the VAE if there is one; every other one is mirrored on average.

    Args:
        renders: uint8 (N, S, S, 4).
        decoded: uint8 (M, S, S, 3), of the first M renders.
        labels: int (N, A).

    Returns:
        Pictures (B, 3, S, S) in [-1, 1], masks, float32 (B, S, S) of 0 and 1, and labels (B, A).
    """
    chosen = rng.integers(len(renders), size=BATCH)
    if decoded is not None:
        chosen[: BATCH // 2] = rng.integers(len(decoded), size=BATCH // 2)
    drawn = renders[chosen]
    if decoded is not None:
        drawn[: BATCH // 2, ..., :3] = decoded[chosen[: BATCH // 2]]
    mirrored = rng.random(BATCH) < 0.5
    drawn[mirrored] = drawn[mirrored, :, ::-1]
    masks = torch.from_numpy(drawn[..., 3] > 0).float()
    return scenes.to_tensor(drawn[..., :3]), masks, torch.from_numpy(labels[chosen])


def degrade(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Blurs or sharpens pictures (B, 3, S, S), shifts their colors and adds noise, all slightly, each differently."""

    def draw(low: float, high: float, channels: int = 1) -> torch.Tensor:
        return low + (high - low) * torch.rand(len(pictures), channels, 1, 1, generator=generator)

    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    pictures = pictures + draw(-0.3, 0.7) * (blurred - pictures)
    pictures = pictures * draw(0.94, 1.06) + draw(-0.04, 0.04) + draw(-0.03, 0.03, channels=3)
    noise = torch.randn(pictures.shape, generator=generator)
    return (pictures + draw(0, 0.06) * noise).clamp(-1, 1)


@torch.no_grad()
def decode_pool(path: Path, vae: AutoencoderKL, renders: np.ndarray, seed: int) -> np.ndarray:
    """Passes renders, uint8 (N, S, S, 4), through the VAE, once, into a file that later calls read.

    Args:
        path: of the file; it must hold nothing of another VAE or other renders.
        seed: draws the noise on the latents, from none to `LATENT_NOISE`.

    Returns:
        The pictures, uint8 (N, S, S, 3).
    """
    if not path.exists():
        generator, decoded = scenes.noise_generator(np.random.default_rng(seed)), []
        for batch in scenes.batches(renders):
            latents = vae.encode(batch.to(vae.device)).latent_dist.mean
            strength = LATENT_NOISE / vae.config.scaling_factor * torch.rand(len(batch), 1, 1, 1, generator=generator)
            noise = strength * torch.randn(latents.shape, generator=generator)
            decoded.append(scenes.to_pictures(vae.decode(latents + noise.to(vae.device)).sample))
        with write_aside(path) as aside:
            np.save(aside, np.concatenate(decoded))
    return np.load(path, mmap_mode="r")


@torch.no_grad()
def score(evaluator: Evaluator, vae: AutoencoderKL | None) -> dict[str, dict[str, float]]:
    """Accuracy of each attribute, where it shows, and mean IoU of the masks, on held-out renders.

    Returns:
        The scores on the renders themselves ("plain") and, if there is a VAE, on its reconstructions ("through_vae").
    """
    indices = range(HELD_OUT_SCENES)
    renders = scenes.render_scenes(scenes.HELD_OUT_SEED, indices)
    labels = np.array([scene_labels(scenes.scene(scenes.HELD_OUT_SEED, index)) for index in indices])
    read = {"plain": evaluator.read(scenes.batches(renders))}
    if vae is not None:
        posteriors = (vae.encode(batch.to(vae.device)).latent_dist for batch in scenes.batches(renders))
        read["through_vae"] = evaluator.read(vae.decode(posterior.mean).sample for posterior in posteriors)
    return {how: _agreement(found, labels, renders[..., 3] > 0) for how, found in read.items()}


def _agreement(read: dict[str, np.ndarray], labels: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    """Compares what `Evaluator.read` returns with labels (N, A) and masks (N, S, S)."""
    scores = {}
    for index, (name, classes) in enumerate(CLASSES.items()):
        shown = labels[:, index] != UNSEEN
        scores[name] = (read[name][shown] == np.array(classes)[labels[shown, index]]).mean()
    union = (read["mask"] | masks).sum((1, 2))
    scores["mask_iou"] = ((read["mask"] & masks).sum((1, 2))[union > 0] / union[union > 0]).mean()
    return {name: round(float(value), 4) for name, value in scores.items()}


def main(arguments: list[str] | None = None) -> int:
    """Trains with the options given on the command line; returns the exit code."""
    parser = options_parser(
        "train_evaluator", "Trains the evaluator that reads pictures of the small world.", "evaluator", STEPS, SCENES
    )
    parser.add_argument("--vae", type=Path, help="folder of the trained VAE, whose pictures it learns to read as well")
    options = parser.parse_args(arguments)
    try:
        check_writable(options.output)
        scores = train(
            options.output,
            options.vae,
            steps=options.steps,
            scene_count=options.scenes,
            seed=options.seed,
            device=options.device,
        )
    except InputError as error:
        parser.exit(2, f"{error}\n")
    for how, values in scores.items():
        print(f"{options.output / 'evaluator'} {how}: {values}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
