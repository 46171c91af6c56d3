"""Reads a data set as another trainer does: `python read_as_others.py TRAINER REPOSITORY FOLDER OUT.npz`.

The code of TRAINER in REPOSITORY reads the data set in FOLDER with the configuration lines there. OUT gets for each
photo its training image as gray (h, w) from 0 to 1, the weights of its loss (h, w) from 0 to 1 before they are resized
to latents, and its caption. Libraries that a reader imports and does not need for this are mocks (`StandIns`).
"""

import json
import os
import sys
import types
from argparse import Namespace
from collections.abc import Callable, Iterator
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import torch
import yaml

SIZE = 64
"""The side in pixels of a square with the area that the trainers resize photos to."""

Read = tuple[str, torch.Tensor, torch.Tensor, str]
"""The file of a photo, its training image (3, h, w) from 0 to 1, its mask (h, w) from 0 to 1, and its caption."""


class StandIns(MetaPathFinder, Loader):
    """Imports of these libraries give mocks."""

    def __init__(self, *names: str) -> None:
        self.names = names
        sys.meta_path.insert(0, self)

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        known = any(name == each or name.startswith(f"{each}.") for each in self.names)
        return ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        module = MagicMock(name=spec.name)
        module.__path__, module.__spec__, module.__name__ = [], spec, spec.name
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def onetrainer(folder: Path) -> Iterator[Read]:
    """OneTrainer's list of modules that find, read, resize and crop photos and masks, in its library mgds."""
    from mgds.OutputPipelineModule import OutputPipelineModule
    from modules.dataLoader.mixin.DataLoaderMgdsMixin import DataLoaderMgdsMixin
    from modules.dataLoader.mixin.DataLoaderText2ImageMixin import DataLoaderText2ImageMixin
    from modules.util.config.TrainConfig import TrainConfig
    from modules.util.TrainProgress import TrainProgress

    class Reader(DataLoaderText2ImageMixin, DataLoaderMgdsMixin):
        pass

    Reader.__abstractmethods__ = frozenset()
    lines = json.loads((folder / "config.json").read_text())
    own = {"resolution": str(SIZE), "train_device": "cpu", "aspect_ratio_bucketing": True}
    usual, reader = TrainConfig.default_values(), Reader()
    config = usual.from_dict({**usual.to_dict(), **lines, **own})
    definition = [
        reader._enumerate_input_modules(config),
        reader._load_input_modules(config, config.train_dtype),
        reader._mask_augmentation_modules(config),
        reader._aspect_bucketing_in(config, 16),
        reader._crop_modules(config),
        OutputPipelineModule(["image_path", "image", "mask", "prompt"]),
    ]
    data = reader._create_mgds(config, definition, TrainProgress())
    data.start_next_epoch()
    for item in data:
        yield item["image_path"], item["image"].float(), item["mask"][0].float(), item["prompt"]


def kohya(folder: Path) -> Iterator[Read]:
    """kohya's data set for `--masked_loss`, and its loss with masks on a loss of ones at the size of the image."""
    for name in ("lpw_stable_diffusion", "sdxl_lpw_stable_diffusion"):  # pipelines that need an older transformers
        sys.modules[f"library.{name}"] = MagicMock()
    from library import config_util, strategy_base
    from library.custom_train_functions import apply_masked_loss

    class Words(strategy_base.TokenizeStrategy):
        def tokenize(self, text, is_weighted=False):
            return [torch.zeros(1, 77, dtype=torch.long)]

    strategy_base.TokenizeStrategy.set_strategy(Words())
    arguments = Namespace(resolution=(SIZE, SIZE), train_batch_size=1, debug_dataset=False, masked_loss=True)
    arguments.min_bucket_reso, arguments.bucket_reso_steps = 32, 16
    sanitizer = config_util.ConfigSanitizer(True, True, arguments.masked_loss, True)
    lines = config_util.load_user_config(str(folder / "dataset.toml"))
    blueprint = config_util.BlueprintGenerator(sanitizer).generate(lines, arguments)
    [data] = config_util.generate_dataset_group_by_blueprint(blueprint.dataset_group)[0].datasets
    data.set_current_strategies()
    own = data.dreambooth_dataset_delegate
    own.set_seed(0)
    for place, index in enumerate(own.buckets_indices):
        [key] = own.bucket_manager.buckets[index.bucket_index][index.batch_index : index.batch_index + 1]
        batch = data[place]
        image = batch["images"][0] / 2 + 0.5
        mask = apply_masked_loss(torch.ones(1, 4, *image.shape[1:]), batch)[0, 0]
        yield own.image_data[key].absolute_path, image, mask, batch["captions"][0]


def ai_toolkit(folder: Path) -> Iterator[Read]:
    """ai-toolkit's data loader."""
    from toolkit.data_loader import get_dataloader_from_datasets

    [lines] = yaml.safe_load((folder / "dataset.yaml").read_text())["datasets"]
    model = MagicMock(is_audio_model=False, encode_control_in_text_embeddings=False, latent_space_version="sd1")
    model.get_bucket_divisibility.return_value = 16
    model.get_frame_count_snapper.return_value = None
    loader = get_dataloader_from_datasets([{**lines, "resolution": SIZE, "num_workers": 0}], 1, model)
    for batch in loader:
        [item] = batch.file_items
        yield item.path, batch.tensor[0] / 2 + 0.5, batch.mask_tensor[0, 0], item.caption


def diffusion_pipe(folder: Path) -> Iterator[Read]:
    """diffusion-pipe's list of the files, and its reading of them."""
    StandIns("comfy", "comfy_api", "deepspeed")
    import toml
    from models.base import PreprocessMediaFile
    from utils.dataset import DirectoryDataset

    lines = toml.load(folder / "dataset.toml")
    [directory] = lines["directory"]
    data = DirectoryDataset(directory, {**lines, "resolutions": [SIZE]}, "toy", round_to_multiple=16)
    found = data._get_ungrouped_metadata()
    read = PreprocessMediaFile(lines)
    for item in found:
        width, height = (48, 80) if item["ar_bucket"][0] < 1 else (80, 48)
        [(image, _, mask)] = read(item["image_spec"], item["mask_file"], (width, height, 1))
        yield item["image_spec"][1], image, mask.float(), item["caption"][0]


def simpletuner(folder: Path) -> Iterator[Read]:
    """SimpleTuner's samples of photos, and the samples of masks that it pairs with them."""
    StandIns("simpletuner.simpletuner_sdk")
    from simpletuner.helpers.data_backend.local import LocalDataBackend
    from simpletuner.helpers.image_manipulation.training_sample import TrainingSample
    from simpletuner.helpers.multiaspect.sampler import MultiAspectSampler
    from simpletuner.helpers.prompts import PromptHandler
    from simpletuner.helpers.training.state_tracker import StateTracker
    from torchvision import transforms

    photos, masks, _ = json.loads((folder / "multidatabackend.json").read_text())
    assert photos["conditioning_data"] == masks["id"]
    StateTracker.set_args(Namespace(aspect_bucket_alignment=16, aspect_bucket_rounding=2, model_family="sdxl"))
    StateTracker.get_webhook_handler = staticmethod(lambda: None)
    scaled = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])
    model = MagicMock(MAXIMUM_CANVAS_SIZE=None)
    model.get_transforms.return_value = scaled
    backends = {}
    for config in (photos, masks):
        whole = {**config, "resolution": SIZE, "resolution_type": "pixel", "crop": False}
        StateTracker.set_data_backend_config(config["id"], whole)
        backends[config["id"]] = LocalDataBackend(MagicMock(num_processes=1), id=config["id"])
    for _, _, files in backends["subject"].list_files(["png"], photos["instance_data_dir"]):
        for path in files:
            own = TrainingSample(backends["subject"].read_image(path), "subject", {}, path, model=model)
            ready = own.prepare(return_tensor=True)
            sampler = MagicMock(source_dataset_id=None, conditioning_type="mask", id=masks["id"], model=model)
            sampler.data_backend = backends[masks["id"]]
            sampler.metadata_backend.instance_data_dir = masks["instance_data_dir"]
            sampler.metadata_backend.get_metadata_by_filepath.return_value = {}
            sampler.caption_strategy, sampler.instance_prompt = "instanceprompt", "a"
            # As `connect_conditioning_samples` calls it
            pair = MultiAspectSampler.get_conditioning_sample(sampler, path.split(photos["instance_data_dir"])[-1])
            mask = pair.prepare_like(own, return_tensor=True).image
            caption = PromptHandler.magic_prompt(path, True, photos["caption_strategy"], False, backends["subject"])
            yield path, ready.image / 2 + 0.5, mask[0] / 2 + 0.5, caption


READERS: dict[str, Callable[[Path], Iterator[Read]]] = {
    "onetrainer": onetrainer,
    "kohya": kohya,
    "simpletuner": simpletuner,
    "ai-toolkit": ai_toolkit,
    "diffusion-pipe": diffusion_pipe,
}


def main(trainer: str, repository: str, folder: str, out: str) -> None:
    sys.path[:0] = repository.split(os.pathsep)
    StandIns("torchaudio")
    found = {}
    for path, image, mask, caption in READERS[trainer](Path(folder)):
        name = Path(path).stem
        found[f"{name} image"], found[f"{name} mask"] = image.mean(dim=0).numpy(), mask.numpy()
        found[f"{name} caption"] = np.array(caption)
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
