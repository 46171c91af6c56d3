"""Uploads a finished run to the Hugging Face Hub: weights, samples and model card, but no photos."""

import json

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import LocalTokenNotFoundError, httpx

from persam_dreambooth.dreambooth.families.latent_diffusion import LORA_WEIGHTS
from persam_dreambooth.dreambooth.training_options import TrainingOptions
from persam_dreambooth.errors import InputError, UnavailableError, may_pass
from persam_dreambooth.options import CONFIG

PIPELINE = "model_index.json"
"""The file of a whole pipeline that names its parts, which are folders beside it."""

PUBLISHED = ["README.md", CONFIG, LORA_WEIGHTS, PIPELINE, "samples/*"]
"""File patterns to upload, besides the parts of a pipeline. A star matches folders too, so none may come first."""


def check_login() -> None:
    """Checks the login to the hub; called before training, which takes hours.

    Raises:
        InputError: no user is logged in.
        UnavailableError: the hub cannot be reached.
    """
    try:
        HfApi().whoami()
    except (LocalTokenNotFoundError, HfHubHTTPError, httpx.HTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
        if may_pass(error):
            raise UnavailableError(f"--push_to_hub: the hub cannot be reached ({reason}): try again") from None
        raise InputError(f"--push_to_hub: no user is logged in to the hub ({reason}): run `hf auth login`") from None


def push(options: TrainingOptions) -> str:
    """Uploads a finished run to a private repository, created if missing; returns its URL.

    Raises:
        UnavailableError: the hub does not take it; the run is whole.
    """
    api = HfApi()
    name = options.hub_model_id or options.run_dir.resolve().name
    index = options.run_dir / PIPELINE
    named = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    parts = [f"{part}/*" for part, classes in named.items() if isinstance(classes, list)]
    try:
        repository = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=options.run_dir,
            allow_patterns=[*PUBLISHED, *parts],
            commit_message=f"{options.max_train_steps} steps of training",
        )
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
        message = f"{options.run_dir} is finished, but its upload failed ({reason}): hf upload {name} {options.run_dir}"
        raise UnavailableError(message) from None
    return str(repository)
