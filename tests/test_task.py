"""Tasks: rendered parts of animals, CelebAMask-HQ's layout, and the evaluation on held-out images."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from persam_dreambooth import InputError, InputNotFoundError, cli, open_sam
from persam_dreambooth.machine import provenance
from persam_dreambooth.photos.images import read_image
from persam_dreambooth.segmentation.adaptation import task_folder
from persam_dreambooth.segmentation.adaptation.task_folder import FACIAL_PARTS, Task, TaskMask, open_task, read_task
from persam_dreambooth.segmentation.evaluation.task import (
    EvaluateTaskOptions,
    held_out_prompt,
    learned_masks,
    split_task,
)
from persam_dreambooth.segmentation.evaluation.task_report import task_heading, task_tables
from persam_dreambooth.segmentation.evaluation.task_scores import TaskRowScores, TaskScores, score_row
from persam_dreambooth.segmentation.prompt_learning import decode_prompts, load_plm
from persam_dreambooth.toy import world
from persam_dreambooth.toy.rendered_parts import part_scenes

# Rendered parts


def test_toy_parts_are_exact_masks_of_animals(tmp_path, capsys):
    assert cli.main(["toy", "parts", "--output_dir", str(tmp_path), "--images", "3"]) == 0
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*"))
    assert files == [
        *(f"images/000{n}.jpg" for n in range(3)),
        *(f"masks/{part}/000{n}.png" for part in ("head", "scarf") for n in range(3)),
        *("masks/tail/0000.png", "masks/tail/0001.png"),  # the third animal is a duck
    ]
    masks = {path.parent.name: np.array(Image.open(path)) > 0 for path in tmp_path.glob("masks/*/0000.png")}
    scene = next(part_scenes(1))
    whole = world.render(scene, 512).mask
    assert all(0.01 < (mask & whole).sum() / whole.sum() < 0.5 for mask in masks.values())
    assert all((mask & ~whole).sum() < 0.01 * mask.sum() for mask in masks.values())
    shared = [(one & two).sum() for one, two in itertools.combinations(masks.values(), 2)]
    assert max(shared) < 20  # pixels of which each covers half
    assert cli.main(["toy", "parts", "--output_dir", str(tmp_path), "--images", "3"]) == 2
    assert "images exists: remove it or choose another folder" in capsys.readouterr().err


def test_a_scarfs_pixels_are_those_of_its_color():
    """Recolored, an animal changes in its scarf only."""
    scene = next(part_scenes(1))
    colors = [color for color in world.COLORS if color != scene.subject.accessory_color]
    recolored = world.Subject(**{**vars(scene.subject), "accessory_color": colors[0]})
    one, two = (
        np.asarray(world.render(world.Scene(subject, scene.pose, scene.background, 1), 256).image, int)
        for subject in (scene.subject, recolored)
    )
    changed = np.abs(one - two).sum(axis=2) > 60
    scarf = world.part_masks(scene.subject, scene.pose, 256)["scarf"]
    assert (changed & scarf).sum() / (changed | scarf).sum() > 0.9


# Readers


@pytest.fixture
def celeba(tmp_path):
    """Two images of 32 x 32 with masks of 16 x 16, in CelebAMask-HQ's layout."""
    (tmp_path / "CelebA-HQ-img").mkdir()
    for number in (0, 2000):
        Image.new("RGB", (32, 32), (number % 255, 0, 0)).save(tmp_path / "CelebA-HQ-img" / f"{number}.jpg")
    for number, part, column in ((0, "hair", 0), (0, "l_eye", 4), (2000, "hair", 8)):
        folder = tmp_path / "CelebAMask-HQ-mask-anno" / str(number // 2000)
        folder.mkdir(parents=True, exist_ok=True)
        mask = np.zeros((16, 16), np.uint8)
        mask[:4, column : column + 4] = 255
        Image.fromarray(mask).convert("RGB").save(folder / f"{number:05}_{part}.png")
    return tmp_path


def test_celebamask_hq_is_read_and_its_masks_have_the_images_size(celeba):
    task = open_task(celeba)
    assert (task.parts, list(task.masks)) == (("l_eye", "hair"), ["0", "2000"])
    assert (task.name, task.genuine) == ("images in the layout of CelebAMask-HQ", False)
    [eye] = [mask for mask in task.masks["0"] if mask.part == "l_eye"]
    mask = eye.read()
    assert mask.shape == (32, 32)
    assert mask.sum() == 64 and mask[:8, 8:16].all()
    assert [len(own) for own in open_task(celeba, ("hair",)).masks.values()] == [1, 1]
    assert len(FACIAL_PARTS) == 18


def test_a_mask_needs_only_the_size_in_its_images_header(celeba):
    image = celeba / "CelebA-HQ-img" / "0.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 32, 3), np.uint8)).save(image)
    image.write_bytes(image.read_bytes()[:800])  # not to be decoded
    with pytest.raises(InputError):
        read_image(image)
    assert open_task(celeba).masks["0"][0].read().shape == (48, 32)


def test_celebamask_hq_is_genuine_with_all_images_and_all_parts(celeba, monkeypatch):
    monkeypatch.setattr(task_folder, "CELEBA_SIZE", 2)
    assert (open_task(celeba).name, open_task(celeba).genuine) == ("CelebAMask-HQ", False)
    masks = celeba / "CelebAMask-HQ-mask-anno" / "1"
    for part in set(FACIAL_PARTS) - {"hair"}:
        shutil.copy(masks / "02000_hair.png", masks / f"02000_{part}.png")
    assert open_task(celeba).genuine
    assert not open_task(celeba, ("hair", "nose")).genuine


def test_a_broken_celebamask_hq_is_reported_in_one_line(celeba):
    masks = celeba / "CelebAMask-HQ-mask-anno" / "0"
    shutil.copy(masks / "00000_hair.png", masks / "00001_hair.png")
    with pytest.raises(InputNotFoundError, match=r"00001_hair\.png has no image: .*CelebA-HQ-img/1\.jpg is missing"):
        open_task(celeba)
    (masks / "00001_hair.png").rename(masks / "00000_wig.png")
    with pytest.raises(InputError, match=r"00000_wig\.png is no mask of CelebAMask-HQ, such as 00000_hair\.png"):
        open_task(celeba)
    (masks / "00000_wig.png").unlink()
    Image.new("RGB", (32, 32)).save(celeba / "CelebA-HQ-img" / "7.jpg")
    with pytest.raises(InputNotFoundError, match=r"7\.jpg has no mask in .*: add it or remove the image"):
        open_task(celeba)
    with pytest.raises(InputNotFoundError, match=r"holds no masks of wig: it has skin, nose, .*, cloth"):
        open_task(celeba, ("wig",))
    shutil.rmtree(celeba / "CelebA-HQ-img")
    with pytest.raises(InputNotFoundError, match=r"CelebA-HQ-img does not exist: .* holds the masks of CelebAMask-HQ"):
        open_task(celeba)


# Scores


def paint(path: Path, *columns: int, side: int = 100) -> None:
    """A mask whose columns from the first to before the second number are white."""
    mask = np.zeros((side, side), np.uint8)
    mask[:, slice(*columns)] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)


@pytest.fixture
def by_hand(tmp_path):
    """Two images of two parts, of which the second shows one, and a row of predictions."""
    row = tmp_path / "plm-point-5"
    for name in ("a", "b"):
        paint(tmp_path / "images" / f"{name}.png", 0, 1)
    for name, part, true, found in (("a", "left", (0, 40), (0, 50)), ("a", "right", (60, 100), (60, 100)),
                                    ("b", "left", (0, 40), (60, 100))):  # fmt: skip
        paint(tmp_path / "masks" / part / f"{name}.png", *true)
        paint(row / part / f"{name}.png", *found)
    about = {"method": "plm", "prompt": "point", "masks": 5, "trained_parameters": 7, "train_seconds": 2.0}
    (row / "row.json").write_text(json.dumps(about))
    return read_task(tmp_path / "images", tmp_path / "masks"), row


def test_scores_by_hand(by_hand):
    task, row = by_hand
    scored = score_row(row, task.of_images(["a", "b"]))
    left, right = scored.by_part["left"], scored.by_part["right"]
    assert left == {"IoU": pytest.approx(100 * (40 / 50 + 0) / 2), "F": 0, "images": 2}  # edges 10 and 60 columns off
    assert right == {"IoU": 100, "F": 100, "images": 1}
    assert scored.means == {"mIoU": pytest.approx(70), "F": 50}  # over parts, not over masks
    low, high = scored.interval
    # Image b alone has a left IoU of 0 and no right; a alone has 80 and 100.
    assert (low, high) == (0, 90)


def test_tables_have_the_figures_and_the_papers_only_for_its_data(by_hand):
    task, row = by_hand
    scored = score_row(row, task.of_images(["a", "b"]))
    options = {"data": "d", "sam_model": "facebook/sam-vit-huge", "seed": 3}
    scores = TaskScores(task, ["a", "b"], [scored], options, provenance())
    iou, edges, training = task_tables(scores)
    assert iou.headings == ["method", "prompt", "masks", "mIoU", "95 % interval", "left", "right"]
    assert iou.rows == [["SAM + PLM", "point", "5", pytest.approx(70), "0.00 to 90.00", pytest.approx(40), 100]]
    assert edges.rows == [["SAM + PLM", "point", "5", 50, 0, 100]]
    assert training.rows == [["SAM + PLM", "point", "5", "7", "2"]]
    assert any("left, right; 2 of 2 images held out" in line for line in task_heading(scores))
    assert "published" not in str([iou, edges, training])
    facial = Task("CelebAMask-HQ", task.parts, task.masks, genuine=True)
    published = task_tables(TaskScores(facial, ["a", "b"], [scored], {**options, "sam_model": "toy"}, provenance()))[2]
    assert published.headings[0] == "method (published)"
    assert published.rows == [["SAM", 35.05], ["SAM-F", 31.83], ["SAM + PLM + PMM", 71.67]]
    boxes = TaskRowScores(row, {**scored.about, "prompt": "box"}, scored.values)
    assert len(task_tables(TaskScores(facial, ["a", "b"], [boxes], options, provenance()))) == 3


# Splits


@pytest.fixture
def many():
    """A task of twenty images, every second with a tail."""
    masks = {
        f"{n:02}": [TaskMask(part, f"{n:02}", Path("i"), Path("m")) for part in ("head", "tail")[: 1 + n % 2]]
        for n in range(20)
    }
    return Task("many", ("head", "tail"), masks)


def options_of(**more):
    return EvaluateTaskOptions(data="d", output="o", sam_model="toy", **more)


def test_held_out_images_are_the_same_for_all_numbers_of_masks(many, tmp_path):
    test, pool = split_task(many, options_of(train_masks=5))
    assert split_task(many, options_of(train_masks=2)) == (test, pool)
    assert len(test) == 4 and sorted(test + pool) == list(many.masks)
    assert split_task(many, options_of(seed=1))[0] != test
    few, more = learned_masks(many, pool, 2), learned_masks(many, pool, 5)
    assert [sum(mask.part == part for mask in few) for part in many.parts] == [2, 2]
    assert {mask.image for mask in few} <= {mask.image for mask in more}
    with pytest.raises(InputError, match=r"tail has \d masks outside the held-out images: lower --train_masks, or"):
        learned_masks(many, pool, 11)
    names = tmp_path / "test.txt"
    names.write_text("03.jpg\n00\n")
    assert split_task(many, options_of(test_images=str(names)))[0] == ["00", "03"]
    names.write_text("nobody\n")
    with pytest.raises(InputError, match=r"test\.txt names nobody, which has no mask: correct or remove the line"):
        split_task(many, options_of(test_images=str(names)))
    names.write_text("\n".join(many.masks))
    with pytest.raises(InputError, match="all 20 images are held out: none is left to learn"):
        split_task(many, options_of(test_images=str(names)))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"methods": "sam,persam"}, "--methods names persam: use sam, sam-oracle, sam-f, plm, plm-pmm, or all"),
        ({"test_share": 1.1}, "--test_share is 1.1: give a fraction above 0, at most 1"),
        ({"train_masks": 0}, "--train_masks is 0: give 1 or more"),
    ],
)
def test_options_that_cannot_be_are_refused(more, said):
    with pytest.raises(InputError, match=said):
        options_of(**more).check()


# The command


@pytest.fixture(scope="module")
def evaluated(task, filled_sam, tmp_path_factory):
    """The folder of an evaluation of all methods."""
    output = tmp_path_factory.mktemp("evaluation") / "out"
    assert evaluate(task, filled_sam, output) == 0
    return output


TRAINING = ("--train_masks", "1", "--max_train_steps", "3", "--train_batch_size", "1")


def evaluate(task, sam, output, *more):
    given = ["--data", str(task), "--output", str(output), "--sam_model", sam, "--seed", "2"]
    return cli.main(["evaluate", "task", *given, *(more or TRAINING)])


def test_all_methods_answer_the_same_prompts(task, evaluated):
    results = json.loads((evaluated / "results.json").read_text())
    assert list(results["rows"]) == ["sam-point", "sam-oracle-point", "sam-f-point-1", "plm-point-1", "plm-pmm-point-1"]
    parameters = [row["trained_parameters"] for row in results["rows"].values()]
    assert parameters[:2] == [0, 0] and min(parameters[2:]) > 0
    assert parameters[4] - parameters[3] > 1_000_000  # the PMM
    assert results["rows"]["sam-oracle-point"]["mIoU"] >= results["rows"]["sam-point"]["mIoU"]
    [image] = {path.stem for path in (evaluated / "predictions" / "sam-point").glob("*/*.png")}
    truth = read_task(task / "images", task / "masks").masks[image][0]
    one, two = (held_out_prompt(truth, truth.read(), "point", 2) for _ in range(2))
    assert np.array_equal(one, two) and truth.read()[one[1], one[0]]
    page = (evaluated / "report.html").read_text()
    assert "SAM + PLM + PMM" in page and "<table>" in page
    for part in results["rows"]["sam-point"]["parts"]:
        assert (evaluated / "overlays" / f"{part}.jpg").is_file()
    assert (evaluated / "results.md").read_text().count("| SAM-F | point | 1 |") == 3


def test_a_repeated_evaluation_computes_only_what_is_missing(task, filled_sam, evaluated, tmp_path):
    output = Path(shutil.copytree(evaluated, tmp_path / "out"))
    before = json.loads((output / "results.json").read_text())["rows"]
    shutil.rmtree(output / "predictions" / "plm-point-1")
    kept = (output / "predictions" / "sam-point" / "row.json").stat().st_mtime_ns
    assert evaluate(task, filled_sam, output) == 0
    after = json.loads((output / "results.json").read_text())["rows"]
    assert (output / "predictions" / "sam-point" / "row.json").stat().st_mtime_ns == kept
    for row in before:
        assert after[row]["parts"] == before[row]["parts"]
    assert evaluate(task, filled_sam, output, "--methods", "sam", "--prompt", "box") == 0
    rows = json.loads((output / "results.json").read_text())["rows"]
    assert list(rows)[-1] == "sam-box" and len(rows) == 6


def test_an_adapter_is_scored_on_images_that_it_has_not_seen(task, filled_sam, adapted, tmp_path, capsys):
    only = ("--methods", "sam", "--test_share", "1", "--adapter", str(adapted))
    assert evaluate(task, filled_sam, tmp_path / "out", *only) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == (
        f"error: {adapted} was trained on {task / 'masks'}, the held-out masks among them: give other --data"
    )
    other = shutil.copytree(task, tmp_path / "other")
    assert evaluate(other, filled_sam, tmp_path / "out", *only) == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    scored = list(rows.values())[1]
    assert list(rows)[1].startswith("adapter-") and scored["adapter"] == str(adapted)
    sam = open_sam(filled_sam, device="cpu")
    plm, _ = load_plm(adapted, sam)
    mask = read_task(other / "images", other / "masks").masks["0000"][0]
    prompt, encoding = held_out_prompt(mask, mask.read(), "point", 2), sam.encode(mask.image_path)
    logits, _ = decode_prompts(sam, [encoding], [prompt], plm)
    found = np.array(Image.open(tmp_path / "out/predictions" / list(rows)[1] / mask.part / "0000.png")) > 0
    assert np.array_equal(found, (sam.upscale(logits[0], encoding)[0] > 0).numpy())
    assert str(adapted) in (tmp_path / "out" / "results.md").read_text()


def test_another_task_or_training_needs_another_folder(task, filled_sam, evaluated, capsys):
    assert evaluate(task, filled_sam, evaluated, *TRAINING, "--test_share", "0.5") == 2
    assert "with other settings (other test_images; other masks): choose another --output" in capsys.readouterr().err
    assert evaluate(task, filled_sam, evaluated, *TRAINING, "--max_train_steps", "4") == 2
    said = "which was trained with --max_train_steps 3 --train_batch_size 1: give these, or another --output"
    assert said in capsys.readouterr().err


def test_a_row_without_its_description_or_a_mask_is_reported(evaluated, task, tmp_path):
    held_out = read_task(task / "images", task / "masks")
    row = Path(shutil.copytree(evaluated / "predictions" / "sam-point", tmp_path / "sam-point"))
    [image] = {path.stem for path in row.glob("*/*.png")}
    next(row.glob("*/*.png")).unlink()
    with pytest.raises(InputNotFoundError, match=r"\.png is missing"):
        score_row(row, held_out.of_images([image]))
    (row / "row.json").unlink()
    with pytest.raises(InputError, match=r"row\.json does not say what made these masks: remove"):
        score_row(row, [])


def test_a_broken_description_of_another_row_is_reported(evaluated, task, filled_sam, tmp_path, capsys):
    output = Path(shutil.copytree(evaluated, tmp_path / "out"))
    (output / "predictions" / "plm-point-1" / "row.json").write_text("{")
    assert evaluate(task, filled_sam, output, *TRAINING, "--methods", "sam-f") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith("plm-point-1/row.json does not say what made these masks: remove "
                         f"{output}/predictions/plm-point-1")  # fmt: skip


def test_a_row_of_one_image_has_no_interval():
    row = TaskRowScores(Path("sam-point"), {}, {"head": {"a": (0.5, 0.25)}})
    assert row.interval is None
    assert row.means == {"mIoU": 50, "F": 25}
