"""The package as a library: its names, progress, threads, saved segmenters, what is refused."""

import inspect
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from small_sams import save_every_kind
from tiny_sam import tiny_model

import persam_dreambooth
from persam_dreambooth import (
    Cancelled,
    InputError,
    InputNotFoundError,
    PerSAM,
    PerSAMF,
    Progress,
    Sam,
    UnavailableError,
    VideoSegmenter,
    find_instances,
    models,
    open_sam,
    personalize,
    read_image,
    read_mask,
    reporting,
    segment,
    toy,
)
from persam_dreambooth.dreambooth.hub import check_login, push
from persam_dreambooth.main_job import TrainOptions
from persam_dreambooth.options import read_config
from persam_dreambooth.photos.folder import Photo
from persam_dreambooth.photos.mask_folder import MaskRecord, PhotoMask
from persam_dreambooth.progress import showing_bars, steps
from persam_dreambooth.segmentation.sams.sam_hq import SamHQ
from persam_dreambooth.segmentation.segment import SegmentOptions
from persam_dreambooth.segmentation.target_semantic_prompting import GuidedTransformer

ROOT = Path(__file__).parents[1]
PHOTOS = toy.path("photos") / "duck"
MASK = toy.path("photos") / "duck_mask" / "00.png"
PICTURE = np.zeros((64, 48, 3), np.uint8)


@pytest.fixture(scope="module")
def sam(encodings):
    return open_sam("toy", device="cpu", encoding_cache=encodings)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """What to give `open_sam`, by kind."""
    return save_every_kind(tmp_path_factory.mktemp("sams"))


def segmenting(output, encodings):
    """Options by name, as a program gives them."""
    return {
        "images": PHOTOS, "mask": MASK, "output": output, "sam_model": "toy", "segmenter": "persam",
        "encoding_cache": encodings,
    }  # fmt: skip


def training(output, encodings, **options):
    return {
        "instance_dir": PHOTOS, "mask": MASK, "output_dir": output, "sam_model": "toy", "segmenter": "persam",
        "encoding_cache": encodings, "pretrained_model_name_or_path": "toy", "resolution": 32, "max_train_steps": 2,
        "num_validation_images": 0, **options,
    }  # fmt: skip


# Progress


def test_a_callback_is_told_of_every_photo_and_no_bar_is_shown(tmp_path, encodings, capfd):
    told = []
    with reporting(told.append):
        segment(**segmenting(tmp_path / "masks", encodings))
    assert told == [Progress("segmenting", "photo", done, 4) for done in (1, 2, 3, 4)]
    assert "segmenting" not in capfd.readouterr().err


def test_cancelled_work_keeps_what_is_finished(tmp_path, encodings):
    def callback(progress):
        if progress.done == 2:
            raise Cancelled("enough")

    with reporting(callback), pytest.raises(Cancelled, match="enough"):
        segment(**segmenting(tmp_path, encodings))
    assert sorted(path.name for path in tmp_path.glob("0*.png")) == ["00.png", "01.png"]


def test_work_in_another_thread_does_not_report_here():
    told = []
    with reporting(told.append):
        thread = threading.Thread(target=lambda: list(steps("ab", "elsewhere", "letter")))
        thread.start()
        thread.join()
        list(steps(iter("ab"), "here", "letter", total=3, initial=1))
    list(steps("ab", "afterwards", "letter"))
    assert told == [Progress("here", "letter", done, 3) for done in (2, 3)]


def test_bars_are_shown_where_they_are_asked_for(capfd):
    with showing_bars():
        assert list(steps("ab", "reading", "letter")) == ["a", "b"]
        list(steps("ab", "in other processes", "letter", hidden=True))
    list(steps("ab", "silently", "letter"))
    shown = capfd.readouterr().err
    assert "reading: 100%" in shown and "2/2" in shown
    assert "other" not in shown and "silently" not in shown


def test_the_bar_of_unfinished_work_ends_its_line(capfd):
    def work(letters):  # the error's traceback keeps `letters`, so that nothing else closes the bar
        for _ in letters:
            raise InputError("broken")

    with pytest.raises(InputError) as caught, showing_bars():
        work(steps("ab", "reading", "letter"))
    assert "letters" in caught.traceback[-1].frame.f_locals
    assert re.search(r"reading: .* 0/2 .*\n$", capfd.readouterr().err)


def test_a_training_is_cancelled_at_a_step_and_resumes(tmp_path, encodings):
    told = []

    def callback(progress):
        told.append(progress)
        if progress == Progress("training", "step", 1, 2):
            raise Cancelled("enough")

    options = training(tmp_path / "run", encodings, resume_from_checkpoint="latest")  # an empty folder starts anew
    with reporting(callback), pytest.raises(Cancelled, match="enough"):
        personalize(**options)
    assert (tmp_path / "run" / "checkpoint-1").is_dir()
    with reporting(told.append):
        assert personalize(**options) == tmp_path / "run"
    assert told[-1] == Progress("training", "step", 2, 2)
    assert [each.done for each in told if each.what == "training"] == [1, 2]


# Names


def test_every_public_name_is_there_and_none_is_hidden_by_a_module():
    modules = {module.name for module in pkgutil.iter_modules(persam_dreambooth.__path__)}
    assert modules.isdisjoint(persam_dreambooth.__all__)
    assert set(persam_dreambooth.__all__) <= set(dir(persam_dreambooth))
    for name in persam_dreambooth.__all__:
        assert getattr(persam_dreambooth, name).__name__ == name
    with pytest.raises(AttributeError, match="PerSam"):
        _ = persam_dreambooth.PerSam


def test_type_checkers_see_the_same_names():
    source = inspect.getsource(persam_dreambooth)
    assert sorted(source.count(f" import {name} as {name}\n") for name in persam_dreambooth.__all__) == [1] * len(
        persam_dreambooth.__all__
    )
    assert (Path(persam_dreambooth.__file__).parent / "py.typed").is_file()


PROGRAM = """
from persam_dreambooth import Progress, PerSAMF, VideoSegmenter, generate, open_sam, personalize, read_mask, reporting
from persam_dreambooth import segment

segmenter = PerSAMF(open_sam("toy")).fit(["a.jpg"], read_mask("a.png"))
reveal_type(segmenter.predict("b.jpg"))
reveal_type(segment(images="cat", mask="a.png", output="masks"))
reveal_type(personalize(instance_dir="cat"))
reveal_type(generate("a [V] cat", model="x"))
segment(imags="cat")
"""


@pytest.mark.slow
def test_a_strict_type_checker_sees_the_options_and_the_results(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    words = ["--strict", "--config-file", ROOT / "pyproject.toml", "--cache-dir", tmp_path / "cache", "program.py"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *words], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "MYPYPATH": str(ROOT)},
    )  # fmt: skip
    revealed = re.findall('Revealed type is "(.*)"', done.stdout)
    assert [name.rsplit(".", 1)[-1] for name in revealed] == ["Found", "PhotoMask]", "Path", "Path]"], done.stdout
    assert re.findall("error: (.*) for overloaded", done.stdout) == ['Unexpected keyword argument "imags"']
    assert done.stdout.endswith("Found 1 error in 1 file (checked 1 source file)\n")


def test_a_job_takes_options_by_name_or_as_one_object(tmp_path, encodings):
    by_name = segment(**segmenting(tmp_path / "one", encodings))
    texts = {name: str(value) for name, value in segmenting(tmp_path / "two", encodings).items()}
    by_object = segment(SegmentOptions(**texts))
    assert len(by_name) == 4
    for one, two in zip(by_name, by_object, strict=True):
        assert (one.mask == two.mask).all()
    assert list(inspect.signature(segment).parameters) == list(inspect.signature(SegmentOptions).parameters)


@pytest.mark.parametrize(
    "given, told",
    [
        ({"imags": "cat/"}, "unknown option imags: did you mean images?"),
        ({"output_dir": "masks/"}, "unknown option output_dir: it is output here"),
        ({"images": 3}, "--images is 3: give text, in quotes"),
        ({"images": np.zeros((2, 2))}, "--images is of type ndarray: give text, in quotes"),
        ({"images": "cat/", "output": "masks"}, "no mask: give --mask .*--point .*--mask_dir"),
        ({"absent": "drop"}, "--absent is drop: give one of 'skip', 'warn', 'keep'"),
    ],
)
def test_options_that_a_job_does_not_take_are_named(given, told):
    with pytest.raises(InputError, match=told.replace("?", r"\?")):
        segment(**given)


def test_an_option_without_its_name_is_refused():
    with pytest.raises(InputError, match="segment got 'cat/' without a name"):
        segment("cat/")


LIBRARY = """
import sys, time
started = time.process_time()
import persam_dreambooth
assert time.process_time() - started < 0.1, time.process_time() - started
assert "torch" not in sys.modules and "numpy" not in sys.modules
from persam_dreambooth import PerSAMF, generate, open_sam, personalize, segment
photos, mask, out, encodings = sys.argv[1:]
shared = dict(mask=mask, sam_model="toy", segmenter="persam", encoding_cache=encodings)
segment(images=photos, output=f"{out}/masks", **shared)
PerSAMF(open_sam("toy", encoding_cache=encodings)).fit(f"{photos}/00.jpg", mask).predict(f"{photos}/02.jpg")
for precision in ("bf16", "no"):
    run = personalize(
        instance_dir=photos, pretrained_model_name_or_path="toy", resolution=32, max_train_steps=1,
        num_validation_images=0, mixed_precision=precision, output_dir=f"{out}/{precision}", **shared,
    )
generate("a [V] duck", model=run, num_images=1, num_inference_steps=2, output=f"{out}/pictures")
import logging
assert logging.getLogger("transformers").level == logging.getLogger("diffusers").level == logging.WARNING
"""


@pytest.mark.slow
def test_a_program_segments_trains_in_several_precisions_and_generates_without_a_word(tmp_path, encodings):
    quiet = {name: value for name, value in os.environ.items() if not name.endswith("_VERBOSITY")}
    done = subprocess.run(
        [sys.executable, "-c", LIBRARY, str(PHOTOS), str(MASK), str(tmp_path), str(encodings)],
        capture_output=True, text=True, env={**quiet, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    precisions = [read_config(tmp_path / run / "config.yaml")["mixed_precision"] for run in ("bf16", "no")]
    assert precisions == ["bf16", "no"]


# Threads


def masks_of(segmenter, times=2):
    """The masks and scores of another photo, several times over."""
    found = [segmenter.predict(PHOTOS / "02.jpg") for _ in range(times)]
    return [(each.mask.tobytes(), each.score, each.steps[0].low_res_logits.tobytes()) for each in found]


@pytest.mark.parametrize(
    "kind", ["sam", "sam-hq", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("sam-2", "mobile-sam"))]
)
def test_threads_find_with_one_sam_and_with_two_what_one_thread_finds(kind, kinds, encodings):
    shared = open_sam(kinds[kind], device="cpu", encoding_cache=encodings)
    own = open_sam(kinds[kind], device="cpu", encoding_cache=encodings)
    segmenters = [PerSAM(shared), PerSAMF(shared, fit_steps=10), PerSAM(own, guidance="paper")]
    for segmenter in segmenters:
        segmenter.fit(PHOTOS / "00.jpg", MASK)
    alone = [masks_of(segmenter) for segmenter in segmenters]
    with ThreadPoolExecutor(len(segmenters)) as pool:
        assert list(pool.map(masks_of, segmenters)) == alone


def test_threads_load_models_at_once(sam):
    with ThreadPoolExecutor(3) as pool:
        loaded = list(pool.map(lambda _: open_sam("toy", device="cpu"), range(6)))
    assert {each.fingerprint for each in loaded} == {sam.fingerprint}


def test_a_thread_segments_while_another_trains_and_a_second_training_is_refused(sam, tmp_path, encodings):
    segmenter = PerSAM(sam).fit(PHOTOS / "00.jpg", MASK)
    alone, found, refused = masks_of(segmenter, 1), [], []

    def callback(progress):
        if progress.what == "training":
            found.append(pool.submit(masks_of, segmenter, 1))
            with pytest.raises(UnavailableError, match="another training runs in this process") as told:
                personalize(**training(tmp_path / "second", encodings))
            refused.append(told)

    with ThreadPoolExecutor(1) as pool, reporting(callback):
        personalize(
            TrainOptions(
                **{
                    name: value if isinstance(value, int) else str(value)
                    for name, value in training(tmp_path / "run", encodings).items()
                }
            )
        )
    assert [each.result() for each in found] == [alone, alone]
    assert len(refused) == 2 and not (tmp_path / "second").exists()


# Saved segmenters


@pytest.mark.parametrize(
    "make",
    [
        lambda sam: PerSAM(sam, guidance="paper", target_coverage=0.3, alpha=2.0),
        lambda sam: PerSAMF(sam, fit_steps=50, absent_threshold=0.9),
    ],
    ids=["persam", "persam-f"],
)
def test_a_saved_segmenter_finds_the_same_bits(make, sam, encodings, tmp_path):
    fitted = make(sam).fit(PHOTOS / "00.jpg", MASK)
    assert fitted.save(tmp_path / "duck") == tmp_path / "duck" / "segmenter.safetensors"
    assert [path.name for path in (tmp_path / "duck").iterdir()] == ["segmenter.safetensors"]
    again = open_sam("toy", device="cpu", encoding_cache=encodings)
    loaded = type(fitted).load(tmp_path / "duck", again)
    assert repr(loaded) == repr(fitted)
    assert masks_of(loaded, 1) == masks_of(fitted, 1)
    one, two = loaded.predict(PHOTOS / "03.jpg"), fitted.predict(PHOTOS / "03.jpg")
    assert (one.presence, one.flags) == (two.presence, two.flags)


def test_what_is_not_this_segmenter_is_not_loaded(sam, kinds, tmp_path):
    with pytest.raises(RuntimeError, match="fit"):
        PerSAM(sam).save(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputNotFoundError, match=r"has no segmenter\.safetensors"):
        PerSAM.load(tmp_path, sam)
    path = PerSAM(sam).fit(PHOTOS / "00.jpg", MASK).save(tmp_path)
    with pytest.raises(InputError, match="is a segmenter of the method persam, not persam-f"):
        PerSAMF.load(tmp_path, sam)
    with pytest.raises(InputError, match=r"was fitted with toy in torch.float32, not with Sam\(.*float32, cpu\)"):
        PerSAM.load(tmp_path, open_sam(kinds["sam"], device="cpu"))
    with pytest.raises(InputError, match=r"was fitted with toy in torch.float32, not with .*bfloat16"):
        PerSAM.load(tmp_path, open_sam("toy", device="cpu", dtype="bfloat16"))
    for folder, told in ((path / "cat", "is not a folder"), ("a" * 256, "is longer than a name may be")):
        with pytest.raises(InputError, match=told):
            PerSAM.load(tmp_path, sam).save(folder)
    shutil.copy(toy.path("sam") / "model.safetensors", path)
    with pytest.raises(InputError, match="is not a saved segmenter"):
        PerSAM.load(tmp_path, sam)
    path.write_bytes(b"broken")
    with pytest.raises(InputError, match="is not a saved segmenter"):
        PerSAM.load(tmp_path, sam)


# Encodings


@pytest.mark.parametrize(
    "kind", ["sam-hq", "sam-2", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("sam", "mobile-sam"))]
)
def test_a_batch_of_photos_of_any_size_is_encoded_as_one_by_one(kind, kinds, tmp_path):
    sam = open_sam(kinds[kind], device="cpu", encoding_cache=tmp_path)
    photos = [Image.open(PHOTOS / "01.jpg"), Image.open(PHOTOS / "02.jpg").crop((0, 60, 512, 400))]
    alone = [sam.encode(photo) for photo in photos]
    embed, batches = sam.embed, []
    sam.embed = lambda pixels: (batches.append(len(pixels)), embed(pixels))[1]
    cache, sam.cache = sam.cache, None
    together = [sam.encode_batch(photos)]
    sam.cache = cache
    together.append(sam.encode_batch([photos[0], alone[1]]))
    assert batches == [2]  # a cached photo and an encoding are not encoded again
    for batch in together:
        for one, other in zip(batch, alone, strict=True):
            assert (one.size, one.resized, one.sam) == (other.size, other.resized, other.sam)
            torch.testing.assert_close((one.embedding, one.extra), (other.embedding, other.extra), rtol=1e-4, atol=1e-4)


class Accelerated(Sam):
    """A SAM on the CPU that says it is on an accelerator, whose memory has room for a number of photos at once."""

    device = torch.device("cuda", 0)
    room = 4

    def padded_input(self, photo):
        self.device = torch.device("cpu")
        return super().padded_input(photo)

    def embed(self, pixels):
        self.batches.append(len(pixels))
        if len(pixels) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return super().embed(pixels)


@pytest.mark.parametrize("room, batches", [(4, [4, 2]), (3, [4, 1, 1, 1, 1, 1, 1])])
def test_many_photos_are_encoded_in_batches_on_an_accelerator_as_memory_allows(room, batches):
    sam = Accelerated(tiny_model(), "tiny")
    sam.room, sam.batches = room, []
    colors = [Image.new("RGB", (64, 40), (shade, 0, 0)) for shade in range(0, 60, 10)]
    found = list(sam.encode_each(colors))
    assert sam.batches == batches
    for color, encoding in zip(colors, found, strict=True):
        torch.testing.assert_close(encoding.embedding, Sam(tiny_model(), "tiny").encode(color).embedding)


def test_an_encoding_of_another_sam_is_refused(sam, kinds):
    other = open_sam(kinds["sam"], device="cpu").encode(PHOTOS / "01.jpg")
    segmenter = PerSAM(sam).fit(PHOTOS / "00.jpg", MASK)
    for use in (
        lambda: segmenter.predict(other),
        lambda: segmenter.fit(other, MASK),
        lambda: find_instances(segmenter, other),
        lambda: sam.decode(other, np.array([[1, 1]]), np.array([1])),
        lambda: VideoSegmenter(sam).fit(other, np.ones(other.size, np.uint8)),
    ):
        with pytest.raises(InputError, match="this encoding was made by another SAM than toy"):
            use()


# Traps


def test_a_model_that_is_wrapped_twice_is_wrapped_once(sam):
    model = tiny_model()
    one, two = Sam(model, "one"), Sam(model, "two")
    assert isinstance(two.transformer, GuidedTransformer) and one.transformer is two.transformer
    assert not isinstance(two.transformer.transformer, GuidedTransformer)
    with pytest.raises(InputError, match=r"another Sam uses this model in torch.float32: load it again"):
        Sam(model, "three", torch.bfloat16)
    assert next(one.encoder.parameters()).dtype == torch.float32


def test_sam_hq_takes_its_arguments_in_the_order_of_sam(kinds, encodings):
    assert str(inspect.signature(SamHQ.decode)) == str(inspect.signature(Sam.decode))
    sam = open_sam(kinds["sam-hq"], device="cpu", encoding_cache=encodings)
    single, scores = sam.decode(sam.encode(PHOTOS / "00.jpg"), np.array([[250, 250]]), np.array([1]), None, None, False)
    assert single.shape == (1, 256, 256) and scores.shape == (1,)


@pytest.mark.parametrize(
    "make, told",
    [
        (lambda sam: PerSAM(sam, up_to="everything"), "up_to is 'everything': use one of positive, negative, "),
        (lambda sam: PerSAM(sam, absent_threshold=85), "absent_threshold is 85: give a number from 0 to 1"),
        (lambda sam: PerSAMF(sam, fit_steps=0), "fit_steps is 0: give 1 or more"),
        (lambda sam: PerSAM("toy"), "sam is a str: open it with open_sam"),
        (lambda sam: VideoSegmenter(sam, "sam-2"), "method 'sam-2' is unknown: use persam or persam-f"),
        (lambda sam: open_sam("toy", device="gpu0"), "device 'gpu0' cannot be used, .*: use cpu, or leave it out"),
        (lambda sam: sam.to("gpu0"), "device 'gpu0' cannot be used, .*: use cpu, or leave it out"),
        (lambda sam: open_sam("toy", device="cpu", dtype=torch.int8), "precision torch.int8 is unknown: use float32"),
        (lambda sam: VideoSegmenter(None), "sam is a NoneType: open it with open_sam"),
        (lambda sam: PerSAM.load(sam, "folder"), "sam is a str: open it with open_sam"),
        (lambda sam: sam.encode_batch("00.jpg"), "images is one str: give a list of images"),
        (lambda sam: sam.encode_batch(PICTURE), "images is one ndarray: give a list of images"),
        (lambda sam: PerSAM(sam).fit(MASK, PHOTOS / "00.jpg"), "00.jpg looks like a photo, not a mask: paint the"),
        (lambda sam: read_mask(Image.open(PHOTOS / "00.jpg")), "this mask looks like a photo, not a mask"),
        (lambda sam: read_mask(np.asarray(Image.open(PHOTOS / "00.jpg"))), "this mask looks like a photo, not a mask"),
        (lambda sam: SamHQ.from_pretrained("toy", device="cpu"), "toy is a Sam, not a SamHQ: use Sam.from_pretrained"),
    ],
)
def test_unknown_names_and_values_out_of_range_are_told(make, told, sam):
    with pytest.raises(InputError, match=told):
        make(sam)


def test_predicting_before_fitting_a_video_names_the_missing_call(sam):
    with pytest.raises(RuntimeError, match="call fit"):
        VideoSegmenter(sam).predict(PHOTOS / "00.jpg", np.zeros((512, 512), np.uint8))
    with pytest.raises(InputError, match=r"the label map is int64: give \(H, W\) uint8"):
        VideoSegmenter(sam).fit(PHOTOS / "00.jpg", np.ones((512, 512), int))
    with pytest.raises(InputError, match="the label map is NoneType"):
        VideoSegmenter(sam).fit(PHOTOS / "00.jpg", None)


def test_pixels_to_leave_out_have_the_size_of_the_photo(sam):
    for segmenter in (PerSAM(sam), PerSAMF(sam, fit_steps=1)):
        segmenter.fit(PHOTOS / "00.jpg", MASK)
        with pytest.raises(InputError, match=r"the mask is \(300, 200\), the image \(512, 512\)"):
            segmenter.predict(PHOTOS / "01.jpg", np.zeros((300, 200), bool))


def test_results_with_arrays_are_compared_and_shown(sam):
    segmenter = PerSAMF(sam, fit_steps=1)
    assert repr(segmenter).endswith("fit_steps=1; not fitted)")
    found, encoding = segmenter.fit(PHOTOS / "00.jpg", MASK).predict(PHOTOS / "00.jpg"), sam.encode(PHOTOS / "00.jpg")
    for value in (found, found.steps[0], encoding, segmenter.target):
        assert value == value and len({value, value}) == 1
    assert found != segmenter.predict(encoding)
    shown = [repr(value) for value in (found, found.steps[0], encoding, sam, segmenter, VideoSegmenter(sam))]
    assert shown[0].startswith("Found(512 x 512, mask covers ") and "score=" in shown[0] and "presence=" in shown[0]
    assert shown[2] == "Encoding(512 x 512 photo, 96 channels, cpu)"
    assert shown[3] == "Sam('toy', float32, cpu)"
    assert shown[4].startswith("PerSAMF(Sam('toy', float32, cpu), target_coverage=0.5, ")
    assert shown[5] == "VideoSegmenter(Sam('toy', float32, cpu), 'persam-f'; not fitted)"
    assert max(map(len, shown)) < 130
    assert repr(segmenter.target).startswith("Target(96 channels, background_similarity=0.")
    mask = PhotoMask(Photo.open(PHOTOS / "00.jpg"), found.mask, MaskRecord("00.jpg", "", "persam-f", 0.25))
    assert repr(mask) == "PhotoMask('00.jpg', persam-f, covers 25.0%)"


@pytest.mark.parametrize(
    "image, told",
    [
        (None, "must be a path, a PIL image or an array; this is None$"),
        (3, "this is a int$"),
        (torch.zeros(3, 64, 48), r"this is a Tensor: convert it to \(H, W, 3\) uint8, such as tensor.permute"),
        (PICTURE.transpose(2, 0, 1), r"\(3, 64, 48\) uint8: move its channels last with .transpose\(1, 2, 0\)"),
        (PICTURE / 255, r"\(64, 48, 3\) float64: scale it to 0 to 255 and round it to uint8"),
        (PICTURE.astype(int), r"\(64, 48, 3\) int64: convert it with .astype\(numpy.uint8\)"),
        (PICTURE[None], r"\(1, 64, 48, 3\) uint8: give one picture of the batch"),
        (PICTURE[..., :1], r"\(64, 48, 1\) uint8: remove the last axis with \[..., 0\]"),
        (PICTURE[..., 0] > 0, r"\(64, 48\) bool: this is a mask, not a photo"),
        ("no-such-photo.jpg", "no-such-photo.jpg does not exist: name an image file"),
    ],
)
def test_images_of_a_wrong_type_are_named(image, told, sam):
    for use in (read_image, PerSAM(sam).fit(PHOTOS / "00.jpg", MASK).predict, sam.encode):
        with pytest.raises(InputError, match=told):
            use(image)


def test_paths_arrays_and_pictures_serve_alike(sam):
    by_path = PerSAM(sam).fit(str(PHOTOS / "00.jpg"), str(MASK))
    picture, mask = read_image(PHOTOS / "00.jpg"), read_mask(MASK)
    for image, own in ((picture, mask), (np.asarray(picture), mask.astype(np.uint8)), (sam.encode(picture), MASK)):
        assert torch.equal(PerSAM(sam).fit(image, own).target.mean, by_path.target.mean)
    assert torch.equal(PerSAM(sam).fit((picture,), (mask,)).target.mean, by_path.target.mean)


# The hub


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine that answers every request with a status: a function that sets it and the hub's code."""

    class Answer(BaseHTTPRequestHandler):
        status, code = 503, None

        def do_HEAD(self):
            self.send_response(self.status)
            if self.code:
                self.send_header("X-Error-Code", self.code)
            self.end_headers()

        do_GET = do_POST = do_HEAD

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    place = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", place)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", "hf_known")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def answer(status, code=None):
        Answer.status, Answer.code = status, code

    yield answer
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_busy_hub_may_answer_on_another_try(hub, status):
    hub(status)
    with pytest.raises(UnavailableError, match=r"owner/model .* the hub cannot be reached \(.*\): connect, or name"):
        open_sam("owner/model")
    with (
        pytest.raises(UnavailableError, match=r"owner/model cannot be downloaded .*: try again"),
        models.loading("owner/model"),
    ):
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url("owner/model", "config.json"))
    with pytest.raises(UnavailableError, match=r"--push_to_hub: the hub cannot be reached \(.*\): try again"):
        check_login()


def test_a_failed_upload_says_that_the_run_is_whole(hub):
    hub(500)
    options = TrainOptions(instance_dir="cat", output_dir="out", hub_model_id="me/cat")
    line = r"out is finished, but its upload failed \(.*\): hf upload me/cat out"
    with pytest.raises(UnavailableError, match=line):
        push(options)


def test_a_hub_that_refuses_will_refuse_again(hub):
    hub(403)
    with pytest.raises(InputError, match=r"the hub refuses owner/model .*: log in"):
        open_sam("owner/model", revision="v1")
    with pytest.raises(InputError, match="--push_to_hub: no user is logged in"):
        check_login()


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_model_says_where_to_accept_its_license(hub, status):
    hub(status, "GatedRepo")
    page = rf"{huggingface_hub.constants.ENDPOINT}/facebook/sam3"
    line = f"^facebook/sam3 is gated: accept its license at {page} and log in with hf auth login, or name a local"
    with pytest.raises(InputError, match=line):
        open_sam("facebook/sam3")


def test_a_machine_that_is_told_to_stay_offline_needs_no_other_try(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputNotFoundError, match="owner/model is not on this machine and the hub cannot be reached"):
        open_sam("owner/model")
