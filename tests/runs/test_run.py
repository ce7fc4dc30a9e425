"""The reader of a run folder: what other programs write as null is not there."""

import json
from pathlib import Path

import fake_runs

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


def test_pairs_whose_file_is_torn_are_measured_again_without_it(tmp_path: Path) -> None:
    run = Run(fake_runs.write_run(tmp_path / "run", {}, fake_runs.make_world()))
    pairs = run.pairs()
    assert pairs is not None
    assert run.with_initial(pairs) is not None
    (run.folder / "eval_pairs.parquet").write_bytes(b"PAR1, and no more")
    assert run.with_initial(pairs) is None
