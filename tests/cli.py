"""What the tests of the commands share: running them in this process."""

import json

import pytest
from typer.testing import CliRunner

from hpo.cli.app import app
from hpo.errors import HpoError


def invoke(*arguments: object) -> str:
    """Run a command in this process; return what it printed. HpoError passes through."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments: object) -> str:
    """Run a command that must be refused; return its message."""
    with pytest.raises(HpoError) as caught:
        invoke(*arguments)
    assert caught.value.exit_status == 2
    return str(caught.value)


def summary(output: str) -> dict:
    return json.loads(output.splitlines()[-1])
