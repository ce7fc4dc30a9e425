"""A log that TRL's own trainer writes is read as far as it goes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from pe_dpo.experiments.compare import compare
from pe_dpo.runs.observations import read_observations

pytest.importorskip("trl", reason="TRL is not installed; it comes with the peer extra")
pytestmark = pytest.mark.peer


def test_the_last_evaluation_of_a_run_of_trl_is_read(
    make_base: Callable[..., Any], peer_trainer: Callable[..., Any], rows: list[dict[str, str]], tmp_path: Path
) -> None:
    """Two steps with an evaluation and a checkpoint after each; the numbers are those of TRL's own last evaluation."""
    options = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    data = {"eval_dataset": Dataset.from_list(rows)}
    trainer = peer_trainer(make_base(), rows, beta=0.3, data=data, per_device_eval_batch_size=6, **options)
    trainer.train()
    (found,) = read_observations([tmp_path / "peer"])[0]
    again = trainer.evaluate()
    assert (found.step, found.source) == (2, "trl")
    for key in ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen"):
        assert found.logged[key] == pytest.approx(again[f"eval_{key}"], rel=1e-4), key
    assert found.logged["pairs"] == len(rows)
    shown = compare([tmp_path / "peer"])
    assert (shown.metric, shown.runs[0].value) == ("rewards/accuracies", found.logged["rewards/accuracies"])
