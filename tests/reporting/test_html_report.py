import base64
import html
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from inmerge_jax.data.chestxray14.labels import FINDINGS
from inmerge_jax.errors import UsageError
from inmerge_jax.reporting import plots
from inmerge_jax.reporting.published import CHESTXRAY14
from inmerge_jax.reporting.runs import read_run
from tests.long import long_unless
from tests.reporting.folder import edit, write_page, write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PROBE = """<script>
window.addEventListener("load", () => {
  const boxes = [...document.querySelectorAll(".scroll")];
  const cut = boxes.filter((box) => box.scrollWidth > box.clientWidth);
  parent.document.body.dataset.probe = JSON.stringify({
    cut: cut.map((box) => box.firstChild.ariaLabel),
    tables: document.querySelectorAll("table").length,
    wide: document.documentElement.scrollWidth > window.innerWidth,
    inner: window.innerWidth,
  });
});
</script>"""


class Reader(HTMLParser):
    """Collects table rows, text, attributes and unclosed elements."""

    VOID = ("meta", "link", "img", "br", "hr", "wbr")

    def __init__(self, text):
        super().__init__()
        self.rows, self.text, self.attributes, self.open = [], "", [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *attr) for attr in attrs]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, *attr) for attr in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run") / "three")


@pytest.fixture(scope="module")
def page(folder):
    path = write_page(folder)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


def test_numbers_are_those_of_the_results(folder, page):
    stored = json.loads((folder / "results.json").read_text())["arms"]
    rows = Reader(page).rows
    for arm, results in stored.items():
        aucs = [result["test"]["auc"] for result in results]
        accs = [result["test"]["acc"] for result in results]
        (spread,) = (row for row in rows if row[0] == arm)
        assert spread[1] == f"{np.mean(aucs):.3f} \u00b1 {np.std(aucs, ddof=1):.3f}"
        assert spread[2] == f"{np.mean(accs):.3f} \u00b1 {np.std(accs, ddof=1):.3f}"
        column = [row[1 + list(stored).index(arm)] for row in rows if row[0] in ("0", "1", "2")]
        assert column == [f"{a:.3f} / {b:.3f}" for a, b in zip(aucs, accs, strict=True)]


def test_nothing_is_requested_from_anywhere(page):
    reader = Reader(page)
    assert not reader.open
    for tag, name, value in reader.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert value.startswith(("data:", "#")), (tag, name, value)
    assert not re.search(r"https?:|@import|<script", page)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]+)\)", page))


def test_every_section_is_drawn(page):
    reader = Reader(page)
    labels = {
        value for tag, name, value in reader.attributes if (tag, name) == ("figure", "aria-label")
    }
    assert {"Training loss", "Validation AUC", "Kernels merged per epoch"} <= labels
    assert {"Kernels merged per layer and epoch", "Nearest other kernel", "ROC: nodule"} <= labels
    assert page.count("<svg") == len(labels) == 4 + 2 + 4 + 4
    for text in ("resnet18", "0.10.2", "rule.threshold", "640 train / 40 val / 160 test"):
        assert text in reader.text


def test_svg_references_stay_inside_the_page(page):
    reader = Reader(page)
    ids = {value for _, name, value in reader.attributes if name == "id"}
    links = set(re.findall(r"url\(#([^)]+)\)", page))
    links |= {v[1:] for _, name, v in reader.attributes if name == "href" and v.startswith("#")}
    assert links and links <= ids


def test_sample_images_are_the_stored_pixels(folder, page):
    stored = np.load(folder / "samples.npz")["images"]
    sources = [v for tag, name, v in Reader(page).attributes if (tag, name) == ("img", "src")]
    for source, image in zip(sources, stored, strict=True):
        shown = Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))
        np.testing.assert_array_equal(np.asarray(shown), image[..., 0])


def test_names_from_the_run_are_escaped(tmp_path):
    evil = "<script>alert(1)</script> & co"
    folder = write_run(tmp_path / "run", seeds=(0,), title=evil, classes=(evil, "b"))
    page = write_page(folder).read_text(encoding="utf-8")
    assert "<script" not in page
    assert evil in Reader(page).text


def test_dollar_signs_are_no_formulas(tmp_path):
    classes = ("$10k (50%) to $20k", "$0-$9k")
    folder = write_run(tmp_path / "run", seeds=(0,), classes=classes)
    text = Reader(write_page(folder).read_text(encoding="utf-8")).text
    assert all(name in text[text.index("ROC curves") :] for name in classes)


def test_an_arm_without_a_layer_to_merge_in_is_not_said_to_be_missing(tmp_path):
    folder = write_run(tmp_path / "run", seeds=(0,))

    def clear(results):
        fields = ("layers", "kernels", "selected", "merged")
        results["arms"]["inmerge"][0].update({name: [] for name in fields})

    edit(folder, clear)
    for path in folder.rglob("inmerge/metrics.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            for name in ("kernels", "selected", "merged", "similarity"):
                line.pop(name)
        path.write_text("\n".join(map(json.dumps, lines)))
    text = Reader(write_page(folder).read_text(encoding="utf-8")).text
    assert "The arm inmerge had no layer to merge in." in text and "was not run" not in text


def test_missing_pieces_are_named(tmp_path):
    folder = write_run(tmp_path / "run", arms=("backbone",))
    for path in [*folder.rglob("metrics.jsonl"), *folder.glob("*.npz")]:
        path.unlink()
    (folder / "environment.json").unlink()
    text = Reader(write_page(folder).read_text(encoding="utf-8")).text
    for expected in (
        "Arm inmerge was not run.",
        "Arm finetune was not run.",
        "The file environment.json is missing.",
        "holds no samples.npz",
        "holds no metrics.jsonl",
        "holds no similarity.json",
        "holds no test labels",
    ):
        assert expected in text


@pytest.mark.parametrize("name", ["labels.npz", "samples.npz"])
@pytest.mark.parametrize("damage", ["cut short", "changed"])
def test_damaged_arrays_are_named_with_the_remedy(tmp_path, name, damage):
    folder = write_run(tmp_path / "run", seeds=(0,))
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data[:200] if damage == "cut short" else data)
    with pytest.raises(UsageError, match=rf"{name} is damaged .*results\.json.*--resume"):
        write_page(folder)


@pytest.mark.parametrize("name", ["metrics.jsonl", "similarity.json"])
def test_damaged_lines_are_named(tmp_path, name):
    folder = write_run(tmp_path / "run", seeds=(0,))
    path = folder / "seed0" / "inmerge" / name
    path.write_bytes(path.read_bytes()[:50] + b"\xff")
    with pytest.raises(UsageError, match=re.escape(str(path))):
        write_page(folder)


@pytest.mark.long
def test_undefined_metrics_are_visible(tmp_path):
    folder = write_run(tmp_path / "run", seeds=(0,))

    def blank(results):
        for results_of_arm in results["arms"].values():
            results_of_arm[0]["test"]["auc"] = float("nan")

    edit(folder, blank)
    for path in folder.rglob("metrics.jsonl"):
        lines = [json.loads(line) | {"val_auc": None} for line in path.read_text().splitlines()]
        path.write_text("\n".join(map(json.dumps, lines)))
    page = write_page(folder).read_text(encoding="utf-8")
    reader = Reader(page)
    assert "inmerge: the test AUC is undefined for seed 0." in reader.text
    assert "undefined in every epoch" in reader.text
    assert "nan" not in [cell for row in reader.rows for cell in row]


def test_a_run_that_merged_nothing_says_so_at_the_top(tmp_path):
    folder = write_run(tmp_path / "run", seeds=(0,), merging=False)
    text = Reader(write_page(folder).read_text(encoding="utf-8")).text
    assert text.index("NOTHING WAS MERGED") < text.index("Sample images")
    assert "nothing was merged" in text[text.index("Block_3/Conv_1") :]


@pytest.mark.long
def test_warnings_of_the_run_are_shown(tmp_path):
    folder = write_run(tmp_path / "run", seeds=(0, 1))
    edit(folder, lambda r: r["arms"]["inmerge"][1]["warnings"].append("no merges by epoch 1"))
    text = Reader(write_page(folder).read_text(encoding="utf-8")).text
    assert "inmerge, seed 1: no merges by epoch 1" in text


@pytest.mark.long
def test_a_class_with_one_label_has_a_panel_without_curve(tmp_path):
    folder = write_run(tmp_path / "run", seeds=(0,))
    labels = np.load(folder / "labels.npz")["test"]
    np.savez(folder / "labels.npz", test=np.where(labels == 3, 0, labels))
    text = Reader(write_page(folder).read_text(encoding="utf-8")).text
    assert "No curve: 0 of 160 test images have this label." in text


@pytest.mark.long
def test_the_same_folder_gives_the_same_bytes(folder, page):
    assert write_page(folder).read_text(encoding="utf-8") == page


@pytest.mark.long
def test_only_the_report_is_written(folder, page):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    write_page(folder)
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert {path for path in after if after[path] != before.get(path)} <= {folder / "report.html"}


@pytest.mark.long
@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's package chromium")
@pytest.mark.parametrize("width", long_unless([390], [1200, 390]))
def test_tables_fit_the_screen(tmp_path, width):
    data = {"name": "chestxray14", "split": "chexnet"}
    data["test_names_sha256"] = CHESTXRAY14[0].names_sha256
    task = "multi-label, binary-class"
    folder = write_run(tmp_path / "run", classes=FINDINGS, task=task, **data)
    edit(folder, lambda results: results["dataset"].update(title="chestxray14 (split chexnet)"))
    content = write_page(folder).read_text(encoding="utf-8").replace("</body>", PROBE + "</body>")
    # In a frame, because the window of a headless browser is at least 500 px wide.
    frame = f'<iframe style="border: 0" width="{width}" height="900" srcdoc="{{}}"></iframe>'
    page = tmp_path / "probed.html"
    page.write_text(f"<!doctype html><body>{frame.format(html.escape(content))}")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--dump-dom", "--window-size=1300,1000", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    probe = re.search(r'data-probe="([^"]+)"', done.stdout)
    assert probe, done.stderr
    assert json.loads(html.unescape(probe[1])) == {
        "cut": [],
        "tables": 7,
        "wide": False,
        "inner": width,
    }


def test_the_layers_that_merge_are_shaded(tmp_path):
    axes = Figure().subplots()
    plots._depth_axis(axes, read_run(write_run(tmp_path)))
    assert [patch.get_x() for patch in axes.patches] == [4.5, 5.5, 6.5, 7.5]
    assert all(patch.get_width() == 1 for patch in axes.patches)
