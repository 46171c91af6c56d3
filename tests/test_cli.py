"""Options come from defaults, YAML and flags; a slip is one line; nothing heavy is imported before it is needed."""

import math
import os
import re
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import yaml
from PIL import Image, ImageDraw

import persam_dreambooth
from persam_dreambooth import cli
from persam_dreambooth.dreambooth.generate import GenerateOptions
from persam_dreambooth.dreambooth.prompts import fill_identifier
from persam_dreambooth.dreambooth.run_folder import with_absolute_paths
from persam_dreambooth.errors import InputError
from persam_dreambooth.main_job import TrainOptions
from persam_dreambooth.options import Options, read_config
from persam_dreambooth.options import parse as read_flags
from persam_dreambooth.segmentation.segment import SegmentOptions
from persam_dreambooth.segmentation.video import VideoOptions

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "persam_dreambooth"
COMMANDS = tuple(cli.COMMANDS)
HEAVY = {
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "matplotlib",
    "huggingface_hub",
}


def parse(*arguments: str) -> TrainOptions:
    return read_flags(TrainOptions, list(arguments), "persam-dreambooth train")


@pytest.fixture
def config(tmp_path):
    """Writes a YAML file of options and returns its path."""

    def write(text: str) -> str:
        path = tmp_path / "options.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def refused(capsys, *arguments: str) -> str:
    """The one line that a command says about its arguments."""
    assert cli.main(list(arguments)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    [line] = said.err.splitlines()
    assert line.startswith("error: ")
    return line


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


# Where options come from


def test_defaults_then_yaml_then_flags_wherever_they_stand(config):
    path = config("rank: 8\nseed: 3\n")
    assert (parse().rank, parse().seed) == (4, 0)
    assert (parse("--config", path).rank, parse("--config", path).seed) == (8, 3)
    for arguments in (["--config", path, "--rank", "16"], ["--rank", "16", "--config", path]):
        assert (parse(*arguments).rank, parse(*arguments).seed) == (16, 3)
    assert parse("--rank=16", f"--config={path}").rank == 16


def test_of_two_yaml_files_the_later_wins(config, tmp_path):
    first = config("rank: 8\nseed: 3\n")
    (tmp_path / "second.yaml").write_text("rank: 2\n")
    options = parse("--config", first, "--config", str(tmp_path / "second.yaml"))
    assert (options.rank, options.seed) == (2, 3)


@pytest.mark.parametrize("written", ["1e-6", "1.0e-6", "0.000001", "1E-6"])
def test_a_learning_rate_in_yaml_is_a_number_however_it_is_written(config, written):
    assert parse("--config", config(f"learning_rate: {written}")).learning_rate == 1e-6
    assert parse("--learning_rate", written).learning_rate == 1e-6


def test_null_in_yaml_stands_for_the_default(config):
    names = [entry.name for entry in fields(TrainOptions)]
    options = parse("--config", config("".join(f"{name}: null\n" for name in names)))
    assert options == TrainOptions()


def test_relative_paths_in_yaml_are_taken_as_they_stand(config):
    assert parse("--config", config("mask: masks/ref.png")).mask == "masks/ref.png"


def test_instance_data_dir_is_instance_dir(config):
    assert parse("--instance_data_dir", "cat").instance_dir == "cat"
    assert parse("--instance_dir", "cat").instance_dir == "cat"


def test_flags_that_are_on_or_off_take_no_value(config):
    switches = [entry.name for entry in fields(TrainOptions) if isinstance(entry.default, bool)]
    assert "unmasked" in switches
    for name in switches:
        assert getattr(parse(f"--{name}"), name) is True
        assert getattr(parse(f"--no_{name}"), name) is False
        if TrainOptions.__dataclass_fields__[name].metadata["when"]:
            continue  # without what it needs, a file's is left out
        path = config(f"{name}: true")
        assert getattr(parse("--config", path), name) is True
        assert getattr(parse("--config", path, f"--no_{name}"), name) is False


TYPED = [
    *("a [V] cat", "[V]", '"quoted"', "it's", "a: b", "{a: b}", "no", "123", "1e5", "#1", "- x", "猫"),
    *(" x ", "a\nb", "\\n", "*", "&a", "%a", "@a", "`a`", "!x", "2024-01-01", "true", "=", "--flag"),
]


@pytest.mark.parametrize("text", TYPED)
def test_text_arrives_as_it_was_typed(text):
    options = parse(f"--instance_prompt={text}", f"--class_name={text}", f"--identifier={text}", f"--mask={text}")
    assert {options.instance_prompt, options.class_name, options.identifier, options.mask} == {text}
    if not text.startswith("-"):
        pictures = read_flags(GenerateOptions, [text, "--model", text], "generate", positional="prompt")
        assert (pictures.prompt, pictures.model) == (text, text)


def test_null_in_a_flag_unsets_what_a_file_says(config):
    path = config("mask: m.png\nclass_name: cat\nrank: 8\n")
    options = parse("--config", path, "--mask", "null", "--rank", "null")
    assert (options.mask, options.rank, options.class_name) == (None, 4, "cat")


def test_home_is_expanded_in_every_path(config, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    typed = parse("--instance_dir=~/cat", "--output_dir=~/run", "--mask=~/m.png", "--class_name=~/x")
    filed = parse("--config", config("instance_dir: ~/cat\noutput_dir: ~/run\nmask: ~/m.png\nclass_name: ~/x"))
    assert typed == filed
    assert (typed.instance_dir, typed.output_dir) == (str(tmp_path / "cat"), str(tmp_path / "run"))
    assert typed.class_name == "~/x"
    assert TrainOptions(mask_dir="~/masks").mask_dir == str(tmp_path / "masks")


def test_a_flag_replaces_its_rival_in_a_file(config):
    path = config("mask: m.png\nreference_image: a.jpg\nabsent: skip\ninstance_dir: cat\nresolution: 64\n")
    options = parse("--config", path, "--mask_dir", "masks")
    assert (options.mask, options.reference_image, options.absent) == (None, None, "warn")
    options.check()
    options = parse("--config", path, "--unmasked", "--aspect_ratio_buckets", "64,64", "--dataset_name", "me/cat")
    assert (options.instance_dir, options.resolution) == (None, None)
    options.check()


def test_what_a_file_does_not_give_is_not_called_left_out(config, caplog):
    caplog.set_level("INFO")
    parse("--config", config("mask: m.png\nunmasked: false\nmask_from: null\n"), "--mask_dir", "masks")
    assert caplog.messages == ["mask from the file is ignored (--mask_dir replaces it)"]


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.name)
@pytest.mark.parametrize("flags", [["--unmasked"], ["--mask_dir", "m"], ["--method", "full", "--mask", "m.png"]])
def test_every_recipe_yields_to_flags(path, flags):
    options = parse("--config", str(path), "--instance_dir", "cat", *flags)
    options.check()
    assert (options.unmasked, options.mask_dir, options.mask) == {
        "--unmasked": (True, None, None), "--mask_dir": (False, "m", None), "--method": (False, None, "m.png")
    }[flags[0]]  # fmt: skip
    assert options.method == ("full" if "full" in flags else read_config(path).get("method", "lora"))


def test_what_is_typed_can_be_at_odds():
    with pytest.raises(InputError, match="--mask and --mask_dir exclude one another"):
        parse("--instance_dir", "cat", "--mask", "m.png", "--mask_dir", "m").check()


def test_recipes_are_known_by_name(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sd15-lora").mkdir()  # a folder of this name is no file of options
    assert parse("--config", "sd15-lora") == parse("--config", str(ROOT / "configs" / "sd15-lora.yaml"))
    assert "name a YAML file, or a recipe: flux-lora, " in refused(capsys, "train", "--config", "sd14-lora")


@pytest.mark.parametrize(
    "text", ["a [V] cat", "[V]", '"quoted"', "it's", "a: b", "null", "no", "123", "#1", "猫", "a\nb"]
)
def test_a_saved_configuration_gives_the_same_options_again(config, text):
    options = TrainOptions(
        instance_dir=text, mask=text, class_name=text, identifier=text, instance_prompt=text, output_dir=text,
        learning_rate=1e-6, adam_epsilon=1e-8, mixed_precision="no", unmasked_weight=0.25, train_text_encoder=True,
        resolution=64, checkpoints_total_limit=2,
    )  # fmt: skip
    assert parse("--config", config(yaml.safe_dump(asdict(options), sort_keys=False))) == options


def test_the_options_of_train_are_these():
    """Adding, renaming or removing an option is a conscious act: the documents and old YAML files know these."""
    assert [entry.name for entry in fields(TrainOptions)] == [
        *("point", "negative_point", "box", "text", "scale"),
        *("instance_dir", "dataset_name", "image_column", "caption_column"),
        *("mask", "reference_image", "other_mask", "mask_dir", "mask_from", "invert_mask"),
        *("caption_from", "class_name", "identifier", "instance_prompt", "class_prompt", "validation_prompt"),
        *("subjects", "unmasked"),
        *("pretrained_model_name_or_path", "revision", "variant", "base_config"),
        *("method", "rank", "lora_alpha", "lora_targets", "init_lora", "lora_dropout", "lora_init", "use_dora"),
        *("export", "train_text_encoder", "long_prompts"),
        *("max_sequence_length", "text_encoder_out_layers", "caption_dropout"),
        *(
            "mask_normalization",
            "unmasked_weight",
            "unmasked_probability",
            "mask_dilation",
            "soft_masks",
            "mask_feather",
        ),
        *("masked_prior_preservation_weight", "class_preservation_weight"),
        *("weighting_scheme", "logit_mean", "logit_std", "mode_scale", "snr_gamma", "noise_offset"),
        *("replace_background", "background_dir", "num_background_images"),
        *("background_scenes", "background_in_prompt"),
        *("with_prior_preservation", "prior_loss_weight", "class_data_dir"),
        *("class_scenes", "num_class_images", "sample_batch_size"),
        *("resolution", "aspect_ratio_buckets", "center_crop", "random_flip", "cache_latents"),
        *("seed", "max_train_steps", "train_batch_size", "gradient_accumulation_steps"),
        *("optimizer", "use_8bit_adam", "learning_rate", "text_encoder_lr", "scale_lr"),
        *("lr_scheduler", "lr_warmup_steps", "lr_num_cycles", "lr_power"),
        *("adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm"),
        *("use_ema", "ema_decay"),
        *("mixed_precision", "quantize", "quantize_text_encoder", "gradient_checkpointing", "cuda_graphs"),
        *("offload", "vae_tiling", "fsdp", "allow_tf32", "dataloader_num_workers"),
        *("output_dir", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "logging_steps"),
        *("num_validation_images", "validation_steps"),
        *("report_to", "push_to_hub", "hub_model_id"),
        *(
            "sam_model",
            "sam_dtype",
            "encoding_cache",
            "segmenter",
            "adapter",
            "target_coverage",
            "guidance",
            "concept_prompt",
            "absent",
            "absent_threshold",
            "smallest_region",
        ),
    ]


MASKS_GIVEN = ("--instance_dir", "cat", "--mask_dir", "m")
WHOLE_PHOTOS = ("--instance_dir", "cat", "--unmasked")
CUT_OUTS = ("--instance_dir", "cat", "--mask_from", "alpha")
FRAMES = ("--frames", "f", "--mask", "m.png", "--output", "o")
PERSEG = ("--data", "d", "--output", "o")
TASK = ("--images", "i", "--masks", "m", "--output", "o")
SCORED = (*PERSEG, "--predictions", "p")
EPISODES = ("data", "output", "predictions", "shots", "episodes", "seed", "seeds", "sam_model")
METHOD_OPTIONS = ("segmenter", "target_coverage", "sam_dtype", "encoding_cache")
OF_MADE_MASKS = ("absent", "absent_threshold", "smallest_region", *METHOD_OPTIONS)
"""Options of masks that are made; the page makes them, whatever it is started with."""

ALWAYS: dict[str, tuple[str, ...]] = {
    "mask": ("photo", "point", "box", "text", "output", "grid", "sam_model"),
    "segment": (
        *("images", "mask", "mask_dir", "other_mask", "point", "box", "text", "output", "instances", "heatmaps"),
        *("layout", "absent", "absent_threshold", "smallest_region", "sam_model", *METHOD_OPTIONS),
    ),
    "video": ("frames", "mask", "output", "overlay", "sam_model", *METHOD_OPTIONS),
    "train": (
        *("instance_dir", "dataset_name", "mask", "mask_dir", "mask_from", "class_name", "identifier"),
        *("point", "box", "text"),
        *("instance_prompt", "subjects", "unmasked"),
        *("pretrained_model_name_or_path", "method", "train_text_encoder", "long_prompts"),
        *("max_sequence_length", "text_encoder_out_layers"),
        *(
            "caption_dropout",
            "weighting_scheme",
            "snr_gamma",
            "noise_offset",
            "with_prior_preservation",
            "class_preservation_weight",
        ),
        *("aspect_ratio_buckets", "center_crop", "random_flip"),
        *("seed", "max_train_steps", "train_batch_size", "gradient_accumulation_steps"),
        *("optimizer", "learning_rate", "scale_lr", "lr_scheduler"),
        *("adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm", "use_ema"),
        *("mixed_precision", "quantize_text_encoder", "gradient_checkpointing", "allow_tf32", "dataloader_num_workers"),
        *("output_dir", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "logging_steps"),
        *("num_validation_images", "report_to", "push_to_hub"),
        "sam_model",  # scripts name it once for runs with and without masks that are made
    ),
    "adapt plm": (
        *("images", "masks", "output", "prompt", "pmm", "validation_share", "sam_model", "encoding_cache", "seed"),
        *("max_train_steps", "train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler"),
        *("adam_weight_decay", "max_grad_norm", "mixed_precision"),
        *("dataloader_num_workers", "validation_steps", "checkpointing_steps", "checkpoints_total_limit"),
        *("resume_from_checkpoint", "logging_steps", "report_to"),
    ),
    "adapt fs-sam2": (
        *("data", "dataset", "output", "shots", "validation_episodes", "sam_model", "seed", "max_train_steps"),
        *("train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler", "adam_weight_decay"),
        *("max_grad_norm", "mixed_precision", "gradient_checkpointing", "dataloader_num_workers"),
        *("validation_steps", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint"),
        *("logging_steps", "report_to"),
    ),
    "generate": (
        *("prompt", "model", "num_images", "seed", "output", "num_inference_steps", "guidance_scale"),
        *("width", "height", "scheduler", "quantize", "quantize_text_encoder", "offload", "vae_tiling"),
        "batch_size",
    ),
    "evaluate perseg": ("data", "output", "predictions", "reference_index", "sam_model"),
    "evaluate pascal5i": (*EPISODES, "fold"),
    "evaluate coco20i": (*EPISODES, "fold"),
    "evaluate fss1000": (*EPISODES, "splits", "split"),
    "evaluate task": (
        *("data", "output", "methods", "adapter", "prompt", "parts", "test_share", "seed", "sam_model", "sam_dtype"),
        "encoding_cache",
    ),
    "evaluate absence": ("data", "output", "others", "absent_threshold", "sam_model", *METHOD_OPTIONS),
    "evaluate davis": ("data", "output", "predictions", "sam_model"),
    "evaluate model": (
        *("model", "output", "identifier", "instance_dir", "mask_dir", "sam_model", "sam_dtype", "clip_model"),
        *("dino_model", "num_images", "background_scenes", "seed", "num_inference_steps", "guidance_scale"),
    ),
    "benchmark background": (
        *(
            "output_dir",
            "recipes",
            "subjects",
            "seeds",
            "at_steps",
            "guidance_scales",
            "num_inference_steps",
            "processes",
        ),
        "mixed_precision",
    ),
    "toy perseg": ("output_dir", "objects"),
    "toy davis": ("output_dir", "sequences", "frames"),
    "toy parts": ("output_dir", "images"),
    "toy episodes": ("output_dir", "images", "size"),
    "demo": ("output_dir", "photos"),
}
"""The options of each command that have an effect beside any other option.

A new option stands here, or in `IDLE` with what takes its effect away.
"""

IDLE: dict[str, dict[tuple[str, ...], tuple[str, ...]]] = {
    "video": {
        (*FRAMES, "--segmenter", "memory"): ("variant",),
        FRAMES: ("adapter", "recent_frames"),
    },
    "segment": {
        ("--images", "cat", "--mask_dir", "m", "--output", "o"): ("reference_image", "negative_point", "scale"),
        ("--images", "cat", "--point", "C4", "--output", "o"): ("invert_mask",),
        ("--images", "cat", "--mask", "m.png", "--output", "o"): (
            *("guidance", "concept_prompt", "class_name", "adapter"),
        ),
    },
    "mask": {("cat.jpg", "--grid"): ("negative_point", "scale", "sam_dtype", "encoding_cache")},
    "train": {
        MASKS_GIVEN: (
            *("negative_point", "scale", "image_column", "caption_column", "reference_image", "other_mask"),
            *("background_dir", "num_background_images"),
            *("background_scenes", "background_in_prompt", "prior_loss_weight", "class_data_dir", "class_scenes"),
            *("num_class_images", "sample_batch_size", "class_prompt", "lr_warmup_steps", "lr_num_cycles", "lr_power"),
            *("text_encoder_lr", "offload"),
            *("ema_decay", "hub_model_id", "guidance", "concept_prompt", "adapter"),
            *OF_MADE_MASKS,
        ),
        CUT_OUTS: ("invert_mask",),
        WHOLE_PHOTOS: (
            *("mask_normalization", "unmasked_weight", "unmasked_probability", "mask_dilation", "mask_feather"),
            *("masked_prior_preservation_weight", "replace_background", "soft_masks"),
        ),
        ("--dataset_name", "me/cat", "--mask_dir", "m"): ("caption_from",),
        (*MASKS_GIVEN, "--method", "full"): (
            *("rank", "lora_alpha", "lora_targets", "init_lora", "lora_dropout", "lora_init", "use_dora"),
            *("export", "quantize"),
        ),
        (*MASKS_GIVEN, "--gradient_checkpointing"): ("cuda_graphs",),
        (*MASKS_GIVEN, "--aspect_ratio_buckets", "64,64"): ("resolution",),
        (*MASKS_GIVEN, "--replace_background", "color"): ("cache_latents",),
        (*MASKS_GIVEN, "--optimizer", "prodigy"): ("use_8bit_adam", "fsdp"),
        (*MASKS_GIVEN, "--weighting_scheme", "none"): ("logit_mean", "logit_std", "mode_scale"),
        (*MASKS_GIVEN, "--num_validation_images", "0"): ("validation_steps", "validation_prompt", "vae_tiling"),
        (*MASKS_GIVEN, "--pretrained_model_name_or_path", "toy"): ("revision", "base_config"),
        (*MASKS_GIVEN, "--pretrained_model_name_or_path", "sd.safetensors"): ("variant",),
    },
    "adapt fs-sam2": {
        (*PERSEG, "--dataset", "fss1000"): ("fold",),
        (*PERSEG, "--dataset", "coco20i"): ("splits",),
        (*PERSEG, "--dataset", "coco20i", "--steps", "7"): ("num_train_epochs",),
    },
    "generate": {
        ("a sks cat", "--model", "toy"): ("identifier", "base_model", "base_config", "lora_scale"),
        ("a cat", "--model", "toy", "--guidance_scale", "1"): ("negative_prompt",),
    },
    "evaluate perseg": {
        SCORED: (*METHOD_OPTIONS, "adapter", "guidance", "concept_prompt", "ablation", "robustness"),
        (*PERSEG, "--reference_index", "1"): ("shots",),
    },
    "evaluate pascal5i": {SCORED: (*METHOD_OPTIONS, "adapter", "guidance", "concept_prompt")},
    "evaluate coco20i": {SCORED: (*METHOD_OPTIONS, "adapter", "guidance", "concept_prompt")},
    "evaluate fss1000": {SCORED: (*METHOD_OPTIONS, "adapter", "guidance", "concept_prompt")},
    "adapt plm": {
        (*TASK, "--max_train_steps", "7"): ("num_train_epochs",),
        (*TASK, "--no_pmm"): ("outline_points",),
    },
    "evaluate task": {
        (*PERSEG, "--methods", "sam,sam-oracle"): ("train_masks", "max_train_steps", "train_batch_size"),
        (*PERSEG, "--test_share", "0.5"): ("test_images",),
    },
    "evaluate absence": {PERSEG: ("adapter", "guidance", "concept_prompt")},
    "evaluate davis": {SCORED: (*METHOD_OPTIONS, "adapter", "variant", "recent_frames")},
}
"""Arguments of each command, and the options that have no effect beside them."""

IDLE["plan"], ALWAYS["plan"] = IDLE["train"], ALWAYS["train"]
IDLE["app"] = {
    arguments: tuple(name for name in names if name not in OF_MADE_MASKS) for arguments, names in IDLE["train"].items()
}
ALWAYS["app"] = (*ALWAYS["train"], *OF_MADE_MASKS, "workspace", "port", "no_browser", "listen", "auth")


def other_value(kind: type[Options], name: str) -> list[str]:
    """A value of an option, as typed, that is not its default."""
    hint, default = get_type_hints(kind)[name], kind.__dataclass_fields__[name].default
    hint = next((each for each in get_args(hint) if each is not type(None)), hint) if default is None else hint
    words = get_args(hint) if get_origin(hint) is Literal else kind.__dataclass_fields__[name].metadata["choices"]
    if hint is bool:
        return []
    return [next(word for word in words if word != default) if words else {int: "7", float: "0.3"}.get(hint, "x")]


@pytest.mark.parametrize("command", COMMANDS)
def test_an_option_without_effect_beside_the_others_is_refused(capsys, command):
    kind = cli.find(cli.COMMANDS[command].options)
    idle = IDLE.get(command, {})
    named = [name for names in (*idle.values(), ALWAYS[command]) for name in names]
    assert sorted(named) == sorted(entry.name for entry in fields(kind))
    for arguments, names in idle.items():
        for name in names:
            line = refused(capsys, *command.split(), *arguments, f"--{name}", *other_value(kind, name))
            assert re.match(f"error: (--{name} has no effect: |--{name} runs methods: |.* exclude one another: )", line)
            assert f"--{name} " in line


@pytest.mark.parametrize("kind", [SegmentOptions, TrainOptions, GenerateOptions, VideoOptions])
def test_every_option_has_a_line_of_help(kind):
    for entry in fields(kind):
        assert entry.metadata["help"]
        assert "\n" not in entry.metadata["help"]


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.name)
def test_every_recipe_parses_and_checks(path):
    parse("--config", str(path), "--instance_dir", "cat", "--mask", "mask.png").check()


# What options mean


def test_scenes_are_separated_by_commas():
    assert TrainOptions(background_scenes="a beach,snow , a city at night,").scenes == [
        *("a beach", "snow", "a city at night")
    ]
    assert len(TrainOptions().scenes) == 8


def test_the_identifier_stands_for_v_in_every_prompt():
    options = TrainOptions(
        instance_dir="cat", identifier="zwx", instance_prompt="photo of [V] cat, [V]", class_prompt="photo of cat",
        validation_prompt="[V] in space",
    )  # fmt: skip
    prompts = {kind: options.prompt(kind) for kind in ("instance", "class")}
    assert prompts == {"instance": "photo of zwx cat, zwx", "class": "photo of cat"}
    assert options.sample_prompts == ["zwx in space"]
    assert fill_identifier("a [v] cat", "zwx") == "a [v] cat"


def test_prompts_follow_from_identifier_and_class():
    options = TrainOptions(instance_dir="photos", class_name="cat")
    prompts = [options.prompt("instance"), options.prompt("class"), *options.sample_prompts]
    assert prompts == ["a sks cat", "a cat", "a sks cat on a beach"]


def test_validation_prompts_are_one_or_several(config, capsys):
    def asked(*arguments: str) -> list[str]:
        return parse("--instance_dir", "cat", *arguments).validation_prompts

    one, two = ["--validation_prompt", "[V], one"], ["--validation_prompt=a [V] two"]
    assert asked(*one) == ["sks, one"]
    assert asked(*one, *two, *one) == ["sks, one", "a sks two"]
    assert asked("--config", config("validation_prompt: a [V] three")) == ["a sks three"]
    listed = config("validation_prompt:\n- a [V] three\n- '[V], four'\n")
    assert asked("--config", listed) == ["a sks three", "sks, four"]
    assert asked("--config", listed, *one) == ["sks, one"]
    for none in ([], ["--validation_prompt", ""], ["--config", listed, "--validation_prompt", "null"]):
        assert asked(*none) == ["a sks cat on a beach"]
    assert asked("--config", config("validation_prompt: []")) == ["a sks cat on a beach"]
    assert TrainOptions(validation_prompt="a [V] five").validation_prompts == ["a sks five"]
    path = config("validation_prompt: [a cat, 3]")
    assert refused(capsys, "train", "--config", path).endswith("--validation_prompt is 3: give text, in quotes")


@pytest.mark.parametrize(
    "folder, class_name", [("cat", "cat"), ("a/b/backpack_dog/", "backpack dog"), ("red-car", "red car"), ("猫", "猫")]
)
def test_the_class_is_named_after_the_folder_where_no_name_is_given(folder, class_name):
    assert TrainOptions(instance_dir=folder).subject == class_name
    assert TrainOptions(instance_dir=folder, class_name="").subject == class_name
    assert TrainOptions(instance_dir=folder, class_name="dog").subject == "dog"


def test_class_and_run_are_named_after_the_data_set():
    options = TrainOptions(dataset_name="me/red-car")
    assert (options.subject, options.run_dir) == ("red car", Path("outputs/red-car"))


def test_the_class_is_named_after_the_working_folder_for_a_dot(tmp_path, monkeypatch):
    (tmp_path / "cat").mkdir()
    monkeypatch.chdir(tmp_path / "cat")
    assert TrainOptions(instance_dir=".").subject == "cat"


def test_the_run_is_named_after_the_folder_where_no_output_is_given():
    assert TrainOptions(instance_dir="photos/red-car").run_dir == Path("outputs/red-car")
    assert TrainOptions(instance_dir="cat", output_dir="here").run_dir == Path("here")


def test_the_learning_rate_is_the_model_familys_where_none_is_given():
    options = TrainOptions(instance_dir="cat")
    assert options.resolved(512, "no", 1e-6).learning_rate == 1e-6
    assert replace(options, learning_rate=0.0).resolved(512, "no", 1e-6).learning_rate == 0


COUNTS = (
    *("rank", "num_class_images", "sample_batch_size", "resolution", "max_train_steps", "train_batch_size"),
    *("gradient_accumulation_steps", "lr_num_cycles", "checkpointing_steps", "checkpoints_total_limit"),
    *("logging_steps", "num_background_images", "validation_steps"),
)
AMOUNTS = (
    *("learning_rate", "prior_loss_weight", "lr_warmup_steps", "adam_weight_decay", "adam_epsilon"),
    *("dataloader_num_workers", "num_validation_images", "masked_prior_preservation_weight"),
    "class_preservation_weight",
)
OUT_OF_RANGE = {
    **dict.fromkeys(COUNTS, ("0", "give 1 or more")),
    **dict.fromkeys(AMOUNTS, ("-1", "give 0 or more")),
    "unmasked_weight": ("1.5", "give a number from 0 to 1"),
    "unmasked_probability": ("-0.1", "give a number from 0 to 1"),
    "mask_dilation": ("17", "give a number from -16 to 16"),
    "mask_feather": ("9.0", "give a number from 0 to 8"),
    "lora_dropout": ("-0.5", "give a number from 0 to 1"),
    "target_coverage": ("1.0", "give a number from 0 to below 1"),
    "adam_beta1": ("1.0", "give a number from 0 to below 1"),
    "caption_dropout": ("1.0", "give a number from 0 to below 1"),
    "adam_beta2": ("-0.1", "give a number from 0 to below 1"),
    "max_grad_norm": ("0.0", "give more than 0"),
    "snr_gamma": ("0.0", "give more than 0"),
    "lora_alpha": ("-1.0", "give more than 0"),
    "ema_decay": ("2.0", "give a number from 0 to 1"),
    "noise_offset": ("1.5", "give a number from 0 to 1"),
    "seed": ("-1", "give a number from 0 to 4294967295"),
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_a_number_out_of_range_is_refused_before_anything_loads(name):
    value, advice = OUT_OF_RANGE[name]
    with pytest.raises(InputError) as refusal:
        parse("--instance_dir", "cat", "--mask", "mask.png", f"--{name}={value}").check()
    floats = isinstance(getattr(TrainOptions(), name), float) or name == "learning_rate" or "." in value
    shown = float(value) if floats else int(value)
    assert str(refusal.value) == f"--{name} is {shown}: {advice}"


def test_not_a_number_is_refused():
    for name in ("learning_rate", "unmasked_weight", "max_grad_norm", "adam_beta1", "target_coverage"):
        with pytest.raises(InputError, match=f"--{name} is nan"):
            parse("--instance_dir", "cat", "--mask", "mask.png", f"--{name}=nan").check()


def test_infinity_is_no_amount():
    with pytest.raises(InputError, match="--learning_rate is inf: give 0 or more"):
        parse("--instance_dir", "cat", "--mask", "mask.png", "--learning_rate", "inf").check()


@pytest.mark.parametrize(
    "options, said",
    [
        ({}, "--instance_dir is missing"),
        ({"instance_dir": "cat"}, "no mask: give --mask .*--point .*--box .*--text .*--mask_dir .*--unmasked"),
        ({"instance_dir": "cat", "mask": "m.png", "unmasked": True}, "--mask and --unmasked exclude one another"),
        ({"instance_dir": "cat", "mask": "m.png", "mask_dir": "m"}, "--mask and --mask_dir exclude one another"),
        (
            {"instance_dir": "cat", "mask_dir": "m", "reference_image": "a.jpg"},
            "--reference_image has no effect: add --mask",
        ),
        ({"instance_dir": "cat", "mask": "m.png", "identifier": ""}, "--identifier is empty"),
        (
            {"instance_dir": "cat", "mask": "m.png", "guidance": "none"},
            "--guidance has no effect: add --segmenter persam",
        ),
        (
            {"instance_dir": "cat", "unmasked": True, "unmasked_weight": 0.5},
            "--unmasked_weight has no effect: remove it or --unmasked",
        ),
        (
            {"instance_dir": "cat", "unmasked": True, "method": "full", "export": "kohya"},
            "--export has no effect: add --method lora",
        ),
        ({"instance_dir": "cat", "unmasked": True, "use_dora": True, "export": "kohya"}, "does not carry DoRA"),
        (
            {"instance_dir": "cat", "unmasked": True, "mask_dilation": -1},
            "--mask_dilation has no effect: remove it or --unmasked",
        ),
        (
            {"instance_dir": "cat", "unmasked": True, "masked_prior_preservation_weight": 0.5},
            "--masked_prior_preservation_weight has no effect: remove it or --unmasked",
        ),
        (
            {"instance_dir": "cat", "unmasked": True, "replace_background": "noise"},
            "--replace_background has no effect: remove it or --unmasked",
        ),
        (
            {"instance_dir": "cat", "mask": "m.png", "replace_background": "color", "background_in_prompt": True},
            "--background_in_prompt has no effect: add --replace_background generated",
        ),
        ({"instance_dir": "cat", "mask": "m.png", "class_scenes": True}, "--class_scenes .* --with_prior_preservation"),
        (
            {"instance_dir": "cat", "mask": "m.png", "use_8bit_adam": True, "optimizer": "prodigy"},
            "--use_8bit_adam has no effect: remove it or --optimizer prodigy",
        ),
        (
            {"instance_dir": "cat", "mask": "m.png", "cache_latents": True, "replace_background": "color"},
            "--cache_latents has no effect: with --replace_background",
        ),
        ({"instance_dir": "cat", "mask": "m.png", "hub_model_id": "me/cat"}, "--hub_model_id .*: add --push_to_hub"),
        (
            {"instance_dir": "cat", "mask": "m.png", "validation_steps": 5, "num_validation_images": 0},
            "--validation_steps has no effect: add --num_validation_images",
        ),
        (
            {"instance_dir": "cat", "dataset_name": "me/cat", "mask": "m.png"},
            "--instance_dir and --dataset_name exclude one another",
        ),
        ({"instance_dir": "cat", "mask": "m.png", "caption_column": "text"}, "--caption_column .*: add --dataset_name"),
        ({"instance_dir": "cat", "mask": "m.png", "ema_decay": 0.5}, "--ema_decay has no effect: add --use_ema"),
        ({"instance_dir": "cat", "mask": "m.png", "method": "full", "rank": 8}, "--rank .*: add --method lora"),
        ({"instance_dir": "cat", "mask": "m.png", "method": "full", "use_dora": True}, "--use_dora .*: add --method"),
        (
            {"instance_dir": "cat", "mask": "m.png", "replace_background": "generated", "background_scenes": " , "},
            "--background_scenes is empty: give",
        ),
    ],
)
def test_options_at_odds_are_refused(options, said):
    with pytest.raises(InputError, match=said):
        TrainOptions(**options).check()


def test_segment_checks_what_train_checks():
    given = {"images": "cat", "reference_image": "a.jpg", "mask": "m.png", "output": "masks"}
    SegmentOptions(**given).check()
    for name in given:
        options = SegmentOptions(**{**given, name: None})
        if name == "reference_image":
            options.check()
            continue
        with pytest.raises(InputError, match=f"--{name} is missing|no mask: give --{name} "):
            options.check()
    with pytest.raises(InputError, match=r"--guidance has no effect: add --segmenter persam"):
        SegmentOptions(**given, guidance="none").check()
    with pytest.raises(InputError, match=r"--target_coverage is 1\.5"):
        SegmentOptions(**given, target_coverage=1.5).check()


@pytest.mark.parametrize(
    "options, said",
    [
        ({"model": "toy"}, "prompt is missing"),
        ({"prompt": " ", "model": "toy"}, "the prompt is empty"),
        ({"prompt": "a \udce9"}, r"'a \\udce9' is not UTF-8"),
        ({"prompt": "a cat", "identifier": "sks"}, r"--identifier has no effect: write \[V\]"),
        ({"prompt": "a cat", "model": "toy", "num_images": 0}, "--num_images is 0: give 1 or more"),
        ({"prompt": "a cat", "model": "toy", "num_inference_steps": 0}, "--num_inference_steps is 0"),
        ({"prompt": "a cat", "model": "toy", "guidance_scale": math.nan}, "--guidance_scale is nan"),
        ({"prompt": "a cat", "model": "toy", "seed": -1}, "--seed is -1: give a number from 0 to 4294967295"),
    ],
)
def test_generate_refuses_what_cannot_be(options, said):
    with pytest.raises(InputError, match=said):
        GenerateOptions(**options).check()


# Slips of the hand


@pytest.mark.parametrize(
    "slip, nearest",
    [
        ("--learning_rat", "--learning_rate"),
        ("--instance-dir", "--instance_dir"),
        ("--masks", "--mask"),
        ("--sam", "--sam_model"),
        ("--train_steps", "--max_train_steps"),
    ],
)
def test_an_unknown_flag_names_the_nearest(capsys, slip, nearest):
    assert refused(capsys, "train", slip, "1") == f"error: unknown option {slip}: did you mean {nearest}?"
    assert refused(capsys, "train", f"{slip}=1") == f"error: unknown option {slip}: did you mean {nearest}?"


@pytest.mark.parametrize(
    "word, ours",
    [
        *(("network_dim", "rank"), ("network_alpha", "lora_alpha"), ("train_data_dir", "instance_dir")),
        *(("min_snr_gamma", "snr_gamma"), ("batch_size", "train_batch_size"), ("resume", "resume_from_checkpoint")),
    ],
)
def test_an_option_of_another_trainer_names_ours(capsys, word, ours):
    assert refused(capsys, "train", f"--{word}", "8") == f"error: unknown option --{word}: it is --{ours} here"


@pytest.mark.parametrize("word", ["--clip_skip", "--xformers", "--width"])
def test_an_option_that_does_nothing_of_ours_names_none(capsys, word):
    assert refused(capsys, "train", word, "8") == f"error: unknown option {word}: --help lists all"


def test_names_of_other_trainers_are_no_options_of_ours_and_mean_one_thing():
    words = [word for entry in fields(TrainOptions) for word in entry.metadata["elsewhere"]]
    assert len(words) == len(set(words))
    assert not {entry.name for entry in fields(TrainOptions)} & set(words)


def test_flags_are_not_abbreviated(capsys):
    assert "unknown option --max_train: did you mean --max_train_steps?" in refused(capsys, "train", "--max_train", "1")


@pytest.mark.parametrize("key, nearest", [("learning_rat", "learning_rate"), ("maskdir", "mask_dir")])
def test_an_unknown_yaml_key_names_the_nearest(capsys, config, key, nearest):
    path = config(f"{key}: 1")
    assert refused(capsys, "train", "--config", path) == f"error: {path}: unknown option {key}: did you mean {nearest}?"


def test_an_unknown_command_names_the_nearest(capsys):
    assert refused(capsys, "trian") == "error: unknown command trian: did you mean train?"
    assert "unknown command --verbose" in refused(capsys, "--verbose")


@pytest.mark.parametrize(
    "name, value, wanted",
    [
        ("rank", "two", "a whole number"),
        ("rank", "1.5", "a whole number"),
        ("resolution", "large", "a whole number"),
        ("learning_rate", "fast", "a number"),
        ("adam_beta1", "fast", "a number"),
        ("method", "lorra", "one of 'lora', 'full'"),
        ("mixed_precision", "fp8", "one of 'no', 'fp16', 'bf16'"),
    ],
)
def test_a_value_of_the_wrong_type_says_what_is_wanted(capsys, config, name, value, wanted):
    said = f"--{name} is {value}: give {wanted}"
    assert refused(capsys, "train", f"--{name}", value) == f"error: {said}"
    path = config(f"{name}: {value}")
    assert refused(capsys, "train", "--config", path) == f"error: {path}: {said}"


def test_yaml_words_that_are_not_text_want_quotes(capsys, config):
    """In YAML a bare no is false, and 123 is a number."""
    line = refused(capsys, "train", "--config", config("mixed_precision: no"))
    assert line.endswith("--mixed_precision is False: give one of 'no', 'fp16', 'bf16'")
    line = refused(capsys, "train", "--config", config("class_name: 123"))
    assert line.endswith("--class_name is 123: give text, in quotes")
    assert parse("--config", config("mixed_precision: 'no'")).mixed_precision == "no"


@pytest.mark.parametrize("content", ["a: [", "{", "\t- x", "a: 'b", "instance_prompt: [V] cat", "\0"])
def test_malformed_yaml_is_refused_with_its_name(capsys, config, content):
    path = config(content)
    assert refused(capsys, "train", "--config", path).startswith(f"error: {path} is not YAML (")


def test_a_yaml_file_that_is_not_text_is_refused_with_its_name(capsys, tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"\xff\xfe\x00")
    line = refused(capsys, "train", "--config", str(tmp_path / "weights.bin"))
    assert line.startswith(f"error: {tmp_path / 'weights.bin'} is not YAML (")


def test_a_key_that_stands_twice_in_a_file_is_refused(capsys, config):
    line = refused(capsys, "train", "--config", config("rank: 4\nseed: 1\nrank: 8\n"))
    assert line.endswith("options.yaml: rank is given twice: keep one line")


@pytest.mark.parametrize("number", ["-1", "-1e-4", "-.5", "-0.5"])
def test_a_negative_number_is_a_value(number):
    assert parse("--noise_offset", number).noise_offset == float(number)


@pytest.mark.parametrize("content", ["", "# nothing yet\n", "- a\n- b\n", "just words", "3"])
def test_yaml_without_options_is_refused_with_its_name(capsys, config, content):
    path = config(content)
    assert refused(capsys, "train", "--config", path) == f"error: {path} holds no options: write lines such as rank: 4"


def test_a_config_file_that_is_not_there_is_named(capsys, tmp_path):
    assert "none.yaml" in refused(capsys, "train", "--config", str(tmp_path / "none.yaml"))
    assert str(tmp_path) in refused(capsys, "train", "--config", str(tmp_path))


@pytest.mark.parametrize("arguments", [[""], [" "], ["'x'"], ["x y"], ["--"], ["-x"], ["--mask"], ["--unmasked=maybe"]])
def test_stray_words_are_refused(capsys, arguments):
    refused(capsys, "train", *arguments)


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["train", "--instance_dir", "cat/00.jpg", "cat/01.jpg"], "cat/01.jpg"),  # the shell expanded cat/*.jpg
        (["train", "--unmasked", "true"], "true"),
        (["generate", "a", "[V]", "cat"], "[V]"),
    ],
)
def test_a_second_value_is_not_called_an_unknown_option(capsys, arguments, word):
    assert refused(capsys, *arguments).startswith(f"error: unexpected {word!r}: an option takes one value ")


def test_an_option_without_its_dashes_is_named(capsys):
    assert refused(capsys, "train", "rank=4") == "error: unknown option rank: did you mean --rank?"


@pytest.mark.parametrize("arguments", [["x"], ["--output_dir"], ["--steps", "3"], ["--photos", "painted"]])
def test_demo_takes_an_output_folder_and_a_kind_of_photos_and_nothing_else(capsys, arguments):
    refused(capsys, "demo", *arguments)


def test_without_a_command_the_commands_are_listed(capsys):
    assert cli.main([]) == 2
    assert cli.main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(f"persam-dreambooth {command}" in listed for command in COMMANDS)


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{persam_dreambooth.__version__}\n"


def test_train_main_reads_the_arguments_of_the_program(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_dreambooth_masked.py", "--rank", "two"])
    assert cli.train_main() == 2
    assert capsys.readouterr().err == "error: --rank is two: give a whole number\n"


# Weight


def test_help_and_import_are_quick_and_load_nothing_heavy(tmp_path):
    script = f"""
import contextlib, io, sys, time
import persam_dreambooth
import persam_dreambooth.cli as cli
assert time.process_time() < 3, time.process_time()
for command in {COMMANDS}:
    for flag in ("--help", "-h"):
        text, started = io.StringIO(), time.process_time()
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            cli.main([*command.split(), flag])
        assert "usage" in text.getvalue(), command
        assert time.process_time() - started < 1, command
heavy = {HEAVY} & set(sys.modules)
assert not heavy, heavy
"""
    done = python("-c", script, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_missing_folder_is_noticed_before_anything_heavy_is_imported(tmp_path):
    script = f"""
import sys
from persam_dreambooth.cli import main
assert main(["train", "--instance_dir", "none", "--mask", "none.png"]) == 2
heavy = {HEAVY} & set(sys.modules)
assert not heavy, heavy
"""
    done = python("-c", script, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        0,
        "error: none does not exist: name the folder that holds the photos\n",
    )


def test_both_programs_say_one_line_and_exit_with_2(tmp_path):
    for program in (["-m", "persam_dreambooth", "train"], [str(ROOT / "train_dreambooth_masked.py")]):
        done = python(*program, "--rank", "two", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "error: --rank is two: give a whole number\n"
        done = python(*program, "--help", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert "--instance_dir" in done.stdout


@pytest.mark.slow
def test_the_program_trains_in_half_precision_and_its_configuration_is_taken_back(tmp_path, monkeypatch):
    for name in ("00.jpg", "01.jpg"):
        picture = Image.new("RGB", (96, 96), (90, 120, 90))
        ImageDraw.Draw(picture).ellipse((20, 20, 60, 60), fill=(200, 30, 30))
        (tmp_path / "red ball").mkdir(exist_ok=True)
        picture.save(tmp_path / "red ball" / name)
    mask = Image.new("L", (96, 96))
    ImageDraw.Draw(mask).ellipse((20, 20, 60, 60), fill=255)
    mask.save(tmp_path / "00_mask.png")
    (tmp_path / "toy.yaml").write_text("pretrained_model_name_or_path: toy\nsam_model: toy\nlearning_rate: 1e-6\n")
    flags = ["--config", "toy.yaml", "--instance_dir", "red ball", "--mask", "00_mask.png", "--segmenter", "persam"]
    flags += ["--max_train_steps", "2", "--num_validation_images", "1", "--mixed_precision", "bf16"]
    done = python(str(ROOT / "train_dreambooth_masked.py"), *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("done: outputs/red ball; see ")
    run = tmp_path / "outputs" / "red ball"
    for made in ("config.yaml", "masks/00.png", "overview.png", "metrics.jsonl", "README.md", "samples"):
        assert (run / made).exists(), made
    head, *_ = (run / "config.yaml").read_text(encoding="utf-8").splitlines()
    assert head.startswith(f"# persam-dreambooth {persam_dreambooth.__version__}")
    monkeypatch.chdir(tmp_path)
    resolved = parse(*flags).resolved(resolution=64, mixed_precision="bf16", learning_rate=1e-4)
    saved = with_absolute_paths(asdict(resolved), TrainOptions)
    assert asdict(parse("--config", str(run / "config.yaml"))) == saved
    assert saved["instance_dir"] == str(tmp_path / "red ball")
    assert (resolved.subject, resolved.learning_rate) == ("red ball", 1e-6)


def test_saved_options_with_other_photos_are_for_their_class(config):
    """What followed from the first photos' folder does not stick to the next; what was given does."""
    saved = TrainOptions(instance_dir="photos/cat", mask="m.png", identifier="zwx").resolved(64, "no", 1e-4)
    path = config(yaml.safe_dump(asdict(saved)))
    options = parse("--config", path, "--instance_dir", "photos/dog")
    prompts = [options.prompt("instance"), options.prompt("class"), *options.sample_prompts]
    assert prompts == ["a zwx dog", "a dog", "a zwx dog on a beach"]
    given = TrainOptions(instance_dir="photos/1", mask="m.png", class_name="cat", instance_prompt="[V], a pet")
    path = config(yaml.safe_dump(asdict(given.resolved(64, "no", 1e-4))))
    options = parse("--config", path, "--instance_dir", "photos/2")
    assert (options.prompt("instance"), options.prompt("class")) == ("sks, a pet", "a cat")
