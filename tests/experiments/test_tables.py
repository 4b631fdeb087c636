"""The tables in the README are those of the stored results."""

import pytest

from experiments import tables
from inmerge_jax.errors import UsageError

README = (tables.ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", tables.PAGES)
def test_every_page_is_up_to_date(page):
    text = (tables.ROOT / page).read_text()
    assert tables.render(text, page) == text, "run python -m experiments.tables"


def test_a_number_typed_by_hand_is_noticed():
    begin = "<!-- begin main -->"
    assert begin in README
    forged = README.replace(begin, begin + "\n\nAUC 0.999")
    assert tables.render(forged) == README


def test_a_missing_place_is_an_error():
    with pytest.raises(UsageError, match="no lines <!-- begin main -->"):
        tables.render("# nothing")
