"""Batches of numbered samples, so that a run resumes at any step and on any number of processes."""

from collections.abc import Iterator
from typing import Any, Protocol

from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset


class BatchOptions(Protocol):
    """The options of a training that say how samples are batched."""

    @property
    def train_batch_size(self) -> int:
        """Samples of a process in a batch."""

    @property
    def gradient_accumulation_steps(self) -> int:
        """Batches per optimizer step."""

    @property
    def dataloader_num_workers(self) -> int:
        """Processes that load samples; 0 loads them in the main process."""


def numbered_batches(
    samples: Dataset, options: BatchOptions, first_step: int, last_step: int, accelerator: Accelerator
) -> Iterator[dict[str, Any]]:
    """The batches of this process, from one step to another.

    Args:
        samples: indexed by sample number, without end; the number decides whatever is random.
        options: of the run.
        first_step: the last completed step.
        last_step: the last step of the run.
        accelerator: consecutive batches of a step belong to its processes in turn.
    """
    size, accumulation = options.train_batch_size, options.gradient_accumulation_steps
    processes, rank = accelerator.num_processes, accelerator.process_index
    first, last = first_step * accumulation, last_step * accumulation
    numbers = [
        [(batch * processes + rank) * size + position for position in range(size)] for batch in range(first, last)
    ]
    return iter(DataLoader(samples, batch_sampler=numbers, num_workers=options.dataloader_num_workers))
