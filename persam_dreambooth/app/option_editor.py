"""A part of the page in which any option of a command is chosen, set and removed, from the command line's own table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from persam_dreambooth.errors import InputError
from persam_dreambooth.extras import gradio as gr
from persam_dreambooth.options import Options, option_choices, option_types, parse

UNSET = "not set"


class OptionEditor:
    """A list of a command's options, the input that fits the chosen one, and a table of what is set.

    Args:
        kind: the command's options.
        leave_out: names of options that other parts of the page set.
        name: the beginning of the components' ids.
    """

    def __init__(self, kind: type[Options], leave_out: Sequence[str], name: str) -> None:
        self.kind, self.types = kind, option_types(kind)
        self.entries = {entry.name: entry for entry in fields(kind) if entry.name not in leave_out}
        choices = [(f"{name}: {entry.metadata['help']}", name) for name, entry in self.entries.items()]
        self.option = gr.Dropdown(
            choices, value=None, label="Option", info="Type to search", filterable=True, elem_id=f"{name}-option"
        )
        self.help = gr.Markdown("", elem_id=f"{name}-help")
        self.text = gr.Textbox(label="Value", visible=False, elem_id=f"{name}-text")
        self.word = gr.Dropdown([], label="Value", visible=False, elem_id=f"{name}-word")
        self.flag = gr.Checkbox(label="On", visible=False, elem_id=f"{name}-flag")
        with gr.Row():
            self.set = gr.Button("Set", size="sm", min_width=80, elem_id=f"{name}-set")
            self.remove = gr.Button("Remove", size="sm", min_width=80, elem_id=f"{name}-remove")
        self.table = gr.Dataframe(
            headers=["Option", "Value"],
            value=[],
            column_count=2,
            interactive=False,
            wrap=True,
            label="Set options",
            elem_id=f"{name}-table",
        )
        self.option.change(
            self._chosen, self.option, [self.help, self.text, self.word, self.flag], api_visibility="private"
        )
        self.table.select(self._selected, None, self.option, api_visibility="private")

    @property
    def inputs(self) -> list[Any]:
        """The components of the chosen option and its value."""
        return [self.option, self.text, self.word, self.flag]

    def _selected(self, event: gr.SelectData) -> Any:
        """The option of the selected row."""
        name = event.row_value[0]
        return name if name in self.entries else gr.skip()

    def _chosen(self, name: str | None) -> list[Any]:
        """Help and input of the chosen option."""
        hidden = [gr.update(visible=False) for _ in range(3)]
        if not name:
            return ["", *hidden]
        entry, words = self.entries[name], option_choices(self.kind, name)
        default = (
            "none"
            if entry.default in (None, "")
            else str(entry.default).lower()
            if self.is_flag(name)
            else entry.default
        )
        needs = "; ".join(condition.advice for condition in entry.metadata["when"])
        told = f"`--{name}`: {entry.metadata['help']}. Default: {default}."
        told += f" Where it has no effect: {needs}." if needs else ""
        if self.is_flag(name):
            hidden[2] = gr.update(visible=True, value=not entry.default, label=f"--{name}")
        elif words:
            hidden[1] = gr.update(visible=True, choices=list(words), value=words[0])
        else:
            many = entry.metadata["many"]
            info = "One a line" if many else None
            hidden[0] = gr.update(visible=True, value="", lines=3 if many else 1, max_lines=6 if many else 1, info=info)
        return [told, *hidden]

    def is_flag(self, name: str) -> bool:
        """Whether an option is on or off."""
        return self.types[name] is bool

    def value(self, name: str | None, text: str, word: str | None, flag: bool) -> tuple[str, Any]:
        """The chosen option and its value, read as on the command line; see `parse` for the errors."""
        if not name:
            raise InputError("no option is chosen: choose one of the list")
        if self.is_flag(name):
            return name, flag
        texts = text.splitlines() if self.entries[name].metadata["many"] else [text]
        given = [str(word)] if option_choices(self.kind, name) else [each.strip() for each in texts if each.strip()]
        if not given:
            raise InputError(f"--{name} has no value: type one, or remove the option")
        return name, getattr(parse(self.kind, [f"--{name}={each}" for each in given], "the page"), name)

    def rows(self, values: dict[str, Any]) -> list[list[str]]:
        """The rows of the table for values by name."""
        return [
            [name, UNSET if value is None else ", ".join(value) if isinstance(value, list) else str(value)]
            for name, value in values.items()
            if name in self.entries
        ]
