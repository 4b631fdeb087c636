import pytest

from inmerge_jax.cli.errors import BAD_INPUT, report, with_options
from inmerge_jax.cli.train import OPTIONS


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("`batch_size` 5: choose 6", "--batch-size 5: choose 6"),
        ("leave it out, or give `optimizer=sgd`", "leave it out, or give --optimizer sgd"),
        ("`difficulty` 9: give 1", "--phantom.difficulty 9: give 1"),
        ("a/`b c`/d and plain text", "a/`b c`/d and plain text"),
    ],
)
def test_arguments_in_messages_are_shown_as_options(message, shown):
    assert with_options(message, OPTIONS) == shown


def test_bad_input_goes_to_stderr_and_has_status_2(capsys):
    assert report(ValueError("`seeds`: give one")) == BAD_INPUT == 2
    assert capsys.readouterr() == ("", "error: --seeds: give one\n")
