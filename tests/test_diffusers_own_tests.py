"""diffusers' own tests of its DreamBooth scripts, run unchanged on this trainer.

They lie in diffusers' repository, not in its package: name a checkout with DIFFUSERS_REPOSITORY. The checkpoints that
they take from the hub are random ones; the toy and the families' tiny ones stand for them, in a hub cache of their own.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny_families import tiny_pipeline
from training_runs import ROOT, toy_pipeline

REPOSITORY = os.environ.get("DIFFUSERS_REPOSITORY")
STAND_INS = {
    "tiny-stable-diffusion-torch": toy_pipeline,
    "tiny-stable-diffusion-xl-pipe": lambda: tiny_pipeline("sdxl"),
    "tiny-sd3-pipe": lambda: tiny_pipeline("sd3"),
    "tiny-flux-pipe": lambda: tiny_pipeline("flux"),
    "tiny-flux2-klein": lambda: tiny_pipeline("klein-one-layer"),
}
SCRIPTS = {
    "train_dreambooth": "full",
    "train_dreambooth_lora": "lora",
    "train_dreambooth_lora_sdxl": "lora",
    "train_dreambooth_lora_sd3": "lora",
    "train_dreambooth_lora_flux": "lora",
    "train_dreambooth_lora_flux2_klein": "lora",
}
SHIM = """import sys
from persam_dreambooth import cli
added = ["--unmasked", "--method", "{method}", "--num_validation_images", "0"]
sys.exit(cli.main(["train", *sys.argv[1:], *added]))
"""
NOT_OURS = "not dreambooth_if and not if_model and not captions and not lora_block"
"""What is left out: DeepFloyd IF is no family here, the hub's data set of captions is not at hand, and for
`--lora_blocks` there is `--lora_targets`, which takes the endings of layers' names.
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not REPOSITORY, reason="DIFFUSERS_REPOSITORY names no checkout of diffusers"),
]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder like diffusers' checkout, with our trainer in place of its scripts."""
    root = tmp_path_factory.mktemp("diffusers")
    scripts, pictures = root / "examples" / "dreambooth", root / "docs" / "source" / "en" / "imgs"
    for folder in (scripts, pictures):
        folder.mkdir(parents=True)
    for number in range(2):
        Image.effect_noise((96, 80), 60 + number).convert("RGB").save(pictures / f"{number}.png")
    shutil.copy(Path(str(REPOSITORY)) / "examples" / "test_examples_utils.py", root / "examples")
    for name, method in SCRIPTS.items():
        (scripts / f"{name}.py").write_text(SHIM.format(method=method))
    for name, pipeline in STAND_INS.items():
        kept, commit = root / "hub" / f"models--hf-internal-testing--{name}", "0" * 40
        pipeline().save_pretrained(kept / "snapshots" / commit)
        (kept / "refs").mkdir()
        (kept / "refs" / "main").write_text(commit)
    return root


@pytest.mark.parametrize(
    "file",
    [
        *("test_dreambooth.py", "test_dreambooth_lora.py", "test_dreambooth_lora_sd3.py"),
        *("test_dreambooth_lora_flux.py", "test_dreambooth_lora_flux2_klein.py"),
    ],
)
def test_they_pass_unchanged(checkout, file):
    shutil.copy(Path(str(REPOSITORY)) / "examples" / "dreambooth" / file, checkout / "examples" / "dreambooth")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    own = {"PATH": path, "HF_HUB_CACHE": str(checkout / "hub"), "HF_HUB_OFFLINE": "1"}
    modules = os.pathsep.join([str(ROOT), str(checkout / "examples")])
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "--durations=0", "-k", NOT_OURS, f"examples/dreambooth/{file}"],
        cwd=checkout, env={**os.environ, **own, "PYTHONPATH": modules}, capture_output=True, text=True,
    )  # fmt: skip
    print(ended.stdout[-3000:])
    assert ended.returncode == 0
