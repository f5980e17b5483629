"""The command line, run in the process of a test."""

from typing import NamedTuple

import pytest

from cmdgen.cli.app import main


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def cmdgen(capsys):
    """Runs the command in this process."""

    def run(*arguments: object) -> Result:
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        return Result(end.value.code or 0, *capsys.readouterr())

    return run
