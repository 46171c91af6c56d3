"""A small world with known truth, and small checkpoints trained on it that ship, so that everything runs offline.

`toy` is accepted wherever a model is named. What each checkpoint is, and is not, stands in `NOTICES`, which is logged
whenever one is loaded, and in `README.md` beside this file.
"""

from pathlib import Path

NOTICES = {
    "sam": "toy SAM: 2.3M parameters, trained on a drawn world and textures; expect rough masks of real photos",
    "stable-diffusion": "toy Stable Diffusion: trained on a drawn world of 6 kinds in 8 places; knows nothing else",
}


def path(kind: str) -> Path:
    """The folder of what ships: `sam`, `stable-diffusion`, `evaluator`, or `photos` of a real toy duck.

    Raises:
        ValueError: another kind.
    """
    if kind not in (*NOTICES, "evaluator", "photos"):
        raise ValueError(f"no toy checkpoint of kind {kind}: use sam, stable-diffusion, evaluator or photos")
    return Path(__file__).parent / kind
