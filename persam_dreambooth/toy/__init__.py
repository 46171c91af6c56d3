"""Small checkpoints that ship, in the layout of the real ones, so that everything runs without network.

`toy` is accepted wherever a model is named. What each of them is, and is not, stands in `NOTICES`, which is logged
whenever one is loaded, and in `README.md` beside this file.
"""

from pathlib import Path

NOTICES = {
    "sam": "toy SAM: a 1M-parameter stand-in trained for half an hour on one core; expect rough masks",
    "stable-diffusion": "toy Stable Diffusion: untrained (random weights); its pictures are noise",
}


def path(kind: str) -> Path:
    """The folder of the checkpoint that ships: `sam` or `stable-diffusion`; or of the demo's photos, `photos`.

    Raises:
        ValueError: another kind.
    """
    if kind not in (*NOTICES, "photos"):
        raise ValueError(f"no toy checkpoint of kind {kind}: use sam, stable-diffusion or photos")
    return Path(__file__).parent / kind
