import json
import re

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from inmerge_jax.data.chestxray14.labels import FINDINGS
from inmerge_jax.data.dataset import names_sha256
from inmerge_jax.files import read_text
from inmerge_jax.reporting.published import CHESTXRAY14
from inmerge_jax.reporting.ranking import rank_findings
from inmerge_jax.reporting.resampling import bootstrap_auroc
from inmerge_jax.reporting.runs import read_run
from inmerge_jax.reporting.tables import make_report
from tests.paths import SHARED, needs
from tests.reporting.folder import edit, markdown, write_page, write_run

TASK = "multi-label, binary-class"
FULL = {"train": 640, "val": 40, "test": 160}


PUBLISHED = CHESTXRAY14[0].names_sha256


def write(folder, split="chexnet", full=FULL, digest=PUBLISHED):
    fields = {"name": "chestxray14", "split": split, "full_counts": full}
    fields["test_names_sha256"] = digest
    return write_run(folder, classes=FINDINGS, task=TASK, **fields)


def test_a_resample_is_what_scikit_learn_gives_for_its_images():
    rng = np.random.default_rng(0)
    positive, scores = rng.random(30) < 0.3, rng.integers(0, 6, 30) / 6
    counts = rng.multinomial(30, np.full(30, 1 / 30), size=40)
    for found, count in zip(bootstrap_auroc(positive, scores, counts), counts, strict=True):
        rows = np.repeat(np.arange(30), count)
        assert found == pytest.approx(roc_auc_score(positive[rows], scores[rows]))
    none = counts * ~positive
    assert np.isnan(bootstrap_auroc(positive, scores, none)).all()


def test_fifteen_ranks_with_intervals(tmp_path):
    folder = write(tmp_path / "run")
    found = rank_findings(read_run(folder), resamples=200)
    assert found.names == (*FINDINGS, "mean")
    stored = json.loads((folder / "results.json").read_text())["arms"]
    for arm, cells in found.arms.items():
        tests = [result["test"] for result in stored[arm]]
        assert cells[3].auc == pytest.approx(np.mean([t["auc_per_class"][3] for t in tests]))
        assert cells[14].auc == pytest.approx(np.mean([t["auc"] for t in tests]))
        assert all(cell.low < cell.auc < cell.high for cell in cells)
    rivals = [cells[3].auc for cells in found.arms.values()] + [0.7156]
    for cells in found.arms.values():
        assert cells[3].rank == 1 + sum(rival > cells[3].auc for rival in rivals)


@pytest.mark.long
@pytest.mark.parametrize(
    ("split", "full", "digest", "line"),
    [
        (
            "chexnet",
            FULL,
            PUBLISHED,
            "Same 160 test images: reproduce-chexnet, DenseNet-121\\.$",
        ),
        (
            "chexnet",
            {**FULL, "train": 78_468},
            PUBLISHED,
            r"Same 160 test images: .*; this run trained on 640 of 78,468 images\.",
        ),
        (
            "chexnet",
            FULL,
            "others",
            "NOT COMPARABLE.*160 test images are not the 22,433 of chexnet",
        ),
        ("chexnet", FULL, "", "NOT COMPARABLE.*160 test images are not the 22,433 of chexnet"),
        (
            "chexnet",
            {**FULL, "test": 22_433},
            "",
            "NOT COMPARABLE.*160 of the split's 22,433 test images",
        ),
        ("patient_hash", FULL, "", "NOT COMPARABLE.*no published row.*split patient_hash"),
    ],
)
def test_one_line_says_what_is_comparable(tmp_path, split, full, digest, line):
    run = read_run(write(tmp_path / "run", split, full, digest))
    report = make_report(run)

    assert sum(bool(re.search(line, note)) for note in report.notes) == 1
    table, others = (table for table in report.tables if "finding" in table.kinds)
    assert [row[0] for row in table.rows] == [*FINDINGS, "mean", "first of 15"]
    assert (*table.rows[0][4:], *others.rows[0][1:]) == ("0.8180", "0.8094", "0.7160")
    assert len(table.columns) == (5 if line.startswith("Same") else 4)
    if digest != PUBLISHED:
        assert "(test images of chexnet)" in others.columns[1]
        assert sum(int(count) for count in table.rows[-1][1:4]) >= 15
    page = write_page(run.folder).read_text()
    assert page.count(table.title) == page.count(others.title) == 2
    assert "Pleural_<wbr>Thickening" in page


LIST = SHARED / "data" / "nih" / "test_list.txt.gz"


@needs(LIST)
def test_the_published_test_images_are_those_of_the_list():
    names = read_text(LIST).split()
    assert len(names) == CHESTXRAY14[0].images
    assert names_sha256(reversed(names)) == PUBLISHED != names_sha256(names[1:])


@pytest.mark.long
def test_a_finding_without_a_positive_image_is_counted_and_breaks_nothing(tmp_path):
    folder = write(tmp_path / "run")
    with np.load(folder / "labels.npz") as arrays:
        labels = arrays["test"].copy()
    labels[:, 13] = 0
    labels[:, 12] = 0
    labels[5, 12] = 1
    np.savez(folder / "labels.npz", val=labels[:40], test=labels)

    def change(results):
        for stages in results["arms"].values():
            for result in stages:
                result["test"]["auc_per_class"][13] = None
                result["test"]["undefined"] = 1

    edit(folder, change)
    cells = rank_findings(read_run(folder)).arms["inmerge"]
    assert np.isnan(cells[13].auc) and cells[13].undefined == 1000 and cells[13].rank == 0
    assert 300 < cells[12].undefined < 440 and np.isfinite(cells[12].low)
    assert np.isfinite(cells[14].low)
    text = markdown(folder)
    assert "| Hernia | n/a | n/a | n/a |" in text and "Hernia 1,000" in text


def test_without_labels_there_is_no_interval_and_none_is_spoken_of(tmp_path):
    folder = write(tmp_path / "run")
    (folder / "labels.npz").unlink()
    found = rank_findings(read_run(folder))
    assert np.isnan(found.arms["inmerge"][0].low)
    text = markdown(folder)
    assert "AUROC intervals: n/a, the run folder lacks test labels" in text
    assert "bootstrap resamples" not in text


@pytest.mark.long
def test_patients_are_drawn_with_all_of_their_images(tmp_path):
    folder = write(tmp_path / "run")
    narrow = rank_findings(read_run(folder))
    with np.load(folder / "labels.npz") as arrays:
        labels = dict(arrays)
    patients = np.arange(len(labels["test"])) // 8
    np.savez(folder / "labels.npz", **labels, test_patients=patients)
    found = rank_findings(read_run(folder))
    assert found.arms["inmerge"][0].auc == narrow.arms["inmerge"][0].auc
    assert found.arms["inmerge"][0].low != narrow.arms["inmerge"][0].low
    assert "resamples of the 160 test images of 20 patients" in markdown(folder)


def test_other_data_sets_have_no_such_table(tmp_path):
    assert rank_findings(read_run(write_run(tmp_path / "run"))) is None
