"""The command line of a run, before its configuration is read."""

import pytest

from torchtitan_style.common.errors import UserError
from torchtitan_style.launch.arguments import parse_config_arguments, take_restarts


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--confg", "there is no option --confg; did you mean --config?"),
        ("--config_file=x.toml", "there is no option --config_file; did you mean --config?"),
        ("--dry_run", "there is no option --dry_run; did you mean --dry-run?"),
        ("--max_restarts", "there is no option --max_restarts; did you mean --max-restarts?"),
        ("my.toml", "argument my.toml: write --config my.toml"),
        ("train", "argument train: leave it out; this command trains already"),
    ],
)
def test_a_mistake_is_named_with_what_was_meant(argument, message):
    rest, _ = take_restarts([argument, "3"])
    with pytest.raises(UserError) as error:
        parse_config_arguments(rest, usage="")
    assert str(error.value) == message


@pytest.mark.parametrize("key", ["--steps", "--max_steps", "--training.max_norm", "--job.confg", "confg"])
def test_what_may_be_a_key_is_left_to_the_configuration(key):
    assert parse_config_arguments([key, "3"], usage="").overrides == [key, "3"]
