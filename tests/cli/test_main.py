"""The command `inmerge` itself."""

import pytest

import inmerge_jax
from inmerge_jax.cli import main


def test_the_help_lists_every_command(capsys):
    assert main.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in main.COMMANDS)
    assert main.main([]) == 2 and capsys.readouterr().out == said


def test_the_version(capsys):
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out.split() == ["inmerge-jax", inmerge_jax.__version__]


def test_an_unknown_command_is_bad_input(capsys):
    assert main.main(["trian"]) == 2
    assert "there is no command 'trian'" in capsys.readouterr().err


@pytest.mark.parametrize("name", main.COMMANDS)
def test_every_command_has_a_help_of_its_own(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main.main([name, "--help"])
    assert ended.value.code == 0
    assert f"inmerge {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ("build --images a --output gs://b/x", "--output"),
        ("measure --data-dir gs://b/x", "--data-dir"),
        ("prepare tfds:mnist --data-dir gs://b/x", "--data-dir"),
    ],
)
def test_data_sets_are_not_made_in_buckets(options, name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main.main(["data", *options.split()]) == 2
    assert f"{name} gs://b/x: inmerge data reads and writes local" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
