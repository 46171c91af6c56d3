"""Parity with the authors' PerSAM and PerSAM-F, one stage at a time; `golden/README.md` says what was recorded.

Each stage gets the recorded input of that stage, so a difference names the stage that made it.
`check(Published(folder))` does the same on another folder of this shape.

C channels of the image embedding, H W photo size; logits are (masks, 256, 256); points xy, boxes x0 y0 x1 y1 inclusive.
"""

import hashlib
import json
from collections.abc import Callable, Hashable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import SamModel

from persam_dreambooth.photos.images import read_image
from persam_dreambooth.photos.masks import read_mask
from persam_dreambooth.segmentation import PerSAM, PerSAMF, open_sam
from persam_dreambooth.segmentation.location_prior import at_photo_size
from persam_dreambooth.segmentation.scale_weights import fit_scale_weights
from persam_dreambooth.segmentation.target_guided_attention import attention_bias
from persam_dreambooth.segmentation.target_semantic_prompting import Guidance

GOLDEN = Path(__file__).parent / "golden"
SUBJECTS = ("cat", "colorful_sneaker")
PHOTOS = tuple(f"{subject}/{number}" for subject in SUBJECTS for number in ("00", "01", "02"))
PHOTOS_WITH_LOGITS = tuple(photo for photo in PHOTOS if not photo.endswith("/00"))

every_photo = pytest.mark.parametrize("photo", PHOTOS)
every_photo_with_logits = pytest.mark.parametrize("photo", PHOTOS_WITH_LOGITS)
every_subject = pytest.mark.parametrize("subject", SUBJECTS)

# A PerSeg mask is dark red (128), and the published code takes a cell as target where red exceeds SAM's mean, 123.675.
PERSEG_COVERAGE = 123.675 / 128
POSITIVE_AND_NEGATIVE = np.array([1, 0])
POSITIVE = np.array([1])


SEGMENTERS = {
    "persam": lambda sam: PerSAM(sam, guidance="published", target_coverage=PERSEG_COVERAGE),
    "persam, bias aligned": lambda sam: PerSAM(sam, guidance="persam", target_coverage=PERSEG_COVERAGE),
    "persam_f": lambda sam: PerSAMF(sam, target_coverage=PERSEG_COVERAGE),
}


class Published:
    """A folder of recorded results beside this package's answers on the same photos, computed when first asked for.

    Args:
        folder: laid out like `golden/`. A photo is named `<subject>/<number>`; number 00 is the subject's reference.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._answers: dict[Hashable, Any] = {}

    @cached_property
    def sam(self):
        """The small SAM; it encodes each photo once, whoever asks."""
        sam = open_sam(str(self.folder / "weights" / "hf"), device="cpu")
        encode = sam.encode
        sam.encode = lambda image: self._once(("encoding", image.tobytes()), lambda: encode(image))
        return sam

    def photos(self) -> tuple[str, ...]:
        images = self.folder / "perseg" / "Images"
        return tuple(sorted(path.relative_to(images).with_suffix("").as_posix() for path in images.glob("*/*.jpg")))

    def image(self, photo: str):
        return read_image(self.folder / "perseg" / "Images" / f"{photo}.jpg")

    def mask(self, photo: str) -> np.ndarray:
        return read_mask(self.folder / "perseg" / "Annotations" / f"{photo}.png")

    def recorded(self, method: str, name: str) -> dict[str, np.ndarray]:
        """Arrays of `method` (persam, persam_f) for a photo, or for `<subject>/train`."""
        with np.load(self.folder / method / f"{name.replace('/', '_')}.npz") as arrays:
            return dict(arrays)

    def encoding(self, photo: str):
        return self.sam.encode(self.image(photo))

    def fitted(self, method: str, subject: str):
        """PerSAM or PerSAM-F (see SEGMENTERS) fitted on the subject's reference."""
        image, mask = self.image(f"{subject}/00"), self.mask(f"{subject}/00")
        return self._once(("fitted", method, subject), lambda: SEGMENTERS[method](self.sam).fit(image, mask))

    def found(self, method: str, photo: str):
        return self._once(
            ("found", method, photo), lambda: self.fitted(method, subject_of(photo)).predict(self.image(photo))
        )

    def scale_weights(self, subject: str) -> tuple[np.ndarray, np.ndarray]:
        """PerSAM-F's weights (3,) and losses (epochs, 2) from the recorded logits of the reference."""
        train, reference = self.recorded("persam_f", f"{subject}/train"), f"{subject}/00"
        logits = self.sam.upscale(torch.from_numpy(dequantized(train, "train_logits_q")), self.encoding(reference))
        return self._once(
            ("scale weights", subject),
            lambda: fit_scale_weights([(logits, self.mask(reference))], steps=int(train["epochs"])),
        )

    def _once(self, key: Hashable, answer: Callable[[], Any]) -> Any:
        if key not in self._answers:
            self._answers[key] = answer()
        return self._answers[key]


@pytest.fixture(scope="module")
def published() -> Published:
    return Published(GOLDEN)


def subject_of(photo: str) -> str:
    return photo.split("/")[0]


def dequantized(arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Logits stored as int16 with one scale: `ref1_best_logits_q` and `ref1_logits_q` go with `ref1_scale`."""
    scale = name.removesuffix("_q").removesuffix("_logits").removesuffix("_best") + "_scale"
    return arrays[name].astype(np.float32) * arrays[scale]


def chosen_logits(arrays: dict[str, np.ndarray], step: str) -> np.ndarray:
    """Recorded logits (256, 256) of the mask that a refinement took, from a record of that mask or of all three."""
    if f"{step}_best_logits_q" in arrays:
        return dequantized(arrays, f"{step}_best_logits_q")
    return dequantized(arrays, f"{step}_logits_q")[arrays[f"{step}_best"]]


def recorded_mask(arrays: dict[str, np.ndarray]) -> np.ndarray:
    height, width = arrays["mask_shape"]
    return np.unpackbits(arrays["mask_bits"])[: height * width].reshape(height, width).astype(bool)


def recorded_guidance(arrays: dict[str, np.ndarray]) -> Guidance:
    target = torch.from_numpy(arrays["target_embedding"]).flatten()
    return Guidance(bias=torch.from_numpy(arrays["attn_sim"]), target=target)


def foreground(published: Published, photo: str, logits: np.ndarray) -> np.ndarray:
    """Mask (H, W) of low-resolution logits (256, 256)."""
    upscaled = published.sam.upscale(torch.as_tensor(logits)[None], published.encoding(photo))
    return (upscaled[0] > 0).numpy()


def assert_boxed(published: Published, photo: str, logits: np.ndarray | torch.Tensor, recorded: np.ndarray) -> None:
    """The tight box of logits (256, 256), within the pixel that int16 rounding can move."""
    box = published.sam.mask_box(torch.as_tensor(logits), published.encoding(photo))
    assert np.abs(box - recorded).max() <= 1


def location_prior(published: Published, photo: str, similarity: np.ndarray) -> np.ndarray:
    """Similarity (64, 64) at the photo's size, (H, W), where its extremes are the points."""
    return at_photo_size(torch.from_numpy(similarity), published.sam, published.encoding(photo)).numpy()


def iou(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())


def assert_same_logits(found: torch.Tensor | np.ndarray, recorded: np.ndarray) -> None:
    """Within 1e-3 of the step's largest |logit|; int16 rounding is 1.5e-5 of it."""
    found = np.asarray(found)
    assert found.shape == recorded.shape
    assert np.abs(found - recorded).max() <= 1e-3 * np.abs(recorded).max()


def assert_same_scores(found: torch.Tensor | np.ndarray, recorded: np.ndarray, best: np.ndarray | None = None) -> None:
    found = np.asarray(found)
    assert found.shape == recorded.shape
    np.testing.assert_allclose(found, recorded, rtol=0, atol=2e-4)
    if best is not None:
        assert found.argmax() == best


def assert_extremes(prior: np.ndarray, highest: np.ndarray, lowest: np.ndarray | None = None) -> None:
    """Points lie where `prior` (H, W) is as high and as low as anywhere, up to float32 noise: ties are common."""
    assert prior[highest[1], highest[0]] >= prior.max() - 2e-5
    if lowest is not None:
        assert prior[lowest[1], lowest[0]] <= prior.min() + 2e-5


# Photos and embeddings


@every_photo
def test_golden_photos_decode_to_the_recorded_pixels(published, photo):
    recorded = json.loads((published.folder / "images.json").read_text())[photo]
    pixels = np.asarray(published.image(photo))
    assert list(pixels.shape[:2]) == recorded["size_hw"]
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == recorded["rgb_sha256"]


@every_photo
def test_against_published_image_embedding(published, photo):
    encoding = published.encoding(photo)
    probe = published.recorded("persam", photo)["embedding_probe"]
    assert encoding.size == published.mask(photo).shape
    np.testing.assert_allclose(encoding.embedding[0, :, ::8, ::8].numpy(), probe, rtol=0, atol=1e-4)


# PerSAM


@every_photo
def test_against_published_persam_target_embedding(published, photo):
    recorded = published.recorded("persam", photo)["target_embedding"].ravel()
    found = published.fitted("persam", subject_of(photo)).target_embedding
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), recorded, rtol=0, atol=1e-4)


@every_photo
def test_against_published_persam_similarity(published, photo):
    recorded = published.recorded("persam", photo)["sim64"]
    found = published.found("persam", photo).similarity
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, recorded, rtol=0, atol=1e-4)


@every_photo
def test_against_published_persam_points(published, photo):
    recorded = published.recorded("persam", photo)
    prior = location_prior(published, photo, recorded["sim64"])
    assert prior.shape == published.mask(photo).shape
    assert_extremes(prior, *recorded["points_xy"])
    found = published.found("persam", photo).points
    assert found.shape == (2, 2)
    assert_extremes(prior, *found)


@every_photo
def test_against_published_persam_attention_bias(published, photo):
    recorded = published.recorded("persam", photo)
    similarity = torch.from_numpy(recorded["sim64"])
    found = attention_bias(similarity, published.sam, published.encoding(photo), kind="published")
    np.testing.assert_allclose(found.numpy(), recorded["attn_sim"], rtol=0, atol=1e-4)


def guided_step(published: Published, photo: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The first pass with the recorded points, bias and target."""
    recorded = published.recorded("persam", photo)
    return published.sam.decode(
        published.encoding(photo),
        recorded["points_xy"],
        POSITIVE_AND_NEGATIVE,
        multimask=False,
        guidance=recorded_guidance(recorded),
    )


@every_photo_with_logits
def test_against_published_persam_step_1_logits(published, photo):
    logits, _ = guided_step(published, photo)
    assert_same_logits(logits, published.recorded("persam", photo)["step1_logits"])


@every_photo
def test_against_published_persam_step_1_predicted_iou(published, photo):
    _, scores = guided_step(published, photo)
    assert_same_scores(scores, published.recorded("persam", photo)["step1_iou"])


@every_photo_with_logits
def test_against_published_persam_mask_areas(published, photo):
    recorded = published.recorded("persam", photo)
    step_1 = foreground(published, photo, recorded["step1_logits"][0])
    refined = foreground(published, photo, chosen_logits(recorded, "ref1"))
    pixels = refined.size
    assert abs(int(step_1.sum()) - int(recorded["step1_area"])) <= 1e-4 * pixels
    assert abs(int(refined.sum()) - int(recorded["ref1_area"])) <= 1e-4 * pixels


@every_photo_with_logits
def test_against_published_persam_refinement_1(published, photo):
    recorded = published.recorded("persam", photo)
    logits, scores = published.sam.decode(
        published.encoding(photo),
        recorded["points_xy"],
        POSITIVE_AND_NEGATIVE,
        mask_logits=torch.from_numpy(recorded["step1_logits"][0]),
    )
    best = int(recorded["ref1_best"])
    assert_same_scores(scores, recorded["ref1_iou"], best)
    assert_same_logits(logits[best], chosen_logits(recorded, "ref1"))
    if "ref1_logits_q" in recorded:
        assert_same_logits(logits, dequantized(recorded, "ref1_logits_q"))


@every_photo_with_logits
def test_against_published_persam_box(published, photo):
    recorded = published.recorded("persam", photo)
    assert_boxed(published, photo, chosen_logits(recorded, "ref1"), recorded["box"])


@every_photo_with_logits
def test_against_published_persam_refinement_2(published, photo):
    recorded = published.recorded("persam", photo)
    logits, scores = published.sam.decode(
        published.encoding(photo),
        recorded["points_xy"],
        POSITIVE_AND_NEGATIVE,
        box=recorded["box"],
        mask_logits=torch.from_numpy(chosen_logits(recorded, "ref1")),
    )
    best = int(recorded["ref2_best"])
    assert_same_scores(scores, recorded["ref2_iou"], best)
    assert_same_logits(logits[best], chosen_logits(recorded, "ref2"))
    assert iou(foreground(published, photo, logits[best]), recorded_mask(recorded)) >= 0.999


@every_photo
def test_against_published_persam_from_photo_to_mask(published, photo):
    recorded = published.recorded("persam", photo)
    found = published.found("persam", photo)
    assert found.mask.dtype == bool
    assert found.mask.shape == published.mask(photo).shape
    assert iou(found.mask, recorded_mask(recorded)) >= 0.995
    assert found.score == pytest.approx(recorded["ref2_iou"].max(), abs=5e-3)
    assert np.abs(found.box - recorded["box"]).max() <= 2


@every_photo
def test_persam_passes_are_one_guided_then_two_refinements(published, photo):
    recorded = published.recorded("persam", photo)
    steps = published.found("persam", photo).steps
    assert [step.low_res_logits.shape for step in steps] == [(1, 256, 256), (3, 256, 256), (3, 256, 256)]
    for step, scores in zip(steps, ("step1_iou", "ref1_iou", "ref2_iou"), strict=True):
        np.testing.assert_allclose(step.scores, recorded[scores], rtol=0, atol=5e-3)
    assert steps[0].box is None
    assert steps[1].box is None
    assert np.abs(steps[2].box - recorded["box"]).max() <= 2


# What makes the guided pass PerSAM's own


@every_photo_with_logits
def test_transformers_own_attention_similarity_is_not_the_published_guidance(published, photo):
    """transformers adds the bias before one softmax and leaves the target out of the last attention: another mask."""
    recorded = published.recorded("persam", photo)
    encoding = published.encoding(photo)
    points = torch.from_numpy(recorded["points_xy"]).float() * 1024 / max(encoding.size)
    model = SamModel.from_pretrained(published.folder / "weights" / "hf").eval()
    prompts = {"input_points": points[None, None], "input_labels": torch.from_numpy(POSITIVE_AND_NEGATIVE)[None, None]}
    guidance = {
        "attention_similarity": torch.from_numpy(recorded["attn_sim"])[None, None, None],
        "target_embedding": torch.from_numpy(recorded["target_embedding"]),
    }
    with torch.no_grad():
        plain = model(image_embeddings=encoding.embedding, multimask_output=False, **prompts)
        theirs = model(image_embeddings=encoding.embedding, multimask_output=False, **prompts, **guidance)
    ours, _ = published.sam.decode(encoding, recorded["points_xy"], POSITIVE_AND_NEGATIVE, multimask=False)
    assert_same_logits(ours, plain.pred_masks[0, 0].numpy())  # the prompts agree; only the guidance differs
    difference = np.abs(theirs.pred_masks[0, 0].numpy() - recorded["step1_logits"]).mean()
    assert difference > 0.5
    masks = [
        foreground(published, photo, logits) for logits in (theirs.pred_masks[0, 0, 0], recorded["step1_logits"][0])
    ]
    assert iou(*masks) < 0.9


@every_subject
def test_padding_aligned_guidance_differs_from_the_published_one_only_off_the_square(published, subject):
    """The published bias is stretched over the padding; on a square photo there is none."""
    for photo in (f"{subject}/01", f"{subject}/02"):
        aligned = published.found("persam, bias aligned", photo).steps[0].low_res_logits
        stretched = published.found("persam", photo).steps[0].low_res_logits
        height, width = published.mask(photo).shape
        if height == width:
            np.testing.assert_allclose(aligned, stretched, rtol=0, atol=1e-5)
        else:
            assert np.abs(aligned - stretched).mean() > 0.02


# PerSAM-F


@every_subject
def test_against_published_persam_f_similarity_of_max_and_mean(published, subject):
    recorded = published.recorded("persam_f", f"{subject}/train")
    found = published.found("persam_f", f"{subject}/00").similarity
    np.testing.assert_allclose(found, recorded["sim64"], rtol=0, atol=1e-4)
    assert_extremes(location_prior(published, f"{subject}/00", recorded["sim64"]), recorded["train_point_xy"][0])


@every_photo
def test_against_published_persam_f_point(published, photo):
    recorded = published.recorded("persam_f", photo)["points_xy"]
    found = published.found("persam_f", photo)
    prior = location_prior(published, photo, found.similarity)
    assert found.points.shape == (1, 2)
    assert_extremes(prior, found.points[0])
    assert_extremes(prior, recorded[0])


@every_subject
def test_against_published_persam_f_reference_logits(published, subject):
    recorded = published.recorded("persam_f", f"{subject}/train")
    logits, scores = published.sam.decode(published.encoding(f"{subject}/00"), recorded["train_point_xy"], POSITIVE)
    assert_same_scores(scores, recorded["train_iou"])
    assert_same_logits(logits, dequantized(recorded, "train_logits_q"))


@every_subject
def test_against_published_persam_f_losses_of_every_epoch(published, subject):
    recorded = published.recorded("persam_f", f"{subject}/train")["loss"]
    _, losses = published.scale_weights(subject)
    assert losses.shape == recorded.shape
    np.testing.assert_allclose(losses, recorded, rtol=0, atol=2e-6)  # a wrong Adam eps shows at 1e-5


@every_subject
def test_against_published_persam_f_weights(published, subject):
    second, third = published.recorded("persam_f", f"{subject}/train")["weights"]
    expected = [1 - second - third, second, third]
    from_recorded_logits, _ = published.scale_weights(subject)
    np.testing.assert_allclose(from_recorded_logits, expected, rtol=0, atol=2e-3)
    from_the_photo = published.fitted("persam_f", subject).weights
    assert from_the_photo.shape == (3,)
    assert from_the_photo.sum() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(from_the_photo, expected, rtol=0, atol=2e-3)


@every_photo
def test_against_published_persam_f_step_1(published, photo):
    recorded = published.recorded("persam_f", photo)
    second, third = published.recorded("persam_f", f"{subject_of(photo)}/train")["weights"]
    logits, scores = published.sam.decode(published.encoding(photo), recorded["points_xy"], POSITIVE)
    assert_same_scores(scores, recorded["step1_iou"])
    weights = torch.tensor([1 - second - third, second, third])
    combined = (weights[:, None, None] * logits).sum(0)
    if "step1_combined_q" in recorded:
        assert_same_logits(combined, dequantized(recorded, "step1_combined_q"))
    assert_boxed(published, photo, combined, recorded["box1"])


@every_photo_with_logits
def test_against_published_persam_f_refinements(published, photo):
    """Both take the point, a box and the previous logits; the scale weights act on the first pass only."""
    recorded = published.recorded("persam_f", photo)
    logits = torch.from_numpy(dequantized(recorded, "step1_combined_q"))
    for step, box in (("ref1", "box1"), ("ref2", "box2")):
        assert_boxed(published, photo, logits, recorded[box])
        candidates, scores = published.sam.decode(
            published.encoding(photo), recorded["points_xy"], POSITIVE, box=recorded[box], mask_logits=logits
        )
        best = int(recorded[f"{step}_best"])
        assert_same_scores(scores, recorded[f"{step}_iou"], best)
        logits = candidates[best]
    assert iou(foreground(published, photo, logits), recorded_mask(recorded)) >= 0.999


@every_photo
def test_against_published_persam_f_from_photo_to_mask(published, photo):
    recorded = published.recorded("persam_f", photo)
    found = published.found("persam_f", photo)
    assert iou(found.mask, recorded_mask(recorded)) >= 0.995
    assert found.score == pytest.approx(recorded["ref2_iou"].max(), abs=5e-3)
    assert found.steps[0].box is None
    assert np.abs(found.steps[1].box - recorded["box1"]).max() <= 2
    assert np.abs(found.steps[2].box - recorded["box2"]).max() <= 2
    assert np.abs(found.box - recorded["box2"]).max() <= 2


# Scores


@pytest.mark.parametrize(
    ("method", "subject", "expected_iou", "expected_accuracy"),
    [
        ("persam", "cat", 54.89, 90.12),
        ("persam", "colorful_sneaker", 43.27, 74.09),
        ("persam_f", "cat", 49.50, 88.90),
        ("persam_f", "colorful_sneaker", 41.70, 71.22),
    ],
)
def test_against_published_scores(published, method, subject, expected_iou, expected_accuracy):
    """IoU and accuracy (recall) in percent over the pixels of all photos but the reference."""
    photos = [photo for photo in published.photos() if subject_of(photo) == subject and not photo.endswith("/00")]
    masks = [(published.found(method, photo).mask, published.mask(photo)) for photo in photos]
    common = sum(int((found & true).sum()) for found, true in masks)
    either = sum(int((found | true).sum()) for found, true in masks)
    subject_pixels = sum(int(true.sum()) for _, true in masks)
    assert 100 * common / either == pytest.approx(expected_iou, abs=0.05)
    assert 100 * common / subject_pixels == pytest.approx(expected_accuracy, abs=0.05)


def check(published: Published) -> dict[str, AssertionError]:
    """Runs every test of one photo or one subject on another folder of the same shape.

    Returns what failed, by test and photo or subject; empty when all agree.
    """
    photos = published.photos()
    with_logits = [photo for photo in photos if "step1_logits" in published.recorded("persam", photo)]
    subjects = sorted({subject_of(photo) for photo in photos})
    failed = {}
    for name, test in list(globals().items()):
        for marker, cases in ((every_photo, photos), (every_photo_with_logits, with_logits), (every_subject, subjects)):
            if marker.mark in getattr(test, "pytestmark", ()):
                for case in cases:
                    try:
                        test(published, case)
                    except AssertionError as error:
                        failed[f"{name}[{case}]"] = error
    return failed
