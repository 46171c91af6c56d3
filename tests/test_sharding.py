"""`--fsdp`: a model in parts, one in each process, trains as a whole one in one process."""

import shutil
from pathlib import Path

import pytest
from tiny_families import save_tiny
from training_runs import SLOW, assert_same_trajectory, flags, in_two_processes, variants

KINDS = {
    "lora": {},
    "lora of flux": {"pretrained_model_name_or_path": "flux", "gradient_checkpointing": True},
    "full": {"method": "full"},
}


@pytest.mark.parametrize("options", variants(KINDS, []))
def test_shards_train_as_one_process_does_and_one_process_resumes_from_them(runs, tmp_path, options):
    options = {"masked_prior_preservation_weight": 1.0, **options}
    if name := options.get("pretrained_model_name_or_path"):
        options["pretrained_model_name_or_path"] = save_tiny(name, tmp_path)
    arguments = runs.options(output_dir=tmp_path / "two", num_validation_images=1, checkpointing_steps=2, **options)
    script = Path(__file__).with_name("watched_shards.py")
    said, _ = in_two_processes(script, "train", "--fsdp", *flags(**arguments))
    held = [float(line.split()[-1]) for line in said.splitlines() if line.startswith("share held")]
    assert len(held) == 2 * (1 + (options.get("method") == "full"))
    assert all(0.45 < share < 0.6 for share in held)
    # Weights and optimizer of two checkpoints, and the weights at the end.
    assert [said.count(f"rank {line}") for line in ("0 keeps all", "1 keeps nothing", "")] == [5, 5, 10]
    assert said.count("still kept: 0") == said.count("still kept") == 6
    # A whole model has more weights, some of whose gradients are tiny.
    rate = 5 * 5e-6 if options.get("method") == "full" else 1e-4
    assert_same_trajectory(runs(train_batch_size=2, **options), tmp_path / "two", rate)
    assert len(list((tmp_path / "two" / "samples").glob("*.png"))) == 1
    alone = {"train_batch_size": 2, "resume_from_checkpoint": "checkpoint-2", **options}
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    assert runs.train(tmp_path / "one", **alone) == 0
    assert_same_trajectory(tmp_path / "one", tmp_path / "two", rate)


@SLOW
def test_shards_resume_from_a_checkpoint_of_one_process(runs, tmp_path):
    options = {"train_batch_size": 2, "checkpointing_steps": 2, "method": "full"}
    shutil.copytree(runs(**options), tmp_path / "two")
    given = {**options, "train_batch_size": 1, "resume_from_checkpoint": "checkpoint-2"}
    arguments = runs.options(output_dir=tmp_path / "two", **given)
    in_two_processes("-m", "persam_dreambooth", "train", "--fsdp", *flags(**arguments))
    assert_same_trajectory(runs(**options), tmp_path / "two", 5 * 5e-6)


def test_one_process_does_not_shard(runs, tmp_path, capsys):
    assert runs.train(tmp_path / "run", fsdp=True) == 2
    assert "--fsdp has no effect in one process" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
