"""The page: a subject is chosen or named at the top; below are the five steps, each usable alone."""

from __future__ import annotations

from collections.abc import Callable

import gradio as gr

from persam_dreambooth.app.desk import Desk, Step

STEPS: dict[str, Callable[[Desk, gr.State], Step]] = {}
"""The steps by their titles, in order: a function that builds a step's components inside its tab. Its arguments are
the desk and the name of the open subject."""


def build_page(desk: Desk) -> gr.Blocks:
    """The page with all steps."""
    with gr.Blocks(title="persam-dreambooth") as page:
        subject = gr.State("")
        with gr.Tabs():
            for title, build in STEPS.items():
                with gr.Tab(title):
                    build(desk, subject)
    return page
