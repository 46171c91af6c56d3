"""The step Train: class word, model and card, any option of `train`, the plan of memory, and the runs as they train."""

from __future__ import annotations

import html
import re
import shlex
import statistics
from collections.abc import Container
from dataclasses import fields, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from persam_dreambooth.app.desk import Desk, PageStep, on_form, status_line, told
from persam_dreambooth.app.jobs import Job
from persam_dreambooth.app.option_editor import OptionEditor
from persam_dreambooth.app.run_command import (
    BASE_OPTION,
    TOY,
    card_recipes,
    chosen_card,
    nearest_recipe,
    options_of,
    read_form,
    recipe_for,
    run_options,
    suggested_recipe,
    with_recipe,
    write_form,
)
from persam_dreambooth.app.subject_folder import SubjectFolder
from persam_dreambooth.dreambooth.albums import read_albums
from persam_dreambooth.dreambooth.run_folder import MODEL_CARD, check_run_folder
from persam_dreambooth.dreambooth.samples import SAMPLES
from persam_dreambooth.errors import InputError, counted
from persam_dreambooth.extras import gradio as gr
from persam_dreambooth.main_job import TrainOptions
from persam_dreambooth.options import CONFIG, command_words, read_config
from persam_dreambooth.plan import CARDS, PlanOptions, plan
from persam_dreambooth.segmentation.segment import doubts

MASKED, PLAIN = "masked", "plain"
"""The folders of a subject's runs; later ones have a number."""

OWNED = (
    *("instance_dir", "mask_dir", "output_dir", "resume_from_checkpoint", "subjects", "class_name", "identifier"),
    *(
        BASE_OPTION,
        "max_train_steps",
        "dataset_name",
        "image_column",
        "caption_column",
        "mask",
        "mask_from",
        "unmasked",
    ),
    *("point", "box", "text", "reference_image", "other_mask", "invert_mask"),
)
"""Options that the page sets in other places."""

SMALL_PICTURES = """<style>
#train-samples .grid-container, #pictures-all .grid-container {
  grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)) !important; grid-auto-rows: auto !important }
</style>"""
"""As many pictures in a row as there is room for: Gradio makes few ones as wide as the page."""

BAR = re.compile(r"\|.*|\x1b\[\w")
"""What a line of a progress bar has after its percentage, and movements of the cursor."""

_plans: dict[str, str] = {}
"""Plans that were made, by their options."""

_seen: dict[Path, list[tuple[int, float]]] = {}
"""Steps of each run and the times of their lines in `metrics.jsonl`, as the page has seen them."""


def train_step(desk: Desk, subject: gr.State) -> PageStep:
    """Builds the step; see `PageStep`."""
    bases = {recipe.base: f"{recipe.model} ({recipe.base})" for recipe in card_recipes()}
    gr.HTML(SMALL_PICTURES, padding=False)
    status = gr.HTML(elem_id="status-train")
    photos = gr.Markdown(elem_id="train-photos")
    with gr.Row():
        class_word = gr.Textbox(label="Class word", info="What the subject is, such as cat", elem_id="train-class")
        identifier = gr.Textbox(
            label="Identifier", info="A rare word, [V] in prompts", placeholder="sks", elem_id="train-identifier"
        )
        steps = gr.Number(
            label="Steps", info="How long it trains", precision=0, minimum=1, min_width=120, elem_id="train-steps"
        )
    with gr.Row():
        base = gr.Dropdown(
            [(label, value) for value, label in bases.items()] + [("toy", TOY)],
            label="Base model",
            info="Or type a hub id or a folder",
            allow_custom_value=True,
            filterable=True,
            elem_id="train-base",
        )
        card = gr.Radio(
            [(f"{size} GB", size) for size in CARDS], label="Card", info="Chooses the recipe", elem_id="train-card"
        )
    also_plain = gr.Checkbox(label="Also train plain (unmasked) for comparison", elem_id="train-plain")
    with gr.Accordion("Advanced options", open=False, elem_id="train-advanced"):
        editor = OptionEditor(TrainOptions, OWNED, "train-options")
    with gr.Accordion("Memory and time", open=False):
        plan_button = gr.Button("Plan", size="sm", elem_id="train-plan-memory")
        planned = gr.Markdown(elem_id="train-planned")
    command = gr.Textbox(
        label="Command", lines=2, max_lines=8, interactive=False, buttons=["copy"], elem_id="command-train"
    )
    with gr.Row():
        start = gr.Button("Start", variant="primary", min_width=80, elem_id="train-start")
        stop = gr.Button("Stop", min_width=80, elem_id="train-stop", interactive=False)
        resume = gr.Button("Resume", min_width=80, elem_id="train-resume", interactive=False)
    progress = gr.HTML(elem_id="train-progress")
    curve = gr.LinePlot(x="step", y="loss", color="run", height=240, label="Loss", visible=False, elem_id="train-loss")
    samples = gr.Gallery(
        label="Samples", columns=4, height="auto", object_fit="contain", visible=False, elem_id="train-samples"
    )

    def opened(name: str) -> tuple[SubjectFolder, TrainOptions, str | None]:
        """The subject, its options and their recipe; before a model is chosen, those of a recipe are suggested."""
        folder = desk.subject(name)
        options, own = folder.options(), folder.own_options()
        suggested = suggested_recipe(desk.base) if BASE_OPTION not in own else None
        if suggested:
            new = {
                option: value for option, value in with_recipe(options, None, suggested).items() if option not in own
            }
            options = replace(options, **new)
        return folder, options, nearest_recipe(options)

    def keep(name: str, values: tuple[Any, ...], **changed: Any) -> None:
        """Saves what the form says, further options by name, and the recipe that was suggested."""
        folder, options, _ = opened(name)
        word, token, count = values
        form = {"class_name": (word or "").strip() or None, "identifier": (token or "").strip() or None}
        form["max_train_steps"] = int(count) if count else None
        saved = folder.options()
        new = {one.name: getattr(options, one.name) for one in fields(options)}
        new = {option: value for option, value in new.items() if value != getattr(saved, option)}
        if new:
            new[BASE_OPTION] = options.pretrained_model_name_or_path
        new |= {option: value for option, value in form.items() if value != getattr(options, option)}
        for option, value in changed.items():
            default = TrainOptions.__dataclass_fields__[option].default
            new[option] = default if value is None and desk.base.given(option) else value
        if new:
            folder.save_options(**new)

    def planned_runs(folder: SubjectFolder, options: TrainOptions) -> list[TrainOptions]:
        """The options of the runs that Start begins."""
        taken = {output_of(job) for job in training_jobs(desk, folder) if job.is_alive}
        kinds = [MASKED, PLAIN] if read_form(folder).get("also_plain") else [MASKED]
        return [
            run_options(options, kind == PLAIN, folder.masks_dir, free_folder(folder.folder / kind, taken))
            for kind in kinds
        ]

    def shown(name: str) -> list[Any]:
        if not name:
            return [gr.skip()] * len(outputs)
        folder, options, recipe = opened(name)
        form = read_form(folder)
        own = options_of(recipe) if recipe else {}
        changed = {name: value for name, value in options.all_given.items() if own.get(name) != value}
        changed |= {name: getattr(options, name) for name in own if own[name] != getattr(options, name)}
        return [
            mask_counts(folder, options),
            options.class_name or "",
            options.identifier or "",
            options.max_train_steps,
            options.pretrained_model_name_or_path,
            gr.update(value=chosen_card(recipe, form.get("card")), visible=recipe != TOY),
            bool(form.get("also_plain")),
            editor.rows(changed),
            commands(planned_runs(folder, options)),
            *live(name),
        ]

    def live(name: str) -> list[Any]:
        if not name:
            return [gr.skip()] * len(live_outputs)
        folder = desk.subject(name)
        shown_runs = newest_runs(folder)
        jobs = training_jobs(desk, folder)
        active = any(job.is_alive for job in jobs)
        rows = [[row["step"], row["loss"], run.name] for run in shown_runs for row in metrics(run)]
        pictures = [found for run in shown_runs for found in run_samples(run)]
        lines = [progress_line(folder, run) for run in shown_runs]
        lines += [job_line(job) for job in jobs if job.is_alive] or [job_line(job) for job in jobs[-1:]]
        left = [] if active else left_to_do(desk, folder)
        if left:
            lines.append(
                "<p>To go on:</p>" + "".join(f"<p><code>{html.escape(shlex.join(one))}</code></p>" for one in left)
            )
        again = bool(left) and not any(has_checkpoint(run) for run in shown_runs if is_unfinished(folder, run))
        return [
            "".join(lines),
            gr.update(value=frame(rows), visible=bool(rows)),
            gr.update(value=pictures, visible=bool(pictures)),
            gr.update(interactive=not active),
            gr.update(interactive=active),
            gr.update(interactive=bool(left), value="Start again" if again else "Resume"),
        ]

    def changed_text(name: str, *values: Any) -> str:
        keep(name, values)
        return ""

    def changed_plain(name: str, also_plain: bool) -> str:
        write_form(desk.subject(name), also_plain=also_plain)
        return ""

    def changed_base(name: str, word: str, token: str, count: Any, chosen: str, size: int | None) -> str:
        _, options, recipe = opened(name)
        chosen = (chosen or "").strip()
        if not chosen or chosen == options.pretrained_model_name_or_path:
            return ""
        known = [r for r in card_recipes() if r.base == chosen]
        if not known and chosen != TOY:
            keep(name, (word, token, count), **{BASE_OPTION: chosen})
            return ""
        if chosen == TOY:
            new = TOY
        else:
            new = recipe_for(chosen, size or CARDS[-1]).name if size and known[0].card <= size else known[0].name
        changed = with_recipe(options, recipe, new)
        keep(name, (word, token, options.max_train_steps), **{**changed, BASE_OPTION: chosen})
        return ""

    def changed_card(name: str, word: str, token: str, count: Any, size: int | None) -> str:
        folder, options, recipe = opened(name)
        size = size or CARDS[0]
        new = recipe_for(options.pretrained_model_name_or_path, size).name
        write_form(folder, card=size)
        if new == recipe:
            keep(name, (word, token, count))
            return f"{new} is the recipe for this card, too"
        keep(name, (word, token, options.max_train_steps), **with_recipe(options, recipe, new))
        return ""

    def set_option(name: str, word: str, token: str, count: Any, *chosen: Any) -> str:
        folder, options, _ = opened(name)
        option, value = editor.value(*chosen)
        others = {option: value}
        run_options(options, False, folder.masks_dir, folder.folder / MASKED, **others).check()
        keep(name, (word, token, count), **others)
        return f"--{option} is set"

    def remove_option(name: str, word: str, token: str, count: Any, option: str | None) -> str:
        _, _, recipe = opened(name)
        if not option:
            raise InputError("no option is chosen: choose a row of the table")
        own = options_of(recipe) if recipe else {}
        keep(name, (word, token, count), **{option: own.get(option)})
        return f"--{option} is as in {recipe}" if option in own else f"--{option} is removed"

    def plan_memory(name: str) -> list[str]:
        folder, options, _ = opened(name)
        run = run_options(options, False, folder.masks_dir, folder.folder / MASKED)
        return ["", f"```\n{planned_memory(repr(run), run)}\n```\n{planned_time(folder, options)}"]

    def begin(name: str, *values: Any) -> str:
        keep(name, values)
        folder, options, _ = opened(name)
        runs = planned_runs(folder, options)
        for run in runs:
            run.check()
            check_run_folder(run)
            read_albums(run)
        desk.release_sam()
        for run in runs:
            desk.jobs.submit(folder, words_of(run)[1:])
        return f"{counted(len(runs), 'training')} started"

    def end(name: str) -> str:
        active = [job for job in training_jobs(desk, desk.subject(name)) if job.is_alive]
        if not active:
            raise InputError("no training that the page started runs: stop one of a terminal there, with Ctrl-C")
        for job in reversed(active):  # so that none begins when the one before it ends
            job.stop()
        return "stopping after this step; a checkpoint is saved"

    def go_on(name: str) -> str:
        folder = desk.subject(name)
        left = left_to_do(desk, folder)
        if not left:
            raise InputError("no training of this subject can be resumed: start one")
        desk.release_sam()
        for words in left:
            desk.jobs.submit(folder, words[1:])
        return f"{counted(len(left), 'training')} resumed"

    live_outputs = (progress, curve, samples, start, stop, resume)
    outputs = [photos, class_word, identifier, steps, base, card, also_plain, editor.table, command, *live_outputs]
    form = [subject, class_word, identifier, steps]

    step = PageStep(shown, outputs, live, live_outputs)
    for text in (class_word, identifier):
        on_form(text.blur, changed_text, form, status, step)
        on_form(text.submit, changed_text, form, status, step)
    on_form(steps.blur, changed_text, form, status, step)
    on_form(also_plain.input, changed_plain, [subject, also_plain], status, step)
    on_form(base.input, changed_base, [*form, base, card], status, step)
    on_form(card.input, changed_card, [*form, card], status, step)
    on_form(editor.set.click, set_option, [*form, *editor.inputs], status, step)
    on_form(editor.remove.click, remove_option, [*form, editor.option], status, step)
    on_form(start.click, begin, form, status, step)
    on_form(stop.click, end, [subject], status, step)
    on_form(resume.click, go_on, [subject], status, step)
    plan_button.click(told(plan_memory, status), [subject], [status, planned], api_visibility="private")
    return step


def words_of(run: TrainOptions) -> list[str]:
    """The command of a run."""
    return command_words("train", run, recipe=nearest_recipe(run))


def commands(runs: list[TrainOptions]) -> str:
    """The commands of runs, one a line."""
    return "\n".join(shlex.join(words_of(run)) for run in runs)


def resume_words(run: Path) -> list[str]:
    """The command that resumes a run."""
    config = str(run / CONFIG)
    return ["persam-dreambooth", "train", "--config", config, "--resume_from_checkpoint", "latest"]


def output_of(job: Job) -> Path | None:
    """The folder of a training's run, if its words name it."""
    return Path(job.words[job.words.index("--output_dir") + 1]) if "--output_dir" in job.words else None


def free_folder(folder: Path, taken: Container[Path | None]) -> Path:
    """The folder, or with the first number for which there is none, and which no waiting job takes."""
    number, free = 2, folder
    while free.exists() or free in taken:
        free, number = folder.with_name(f"{folder.name}-{number}"), number + 1
    return free


def mask_counts(folder: SubjectFolder, options: TrainOptions) -> str:
    """How many photos and masks there are, and how many of the masks are doubtful."""
    try:
        photos, masks = folder.photos(), folder.masks()
    except InputError as error:
        return str(error)
    doubtful = sum(bool(doubts(item.record.flags, options.absent)) for item in masks)
    return ", ".join([counted(len(photos), "photo"), counted(len(masks), "mask"), f"{doubtful} doubtful"])


def is_plain(run: Path) -> bool:
    """Whether a run trains on whole photos."""
    return bool(config_of(run).get("unmasked"))


def config_of(run: Path) -> dict[str, Any]:
    """The saved options of a run; empty before it has some."""
    try:
        return _read_config(run / CONFIG, (run / CONFIG).stat().st_mtime_ns)
    except FileNotFoundError:
        return {}


@lru_cache(64)
def _read_config(path: Path, time: int) -> dict[str, Any]:
    """The options in a file of a time."""
    return read_config(path)


def newest_runs(folder: SubjectFolder) -> list[Path]:
    """The newest masked run of a subject and its newest plain one, as far as they have begun."""
    newest = {is_plain(run): run for run in folder.runs.values()}
    return [newest[plain] for plain in (False, True) if plain in newest]


def training_jobs(desk: Desk, folder: SubjectFolder) -> list[Job]:
    """The trainings of a subject that the page started, the newest last."""
    return [job for job in desk.jobs.of(folder) if job.words[:1] == ["train"] and not hands_out(job)]


def hands_out(job: Job) -> bool:
    """Whether a job resumes a finished run only to export or upload its weights."""
    return "--resume_from_checkpoint" in job.words and bool({"--export", "--push_to_hub"} & set(job.words))


def is_unfinished(folder: SubjectFolder, run: Path) -> bool:
    """Whether a run is unfinished and no process trains it."""
    return not (run / MODEL_CARD).is_file() and not folder.is_busy(run)


def has_checkpoint(run: Path) -> bool:
    """Whether a run that ended can go on where it was; else it begins again."""
    from persam_dreambooth.training.checkpoint import list_checkpoints

    return bool(list_checkpoints(run))


def left_to_do(desk: Desk, folder: SubjectFolder) -> list[list[str]]:
    """The commands that finish what was stopped: of runs that have begun, and of jobs that ended before they had."""
    left = {run: resume_words(run) for run in newest_runs(folder) if is_unfinished(folder, run)}
    for job in training_jobs(desk, folder)[-2:]:  # a masked run and a plain one
        run = output_of(job) or folder.folder
        if job.state in ("stopped", "killed") and not run.exists():
            left[run] = ["persam-dreambooth", *job.words]
    return list(left.values())


def metrics(run: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics; notes when they were written."""
    from persam_dreambooth.training.meter import METRICS

    try:
        state = (run / METRICS).stat()
    except FileNotFoundError:
        return []
    rows = _read_metrics(run, state.st_mtime_ns, state.st_size)
    if rows:
        mark = (int(rows[-1]["step"]), state.st_mtime)
        marks = _seen.setdefault(run, [])
        if mark not in marks[-1:]:
            marks.append(mark)
    return rows


@lru_cache(16)
def _read_metrics(run: Path, time: int, size: int) -> list[dict[str, float]]:
    """The lines of a run's metrics of a time and a size."""
    from persam_dreambooth.training.meter import metrics_rows

    return metrics_rows(run)


def seconds_per_step(run: Path) -> float | None:
    """The median seconds of a step, samples included, from the times of checkpoints, samples and metrics; or None."""
    metrics(run)
    files = [*run.glob("checkpoint-*"), *(run / SAMPLES).glob("step-*")]
    numbers = [(path.name.rpartition("-")[2], path) for path in files]
    marks = sorted([(int(n), path.stat().st_mtime) for n, path in numbers if n.isdigit()] + _seen.get(run, []))
    pace = [
        (later[1] - earlier[1]) / (later[0] - earlier[0])
        for earlier, later in pairwise(marks)
        if later[0] > earlier[0] and later[1] > earlier[1]
    ]
    return statistics.median(pace) if pace else None


def progress_line(folder: SubjectFolder, run: Path) -> str:
    """A run's progress as HTML: steps, loss, pace and time left."""
    rows, config = metrics(run), config_of(run)
    total = int(config.get("max_train_steps") or 0)
    step = int(rows[-1]["step"]) if rows else 0
    done, busy = (run / MODEL_CARD).is_file(), folder.is_busy(run)
    state = "training" if busy else "finished" if done else "stopped"
    told = [f"{run.name}: {state}, step {step} of {total}"]
    told += [f"loss {rows[-1]['loss']:.4f}"] if rows else []
    pace = seconds_per_step(run)
    if busy and not done:
        left = "time left unknown before the first steps" if pace is None else f"{duration(pace * (total - step))} left"
        told += [f"{pace:.2g} s per step", left] if pace else [left]
    label = html.escape(", ".join(told))
    return (
        f'<p style="margin: 0.5em 0 0">{label}</p><progress max="{max(total, 1)}" value="{step}" '
        f'style="width: 100%; accent-color: var(--color-accent)" aria-label="{label}"></progress>'
    )


def job_line(job: Job) -> str:
    """The state of a job as HTML: what it does, or its error; empty if it ended well."""
    if job.state == "failed":
        return status_line(job.message, failed=True)
    if job.state == "done":
        return ""
    output, now = output_of(job), BAR.sub("", job.message)
    name = output.name if output else job.words[0]
    lines = [f"{name}: {job.state}", now.strip()]
    return f'<p style="overflow-wrap: anywhere">{html.escape(", ".join(filter(None, lines)))}</p>'


def run_samples(run: Path) -> list[tuple[str, str]]:
    """The samples of a run with captions, the newest first."""
    folder, rows = run / SAMPLES, metrics(run)
    steps = {int(path.name.removeprefix("step-")): path for path in folder.glob("step-*")}
    last = {int(rows[-1]["step"]): folder} if rows else {}
    found = [(step, path) for step, own in ({**steps, **last}).items() for path in sorted(own.glob("*.png"))]
    return [(str(path), f"{run.name}, step {step}") for step, path in sorted(found, reverse=True)]


def frame(rows: list[list[Any]]) -> Any:
    """The table of the loss curve."""
    import pandas as pd

    return pd.DataFrame(rows, columns=["step", "loss", "run"])


def planned_memory(key: str, run: TrainOptions) -> str:
    """The plan of a run as a table; it is made once for the same options, and takes seconds."""
    if key not in _plans:
        _plans[key] = str(plan(PlanOptions(**vars(run))))
    return _plans[key]


def planned_time(folder: SubjectFolder, options: TrainOptions) -> str:
    """How long a training takes, from the subject's earlier runs with the same model."""
    base = options.pretrained_model_name_or_path
    known = [
        pace
        for run in folder.runs.values()
        if config_of(run).get(BASE_OPTION) == base and (pace := seconds_per_step(run)) is not None
    ]
    if not known:
        return "Time: unknown before the first steps."
    return (
        f"Time: about {duration(known[-1] * options.max_train_steps)}, at {known[-1]:.2g} s per step of an earlier run."
    )


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
