"""The reader of a run folder: what other programs write as null is not there."""

import json
from pathlib import Path

import fake_runs
import pytest

from pe_dpo.errors import RunFolderError
from pe_dpo.runs.run import Run


def test_a_number_that_was_not_finite_is_one_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"before": {}, "after": {"loss": None, "pairs": 3}}))
    found = {"pairs": {"loss": None, "pairs": 3}, "generation": {"kl": {"mean": None, "standard_error": None}, "tokens": 7}}
    (tmp_path / "evaluation.json").write_text(json.dumps(found))
    run = Run(tmp_path)
    assert run.info.after == {"pairs": 3}
    assert run.metrics_of_pairs == {"pairs": 3}
    assert run.estimate("kl") is None
    assert run.estimate("tokens") is not None


def test_curves_are_read_anew_where_more_was_written_and_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [{"step": 0, "probe_loss": 0.7}, {"step": 2, "loss": 0.5}, {"step": 1, "loss": None}, {"step": 2, "loss": 0.4}]
    file.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"note": "no step"}]))
    run = Run(tmp_path)
    assert (run.metrics, run.curve("loss"), run.curve("watched/loss")) == (lines, ([2], [0.4]), ([0], [0.7]))
    with file.open("a") as more:
        more.write('{"step": 3, "loss": 0.25}\n{"step": 3, "remark": "dead", "words": "no pull"}\n{"step": 4, "lo')
    assert run.curve("loss") == ([2, 3], [0.4, 0.25])
    assert (run.curve("step").steps, run.remarks) == ([0, 1, 2, 3], ["step 3: no pull"])
    file.write_text('{"step": 1}\n{"step": \n{"step": 2}\n')
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl:2: is not JSON"):
        run.curve("loss")


def test_pairs_whose_file_is_torn_are_measured_again_without_it(tmp_path: Path) -> None:
    run = Run(fake_runs.write_run(tmp_path / "run", {}, fake_runs.make_world()))
    pairs = run.pairs()
    assert pairs is not None
    assert run.with_initial(pairs) is not None
    (run.folder / "eval_pairs.parquet").write_bytes(b"PAR1, and no more")
    assert run.with_initial(pairs) is None
