"""The page of a training run, `report.html` in its folder, written from the first mask to the last step."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from persam_dreambooth.dreambooth.card import about_run, generate_command, how_to_name, run_facts, run_title
from persam_dreambooth.dreambooth.data import Crops
from persam_dreambooth.dreambooth.pipelines import model_notice
from persam_dreambooth.dreambooth.run_folder import MODEL_CARD, RUN_PACKAGES
from persam_dreambooth.dreambooth.samples import SAMPLES, sample_source
from persam_dreambooth.dreambooth.training_options import TrainingOptions
from persam_dreambooth.errors import Cancelled, SaveError
from persam_dreambooth.files import write_text
from persam_dreambooth.options import CONFIG, command_words
from persam_dreambooth.photos.mask_folder import MaskRecord, PhotoMask
from persam_dreambooth.report import page
from persam_dreambooth.report.pictures import fit_tile
from persam_dreambooth.report.run_page import (
    RUN_PAGE,
    commands_section,
    loss_section,
    machine_facts,
    masks_section,
    options_section,
)
from persam_dreambooth.training.meter import metrics_rows

SAMPLES_SHOWN = 48
"""Maximum number of samples on a page."""

SAMPLE_SIDE = 192
"""Width and height of a sample on the page, in pixels."""

logger = logging.getLogger(__name__)


class TrainingPage:
    """The page; what does not change during training is made once.

    Args:
        given: the options as they were given.
        options: the same, resolved.
        masks: of all photos; empty for a run on whole photos.
        crops: the training crops.
        doubts: the reasons why a mask is doubtful.
        subjects: the subject of each mask, if there are several subjects.
    """

    def __init__(
        self,
        given: TrainingOptions,
        options: TrainingOptions,
        masks: list[PhotoMask],
        crops: Crops,
        doubts: Callable[[MaskRecord], Sequence[str]],
        subjects: list[str] | None = None,
    ) -> None:
        self.given, self.options = given, options
        self.facts = {**run_facts(options, masks, crops), **machine_facts(*RUN_PACKAGES)}
        self.about = [about_run(options, masks, crops), *how_to_name(options.each_subject).split("\n- ")]
        notice = model_notice(options.pretrained_model_name_or_path)
        self.about += [notice] if notice else []
        self.masks = masks_section(masks, doubts, "overview.png", subjects) if masks else ""
        self.state = "The training is running."

    @contextmanager
    def following(self) -> Iterator[None]:
        """Writes the page at the beginning and the end of the block, with the reason if the block raises."""
        self.write()
        try:
            yield
        except BaseException as error:
            stopped = isinstance(error, (KeyboardInterrupt, Cancelled, SystemExit))
            self.state = f"The training {'was stopped' if stopped else 'failed'}: {str(error) or type(error).__name__}"
            self.write()
            raise
        self.state = "The training is finished."
        self.write()

    def write(self) -> None:
        """Writes the page; if the disk is full, the training goes on without it."""
        run_dir = self.options.run_dir
        rows = metrics_rows(run_dir)
        steps = self.options.max_train_steps
        step = f"{rows[-1]['step']:g} of {steps} steps, loss {rows[-1]['loss']:.4f}" if rows else f"0 of {steps} steps"
        body = [
            *map(page.paragraph, [*self.about, self.state]),
            page.facts({"trained": step, **self.facts}),
            self.masks,
            loss_section(rows),
            samples_section(run_dir, steps),
            options_section(self.given, self.options),
            commands_section(self._commands()),
        ]
        try:
            write_text(run_dir / RUN_PAGE, page.page(f"Training: {run_title(self.options)}", *body))
        except SaveError as error:
            logger.warning("%s", error)

    def _commands(self) -> dict[str, str]:
        run_dir, config = self.options.run_dir, str(self.options.run_dir / CONFIG)
        made = command_words("train", self.given, leave_out=("resume_from_checkpoint",))
        if self.given.subjects:  # a list that only a file can hold
            made = ["persam-dreambooth", "train", "--config", config]
        resume = ["persam-dreambooth", "train", "--config", config, "--resume_from_checkpoint", "latest"]
        commands = {"This command made the run.": shlex.join(made)}
        if (run_dir / MODEL_CARD).is_file():
            more = shlex.join([*resume, "--max_train_steps", str(2 * self.options.max_train_steps)])
            commands["Generate images:"] = generate_command(self.options)
            commands["Train for more steps, from the last checkpoint:"] = more
        else:
            commands["Resume an interrupted training:"] = shlex.join(resume)
            commands["Generate images when the training is finished:"] = generate_command(self.options)
        if self.masks and len(self.options.each_subject) == 1:
            retrain = ["persam-dreambooth", "train", "--config", config, "--mask_dir", str(run_dir / "masks")]
            commands["Correct a wrong mask in any image editor, and train again into a new folder:"] = shlex.join(
                retrain
            )
        return commands


def samples_section(run_dir: Path, last_step: int) -> str:
    """Samples by prompt and step, at most `SAMPLES_SHOWN`; those of the last step only of a finished run."""
    folders = {int(path.name.removeprefix("step-")): path for path in (run_dir / SAMPLES).glob("step-*")}
    if (run_dir / MODEL_CARD).is_file():
        folders[last_step] = run_dir / SAMPLES
    found: dict[str, list[tuple[int, int, Path]]] = {}
    for step, folder in folders.items():
        for path in folder.glob("*.png"):
            if source := sample_source(path):
                found.setdefault(source[0], []).append((step, source[1], path))
    blocks = []
    for prompt, samples in found.items():
        samples.sort()
        wanted = max(1, SAMPLES_SHOWN // len(found))
        shown = samples[:: -(-len(samples) // wanted)][: wanted - 1] if len(samples) > wanted else samples[:-1]
        pictures = []
        for step, seed, path in [*shown, samples[-1]]:
            with Image.open(path) as image:
                tile = fit_tile(image.convert("RGB"), SAMPLE_SIDE)
            pictures.append(page.picture(tile, f"{prompt}, step {step}, seed {seed}", [f"step {step}, seed {seed}"]))
        left = len(samples) - len(pictures)
        more = page.paragraph(f"{left} more samples are in `{SAMPLES}`.") if left else ""
        blocks.append(page.subheading(prompt) + page.row(pictures) + more)
    return page.section("samples", "Samples", *blocks) if blocks else ""
