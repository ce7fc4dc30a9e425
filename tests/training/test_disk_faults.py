"""A disk that fails at any moment of a run: one line, a true status, nothing half-written, and a run that goes on."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from failing_disk import FailingDisk, failing
from safetensors.torch import load_file

from pe_dpo.errors import DiskError
from pe_dpo.experiments.point import share
from pe_dpo.recipe import Recipe
from pe_dpo.runs.run import Run
from pe_dpo.runs.writing import RunWriter
from pe_dpo.training import train as train_module
from pe_dpo.training.arguments import check_disk
from pe_dpo.training.train import train

MEASURED = ("generation.prompts=1", "generation.max_new_tokens=1", "generation.snapshots=1")
EVERY_STEP = ("train.max_steps=2", "train.save_every=1", "train.eval_every=2", "train.keep_checkpoints=1")


@pytest.fixture(scope="module")
def shared(tiny_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Pairs and base of all runs here."""
    return share(tiny_recipe(tmp_path_factory.mktemp("shared")))


def half_written(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name == ".staging" or path.name.endswith(".partial")]


@pytest.mark.slow
def test_a_disk_that_refuses_anything_at_any_moment_costs_no_run(
    tiny_recipe: Callable[..., Recipe], shared: Any, tmp_path: Path
) -> None:
    """Of the 132 requests of a run that saves, samples and keeps a snapshot: one refused once, another with all that follow it.

    With PE_DPO_EVERY_FAULT=1 all of them, both ways; it takes five minutes.
    """
    run = tmp_path / "run"
    recipe = tiny_recipe(run, *EVERY_STEP, *MEASURED)
    with failing(FailingDisk(run)) as watched:
        train(recipe, shared=shared)
    expected = load_file(run / "adapter_model.safetensors")
    numbers = [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EMFILE, errno.ESTALE, errno.EDQUOT]
    moments = [(at, lasts) for at in range(len(watched.asked)) for lasts in (False, True)]
    if not os.environ.get("PE_DPO_EVERY_FAULT"):
        wanted = ("README.md", "checkpoint-2/optimizer.pt")
        moments = [
            (next(at for at, asked in enumerate(watched.asked) if name in asked), number == 1)
            for number, name in enumerate(wanted)
        ]
    for at, lasts in moments:
        shutil.rmtree(run)
        with failing(FailingDisk(run, numbers[at % len(numbers)], at=at, lasts=lasts)):
            try:
                train(recipe, shared=shared)
            except DiskError as error:
                said = str(error)
            else:
                assert "os.mkdir" in watched.asked[at]  # which was there already
                continue
        assert said.startswith(str(run)) and "\n" not in said, watched.asked[at]
        if run.is_dir() and not lasts:
            assert half_written(run) == []
            assert not (run / "run.json").exists() or Run(run).info.status == "failed"
        goes_on = Run(run).exists
        train(recipe, resume=goes_on, overwrite=not goes_on, shared=shared)
        found = load_file(run / "adapter_model.safetensors")
        assert all(torch.equal(found[name], expected[name]) for name in expected), watched.asked[at]
        assert (Run(run).info.status, Run(run).info.why, half_written(run)) == ("finished", "", [])


def test_where_not_a_byte_has_room_the_status_is_true_all_the_same(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path)
    writer.update(id="x", status="training", ended="β·Δπ")
    size = (tmp_path / "run.json").stat().st_size
    (tmp_path / ".staging" / "checkpoint-3").mkdir(parents=True)
    writer.fail("nobody began")
    assert Run(tmp_path).info.status == "training"
    writer._has_begun = True
    with failing(FailingDisk(tmp_path / ".run.json.partial", errno.ENOSPC, lasts=True)):
        writer.fail("the disk is full")
    assert (Run(tmp_path).info.status, Run(tmp_path).info.id) == ("failed", "x")
    assert (tmp_path / "run.json").stat().st_size == size
    assert half_written(tmp_path) == []
    writer.fail("the disk is full")
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["why"] == "the disk is full"


def test_whatever_ends_a_run_its_status_says_so_and_one_that_had_not_begun_is_left_alone(
    tiny_recipe: Callable[..., Recipe], shared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RecursionError("maximum recursion depth exceeded\nin comparison")

    recipe = tiny_recipe(tmp_path / "run", "train.max_steps=1")
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "check_start", fails)
        with pytest.raises(RecursionError):
            train(recipe, shared=shared)
    assert (Run(tmp_path / "run").info.status, Run(tmp_path / "run").info.why) == (
        "failed",
        "RecursionError: maximum recursion depth exceeded",
    )
    before = (tmp_path / "run" / "run.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "load_policy", fails)
        with pytest.raises(RecursionError):
            train(recipe, overwrite=True, shared=shared)
    assert (tmp_path / "run" / "run.json").read_bytes() == before


def test_room_for_the_checkpoints_is_looked_for_before_the_first_step(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A million parameters in float32 and Adam's two: 12 MB a checkpoint, two kept and one being written, 4 MB at the end."""
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=1 << 40, free=39_900_000))
    recipe = make_recipe()
    with pytest.raises(DiskError, match=r"4\.0 MB with 3 × 12\.0 MB of checkpoints at a time takes 40\.0 MB, and 39\.9"):
        check_disk(recipe, parameters=1_000_000, saves=10)
    check_disk(recipe, parameters=1_000_000, saves=10, there=1)
    check_disk(recipe, parameters=1_000_000, saves=2)
    check_disk(make_recipe("train.optimizer=adamw_bnb_8bit"), parameters=1_000_000, saves=10)
