"""The step Pictures: prompts, pictures of each run, masked beside plain, and what can be taken away from a run."""

from __future__ import annotations

import html
import re
import shlex
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from persam_dreambooth.app.desk import Desk, PageStep, on_form, told
from persam_dreambooth.app.run_command import read_form, write_form
from persam_dreambooth.app.steps.train import hands_out, is_plain, job_line, resume_words
from persam_dreambooth.app.subject_folder import SubjectFolder
from persam_dreambooth.dreambooth.generate import GENERATED, GenerateOptions
from persam_dreambooth.dreambooth.run_folder import MODEL_CARD
from persam_dreambooth.dreambooth.samples import read_settings
from persam_dreambooth.errors import InputError, counted
from persam_dreambooth.extras import gradio as gr
from persam_dreambooth.options import command_words

MODEL = re.compile(r", Model: .*?, Model hash: \w+")
"""What differs between the settings of two runs' pictures."""

FORM_DEFAULTS: dict[str, Any] = {
    "prompts": "",
    "runs": None,
    "num_images": 4,
    "seed": 0,
    "num_inference_steps": 30,
    "width": None,
    "height": None,
}
"""What the form says at first; without a choice, all finished runs are chosen."""


def pictures_step(desk: Desk, subject: gr.State) -> PageStep:
    """Builds the step; see `PageStep`."""
    status = gr.HTML(elem_id="status-pictures")
    prompts = gr.Textbox(label="Prompts", info="One a line; [V] is the subject", lines=3, elem_id="pictures-prompts")
    runs = gr.CheckboxGroup([], label="Runs", elem_id="pictures-runs")
    with gr.Row():
        number = _number("Pictures of each prompt", 1, "pictures-number")
        seed = _number("First seed", 0, "pictures-seed")
        steps = _number("Denoising steps", 1, "pictures-steps")
        width = _number("Width", None, "pictures-width")
        height = _number("Height", None, "pictures-height")
    command = gr.Textbox(
        label="Command", lines=2, max_lines=8, interactive=False, buttons=["copy"], elem_id="command-pictures"
    )
    start = gr.Button("Generate", variant="primary", elem_id="pictures-start")
    progress = gr.HTML(elem_id="pictures-progress")
    beside = gr.Gallery(
        label="Masked beside plain",
        columns=2,
        height="auto",
        object_fit="contain",
        visible=False,
        elem_id="pictures-beside",
    )
    every = gr.Gallery(
        label="All pictures, newest first",
        columns=4,
        height="auto",
        object_fit="contain",
        visible=False,
        elem_id="pictures-all",
    )
    downloads = gr.HTML(elem_id="pictures-downloads")
    with gr.Row():
        export = gr.Button("Export for ComfyUI", size="sm", min_width=120, elem_id="pictures-export")
        upload = gr.Button("Upload to the hub", size="sm", min_width=120, elem_id="pictures-upload")
    repository = gr.Textbox(
        label="Repository",
        info="It is private; empty: the run's name",
        placeholder="me/cat",
        elem_id="pictures-repository",
    )

    def requests(name: str) -> list[GenerateOptions]:
        """A request for each prompt and run."""
        folder = desk.subject(name)
        said = form_of(folder)
        chosen = [run for run in finished(folder) if run.name in said["runs"]]
        given: dict[str, Any] = {option: int(said[option] or 0) for option in ("num_images", "seed")}
        given["num_inference_steps"] = int(said["num_inference_steps"] or 0)
        given |= {option: int(said[option]) if said[option] else None for option in ("width", "height")}
        texts = [line.strip() for line in said["prompts"].splitlines() if line.strip()]
        return [GenerateOptions(prompt=text, model=str(run), **given) for text in texts for run in chosen]

    def commands_of(name: str) -> str:
        return "\n".join(shlex.join(command_words("generate", each, "prompt")) for each in requests(name))

    def keep(name: str, *values: Any) -> None:
        """Saves what the form says; all runs chosen is no choice, so that a new one is chosen too."""
        folder = desk.subject(name)
        said = dict(zip(FORM_DEFAULTS, values, strict=True))
        if set(said["runs"] or ()) >= {run.name for run in finished(folder)}:
            said["runs"] = None
        if said != {option: form_of(folder, all_runs=False)[option] for option in said}:
            write_form(folder, **said)

    def changed(name: str, *values: Any) -> list[str]:
        if not name:
            return ["", ""]
        keep(name, *values)
        return ["", commands_of(name)]

    def live(name: str) -> list[Any]:
        if not name:
            return [gr.skip()] * len(live_outputs)
        folder = desk.subject(name)
        done = finished(folder)
        pairs = side_by_side(done)
        found = sorted(
            (path for run in done for path in (run / GENERATED).glob("*.png")),
            key=lambda path: path.stat().st_mtime,
            reverse=True,
        )
        own = [job for job in desk.jobs.of(folder) if job.words[:1] == ["generate"] or hands_out(job)]
        lines = [job_line(job) for job in own if job.is_alive] or [job_line(job) for job in own[-1:]]
        return [
            "".join(lines),
            gr.update(value=pairs, visible=bool(pairs)),
            gr.update(value=[(str(path), _caption(path)) for path in found], visible=bool(found)),
            links(done),
        ]

    def shown(name: str) -> list[Any]:
        if not name:
            return [gr.skip()] * len(outputs)
        folder = desk.subject(name)
        said = form_of(folder)
        choices = gr.update(choices=[run.name for run in finished(folder)], value=said.pop("runs"))
        return [said.pop("prompts"), choices, *said.values(), commands_of(name), *live(name)]

    def begin(name: str, *values: Any) -> str:
        keep(name, *values)
        made = requests(name)
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

    def export_runs(name: str, chosen: list[str]) -> str:
        return hand_out(name, chosen, "--export", "kohya")

    def send(name: str, chosen: list[str], place: str) -> str:
        from persam_dreambooth.dreambooth.hub import check_login

        if len(chosen) != 1:
            raise InputError("a repository holds one run: choose one")
        check_login()
        return hand_out(
            name, chosen, "--push_to_hub", *(["--hub_model_id", place.strip()] if (place or "").strip() else [])
        )

    live_outputs = (progress, beside, every, downloads)
    form = [prompts, runs, number, seed, steps, width, height]
    outputs = [*form, command, *live_outputs]

    step = PageStep(shown, outputs, live, live_outputs)
    gr.on(  # one event for all fields: with one for each, an answer to an earlier field could come last
        [part.input for part in form], told(changed, status), [subject, *form], [status, command],
        api_visibility="private", show_progress="hidden", trigger_mode="always_last",
    )  # fmt: skip
    on_form(start.click, begin, [subject, *form], status, step)
    on_form(export.click, export_runs, [subject, runs], status, step)
    on_form(upload.click, send, [subject, runs, repository], status, step)
    return step


def _number(label: str, least: int | None, name: str) -> gr.Number:
    """A whole number of the form; without a least one, it may be empty, for the model's own."""
    return gr.Number(label=label, precision=0, minimum=least, placeholder="model's own", min_width=120, elem_id=name)


def finished(folder: SubjectFolder) -> list[Path]:
    """The finished runs of a subject, the masked ones first."""
    done = [run for run in folder.runs.values() if (run / MODEL_CARD).is_file()]
    return sorted(done, key=is_plain)


def form_of(folder: SubjectFolder, all_runs: bool = True) -> dict[str, Any]:
    """What the form says; without a choice of runs, the finished ones are chosen, or None if not `all_runs`."""
    saved = read_form(folder)
    said = {option: saved.get(option, default) for option, default in FORM_DEFAULTS.items()}
    if all_runs:
        done = [run.name for run in finished(folder)]
        said["runs"] = done if said["runs"] is None else [name for name in said["runs"] if name in done]
    return said


def _caption(path: Path) -> str:
    """The run, prompt and seed of a picture, from its own settings."""
    settings = settings_of(path)
    prompt, seed = settings.split("\nNegative prompt: ")[0].rpartition("\nSteps: ")[0], settings.rpartition("Seed: ")[2]
    prompt = prompt or settings.split("\n")[0]
    return f"{path.parent.parent.name}: {prompt}, seed {seed}" if settings else path.name


def settings_of(path: Path) -> str:
    """The settings of a picture, which are read once."""
    return _read_settings(path, path.stat().st_mtime_ns)


@lru_cache(4096)
def _read_settings(path: Path, time: int) -> str:
    """The settings of a picture of a time."""
    return read_settings(path)


def side_by_side(runs: list[Path]) -> list[tuple[str, str]]:
    """Pictures of the same settings and seeds, of the newest masked run and the newest plain one in turn."""
    newest = {is_plain(run): run for run in runs}
    if len(newest) < 2:
        return []
    of_run = [
        {MODEL.sub("", settings_of(path)): path for path in sorted((newest[plain] / GENERATED).glob("*.png"))}
        for plain in (False, True)
    ]
    both = [key for key in of_run[0] if key and key in of_run[1]]
    return [(str(own[key]), _caption(own[key])) for key in both for own in of_run]


def links(runs: list[Path]) -> str:
    """Links to the files of runs that can be downloaded, as HTML."""
    if not runs:
        return ""
    from persam_dreambooth.dreambooth.families.latent_diffusion import LORA_WEIGHTS
    from persam_dreambooth.dreambooth.kohya import FILE

    offered = {LORA_WEIGHTS: "LoRA", FILE: "LoRA for ComfyUI and A1111", "report.html": "report"}
    rows = [
        f'<li><a download href="gradio_api/file={quote(str((run / name).resolve()))}">'
        f"{html.escape(f'{run.name}: {what} ({name})')}</a></li>"
        for run in runs
        for name, what in offered.items()
        if (run / name).is_file()
    ]
    return f"<p>Download</p><ul>{''.join(rows)}</ul>" if rows else ""
