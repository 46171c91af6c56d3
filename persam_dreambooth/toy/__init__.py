"""The toy world, with known truth, and small checkpoints trained on it, so that everything runs offline.

Every option that takes a model accepts `toy`, and one that takes a SAM also `toy-sam2`. `NOTICES` says what each
checkpoint can do, and is logged when one is loaded; `README.md` beside this file says more.
"""

from pathlib import Path

NOTICES = {
    "sam": "toy SAM: 3.1M parameters, trained on a rendered world and 46 photos; expect rough masks of real photos",
    "sam2": "toy SAM 2: 3.9M parameters, trained on such pictures at 512 pixels; expect rough masks of real photos",
    "stable-diffusion": "toy Stable Diffusion: trained on a rendered world of 6 kinds in 8 places; knows nothing else",
}


def path(kind: str) -> Path:
    """The folder of a toy checkpoint: `sam`, `sam2`, `stable-diffusion`, `evaluator`; or `photos` of a real toy duck.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in (*NOTICES, "evaluator", "photos"):
        raise ValueError(f"no toy checkpoint of kind {kind}: use sam, sam2, stable-diffusion, evaluator or photos")
    return Path(__file__).parent / kind
