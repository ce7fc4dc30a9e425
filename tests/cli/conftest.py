"""The command line run inside this process, and a tiny world to run it on."""

import contextlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest

from pe_dpo.cli import main

SECRET = "hf_plantedsecret0123456789"
"""What the environment has of secrets whenever a command runs; no command shows it, and no file has it."""


class Finished(NamedTuple):
    """What one command left."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def pe_dpo() -> Callable[..., Finished]:
    """Run `pe-dpo` with the given arguments, into a pipe or on a screen, as the installed script does; return what it left."""

    def run(*arguments: object, columns: int = 120, is_screen: bool = False) -> Finished:
        out, err = io.StringIO(), io.StringIO()
        argv = ["pe-dpo", *map(str, arguments)]
        environment = {"COLUMNS": str(columns), "HF_TOKEN": SECRET, "TTY_COMPATIBLE": str(int(is_screen)), "TERM": "dumb"}
        with mock.patch.object(sys, "argv", argv), mock.patch.dict(os.environ, environment):  # noqa: SIM117
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
                main()
        assert SECRET not in out.getvalue() + err.getvalue()
        return Finished(ended.value.code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def recipe_file(tiny_base: Path, tiny_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of two steps of four pairs over the tiny world; its output is to be given."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(
        f"model: {{base: '{tiny_base}'}}\n"
        f"data: {{train: '{tiny_pairs}'}}\n"
        "loss: {beta: 0.1}\n"
        "train: {max_steps: 2, pairs_per_step: 4, learning_rate: 1.0e-2, warmup: 0}\n"
    )
    return path


@pytest.fixture(scope="session")
def trained(
    pe_dpo: Callable[..., Finished], recipe_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Finished]:
    """The folder of a run of two steps, and what `train` left when it made it."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    return folder, pe_dpo("train", recipe_file, "-o", folder)
