import numpy as np
import pytest

from inmerge_jax.data.chestxray14.labels import FINDINGS, find_labels, read_labels
from inmerge_jax.errors import UsageError
from inmerge_jax.reporting.published import CHESTXRAY14
from tests.data.chestxray14.nih import HEADER, rows, write_labels
from tests.paths import SHARED, needs

REAL = SHARED / "data" / "nih" / "Data_Entry_2017_v2020.csv.gz"


@pytest.mark.parametrize("name", ["Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv.gz"])
def test_plain_and_gzipped_give_the_same(tmp_path, name):
    table = rows()
    labels = read_labels(write_labels(tmp_path / name, table[::-1]))
    assert labels.names == tuple(sorted(row[0] for row in table))
    for (_, text, _, patient, _), found, who in zip(
        table, labels.findings, labels.patients, strict=True
    ):
        shown = {FINDINGS[k] for k in np.flatnonzero(found)}
        assert shown == (set() if text == "No Finding" else set(text.split("|")))
        assert who == patient
    assert find_labels(tmp_path) == tmp_path / name == find_labels(tmp_path / name)


@pytest.mark.parametrize("column", ["Image Index", "Finding Labels", "Patient ID"])
def test_a_missing_column_is_named(tmp_path, column):
    header = ["Other" if name == column else name for name in HEADER]
    path = write_labels(tmp_path / "a.csv", header=header)
    with pytest.raises(UsageError, match=rf"a\.csv lacks the column '{column}'"):
        read_labels(path)


def test_what_is_wrong_with_a_row_is_named(tmp_path):
    def refused(row, message):
        path = write_labels(tmp_path / "a.csv", [*rows(), row])
        with pytest.raises(UsageError, match=message):
            read_labels(path)

    first = rows()[0][0]
    refused((first, "Mass", 0, 1, 5), rf"a\.csv names 1 image \({first}\) more than once")
    refused(("x.png", "Mass|Cough", 0, 1, 5), "line 62: x.png has the unknown finding 'Cough'")
    refused(("x.png", "Mass|No Finding", 0, 1, 5), "unknown finding 'No Finding'")
    refused(("x.png", "", 0, 1, 5), "unknown finding ''")
    refused(("x.png", "Mass", 0, "p7", 5), "the patient of x.png is 'p7', no number")
    refused(("x.png", "Mass", 0, "9" * 20, 5), "line 62: the patient of x.png is '9999.* 64 bits")
    refused(("x.png",), "line 62 is cut short")


def test_a_quotation_mark_that_is_not_closed(tmp_path):
    path = write_labels(tmp_path / "a.csv", [*rows(), ("x.png", "Mass", 0, 7, 5)])
    path.write_text(path.read_text().replace(rows()[3][0], '"' + rows()[3][0]) + "x" * 200_000)
    with pytest.raises(UsageError, match=r"a\.csv, from line \d+ on: field larger.*not closed"):
        read_labels(path)


def test_files_that_are_no_labels(tmp_path):
    path = write_labels(tmp_path / "Data_Entry_2017.csv.gz")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UsageError, match=r"csv\.gz cannot be read: .*fetch it again"):
        read_labels(path)
    with pytest.raises(UsageError, match="there is no file"):
        read_labels(tmp_path / "none.csv")
    with pytest.raises(UsageError, match="a header and no image"):
        read_labels(write_labels(tmp_path / "a.csv", []))
    with pytest.raises(UsageError, match="there are no labels at"):
        find_labels(tmp_path / "none")
    with pytest.raises(UsageError, match="there: none"):
        find_labels(write_labels(tmp_path / "empty" / "other.csv").parent)
    write_labels(tmp_path / "Data_Entry_2017.csv")
    with pytest.raises(UsageError, match=r"there: Data_Entry_2017\.csv, Data_Entry_2017\.csv\.gz"):
        find_labels(tmp_path)


def test_published_rows_have_a_number_for_every_finding():
    for row in CHESTXRAY14:
        *aucs, mean = row.values
        assert len(aucs) == len(FINDINGS)
        assert np.mean(aucs) == pytest.approx(mean, abs=1e-3)


@needs(REAL)
def test_nihs_own_file():
    labels = read_labels(REAL)
    assert len(labels) == 112_120 and len(np.unique(labels.patients)) == 30_805
    counts = dict(zip(FINDINGS, labels.findings.sum(0).tolist(), strict=True))
    assert (counts["Infiltration"], counts["Hernia"]) == (19_894, 227)
