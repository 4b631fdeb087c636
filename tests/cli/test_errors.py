import errno
import os

import pytest

from inmerge_jax.buckets import as_path
from inmerge_jax.cli import data, export, predict
from inmerge_jax.cli import report as report_command
from inmerge_jax.cli.errors import BAD_INPUT, report, with_options
from inmerge_jax.cli.train import OPTIONS

COMMANDS = [
    (report_command, "write_and_print", "run"),
    (predict, "predict", "run --to out.csv"),
    (export, "export", "run --to out.pth"),
    (data, "run_build", "build --images images --output out"),
    (data, "run_prepare", "prepare tfds:mnist"),
]


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("`batch_size` 5: choose 6", "--batch-size 5: choose 6"),
        ("leave it out, or give `optimizer=sgd`", "leave it out, or give --optimizer sgd"),
        ("`augment.crop`: leave it out", "--augment.crop: leave it out"),
        ("`difficulty` 9: give 1", "--phantom.difficulty 9: give 1"),
        ("a/`b c`/d and plain text", "a/`b c`/d and plain text"),
    ],
)
def test_arguments_in_messages_are_shown_as_options(message, shown):
    assert with_options(message, OPTIONS) == shown


def test_bad_input_goes_to_stderr_and_has_status_2(capsys):
    assert report(ValueError("`seeds`: give one")) == BAD_INPUT == 2
    assert capsys.readouterr() == ("", "error: --seeds: give one\n")


@pytest.mark.parametrize(("module", "name", "words"), COMMANDS)
def test_every_command_says_what_the_system_refuses(module, name, words, monkeypatch, capsys):
    raised: list[BaseException] = [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "place/file"),
        OSError(errno.EROFS, os.strerror(errno.EROFS), "place/file"),
        PermissionError(errno.EACCES, os.strerror(errno.EACCES), "place/file"),
        KeyboardInterrupt(),
        OSError(errno.EIO, os.strerror(errno.EIO)),
    ]

    def fail(*_):
        raise raised.pop(0)

    monkeypatch.setattr(module, name, fail)
    for said in ("cannot write place/file: No space left", "cannot write place/file: Read-only"):
        assert module.main(words.split()) == 2
        message = capsys.readouterr().err
        assert said in message and "make room or give rights" in message
    assert module.main(words.split()) == 2
    assert "'place/file'; give rights to it" in capsys.readouterr().err
    assert module.main(words.split()) == 130
    assert capsys.readouterr().err.startswith("stopped; ")
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        module.main(words.split())


@pytest.mark.parametrize(("module", "name", "words"), COMMANDS)
def test_every_command_says_why_a_bucket_fails(module, name, words, monkeypatch, capsys):
    retry = pytest.importorskip("gcsfs.retry")
    aiohttp = pytest.importorskip("aiohttp")
    raised = [
        retry.HttpError({"code": 403, "message": "Forbidden"}),
        aiohttp.ServerTimeoutError("no answer"),  # an OSError too
    ]

    def fail(*_):
        raise raised.pop(0)

    monkeypatch.setattr(module, name, fail)
    for reason in ("HttpError: Forbidden", "ServerTimeoutError: no answer"):
        assert module.main(words.split()) == 1
        said = capsys.readouterr().err
        assert said.startswith("error: a bucket failed: ") and reason in said
        assert "check network, address and rights" in said and said.count("\n") == 1


@pytest.mark.parametrize("module", [predict, export])
def test_a_bucket_that_refuses_the_file_is_named(module, monkeypatch, capsys):
    retry = pytest.importorskip("gcsfs.retry")

    def refuse(self):
        raise retry.HttpError({"code": 403, "message": "Forbidden"})

    monkeypatch.setattr(type(as_path("gs://bucket/out.pth")), "exists", refuse)
    assert module.main(["run", "--to", "gs://bucket/out.pth"]) == 2
    said = capsys.readouterr().err
    assert "cannot write gs://bucket/out.pth: HttpError: Forbidden" in said
