"""What is logged for one file, and what of it is shown."""

import logging
from pathlib import Path

import pytest

from pe_dpo.log import logged_to
from pe_dpo.progress import advance, progress, showing

logger = logging.getLogger("pe_dpo.tests")


def test_what_one_run_says_is_kept_for_its_file_and_shown_nowhere(tmp_path: Path, logged: list[str]) -> None:
    seen: list[tuple[str, int, int]] = []
    with showing(lambda *report: seen.append(report)):
        with logged_to(tmp_path / "log.txt"), progress("scoring"):
            logger.info("a fact")
            logger.warning("what looks off")
            advance(1, 2)
        with progress("scoring"):
            advance(2, 2)
    logger.info("outside")
    assert (tmp_path / "log.txt").read_text() == "a fact\nwarning: what looks off\n"
    assert logged == ["outside"]
    assert seen == [("scoring", 2, 2)]


def test_a_log_that_cannot_be_written_hides_no_error_of_the_run(tmp_path: Path, logged: list[str]) -> None:
    (tmp_path / "log.txt").mkdir()
    with pytest.raises(KeyError, match="of the run"), logged_to(tmp_path / "log.txt"):
        raise KeyError("of the run")
    why = "the log cannot be written: Is a directory; the rest of its run is not concerned"
    assert logged == [f"warning: {tmp_path / 'log.txt'}: {why}"]
