import shutil
from pathlib import Path

import pytest

from tests.data.chestxray14.nih import make, make_nih


@pytest.fixture(scope="package")
def nih(tmp_path_factory):
    return make_nih(tmp_path_factory.mktemp("nih"))


@pytest.fixture(scope="package")
def built(nih, tmp_path_factory):
    output = tmp_path_factory.mktemp("built") / "data"
    make(nih, output)
    return output


@pytest.fixture
def copy(built, tmp_path):
    return Path(shutil.copytree(built, tmp_path / "copy"))
