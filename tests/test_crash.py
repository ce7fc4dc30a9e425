"""Commands that SIGKILL ends twenty times, at moments and at changes of the disk, end as those that lived."""

from functools import partial

import pytest

from benchmarks.crash.jobs import prepare
from benchmarks.crash.run import kill_and_compare

JOBS = ("train", "reference pass", "merge", "export of an adapter")


@pytest.mark.slow
def test_twenty_kills_change_nothing_of_what_comes_out(tiny_base, tiny_pairs, tmp_path):
    make = partial(prepare, steps=2, base=tiny_base, pairs=tiny_pairs, rows=12, pairs_per_step=4)
    found = kill_and_compare(20, work=tmp_path, names=JOBS, seed=1, make=make)
    assert found["kills"] == 20
    assert [one["faults"] for one in found["jobs"].values()] == [[]] * 4
    assert sum(one["deaths"]["a moment"] for one in found["jobs"].values()) < 20
