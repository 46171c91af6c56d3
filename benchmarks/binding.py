"""Measures what training changes under each prompt, to show what binds a subject to its name.

    python -m benchmarks.binding [--steps 150] [--every 25]

It trains the toy Stable Diffusion on two subjects of the benchmark with several recipes. Every few steps it compares
the trained model with its base: the mean squared difference of their predictions under "a [V] cat", "a cat" and the
empty prompt, inside the masks of noisy photos. It writes `benchmarks/results/binding.json` and `binding.png`.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.nn.functional import interpolate

from benchmarks.measuring import RESULTS, record
from persam_dreambooth.dreambooth.pipelines import load_model
from persam_dreambooth.evaluation.benchmark_cells import BenchmarkCell, train_options
from persam_dreambooth.evaluation.benchmark_data import prepare_data
from persam_dreambooth.evaluation.benchmark_subjects import Personal, personal
from persam_dreambooth.evaluation.recipes import BASE, RECIPES
from persam_dreambooth.main_job import personalize
from persam_dreambooth.toy import world

SHOWN = ("plain", "masked-preserve", "bound-unet", "bound")
SUBJECTS = (0, 1)
NOISES = 8
"""Noise samples for each photo, with timesteps from 60 to 940."""


def probe(pipeline: Any, owner: Personal) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy latents (N, C, h, w) of a subject's photos, their timesteps (N,), and masks (N, 1, h, w)."""
    rendered = [world.render(scene, world.SIZE) for scene in owner.scenes]
    pixels = np.stack([np.asarray(photo.image, np.float32) for photo in rendered]) / 127.5 - 1
    latents = pipeline.vae.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2)).latent_dist.mean
    latents = (latents * pipeline.vae.config.scaling_factor).repeat_interleave(NOISES, dim=0)
    masks = torch.from_numpy(np.stack([photo.mask for photo in rendered])).float()[:, None]
    masks = interpolate(masks, latents.shape[-2:], mode="area").repeat_interleave(NOISES, dim=0)
    steps = torch.linspace(60, 940, NOISES).long().repeat(len(rendered))
    kept = pipeline.scheduler.alphas_cumprod[steps][:, None, None, None]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    return kept.sqrt() * latents + (1 - kept).sqrt() * noise, steps, masks


def predictions(pipeline: Any, noisy: torch.Tensor, steps: torch.Tensor, prompt: str) -> torch.Tensor:
    """The denoiser's predictions under a prompt, (N, C, h, w)."""
    tokens = pipeline.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
    text = pipeline.text_encoder(tokens)[0].expand(len(noisy), -1, -1)
    return pipeline.unet(noisy, steps, text).sample


@torch.no_grad()
def changes(base: Any, trained: Any, owner: Personal) -> dict[str, float]:
    """The mean squared difference of predictions inside the masks, under each kind of prompt."""
    noisy, steps, masks = probe(base, owner)
    kind = owner.subject.kind
    found = {}
    for name, prompt in (("a [V] X", f"a sks {kind}"), ("a X", f"a {kind}"), ("empty", "")):
        square = (predictions(trained, noisy, steps, prompt) - predictions(base, noisy, steps, prompt)) ** 2
        found[name] = float((masks * square).sum() / (square.shape[1] * masks.sum()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures what training changes under each prompt.")
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of a run")
    parser.add_argument("--every", type=int, default=25, help="steps between measurements")
    given = parser.parse_args()
    if given.every < 1 or given.steps % given.every:
        parser.error("--steps must be a multiple of --every")
    base, owners = load_model("toy"), [personal(number) for number in SUBJECTS]
    curves: dict[str, dict[str, list[float]]] = {}
    measured = list(range(given.every, given.steps + 1, given.every))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare_data(folder, owners, [RECIPES[name] for name in SHOWN])
        for name in SHOWN:
            each = []
            for owner in owners:
                run_dir = folder / f"{name}.{owner.name}"
                shared = {**BASE, "max_train_steps": measured[-1], "checkpointing_steps": given.every}
                personalize(train_options(BenchmarkCell(name, owner, 0), folder, run_dir, shared))
                models = [load_model(str(run_dir / f"checkpoint-{steps}")) for steps in measured]
                each.append([changes(base, model, owner) for model in models])
            curves[name] = {
                prompt: [0.0, *(float(np.mean([run[i][prompt] for run in each])) for i in range(len(measured)))]
                for prompt in each[0][0]
            }
    draw([0, *measured], curves, RESULTS / "binding.png")
    record("binding", {"what": "mean squared change of predictions", "steps": [0, *measured], "change": curves})


def draw(steps: list[int], curves: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Draws a panel for each recipe, with a line for each prompt, as a PNG."""
    figure = Figure(figsize=(4 * len(curves), 3.8), layout="constrained")
    panels = figure.subplots(1, len(curves), sharey=True)
    for axes, (name, lines) in zip(panels, curves.items(), strict=True):
        for (prompt, values), color in zip(lines.items(), ("#c2185b", "#1565c0", "#777777"), strict=True):
            axes.plot(steps, values, marker="o", markersize=3, color=color, label=prompt)
        axes.set(title=RECIPES[name].name, xlabel="steps")
        axes.title.set_fontsize(9)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("change of the prediction inside the mask")
    panels[0].legend()
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
