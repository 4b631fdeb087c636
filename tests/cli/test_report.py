"""`inmerge report` on a folder that cannot be written."""

import errno
import os

import pytest

from inmerge_jax import files
from inmerge_jax.cli import report
from tests.reporting.folder import write_run


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch, capsys, code):
    folder = write_run(tmp_path / "run", seeds=(0,))

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, "fsync", refuse)
    assert report.main([str(folder)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: cannot write {folder / 'report.html'}: {os.strerror(code)};")
    assert "make room or give rights there" in said
