"""The page: a subject is chosen or named at the top; below are the five steps, each usable alone."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from persam_dreambooth.app.desk import Desk, PageStep, told
from persam_dreambooth.errors import InputNotFoundError
from persam_dreambooth.extras import gradio as gr

PAGE_STEPS: dict[str, str] = {
    "Photos": "photos:photos_step",
    "First mask": "first_mask:first_mask_step",
    "Masks": "masks:masks_step",
    "Train": "train:train_step",
    "Pictures": "pictures:pictures_step",
}
"""The steps by their titles, in order, as module:function in `app.steps`, such as `photos:photos_step`. The function
builds a step's components inside its tab; its arguments are the desk and the name of the open subject."""

LIVE_SECONDS = 1.5
"""Time between two looks at what jobs do."""

IN_ADDRESS = """(name) => {
    const url = new URL(window.location);
    if (name) url.searchParams.set("subject", name); else url.searchParams.delete("subject");
    window.history.replaceState(null, "", url);
}"""
"""Puts the name of the open subject in the page's address, so that a reload shows it again."""


def build_page(desk: Desk) -> gr.Blocks:
    """The page with all steps."""
    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    with gr.Blocks(title="persam-dreambooth", analytics_enabled=False) as page:
        subject = gr.State("")
        gr.Markdown("# persam-dreambooth\nFrom photos and one mask to pictures of your subject.")
        with gr.Row():
            chooser = gr.Dropdown(desk.subjects(), value=None, label="Subject", elem_id="subject-chooser")
            named = gr.Textbox(label="New subject", placeholder="cat", max_lines=1, elem_id="subject-new")
            make = gr.Button("Make", elem_id="subject-make", scale=0)
        status = gr.HTML(elem_id="status-subject")
        steps: list[PageStep] = []
        with gr.Tabs():
            for title, place in PAGE_STEPS.items():
                with gr.Tab(title) as tab:
                    step = _builder(place)(desk, subject)
                    steps.append(step)
                chosen = told(lambda name, step=step: _by_component(step.shown(name), step.outputs), status)
                tab.select(chosen, [subject], [*step.outputs, status], **private)

        def opened(name: str) -> dict[Any, Any]:
            """The values of all components for a subject; "" for none."""
            if name and not desk.subject(name).exists:
                raise InputNotFoundError(f"there is no subject {name}: choose one, or make it")
            values = {subject: name, status: "", chooser: gr.update(choices=desk.subjects(), value=name)}
            if not name:
                values[chooser] = gr.update(choices=desk.subjects(), value=None)
            for step in steps:
                values |= _by_component(step.shown(name), step.outputs)
            return values

        def loaded(request: gr.Request) -> dict[Any, Any]:
            return opened(request.query_params.get("subject") or desk.start)

        def made(name: str) -> dict[Any, Any]:
            return {**opened(desk.new_subject(name).name), named: ""}

        def looked(name: str) -> dict[Any, Any]:
            values: dict[Any, Any] = {}
            for step in steps:
                if step.live:
                    values |= _by_component(step.live(name), step.live_outputs)
            return values

        every = [subject, status, named, chooser, *(one for step in steps for one in step.outputs)]
        page.load(told(loaded, status), None, every, **private)
        chooser.input(told(opened, status), [chooser], every, **private)
        gr.on([named.submit, make.click], told(made, status), [named], every, **private)
        chooser.change(None, [chooser], None, js=IN_ADDRESS, **private)
        live = [one for step in steps for one in step.live_outputs]
        if live:
            gr.Timer(LIVE_SECONDS).tick(
                told(looked, status), [subject], [*live, status], concurrency_limit=None, **private
            )
    return page


def _builder(place: str) -> Callable[[Desk, gr.State], PageStep]:
    module, name = place.split(":")
    return getattr(import_module(f"persam_dreambooth.app.steps.{module}"), name)


def _by_component(values: Any, outputs: Any) -> dict[Any, Any]:
    """What a step returns for its outputs, as Gradio takes it: one value, or one for each, or a dictionary."""
    if isinstance(values, dict) and set(values) <= set(outputs):
        return values
    listed = values if isinstance(values, (list, tuple)) and len(values) == len(outputs) else [values]
    return dict(zip(outputs, listed, strict=True))
