"""Commands that SIGKILL ends twenty times, at moments and at changes of the disk, end as those that lived."""

import pytest

from benchmarks.crash.run import kill_and_compare

JOBS = ("train", "reference pass", "merge", "export of an adapter")


@pytest.mark.slow
def test_twenty_kills_change_nothing_of_what_comes_out(tmp_path):
    found = kill_and_compare(20, work=tmp_path, names=JOBS, steps=2)
    assert found["kills"] == 20
    assert [one["faults"] for one in found["jobs"].values()] == [[]] * 4
    assert sum(one["deaths"]["a moment"] for one in found["jobs"].values()) < 20
