"""Scores of segmentations: the metrics, PerSeg with every row, DAVIS, and data that cannot be scored."""

import csv
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from small_sams import SMALL_SAM, save_sam2
from tiny_sam import tiny_model
from training_runs import in_two_processes

from persam_dreambooth.cli import main
from persam_dreambooth.files import locked, write_json
from persam_dreambooth.photos.labels import save_labels
from persam_dreambooth.photos.masks import read_mask
from persam_dreambooth.report.pictures import TILE
from persam_dreambooth.report.tables import csv_tables
from persam_dreambooth.segmentation import PerSAM, open_sam
from persam_dreambooth.segmentation.evaluation import davis_report, davis_scores, metrics
from persam_dreambooth.segmentation.evaluation import one_shot_report as report
from persam_dreambooth.segmentation.evaluation import perseg as perseg_evaluation
from persam_dreambooth.segmentation.evaluation.costs import Cost
from persam_dreambooth.segmentation.evaluation.data_set import DataSet
from persam_dreambooth.segmentation.evaluation.one_shot import Row, disturbed, evaluate_one_shot
from persam_dreambooth.segmentation.evaluation.perseg_tables import PERSEG_METHODS, perseg_tables
from persam_dreambooth.segmentation.evaluation.trace import read_trace, save_trace
from persam_dreambooth.segmentation.segmenters import make_segmenter
from persam_dreambooth.toy import rendered_davis as rendered_videos
from persam_dreambooth.toy import rendered_perseg as perseg

GOLDEN = Path(__file__).parent / "golden"


def square(top, left, side, shape=(40, 60)):
    mask = np.zeros(shape, bool)
    mask[top : top + side, left : left + side] = True
    return mask


# --- metrics


def test_j_and_f_of_empty_masks():
    empty, full = np.zeros((8, 8), bool), square(2, 2, 3, (8, 8))
    assert metrics.jaccard(empty, empty) == metrics.boundary_f(empty, empty) == 1
    assert metrics.jaccard(empty, full) == metrics.boundary_f(empty, full) == metrics.boundary_f(full, empty) == 0


def test_f_forgives_what_j_does_not():
    """At 40 x 60, boundaries match up to one pixel apart: a mask moved by one is as good as right, by two is not."""
    truth = square(10, 10, 20)
    assert metrics.boundary_f(square(10, 11, 20), truth) == 1 > metrics.jaccard(square(10, 11, 20), truth)
    assert 0.5 < metrics.boundary_f(square(10, 12, 20), truth) < 1


def test_the_boundary_band_is_two_percent_of_the_diagonal_wide():
    truth = square(20, 30, 100, (300, 400))  # diagonal 500: 10 pixels
    found = square(20, 30, 80, (300, 400))
    common, union = metrics.boundary_overlap(found, truth)
    rings = sum(side**2 - (side - 20) ** 2 for side in (100, 80))
    assert common == 10 * 80 + 10 * 70  # the upper side of the smaller one, and the rest of its left side
    assert union == rings - common


def test_decay_is_the_first_quarter_minus_the_last_and_quarters_share_their_ends():
    values = np.array([1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0, 0], float)
    mean, recall, decay = metrics.statistics(values)
    assert mean == pytest.approx(5 / 9) and recall == pytest.approx(3 / 9)
    assert decay == pytest.approx(np.mean([1, 1, 1]) - np.mean([0.5, 0, 0]))


@pytest.mark.parametrize(
    "left, growth, pixels",
    [
        (200, -95, 106 * 106),
        (0, -95, 16_218),  # OpenCV's erosion does not count what lies outside of the picture: that side stays
        (0, 95, 294 * 247),
        (200, 95, 294 * 294),
        (0, -75, 126 * 163),
    ],
)
def test_disturbed_masks_are_those_of_opencv_with_a_square_kernel(left, growth, pixels):
    mask = square(200, left, 200, (600, 600))
    assert disturbed(mask, growth).sum() == pixels


def test_a_mask_that_fills_the_picture_stays_whole():
    assert disturbed(np.ones((300, 200), bool), -95).all()
    mask = square(3, 3, 9)
    assert disturbed(mask, 0) is mask


def test_the_bootstrap_interval_of_a_mean_is_the_known_one():
    """Of 400 values: scipy's percentile bootstrap, and the normal approximation, mean ± 1.96 s / sqrt(n)."""
    values = np.random.default_rng(1).normal(70, 12, 400)

    def ends_of(values):
        return metrics.bootstrap_intervals(len(values), lambda drawn: {"mean": drawn @ values / len(values)})["mean"]

    ends, error = ends_of(values), values.std(ddof=1) / 20
    assert ends == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.1 * error)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=2000, rng=2).confidence_interval
    assert ends == pytest.approx(tuple(theirs), abs=0.15 * error)
    assert ends_of(np.full(4, 0.5)) == (0.5, 0.5)
    assert ends_of(np.array([0.5])) is None


# --- PerSeg


def evaluate(*arguments):
    return main(["evaluate", "perseg", *map(str, arguments)])


def read(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two rendered objects of three images each."""
    folder = tmp_path_factory.mktemp("perseg")
    perseg.write_perseg(perseg.ToyPersegOptions(str(folder), 2))
    for path in [*folder.glob("Images/*/0[3-9].jpg"), *folder.glob("Annotations/*/0[3-9].png")]:
        path.unlink()
    return folder


@pytest.fixture(scope="module")
def evaluated(data, tmp_path_factory, toy_sam):
    output = tmp_path_factory.mktemp("evaluated")
    assert evaluate("--data", data, "--output", output, *toy_sam, "--ablation") == 0
    return output


@pytest.fixture
def truth(data, tmp_path):
    """The annotations as predictions."""
    return Path(shutil.copytree(data / "Annotations", tmp_path / "truth"))


def tables_of(output):
    """The tables of `results.csv`: by title, the cells of each row by its first cell, and the headings by ''."""
    tables = {}
    for title, *cells in csv.reader((output / "results.csv").open(encoding="utf-8", newline="")):
        while cells and not cells[-1]:
            cells.pop()
        table = tables.setdefault(title.split(":")[0], {})
        table[cells[0] if table else ""] = cells[1:]
    return tables


def test_all_rows_are_scored_and_shown(evaluated, data):
    results = read(evaluated)
    assert list(results["rows"]) == [
        "persam-f", "ablation-positive", "ablation-negative", "ablation-refinement", "ablation-attention",
        "ablation-prompting", "ablation-persam-f",
    ]  # fmt: skip
    assert results["row"] == "persam-f"
    assert results["rows"]["ablation-persam-f"]["mIoU"] == results["mIoU"] > 40
    assert results["mIoU"] == pytest.approx(np.mean([each["IoU"] for each in results["objects"].values()]))
    tables = tables_of(evaluated)
    negative = results["rows"]["ablation-negative"]
    assert tables["All rows"]["ablation-negative"][:4] == [
        f"{negative[figure]:.2f}" for figure in ("mIoU", "mAcc", "mBIoU", "FB-IoU")
    ]
    worst = min(results["objects"], key=lambda name: results["objects"][name]["IoU"])
    assert next(name for name in tables["Objects of persam-f"] if name) == worst
    assert tables["Objects of persam-f"][worst] == [
        f"{results['objects'][worst][figure]:.2f}" for figure in ("IoU", "Acc", "BIoU")
    ]
    assert len(list((evaluated / "overlays").glob("*.jpg"))) == 2
    sheet = Image.open(next((evaluated / "overlays").iterdir()))
    # Three photos, with their true masks, heat maps, masks and errors.
    assert sheet.width > 900 and 5 * TILE < sheet.height < 6 * TILE


def test_table_3_has_the_gain_of_each_part(evaluated):
    """The parts in the paper's order; a gain is the difference to the row before."""
    rows = read(evaluated)["rows"]
    table = tables_of(evaluated)["Table 3"]
    assert list(table)[1:4] == ["Only positive prior", "+ Negative prior", "+ Post-refinement"]
    assert table["Only positive prior"] == [f"{rows['ablation-positive']['mIoU']:.2f}", "-"]
    gain = rows["ablation-negative"]["mIoU"] - rows["ablation-positive"]["mIoU"]
    assert table["+ Negative prior"] == [f"{rows['ablation-negative']['mIoU']:.2f}", f"{gain:+.2f}"]


def test_results_say_what_made_them(evaluated, data):
    results = read(evaluated)
    assert results["data"] == {"name": "Objects in PerSeg's layout", "objects": 2, "images": 6}
    assert results["options"]["data"] == str(data) and results["options"]["sam_model"] == "toy"
    assert results["made_with"]["torch"] == torch.__version__
    assert results["bootstrap"]["seed"] == 0 and results["bootstrap"]["resamples"] == 10_000
    cost = results["cost"]
    assert cost["encode_seconds"] is None  # encodings came from a cache
    assert 0 < cost["predict_seconds"] < cost["fit_seconds"] and cost["peak_memory_mb"] > 100
    for name in ("results.md", "report.html"):
        text = (evaluated / name).read_text(encoding="utf-8")
        assert "2 objects, 6 images" in text and f"torch {torch.__version__}" in text and "seed 0" in text


def test_intervals_over_two_objects_end_at_them(evaluated):
    """Of two objects, one is drawn twice in a half of the resamples."""
    results = read(evaluated)
    ious = [each["IoU"] for each in results["objects"].values()]
    assert results["intervals"]["mIoU"] == pytest.approx([min(ious), max(ious)])


def test_another_method_adds_its_rows(evaluated, data, tmp_path, toy_sam, capsys):
    output = Path(shutil.copytree(evaluated, tmp_path / "copy"))
    command = ("--data", data, "--output", output, *toy_sam)
    before = read(output)["rows"]
    masks = {path: path.stat().st_mtime_ns for path in output.glob("predictions/*/*/*.png")}
    assert evaluate(*command, "--segmenter", "persam") == 0
    after = read(output)
    assert list(after["rows"]) == ["persam", *before] and after["row"] == "persam"
    assert {name: row for name, row in after["rows"].items() if name != "persam"} == before
    assert {path: path.stat().st_mtime_ns for path in masks} == masks
    table, persam, persam_f = tables_of(output)["Table 1"], after["mIoU"], before["persam-f"]["mIoU"]
    assert table["PerSAM"][:2] == [f"{persam:.2f}", "0"] and table["PerSAM-F"][:2] == [f"{persam_f:.2f}", "2"]
    assert table["Improvement"][0] == f"{persam_f - persam:+.2f}"
    capsys.readouterr()
    # With other settings it would be another experiment; and an interrupted method is not compared.
    assert evaluate(*command, "--segmenter", "persam", "--guidance", "none") == 2
    assert "holds an evaluation with other settings" in capsys.readouterr().err
    shutil.rmtree(next((output / "predictions" / "persam").iterdir()))
    assert evaluate(*command) == 0
    assert list(read(output)["rows"]) == list(before)


def test_predictions_are_not_scored_into_a_methods_folder(evaluated, data, truth, capsys):
    before = (evaluated / "results.json").read_bytes()
    assert evaluate("--data", data, "--output", evaluated, "--predictions", truth) == 2
    assert "holds an evaluation of a method" in capsys.readouterr().err
    assert (evaluated / "results.json").read_bytes() == before


PERSEG_NAMES = [
    "backpack", "barn", "can", "cat", "clock", "duck_toy", "red_cartoon", "robot_toy", "teddybear", "thin_bird",
    *(f"object_{number}" for number in range(30)),
]  # fmt: skip


@pytest.fixture(scope="module")
def forty(tmp_path_factory):
    """40 objects, PerSeg's ten in Table 1 among them, scored with masks of all rows that claim to be of SAM ViT-H."""
    folder = tmp_path_factory.mktemp("forty")
    options = perseg_evaluation.EvaluatePersegOptions(
        data=str(folder / "PerSeg"), output=str(folder / "out"), segmenter="persam", ablation=True, robustness=True
    )
    mask = Image.fromarray(square(10, 10, 20).astype(np.uint8) * 255)
    for name in PERSEG_NAMES:
        for kind in ("Images", "Annotations"):
            (folder / "PerSeg" / kind / name).mkdir(parents=True)
        for stem in ("00", "01"):
            Image.new("RGB", mask.size).save(folder / "PerSeg" / "Images" / name / f"{stem}.jpg")
            mask.save(folder / "PerSeg" / "Annotations" / name / f"{stem}.png")
    found = square(10, 10, 16).astype(np.uint8) * 255  # 16 x 16 of 20 x 20: IoU 64
    for row in perseg_evaluation.chosen_rows(options, []):
        for name in PERSEG_NAMES:
            place = folder / "out" / "predictions" / row.name / name
            place.mkdir(parents=True)
            Image.fromarray(found).save(place / "01.png")
            write_json(place / "cost.json", {"sam": "SAM ViT-H"})
    return perseg_evaluation.evaluate_perseg(options)


def test_published_figures_are_beside_ours_for_perseg_and_vit_h(forty):
    output = Path(forty.options["output"])
    tables = tables_of(output)
    table = tables["Table 1"]
    assert table[""] == [
        "mIoU", "Param.", "Can", "Barn", "Clock", "Cat", "Backpack", "Teddy Bear", "Duck Toy", "Thin Bird",
        "Red Cartoon", "Robot Toy",
    ]  # fmt: skip
    assert table["PerSAM"] == ["64.00", "0", *["64.00"] * 10]
    assert table["PerSAM-F"][:2] == ["64.00", "2"]  # the last row of the ablation is the method
    assert table["SEEM (published)"][:3] == ["80.50", "157M", "88.80"]
    assert table["PerSAM (published)"][:3] == ["89.32", "0", "96.17"]
    assert table["PerSAM-F (published)"][-1] == "96.67"
    assert tables["Table 3"][""] == ["mIoU", "gain", "published mIoU", "published gain"]
    assert tables["Table 3"]["+ Target-guided attention"] == ["64.00", "+0.00", "85.82", "+1.91"]
    assert tables["Table 4"][""] == ["shrink 95", "shrink 75", "enlarge 75", "enlarge 95"]
    assert tables["Table 4"]["PerSAM"] == ["64.00"] * 4
    assert tables["Table 4"]["PerSAM-F (published)"] == ["85.16", "88.28", "83.19", "81.19"]
    for name in ("results.md", "results.tex", "report.html"):
        assert "SegGPT (published)" in (output / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("other", ["sam", "objects", "names", "unknown"])
def test_no_figure_of_the_paper_stands_beside_another_experiment(other, forty):
    """Another SAM made a row's masks, or it is unknown which; an object is missing, or has another name."""
    first, *rest = forty.rows
    items = forty.data.items
    if other in ("sam", "unknown"):
        cost = [replace(first.costs[0], sam="SAM ViT-B")] if other == "sam" else []
        changed = replace(forty, rows=(replace(first, costs=(*first.costs[1:], *cost)), *rest))
        assert "Teddy Bear" in csv_tables(perseg_tables(changed))  # it is still PerSeg
    else:
        more = [replace(items[0], name="spoon")] if other == "names" else []
        changed = replace(forty, data=replace(forty.data, items=[*items[1:], *more]))
    assert "published" in csv_tables(perseg_tables(forty))
    assert "published" not in csv_tables(perseg_tables(changed))


def test_a_rendered_set_is_shown_without_the_papers_figures(evaluated):
    for name in ("results.md", "results.csv", "results.tex", "report.html"):
        assert "published" not in (evaluated / name).read_text(encoding="utf-8")


@pytest.mark.slow
def test_masks_that_version_0_1_shrank_are_made_again(data, tmp_path, toy_sam):
    """It also wrote neither costs nor where a photo ends in a trace; its other masks are kept."""
    options = perseg_evaluation.EvaluatePersegOptions(
        data=str(data), output=str(tmp_path), segmenter="persam", sam_model="toy", encoding_cache=toy_sam[3]
    )
    items = perseg_evaluation.read_perseg(data)
    rows = [Row("persam", partial(make_segmenter, options)),
            Row("persam-shrunk-75", partial(make_segmenter, options), growth=-75)]  # fmt: skip
    for turn in range(2):
        evaluate_one_shot(options, DataSet("PerSeg", items), rows, PERSEG_METHODS)
        for path in tmp_path.glob("predictions/**/cost.json"):
            path.unlink()
        if not turn:
            before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("predictions/*/*/01.png")}
    again = [path.parts[-3] for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert again == ["persam-shrunk-75"] * 2


def test_the_first_shots_are_references_and_are_not_scored(data, tmp_path, toy_sam, capsys):
    command = ("--data", data, "--output", tmp_path, *toy_sam, "--segmenter", "persam")
    assert evaluate(*command, "--shots", "2") == 0
    results = read(tmp_path)
    assert results["row"] == "persam-shots-2" and results["references"] == [0, 1]
    for name, figures in results["objects"].items():
        folder = tmp_path / "predictions" / "persam-shots-2" / name
        found, true = (read_mask(path / "02.png") for path in (folder, data / "Annotations" / name))
        assert figures["IoU"] == pytest.approx(100 * (found & true).sum() / (found | true).sum())
        given = read_mask(data / "Annotations" / name / "01.png")
        assert (read_mask(folder / "01.png") == given).all()  # a reference, not found
        sam = open_sam("toy", device="cpu", encoding_cache=toy_sam[3])
        photos = [Image.open(data / "Images" / name / f"{stem}.jpg") for stem in ("00", "01", "02")]
        masks = [read_mask(data / "Annotations" / name / f"{stem}.png") for stem in ("00", "01")]
        assert (PerSAM(sam).fit(photos[:2], masks).predict(photos[2]).mask == found).all()
    assert evaluate(*command, "--shots", "3") == 2
    assert "with all as references, none is left to score" in capsys.readouterr().err
    assert evaluate(*command, "--shots", "2", "--reference_index", "1") == 2
    assert "exclude one another" in capsys.readouterr().err


def test_the_report_opens_without_network_and_shows_the_worst_object_first(evaluated):
    page = (evaluated / "report.html").read_text(encoding="utf-8")
    assert "http" not in page and page.count("<img") == page.count('src="data:image/jpeg;base64,') == 6
    assert "true mask" in page and "errors" in page
    objects = read(evaluated)["objects"]
    worst, best = sorted(objects, key=lambda name: objects[name]["IoU"])
    assert page.index(f'id="{worst}"') < page.index(f'id="{best}"')
    assert f'<a href="#{worst}">{worst}</a>' in page and f"{objects[worst]['IoU']:.2f}" in page
    assert "ablation-negative" in page and "similarity" in page


def test_the_page_shows_no_more_objects_than_it_can_hold(evaluated, data, monkeypatch, toy_sam):
    monkeypatch.setattr(report, "SHOWN", 1)
    assert evaluate("--data", data, "--output", evaluated, *toy_sam, "--ablation") == 0
    page = (evaluated / "report.html").read_text(encoding="utf-8")
    assert page.count("<section") == 1 and "1 of 2 objects are shown" in page
    assert len(list((evaluated / "overlays").glob("*.jpg"))) == 2


def test_a_broken_trace_is_named(evaluated, data, tmp_path, capsys):
    predictions = Path(shutil.copytree(evaluated / "predictions" / "persam-f", tmp_path / "predictions"))
    path = sorted(predictions.glob("*/01.npz"))[0]
    path.write_bytes(path.read_bytes()[:100])
    assert evaluate("--data", data, "--output", tmp_path / "out", "--predictions", predictions) == 2
    assert f"{path} is not a trace of a method" in capsys.readouterr().err


def test_predictions_with_a_trace_of_version_0_1_are_scored_without_its_heat_map(evaluated, data, tmp_path):
    predictions = Path(shutil.copytree(evaluated / "predictions" / "persam-f", tmp_path / "predictions"))
    for path in predictions.glob("*/*.npz"):
        with np.load(path) as arrays:
            kept = {name: arrays[name] for name in ("similarity", "points", "box")}
        np.savez_compressed(path, **kept)
    assert evaluate("--data", data, "--output", tmp_path / "out", "--predictions", predictions) == 0
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "photo, true mask, mask, errors" in page and "similarity" not in page


@pytest.mark.parametrize("kind, cells", [("sam", (43, 64)), ("sam-2", (64, 64))])
def test_a_trace_holds_the_cells_that_the_photo_covers(kind, cells, tmp_path):
    """SAM pads a photo of 300 x 200 to a square, below; SAM 2 stretches it."""
    model = SMALL_SAM if kind == "sam" else str(save_sam2(tmp_path / "sam2"))
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8))
    found = PerSAM(open_sam(model, device="cpu")).fit(photo, square(50, 80, 100, (200, 300))).predict(photo)
    save_trace(tmp_path / "00.npz", found)
    trace = read_trace(tmp_path / "00.npz")
    assert trace is not None and trace.in_photo.shape == cells
    assert (trace.in_photo == found.similarity[: cells[0]].astype(np.float16)).all()


def test_parts_make_a_difference_and_the_last_is_persam_itself(evaluated, data, tmp_path, toy_sam):
    rows = read(evaluated)["rows"]
    assert len({rows[f"ablation-{part}"]["mIoU"] for part in ("positive", "negative", "refinement", "prompting")}) >= 3
    assert evaluate("--data", data, "--output", tmp_path, *toy_sam, "--segmenter", "persam") == 0
    assert read(tmp_path)["mIoU"] == rows["ablation-prompting"]["mIoU"]


def test_an_interrupted_evaluation_does_only_what_is_left(evaluated, data, toy_sam):
    lost, *kept = sorted((evaluated / "predictions" / "persam-f").iterdir())
    before = read(evaluated)
    shutil.rmtree(lost)
    written = {path: path.stat().st_mtime_ns for folder in kept for path in folder.iterdir()}
    assert evaluate("--data", data, "--output", evaluated, *toy_sam, "--ablation") == 0
    assert {path: path.stat().st_mtime_ns for path in written} == written
    after = read(evaluated)
    assert after["rows"].keys() == before["rows"].keys() and after["objects"] == before["objects"]


def test_predictions_of_another_sam_are_not_gone_on_with(evaluated, data, capsys):
    assert evaluate("--data", data, "--output", evaluated, "--sam_model", "another") == 2
    assert "holds an evaluation with other settings" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["perseg", "absence"])
def test_a_mistyped_sam_leaves_the_folder_to_another_command(what, data, tmp_path, toy_sam, capsys):
    given = ["evaluate", what, "--data", str(data), "--output", str(tmp_path / "out"), "--segmenter", "persam"]
    assert main([*given, "--sam_model", "toyy"]) == 2
    assert "toyy is not a model folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_one_folder_may_be_written_in_several_ways(evaluated, data, capsys):
    settings = (evaluated / "settings.json").read_bytes()
    assert json.loads(settings)["data"] == str(data)
    assert evaluate("--data", f"{data.parent}/./{data.name}/", "--output", evaluated, "--sam_model", "another") == 2
    assert "(sam_model toy, now another)" in capsys.readouterr().err  # and not the data
    assert (evaluated / "settings.json").read_bytes() == settings


@pytest.mark.slow
def test_every_image_may_be_the_reference(data, tmp_path, toy_sam):
    assert evaluate("--data", data, "--output", tmp_path, *toy_sam, "--reference_index", "all") == 0
    results = read(tmp_path)
    assert results["references"]["count"] == 3
    means = [row["mIoU"] for row in results["rows"].values()]
    assert results["references"]["mIoU"] == pytest.approx(np.mean(means)) and results["references"]["std"] > 0
    spread = [f"{results['references'][name]:.2f}" for name in ("mIoU", "std")]
    assert tables_of(tmp_path)["Spread over references"]["persam-f"] == ["3", *spread]


@pytest.mark.slow
def test_another_reference_does_not_go_on_with_the_predictions_of_the_first(data, tmp_path, toy_sam):
    command = ["--data", data, "--output", tmp_path, *toy_sam, "--segmenter", "persam"]
    assert evaluate(*command) == 0
    first = read(tmp_path)["objects"]
    assert evaluate(*command, "--reference_index", "1") == 0
    assert read(tmp_path)["objects"] != first
    assert {path.name for path in (tmp_path / "predictions").iterdir()} == {"persam", "persam-reference-01"}


def test_predictions_made_by_anything_are_scored_without_a_sam(data, truth, tmp_path):
    assert evaluate("--data", data, "--output", tmp_path / "out", "--predictions", truth) == 0
    assert read(tmp_path / "out")["mIoU"] == pytest.approx(100)
    assert read(tmp_path / "out")["mBIoU"] == pytest.approx(100)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Masks that another program made are compared with true masks" in page and "sam_model" not in page
    for name in ("results.md", "report.html"):  # nobody printed figures of these predictions
        assert "published" not in (tmp_path / "out" / name).read_text(encoding="utf-8")
    path = sorted(truth.iterdir())[0] / "01.png"
    Image.new("L", Image.open(path).size).save(path)  # nothing found in one of the two that are scored
    assert evaluate("--data", data, "--output", tmp_path / "out", "--predictions", truth) == 0
    annotations = [np.asarray(Image.open(data / "Annotations" / path.parent.name / name)).any(axis=2) for name in
                   ("01.png", "02.png")]  # fmt: skip
    expected = 100 * annotations[1].sum() / (annotations[0].sum() + annotations[1].sum())
    assert read(tmp_path / "out")["objects"][path.parent.name]["IoU"] == pytest.approx(expected)


def test_the_reference_is_not_scored(data, truth, tmp_path, capsys):
    for path in truth.glob("*/00.png"):
        path.unlink()
    assert evaluate("--data", data, "--output", tmp_path / "out", "--predictions", truth) == 0
    assert evaluate(
        "--data", data, "--output", tmp_path / "again", "--predictions", truth, "--reference_index", "1"
    ) == 2  # fmt: skip
    assert "00.png is missing: give a mask of every image but the references" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


@pytest.fixture
def broken(data, tmp_path):
    return Path(shutil.copytree(data, tmp_path / "broken"))


def test_a_missing_annotation_is_named(broken, tmp_path, capsys):
    path = next(broken.glob("Annotations/*/01.png"))
    path.unlink()
    assert evaluate("--data", broken, "--output", tmp_path / "out") == 2
    assert f"has no annotation: {path} is missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_object_of_one_image_is_named(broken, tmp_path, capsys):
    folder = next((broken / "Images").iterdir())
    for path in [folder / "01.jpg", folder / "02.jpg"]:
        path.unlink()
    assert evaluate("--data", broken, "--output", tmp_path / "out") == 2
    assert f"{folder} holds 1 images" in capsys.readouterr().err


def test_a_broken_annotation_is_named_and_finished_objects_stay(broken, tmp_path, capsys, toy_sam):
    first, second = sorted((broken / "Annotations").iterdir())
    (second / "00.png").write_bytes((second / "00.png").read_bytes()[:60])
    output = tmp_path / "out"
    assert evaluate("--data", broken, "--output", output, *toy_sam) == 2
    assert str(second / "00.png") in capsys.readouterr().err
    assert [path.name for path in (output / "predictions" / "persam-f").iterdir()] == [first.name]


def test_predictions_that_do_not_fit_are_named(data, truth, tmp_path, capsys):
    (truth / "teddy").mkdir()
    assert evaluate("--data", data, "--output", tmp_path / "out", "--predictions", truth) == 2
    assert f"{truth / 'teddy'} matches no object" in capsys.readouterr().err
    (truth / "teddy").rmdir()
    path = sorted(truth.glob("*/01.png"))[0]
    Image.open(path).resize((100, 100)).save(path)
    assert evaluate("--data", data, "--output", tmp_path / "out", "--predictions", truth) == 2
    assert f"{path} is (100, 100)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, told",
    [
        (["--predictions", "p", "--ablation"], "--ablation runs methods"),
        (["--predictions", "p", "--reference_index", "all"], "--reference_index all runs a method"),
        (["--reference_index", "first"], "give a number from 0, or all"),
    ],
)
def test_options_at_odds_are_refused(options, told, data, tmp_path, capsys):
    assert evaluate("--data", data, "--output", tmp_path / "out", *options) == 2
    assert told in capsys.readouterr().err


def test_perseg_figures_are_those_of_the_published_evaluation(tmp_path):
    """Masks of the published PerSAM and PerSAM-F, and what the published script prints for them."""
    printed = {
        "persam": {"cat": (54.89, 90.12), "colorful_sneaker": (43.27, 74.09)},
        "persam_f": {"cat": (49.50, 88.90), "colorful_sneaker": (41.70, 71.22)},
    }
    for method, expected in printed.items():
        for name in expected:
            (tmp_path / method / name).mkdir(parents=True)
            for stem in ("01", "02"):
                arrays = np.load(GOLDEN / method / f"{name}_{stem}.npz")
                height, width = arrays["mask_shape"]
                mask = np.unpackbits(arrays["mask_bits"])[: height * width].reshape(height, width)
                Image.fromarray(mask * 255).save(tmp_path / method / name / f"{stem}.png")
        output = tmp_path / f"{method}-scores"
        assert evaluate("--data", GOLDEN / "perseg", "--output", output, "--predictions", tmp_path / method) == 0
        for name, (iou, accuracy) in expected.items():
            figures = read(output)["objects"][name]
            assert round(figures["IoU"], 2) == iou and round(figures["Acc"], 2) == accuracy


# --- DAVIS


def davis(*arguments):
    return main(["evaluate", "davis", *map(str, arguments)])


@pytest.fixture
def video(tmp_path):
    """A sequence of six frames with two objects, of which the second leaves; predictions miss it once."""
    data, predictions = tmp_path / "DAVIS", tmp_path / "predictions"
    (data / "ImageSets" / "2017").mkdir(parents=True)
    (data / "ImageSets" / "2017" / "val.txt").write_text("ball\n")
    for folder in (data / "Annotations" / "480p" / "ball", predictions / "ball"):
        folder.mkdir(parents=True)
        for number in range(6):
            labels = square(5, 5 + number, 10).astype(np.uint8)
            if number < 3:
                labels[square(20, 30, 12)] = 2
            if number == 4:
                labels[30:, 50:] = 255  # void
            if folder.parent == predictions and number == 2:
                labels[labels == 2] = 0
            image = Image.fromarray(labels)
            image.putpalette(list(range(256)) * 3)
            image.save(folder / f"{number:05}.png")
    return data, predictions


def test_davis_scores_objects_in_the_frames_between(video, tmp_path):
    data, predictions = video
    assert davis("--data", data, "--predictions", predictions, "--output", tmp_path / "out") == 0
    results = read(tmp_path / "out")
    assert results["per_object"]["ball_1"]["J-Mean"] == results["per_object"]["ball_1"]["F-Mean"] == 100
    assert results["per_object"]["ball_2"]["J-Mean"] == 75  # frames 1 to 4: one miss; empty is right where it left
    assert results["global"]["J&F-Mean"] == pytest.approx(87.5)
    assert "| ball_2 |" in (tmp_path / "out" / "results.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "damage, told",
    [
        ("object", "has an object 3, the sequence has 2"),
        ("size", "give it this size"),
        ("missing", "does not exist"),
        ("all", "does not exist: name a folder of predictions"),
    ],
)
def test_davis_names_what_cannot_be_scored(damage, told, video, tmp_path, capsys):
    data, predictions = video
    path = predictions / "ball" / "00003.png"
    if damage == "object":
        labels = np.array(Image.open(path))
        labels[0, 0] = 3
        Image.fromarray(labels).save(path)
    elif damage == "size":
        Image.open(path).resize((30, 20)).save(path)
    elif damage == "missing":
        path.unlink()
    else:
        shutil.rmtree(predictions)
    assert davis("--data", data, "--predictions", predictions, "--output", tmp_path / "out") == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_davis_figures_are_those_of_the_official_evaluation(tmp_path):
    root = GOLDEN / "davis"
    assert davis("--data", root / "DAVIS", "--predictions", root / "predictions", "--output", tmp_path) == 0
    expected, results = json.loads((root / "expected.json").read_text()), read(tmp_path)
    for name, value in expected["global"].items():
        assert results["global"][name] == pytest.approx(100 * value, abs=1e-7)
    for name, figures in expected["per_object"].items():
        for figure, value in figures.items():
            assert results["per_object"][name][figure] == pytest.approx(100 * value, abs=1e-7)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """Two rendered videos of five frames, and what PerSAM makes of them with a SAM of random weights."""
    folder = tmp_path_factory.mktemp("davis")
    rendered_videos.write_davis(rendered_videos.ToyDavisOptions(str(folder / "DAVIS"), 2, 5))
    tiny_model().save_pretrained(folder / "sam")
    return folder


def run_davis(rendered, output, *more):
    command = ["--data", rendered / "DAVIS", "--output", output, "--sam_model", rendered / "sam"]
    return davis(*command, "--segmenter", "persam", *more)


@pytest.fixture(scope="module")
def davis_rows(rendered):
    """An evaluation of PerSAM, by our rules and then by the published ones, in one folder."""
    output = rendered / "evaluated"
    assert run_davis(rendered, output) == 0
    first = read(output)
    assert run_davis(rendered, output, "--variant", "published") == 0
    return output, first


@pytest.mark.slow
def test_davis_runs_a_method_and_scores_what_it_wrote(rendered, davis_rows, tmp_path):
    output, first = davis_rows
    folders = sorted((output / "predictions" / "persam").iterdir())
    assert [len(list(folder.glob("*.png"))) for folder in folders] == [5, 5]
    truth = rendered / "DAVIS" / "Annotations" / "480p" / folders[0].name / "00000.png"
    assert (np.array(Image.open(folders[0] / "00000.png")) == np.array(Image.open(truth))).all()
    predictions = output / "predictions" / "persam"
    assert davis("--data", rendered / "DAVIS", "--predictions", predictions, "--output", tmp_path / "again") == 0
    assert read(tmp_path / "again")["global"] == first["global"] == read(output)["rows"]["persam"]["global"]
    assert "PerSAM" not in (tmp_path / "again" / "results.md").read_text(encoding="utf-8")  # no method was run


def test_davis_keeps_the_rows_of_two_variants(davis_rows):
    output, first = davis_rows
    results = read(output)
    assert list(first["rows"]) == ["persam"] and results["row"] == "persam-published"
    assert results["rows"]["persam"]["per_object"] == first["rows"]["persam"]["per_object"]
    assert results["rows"]["persam-published"]["global"] == results["global"]
    assert results["global"] != first["global"]  # the random SAM finds nothing that it is sure of, but it must try
    assert results["data"] == {"sequences": 2, "objects": 4, "scored_frames": 6}
    assert results["made_with"]["date"] and results["options"]["variant"] == "published"
    assert results["rows"]["persam"]["cost"]["predict_seconds"] > 0


def test_davis_shows_tables_and_pictures(davis_rows):
    output, _ = davis_rows
    results, table = read(output), (output / "results.md").read_text(encoding="utf-8")
    html = (output / "report.html").read_text(encoding="utf-8")
    overall = results["rows"]["persam"]["global"]
    cells = " | ".join(f"{overall[name]:.1f}" for name in ("J&F-Mean", "J-Mean", "F-Mean"))
    assert f"| PerSAM | no | {cells} |" in table
    assert "(published)" not in table and "AGAME" not in html  # neither DAVIS nor ViT-H
    assert "not DAVIS 2017's validation set" in table and "not DAVIS 2017's" in html.replace("&#x27;", "'")
    for sequence, figures in results["per_sequence"].items():
        assert f"| {sequence} | 2 | 3 | {figures['J&F-Mean']:.1f} |" in table
        assert f'<section id="{sequence}"><h2>{sequence}: J&amp;F {figures["J&F-Mean"]:.1f} %' in html
        assert Image.open(output / "overlays" / f"{sequence}.jpg").width > 3 * TILE
    assert html.count("<figure>") == 2 * 4
    assert "persam-dreambooth" in html and "percentile bootstrap over sequences" in html
    assert (output / "results.csv").read_text(encoding="utf-8").count("Sequences of persam-published,") == 3


def scores_of(sequences, sam, row="persam-f-published"):
    """Scores of one object for each sequence, with J of 50 % and F of 100 %."""
    j, f = metrics.Statistics(0.5, 0.5, 0), metrics.Statistics(1, 1, 0)
    objects = tuple(davis_scores.ObjectScores(sequence, 1, j, f, 3) for sequence in sequences)
    found = davis_scores.VideoRow(row, Path("predictions"), objects, (Cost(sam),) * len(objects))
    data = davis_scores.VideoSet(Path("JPEGImages/480p"), Path("Annotations/480p"), tuple(sequences))
    return davis_scores.DavisScores(found, (found,), "a test", {"data": "DAVIS"}, {}, data)


def test_table_2_has_the_papers_rows_only_for_its_data_and_its_sam():
    sequences = sorted(davis_report.DAVIS_2017_VAL)
    assert len(sequences) == 30
    [table] = davis_report.table_2(scores_of(sequences, "SAM ViT-H"))
    assert table.rows[-2:] == [
        ["PerSAM-F (published)", "no", 71.9, 69.0, 74.8], ["PerSAM-F, published rules", "no", 75.0, 50.0, 100.0]
    ]  # fmt: skip
    for others in (scores_of(sequences[1:], "SAM ViT-H"), scores_of(sequences, "SAM ViT-B"),
                   scores_of([*sequences[1:], "cat"], "SAM ViT-H")):  # fmt: skip
        [table] = davis_report.table_2(others)
        assert [row[0] for row in table.rows] == ["PerSAM-F, published rules"]
    assert davis_report.table_2(scores_of(sequences, "SAM ViT-H", "predictions")) == []


def test_an_interval_is_over_sequences():
    """Objects of one sequence are drawn together: two sequences, J&F 25 and 75 %, so 25 to 75."""
    low, high = (metrics.Statistics(each, 0, 0) for each in (0.25, 0.75))
    objects = [davis_scores.ObjectScores(name, number, each, each, 3)
               for name, each in (("a", low), ("b", high)) for number in (1, 2, 3)]  # fmt: skip
    row = davis_scores.VideoRow("persam", Path(), tuple(objects), ())
    assert row.interval == (25.0, 75.0) and row.overall["J&F-Mean"] == 50


def test_an_interrupted_davis_evaluation_does_only_what_is_left(rendered, davis_rows, tmp_path, capsys, caplog):
    output = shutil.copytree(davis_rows[0], tmp_path / "out")
    one, other = sorted((output / "predictions" / "persam").iterdir())
    for name in ("00004.png", "00003.png", "cost.json"):
        (other / name).unlink()
    shutil.rmtree(output / "predictions" / "persam-published" / other.name)
    kept = {path: path.stat().st_mtime_ns for path in [*one.iterdir(), *other.iterdir()]}
    assert run_davis(rendered, output) == 0
    assert read(output)["global"] == davis_rows[1]["global"]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert "persam-published is left out of the tables: 1 of its 2 sequences are not finished" in caplog.text
    assert list(read(output)["rows"]) == ["persam"]


def test_davis_refuses_a_folder_of_other_settings_before_the_work(rendered, davis_rows, video, tmp_path, capsys):
    output, results = davis_rows[0], (davis_rows[0] / "results.json").read_bytes()
    sam = ["--sam_model", rendered / "sam"]
    for more in ([*sam, "--target_coverage", "0.4"], ["--predictions", output / "predictions" / "persam"]):
        assert davis("--data", rendered / "DAVIS", "--output", output, *more) == 2
        assert "holds an evaluation with other settings" in capsys.readouterr().err
    assert (output / "results.json").read_bytes() == results
    data, predictions = video
    assert davis("--data", data, "--predictions", predictions, "--output", tmp_path / "out") == 0
    assert davis("--data", data, "--output", tmp_path / "out", "--sam_model", rendered / "sam") == 2
    assert davis("--data", data, "--predictions", predictions, "--output", tmp_path, "--variant", "published") == 2
    assert "--predictions and --variant exclude one another" in capsys.readouterr().err


@pytest.fixture
def youtube(tmp_path):
    """A video in the layout of YouTube-VOS: frames 0, 5, ... 30, annotations of all but one, object 3 from frame 10."""
    data, predictions = tmp_path / "YouTube", tmp_path / "predictions" / "clip"
    frames, annotations = data / "JPEGImages" / "clip", data / "Annotations" / "clip"
    for folder in (frames, annotations, predictions):
        folder.mkdir(parents=True)
    for number in range(0, 35, 5):
        labels = square(5, 5, 10).astype(np.uint8)
        if number >= 10:
            labels[square(20, 30, 12)] = 3
        Image.fromarray(labels * 60).convert("RGB").save(frames / f"{number:05}.jpg")
        if number != 15:
            save_labels(annotations / f"{number:05}.png", labels)
        labels[labels == (3 if number == 20 else 1 if number == 5 else 9)] = 0
        save_labels(predictions / f"{number:05}.png", labels)
    return data, predictions.parent


def test_videos_with_gaps_and_later_objects_are_scored_as_in_youtube_vos(youtube, tmp_path):
    """Object 1 in frames 5 to 25, missed in one; object 3 in frames 20 and 25, after its first mask, missed in one."""
    data, predictions = youtube
    assert davis("--data", data, "--predictions", predictions, "--output", tmp_path / "out") == 0
    found = {name: figures["J-Mean"] for name, figures in read(tmp_path / "out")["per_object"].items()}
    assert found == {"clip_1": 75.0, "clip_3": 50.0}


def test_a_method_runs_on_videos_with_gaps_and_later_objects(youtube, rendered, tmp_path):
    data, _ = youtube
    output = tmp_path / "out"
    assert davis("--data", data, "--output", output, "--sam_model", rendered / "sam", "--segmenter", "persam") == 0
    labels = {path.stem: np.array(Image.open(path)) for path in (output / "predictions" / "persam").glob("clip/*.png")}
    assert sorted(labels) == [f"{number:05}" for number in range(0, 35, 5)]
    assert not (labels["00005"] == 3).any() and (labels["00010"] == 3).sum() == 144
    assert read(output)["data"]["scored_frames"] == 4


def evaluate_in_two_processes(*arguments):
    """`evaluate` under `accelerate launch`; what it logged."""
    said, logged = in_two_processes("-m", "persam_dreambooth", "evaluate", *arguments)
    assert said.count("done: ") == 1
    return logged


no_accelerator = pytest.mark.skipif(
    torch.accelerator.is_available(), reason="two processes want two accelerators, or none"
)


@pytest.mark.slow
@no_accelerator
def test_two_processes_share_the_sequences(rendered, tmp_path):
    sam = ("--sam_model", rendered / "sam", "--segmenter", "persam")
    logged = evaluate_in_two_processes("davis", "--data", rendered / "DAVIS", "--output", tmp_path / "two", *sam)
    assert "1 of 1" in logged  # each process has one of the two
    assert run_davis(rendered, tmp_path / "one") == 0
    assert read(tmp_path / "two")["per_object"] == read(tmp_path / "one")["per_object"]


@pytest.mark.slow
@no_accelerator
def test_two_processes_share_the_objects(data, rendered, tmp_path):
    options = ("--data", data, "--sam_model", rendered / "sam", "--segmenter", "persam")
    logged = evaluate_in_two_processes("perseg", *options, "--output", tmp_path / "two")
    assert "segmenting: 100%" in logged and "0/2 [" not in logged.split("scoring")[0]  # each process has one of the two
    assert evaluate(*options, "--output", tmp_path / "one") == 0
    assert read(tmp_path / "two")["objects"] == read(tmp_path / "one")["objects"]


def test_frames_that_do_not_fit_their_annotations_are_named(rendered, tmp_path, capsys):
    data = shutil.copytree(rendered, tmp_path / "copy")
    last = sorted((data / "DAVIS" / "JPEGImages" / "480p").glob("*/00004.jpg"))[1]
    last.unlink()
    assert run_davis(data, tmp_path / "out") == 2
    assert f"{last.parent.name} has 4 frames and 5 annotations" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_broken_frame_is_named_and_finished_sequences_stay(rendered, tmp_path, capsys):
    data = shutil.copytree(rendered, tmp_path / "copy")
    broken = sorted((data / "DAVIS" / "JPEGImages" / "480p").glob("*/00002.jpg"))[1]
    broken.write_bytes(broken.read_bytes()[:500])
    assert run_davis(data, tmp_path / "out") == 2
    assert f"{broken} cannot be read" in capsys.readouterr().err
    folders = sorted((tmp_path / "out" / "predictions" / "persam").iterdir())
    assert [len(list(folder.glob("*.png"))) for folder in folders] == [5, 2]


@pytest.mark.parametrize("data", ["perseg", "davis"])
def test_a_folder_that_another_evaluation_writes_to_is_refused(tmp_path, capsys, data):
    if data == "davis":
        rendered_videos.write_davis(rendered_videos.ToyDavisOptions(str(tmp_path / data), 1, 3))
    else:
        perseg.write_perseg(perseg.ToyPersegOptions(str(tmp_path / data), 1))
    words = ["evaluate", data, "--data", str(tmp_path / data), "--output", str(tmp_path / "out"), "--sam_model", "toy"]
    with locked(tmp_path / "out"):
        assert main(words) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"error: another run is writing to {tmp_path / 'out'}: wait for its end, or choose another folder"
    assert not (tmp_path / "out").exists()
