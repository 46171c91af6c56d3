"""Measures the toy checkpoints on held-out data, in minutes on two cores.

    python -m tools.toy.check [--json] [--stable_diffusion FOLDER] [--sam FOLDER] [--sam2 FOLDER] [--images N]

- `background`, `color`, `class`: fractions of generated pictures that show what their prompt says, by the toy
  evaluator, over combinations of color, class and background that no training scene has. `evaluator_*` is the
  evaluator's own accuracy on held-out renders through the VAE.
- `vae_psnr`: PSNR in dB of the VAE's reconstructions of held-out renders, from the mean squared error of all.
- `sam_point_iou`: IoU of the mask with the highest predicted IoU, prompted with one random point of the subject, on the
  images of the rendered data set in PerSeg's layout (`toy perseg`).
- `persam_f_miou`: PerSAM-F on that data set: IoU pooled over an object's images except the reference, then the mean
  over 40 objects. Every second image of an object shows other objects too; with one image for each object, so do the
  images of every second object.
- `memory_miou`: the same of memory segmentation with the toy SAM 2.

On processors that multiply in bfloat16, the UNet and SAM's image encoder run in bfloat16, which halves the time.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from persam_dreambooth import toy
from persam_dreambooth.errors import InputError
from persam_dreambooth.toy import world

BARS = {
    "background": 0.98,
    "color": 0.98,
    "class": 0.95,
    "vae_psnr": 29.0,
    "sam_point_iou": 0.75,
    "persam_f_miou": 0.85,
    "memory_miou": 0.85,
}
"""What each figure must reach."""

PICTURES = 96
SAMPLING = {"num_inference_steps": 12, "guidance_scale": 7.5}
VAE_SCENES = 100
PERSEG_IMAGES = 1
"""Images of each object that are segmented, besides the reference; `--images 6` takes all."""

PARTS = 4
"""Pieces that the prompts and the objects are divided into, for as many processes as there are cores."""


def check(stable_diffusion: Path, sam: Path, sam2: Path, images: int = PERSEG_IMAGES) -> dict[str, float]:
    """All figures, see above.

    Args:
        stable_diffusion: a pipeline of the toy world.
        sam: a `SamModel`.
        sam2: a `Sam2VideoModel`.
        images: of each object of the PerSeg-shaped set.
    """
    workers = min(os.cpu_count() or 1, 3 * PARTS + 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        segmenting = [pool.submit(segmented, sam, images, part) for part in range(PARTS)]
        remembering = [pool.submit(remembered, sam2, images, part) for part in range(PARTS)]
        generating = [pool.submit(prompted, stable_diffusion, part) for part in range(PARTS)]
        reconstructing = pool.submit(vae, stable_diffusion)
        right = np.concatenate([future.result() for future in generating]).mean(axis=0)
        point, persam_f = np.concatenate([future.result() for future in segmenting]).mean(axis=0)
        memory = np.concatenate([future.result() for future in remembering]).mean()
        psnr = reconstructing.result()
    scores = json.loads((toy.path("evaluator") / "scores.json").read_text(encoding="utf-8"))["through_vae"]
    return {
        "background": float(right[0]),
        "color": float(right[1]),
        "class": float(right[2]),
        "evaluator_background": scores["background"],
        "evaluator_color": scores["color"],
        "evaluator_class": scores["kind"],
        "vae_psnr": psnr,
        "sam_point_iou": float(point),
        "persam_f_miou": float(persam_f),
        "memory_miou": float(memory),
    }


def prompted(folder: Path, part: int) -> np.ndarray:
    """Paints a part of the held-out prompts: whether background, color and class are as told, bool (pictures, 3)."""
    import torch

    from persam_dreambooth.dreambooth.families.registry import fast_sampler, load_pipeline
    from persam_dreambooth.toy import scenes
    from persam_dreambooth.toy.evaluator import Evaluator

    combinations = [
        (kind, color, background)
        for kind in world.KINDS
        for color in world.COLORS
        for background in world.BACKGROUNDS
        if scenes.held_out(kind, color, background)
    ]
    numbers = range(part, PICTURES, PARTS)
    chosen = [combinations[number % len(combinations)] for number in numbers]
    pipeline = fast_sampler(load_pipeline(str(folder)))
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(scenes.HELD_OUT_SEED + number) for number in numbers]
    with _bfloat16():
        generated = pipeline([world.describe(*one) for one in chosen], generator=generators, **SAMPLING).images
    seen = Evaluator.load(toy.path("evaluator")).judge(generated)
    kinds, colors, backgrounds = (np.array(column) for column in zip(*chosen, strict=True))
    return np.stack([seen["background"] == backgrounds, seen["color"] == colors, seen["kind"] == kinds], axis=1)


def vae(folder: Path) -> float:
    """Encodes and decodes held-out renders: PSNR in dB."""
    from diffusers import AutoencoderKL

    from tools.toy.train_vae import score

    return score(AutoencoderKL.from_pretrained(folder / "vae"), VAE_SCENES)["psnr"]


def segmented(folder: Path, images: int, part: int) -> np.ndarray:
    """Segments a part of the PerSeg-shaped set, from a random point and with PerSAM-F: mean IoUs, (objects, 2).

    The IoU of a point is the mean over an object's images, that of PerSAM-F is pooled over them.
    """
    from PIL import Image

    from persam_dreambooth.segmentation import PerSAMF, open_sam
    from persam_dreambooth.segmentation.sams.sam import Encoding
    from persam_dreambooth.toy import scenes
    from tools.toy.fused_attention import fuse_attention

    sam = open_sam(str(folder))
    fuse_attention(sam.model.vision_encoder)

    def encode(image: Image.Image) -> Encoding:
        with _bfloat16():
            encoding = sam.encode(image)
        return replace(encoding, embedding=encoding.embedding.float())

    figures = []
    for number, reference, others in rendered(images, part):
        persam = PerSAMF(sam).fit(encode(reference.image), reference.mask)
        rng = np.random.default_rng([scenes.HELD_OUT_SEED, 7, number])
        from_points, found = [], []
        for other in others:
            encoding = encode(other.image)
            rows, columns = np.nonzero(other.mask)
            pick = rng.integers(len(rows))
            logits, scores = sam.decode(encoding, np.array([[columns[pick], rows[pick]]]), np.array([1]))
            from_point = sam.upscale(logits, encoding)[int(scores.argmax())].cpu().numpy() > 0
            from_points.append((from_point & other.mask).sum() / (from_point | other.mask).sum())
            found.append(persam.predict(encoding).mask)
        figures.append([np.mean(from_points), pooled_iou(found, others)])
    return np.array(figures)


def remembered(folder: Path, images: int, part: int) -> np.ndarray:
    """Segments a part of the PerSeg-shaped set by SAM 2's memory: IoU pooled over an object's images, (objects,)."""
    from persam_dreambooth.segmentation import MemorySegmenter, open_sam

    sam = open_sam(str(folder))
    figures = []
    for _, reference, others in rendered(images, part):
        segmenter = MemorySegmenter(sam).fit(reference.image, reference.mask)
        figures.append(pooled_iou([segmenter.predict(other.image).mask for other in others], others))
    return np.array(figures)


def rendered(images: int, part: int) -> Iterator[tuple[int, world.Render, list[world.Render]]]:
    """A part of the PerSeg-shaped set: an object's number, its reference and its other images."""
    from persam_dreambooth.toy.rendered_perseg import IMAGE_SIDE, objects

    for number, item in list(enumerate(objects()))[part::PARTS]:
        # A single image is the first, with other objects, or the second, without: all kinds have both.
        first = 1 + number // len(world.KINDS) % 2 if images == 1 else 1
        reference, *others = (
            world.render(scene, IMAGE_SIDE) for scene in (item.scenes[0], *item.scenes[first:][:images])
        )
        yield number, reference, others


def pooled_iou(found: list[np.ndarray], truth: list[world.Render]) -> float:
    """The IoU of masks (H, W), pooled over images."""
    common = sum((mask & other.mask).sum() for mask, other in zip(found, truth, strict=True))
    union = sum((mask | other.mask).sum() for mask, other in zip(found, truth, strict=True))
    return float(common / (union + 1e-10))


def _bfloat16() -> AbstractContextManager[object]:
    """A block in bfloat16, where the processor knows it."""
    import torch

    known: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # since torch 2.10
    return torch.autocast("cpu", torch.bfloat16, enabled=bool(known.get("avx512_bf16")))


def _one_thread() -> None:
    os.environ["TQDM_DISABLE"] = "1"  # read when it is imported
    import torch

    torch.set_num_threads(1)


def main(arguments: list[str] | None = None) -> int:
    """Prints the figures; returns 0 if all reach their bars, else 1."""
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m tools.toy.check", description=summary)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--stable_diffusion", type=Path, default=toy.path("stable-diffusion"), help="another pipeline")
    parser.add_argument("--sam", type=Path, default=toy.path("sam"), help="another SAM")
    parser.add_argument("--sam2", type=Path, default=toy.path("sam2"), help="another SAM 2")
    parser.add_argument(
        "--images", type=int, default=PERSEG_IMAGES, help="images of each PerSeg-shaped object (1 to 6)"
    )
    options = parser.parse_args(arguments)
    started = time.monotonic()
    try:
        figures = check(options.stable_diffusion, options.sam, options.sam2, options.images)
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
