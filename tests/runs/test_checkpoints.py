"""Which checkpoints stay when a new one is sealed."""

from pathlib import Path

from pe_dpo.runs.checkpoints import checkpoints, commit_checkpoint, faults, staging_folder


def _save(run: Path, step: int, *, keep: int) -> None:
    staged = staging_folder(run) / f"checkpoint-{step}"
    staged.mkdir(parents=True)
    (staged / "state").write_text(f"step {step}")
    commit_checkpoint(run, step, {}, keep=keep)


def test_the_oldest_are_removed(tmp_path: Path) -> None:
    for step in (2, 10, 4):
        _save(tmp_path, step, keep=9)
    _save(tmp_path, 12, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-12"]


def test_the_last_whole_one_before_the_newest_stays_outside_of_the_rotation(tmp_path: Path) -> None:
    """Should the newest turn out damaged, there is one to go on from, whatever number is kept."""
    for step in (2, 4, 6):
        _save(tmp_path, step, keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-6"]
    for step in (4, 6):
        (tmp_path / f"checkpoint-{step}" / "state").write_text("torn")
    _save(tmp_path, 8, keep=2)
    (tmp_path / "checkpoint-8" / "state").write_text("torn")
    _save(tmp_path, 10, keep=2)
    _save(tmp_path, 12, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-12"]


def test_rotation_never_removes_the_only_whole_one(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        _save(tmp_path, step, keep=3)
    for step in (4, 6):
        (tmp_path / f"checkpoint-{step}" / "state").write_text("torn")
    _save(tmp_path, 8, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-6", "checkpoint-8"]


def test_a_damaged_one_of_a_later_step_does_not_cost_the_one_just_saved(tmp_path: Path) -> None:
    for step in (4, 8):
        _save(tmp_path, step, keep=2)
    (tmp_path / "checkpoint-8" / "state").write_text("torn")
    _save(tmp_path, 5, keep=1)  # the run went on from step 4
    assert [path.name for path in checkpoints(tmp_path) if not faults(path)] == ["checkpoint-4", "checkpoint-5"]
