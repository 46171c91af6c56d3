"""Measures the checkpoints that ship on what no training saw, in some two minutes on two cores.

    python -m persam_dreambooth.toy.check [--json] [--stable_diffusion FOLDER] [--sam FOLDER] [--images N]

- `background`, `color`, `class`: parts of pictures that show what their prompt says, by the evaluator that ships, over
  combinations of color, class and background that no training scene has. `evaluator_*` is the evaluator's own accuracy
  on held-out renders through the VAE.
- `vae_psnr`: dB between held-out renders and what the VAE makes of them, from the mean squared error of all.
- `sam_point_iou`: IoU of the mask that SAM's predicted IoU chooses from one random point of the subject.
- `persam_f_miou`: PerSAM-F on the rendered PerSeg-shaped set (`toy perseg`): the IoU pooled over an object's images but
  the reference, then the mean over 40 objects.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from persam_dreambooth import toy
from persam_dreambooth.errors import InputError

BARS = {
    "background": 0.98,
    "color": 0.98,
    "class": 0.95,
    "vae_psnr": 29.0,
    "sam_point_iou": 0.75,
    "persam_f_miou": 0.85,
}
"""What each figure must reach."""

PICTURES = 192
SAMPLING = {"num_inference_steps": 20, "guidance_scale": 7.5}
POINT_SCENES = 40
PERSEG_IMAGES = 1
"""Images of each object that are segmented, besides the reference; `--images 6` takes all."""


def check(stable_diffusion: Path, sam: Path, images: int = PERSEG_IMAGES) -> dict[str, float]:
    """All figures, see above.

    Args:
        stable_diffusion: a pipeline of the toy world.
        sam: a `SamModel`.
        images: of each object of the PerSeg-shaped set.
    """
    return {**prompted(stable_diffusion), **vae(stable_diffusion), **one_point(sam), **perseg(sam, images)}


def prompted(folder: Path) -> dict[str, float]:
    """Paints held-out prompts and lets the evaluator judge."""
    import torch

    from persam_dreambooth.dreambooth.stable_diffusion import fast_sampler, load_pipeline
    from persam_dreambooth.toy import scenes, world
    from persam_dreambooth.toy.evaluator import Evaluator

    combinations = [
        (kind, color, background)
        for kind in world.KINDS
        for color in world.COLORS
        for background in world.BACKGROUNDS
        if scenes.held_out(kind, color, background)
    ]
    chosen = [combinations[number % len(combinations)] for number in range(PICTURES)]
    pipeline = fast_sampler(load_pipeline(str(folder)))
    pipeline.set_progress_bar_config(disable=True)
    painted: list[Any] = []
    for start in range(0, PICTURES, 48):
        part = range(start, min(start + 48, PICTURES))
        told = [world.describe(*chosen[number]) for number in part]
        generators = [torch.Generator().manual_seed(scenes.HELD_OUT_SEED + number) for number in part]
        painted += pipeline(told, generator=generators, **SAMPLING).images
    evaluator = Evaluator.load(toy.path("evaluator"))
    seen = evaluator.judge(painted)
    kinds, colors, backgrounds = (np.array(column) for column in zip(*chosen, strict=True))
    scores = json.loads((toy.path("evaluator") / "scores.json").read_text(encoding="utf-8"))
    return {
        "background": float((seen["background"] == backgrounds).mean()),
        "color": float((seen["color"] == colors).mean()),
        "class": float((seen["kind"] == kinds).mean()),
        "evaluator_background": scores["through_vae"]["background"],
        "evaluator_color": scores["through_vae"]["color"],
        "evaluator_class": scores["through_vae"]["kind"],
    }


def vae(folder: Path) -> dict[str, float]:
    """Encodes and decodes held-out renders."""
    from diffusers import AutoencoderKL

    from persam_dreambooth.toy.train_vae import score

    return {"vae_psnr": score(AutoencoderKL.from_pretrained(folder / "vae"))["psnr"]}


def one_point(folder: Path) -> dict[str, float]:
    """Segments held-out scenes from one random point of the subject each."""
    from persam_dreambooth.segmentation import open_sam
    from persam_dreambooth.toy import scenes, world

    sam = open_sam(str(folder))
    ious = []
    for number in range(POINT_SCENES):
        rng = np.random.default_rng([scenes.HELD_OUT_SEED, 7, number])
        rendered = world.render(world.random_scene(rng), 512)
        rows, columns = np.nonzero(rendered.mask)
        pick = rng.integers(len(rows))
        encoding = sam.encode(rendered.image)
        logits, scores = sam.decode(encoding, np.array([[columns[pick], rows[pick]]]), np.array([1]))
        found = sam.upscale(logits, encoding)[scores.argmax()].numpy() > 0
        ious.append((found & rendered.mask).sum() / (found | rendered.mask).sum())
    return {"sam_point_iou": float(np.mean(ious))}


def perseg(folder: Path, images: int) -> dict[str, float]:
    """Segments the PerSeg-shaped set with PerSAM-F, one reference for each object."""
    from persam_dreambooth.segmentation import PerSAMF, open_sam
    from persam_dreambooth.toy import world
    from persam_dreambooth.toy.perseg import SIDE, objects

    sam = open_sam(str(folder))
    ious = []
    for item in objects():
        reference, *others = (world.render(scene, SIDE) for scene in item.scenes[: images + 1])
        persam = PerSAMF(sam).fit(reference.image, reference.mask)
        common = union = 0
        for other in others:
            found = persam.predict(other.image).mask
            common += (found & other.mask).sum()
            union += (found | other.mask).sum()
        ious.append(common / (union + 1e-10))
    return {"persam_f_miou": float(np.mean(ious))}


def main(arguments: list[str] | None = None) -> int:
    """Prints the figures; returns 0 if all reach their bars, else 1."""
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m persam_dreambooth.toy.check", description=summary)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--stable_diffusion", type=Path, default=toy.path("stable-diffusion"), help="another pipeline")
    parser.add_argument("--sam", type=Path, default=toy.path("sam"), help="another SAM")
    parser.add_argument(
        "--images", type=int, default=PERSEG_IMAGES, help="images of each PerSeg-shaped object (1 to 6)"
    )
    options = parser.parse_args(arguments)
    started = time.monotonic()
    try:
        figures = check(options.stable_diffusion, options.sam, options.images)
    except InputError as error:
        parser.exit(2, f"{error}\n")
    figures = {name: round(value, 4) for name, value in figures.items()}
    if options.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:22} {value:8.3f}" + (f"   (at least {BARS[name]})" if name in BARS else ""))
        print(f"{time.monotonic() - started:.0f} s")
    return int(any(figures[name] < bar for name, bar in BARS.items()))


if __name__ == "__main__":
    raise SystemExit(main())
