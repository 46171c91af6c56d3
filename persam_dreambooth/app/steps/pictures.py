"""The step Pictures: prompts, pictures of each run, masked beside plain, and what can be taken away from a run."""

from __future__ import annotations

import html
import re
import shlex
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr

from persam_dreambooth.app.desk import Desk, PageStep
from persam_dreambooth.app.option_editor import saying
from persam_dreambooth.app.steps.train import is_plain, resume_words
from persam_dreambooth.dreambooth.families.latent_diffusion import LORA_WEIGHTS
from persam_dreambooth.dreambooth.generate import GENERATED, GenerateOptions
from persam_dreambooth.dreambooth.kohya import FILE
from persam_dreambooth.dreambooth.run_folder import MODEL_CARD
from persam_dreambooth.dreambooth.samples import read_settings
from persam_dreambooth.errors import InputError, counted
from persam_dreambooth.options import command_words

FILES = {LORA_WEIGHTS: "LoRA", FILE: "LoRA for ComfyUI and A1111", "report.html": "report"}
"""The files of a run that the page offers, in words."""

MODEL = re.compile(r", Model: .*?, Model hash: \w+")
"""What differs between the settings of two runs' pictures."""


def pictures_step(desk: Desk, subject: gr.State) -> PageStep:
    """Builds the step; see `Step`."""
    status = gr.HTML(elem_id="status-pictures")
    prompts = gr.Textbox(label="Prompts", info="One a line; [V] is the subject", lines=3, elem_id="pictures-prompts")
    with gr.Row():
        runs = gr.CheckboxGroup([], label="Runs", elem_id="pictures-runs")
        number = gr.Number(4, label="Pictures of each prompt", precision=0, minimum=1, elem_id="pictures-number")
        seed = gr.Number(0, label="First seed", precision=0, minimum=0, elem_id="pictures-seed")
        steps = gr.Number(30, label="Denoising steps", precision=0, minimum=1, elem_id="pictures-steps")
    with gr.Row():
        width = gr.Number(None, label="Width", info="Empty: the model's own", precision=0, elem_id="pictures-width")
        height = gr.Number(None, label="Height", info="Empty: the model's own", precision=0, elem_id="pictures-height")
    command = gr.Textbox(label="Command", lines=2, max_lines=8, buttons=["copy"], elem_id="command-pictures")
    start = gr.Button("Generate", variant="primary", elem_id="pictures-start")
    beside = gr.Gallery(label="Masked beside plain", columns=2, height="auto", visible=False, elem_id="pictures-beside")
    every = gr.Gallery(label="All pictures, newest first", columns=4, height="auto", elem_id="pictures-all")
    downloads = gr.HTML(elem_id="pictures-downloads")
    with gr.Row():
        export = gr.Button("Export for ComfyUI", size="sm", elem_id="pictures-export")
        repository = gr.Textbox(label="Private repository", placeholder="me/cat", elem_id="pictures-repository")
        upload = gr.Button("Upload to the hub", size="sm", elem_id="pictures-upload")

    def requests(name: str, *values: Any) -> list[GenerateOptions]:
        """A request for each prompt and run."""
        said, chosen, count, first, denoising, wide, high = values
        sizes = {"width": int(wide) if wide else None, "height": int(high) if high else None}
        counts = {"num_images": int(count or 0), "seed": int(first or 0), "num_inference_steps": int(denoising or 0)}
        places = desk.subject(name).runs
        texts = [line.strip() for line in (said or "").splitlines() if line.strip()]
        return [
            GenerateOptions(prompt=text, model=str(places[run]), **counts, **sizes) for text in texts for run in chosen
        ]

    def told(name: str, *values: Any) -> str:
        """The commands of the form."""
        made = requests(name, *values) if name else []
        return "\n".join(shlex.join(command_words("generate", each, "prompt")) for each in made)

    def live(name: str) -> list[Any]:
        if not name:
            return [gr.skip()] * 3
        folder = desk.subject(name)
        pairs = side_by_side(finished(folder))
        found = sorted(
            (path for run in finished(folder) for path in (run / GENERATED).glob("*.png")),
            key=lambda path: path.stat().st_mtime,
            reverse=True,
        )
        return [
            gr.update(value=pairs, visible=bool(pairs)),
            [(str(path), caption(path)) for path in found],
            links(finished(folder)),
        ]

    def shown(name: str) -> list[Any]:
        if not name:
            return [gr.skip()] * len(outputs)
        names = [run.name for run in finished(desk.subject(name))]
        return [gr.update(choices=names, value=names), *live(name)]

    def begin(name: str, *values: Any) -> str:
        made = requests(name, *values)
        if not made:
            raise InputError("no prompt, or no finished run: write a prompt, and choose a run")
        for each in made:
            each.check()
        desk.release_sam()
        for each in made:
            desk.jobs.submit(desk.subject(name), command_words("generate", each, "prompt")[1:])
        return f"{counted(len(made), 'command')} started"

    def hand_out(name: str, chosen: list[str], *flags: str) -> str:
        """Resumes finished runs, which have nothing left to train, with options of what to do with them."""
        if not chosen:
            raise InputError("no run is chosen: choose one")
        folder = desk.subject(name)
        for run in chosen:
            desk.jobs.submit(folder, [*resume_words(folder.runs[run])[1:], *flags])
        return f"started: {shlex.join([*resume_words(folder.runs[chosen[-1]]), *flags])}"

    def send(name: str, chosen: list[str], place: str) -> str:
        if len(chosen) != 1:
            raise InputError("a repository holds one run: choose one")
        return hand_out(
            name, chosen, "--push_to_hub", *(["--hub_model_id", place.strip()] if (place or "").strip() else [])
        )

    live_outputs = (beside, every, downloads)
    outputs = [runs, *live_outputs]
    form = [prompts, runs, number, seed, steps, width, height]
    for part in form:
        part.change(told, [subject, *form], command, api_visibility="private", show_progress="hidden")
    start.click(saying(begin, shown), [subject, *form], [status, *outputs], api_visibility="private")
    export.click(
        saying(lambda name, chosen: hand_out(name, chosen, "--export", "kohya"), shown),
        [subject, runs],
        [status, *outputs],
        api_visibility="private",
    )
    upload.click(saying(send, shown), [subject, runs, repository], [status, *outputs], api_visibility="private")
    return PageStep(shown, outputs, live, live_outputs)


def finished(folder: Any) -> list[Path]:
    """The finished runs of a subject, the masked ones first."""
    done = [run for run in folder.runs.values() if (run / MODEL_CARD).is_file()]
    return sorted(done, key=is_plain)


def caption(path: Path) -> str:
    """The run, prompt and seed of a picture, from its own settings."""
    settings = read_settings(path)
    prompt, seed = settings.split("\nNegative prompt: ")[0].rpartition("\nSteps: ")[0], settings.rpartition("Seed: ")[2]
    prompt = prompt or settings.split("\n")[0]
    return f"{path.parent.parent.name}: {prompt}, seed {seed}" if settings else path.name


def side_by_side(runs: list[Path]) -> list[tuple[str, str]]:
    """Pictures of the same settings and seeds, of the newest masked run and the newest plain one in turn."""
    newest = {is_plain(run): run for run in runs}
    if len(newest) < 2:
        return []
    of_run = [
        {MODEL.sub("", read_settings(path)): path for path in sorted((newest[plain] / GENERATED).glob("*.png"))}
        for plain in (False, True)
    ]
    both = [key for key in of_run[0] if key and key in of_run[1]]
    return [(str(own[key]), caption(own[key])) for key in both for own in of_run]


def links(runs: list[Path]) -> str:
    """Links to the files of runs that can be downloaded, as HTML."""
    rows = [
        f'<li><a download href="gradio_api/file={quote(str((run / name).resolve()))}">{run.name}: {html.escape(what)} '
        f"({name})</a></li>"
        for run in runs
        for name, what in FILES.items()
        if (run / name).is_file()
    ]
    return f"<ul>{''.join(rows)}</ul>" if rows else ""
