"""The study: its page holds what the kept numbers come to; what makes numbers of them is right where the answer is known."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.study import explicit, luck
from benchmarks.study.contrasts import contrasts
from benchmarks.study.measured import Measured, State

PAGE = (Path(__file__).parents[1] / "docs" / "study-gamma-vs-mixout.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_page_has_the_tables_and_the_numbers_of_its_sentences_and_every_page_the_claims_that_are_kept_as_data():
    from benchmarks.claims import FILE, ROOT, claims
    from benchmarks.study.page import tables

    kept = json.loads(FILE.read_text(encoding="utf-8"))
    assert kept == [one._asdict() for one in claims()]
    assert len({one["id"] for one in kept}) == len(kept)
    pages = {one["page"]: (ROOT / one["page"]).read_text(encoding="utf-8") for one in kept}
    assert [one["id"] for one in kept if one["text"] not in " ".join(pages[one["page"]].split())] == []
    for name, table in tables().items():
        assert f"<!-- {name} -->\n{table}\n<!-- end -->" in PAGE, name


@pytest.mark.slow
def test_contrasts_err_as_often_as_they_say_and_holm_adjusts_those_that_were_named_together():
    """4,000 draws of eight differences: 5 % of intervals leave a mean of 0 out; of a mean of d, 5 % are called within d."""
    random = np.random.default_rng(0)
    values = random.normal(0, 1, (4000, 8))
    found = [contrasts({"one": row})[0] for row in values]
    assert np.mean([one.p < 0.05 for one in found]) == pytest.approx(0.05, abs=0.011)
    assert np.mean([one.low > 0 or one.high < 0 for one in found]) == np.mean([one.p < 0.05 for one in found])
    at_the_edge = [contrasts({"one": row + 2.0})[0].is_within(2.0) for row in values]
    assert np.mean(at_the_edge) == pytest.approx(0.05, abs=0.011)
    several = contrasts({"a": values[0] + 3, "b": values[1], "c": values[2] + 2})
    assert sorted(one.p * size for one, size in zip(sorted(several, key=lambda one: one.p), (3, 2, 1), strict=True))[0] == min(
        one.p_holm for one in several
    )


def test_components_of_variance_are_those_that_were_put_in():
    """Draws 9, seeds 1, configurations 4, both 2.25, rest 0.25; the mean of 300 designs, of which each is right on average."""
    random = np.random.default_rng(0)

    def design() -> luck.Components:
        parts = [(3.0, (6, 1, 1)), (1.0, (6, 4, 1)), (2.0, (1, 1, 6)), (1.5, (6, 1, 6)), (0.5, (6, 4, 6))]
        return luck.components(np.sum([np.broadcast_to(random.normal(0, sd, shape), (6, 4, 6)) for sd, shape in parts], axis=0))

    assert np.mean([design() for _ in range(300)], axis=0) == pytest.approx([9, 1, 4, 2.25, 0.25], rel=0.12)


def test_the_best_of_k_is_that_of_all_draws_of_k():
    random = np.random.default_rng(0)
    scores, worth = random.random(9), random.random(9)
    for size in (1, 2, 5, 9):
        every = [worth[max(drawn, key=lambda one: scores[one])] for drawn in itertools.combinations(range(9), size)]
        assert luck.best_of(scores, worth, size) == pytest.approx(np.mean(every))


def a_state(beta: float, win: float, root_kl: float, **settings: float) -> State:
    """A policy of draw 0 whose four answers win with this chance where π0's are worth 0 and 2 half the time each."""
    worth = np.array([2, 2, 2, 2] if win == 0.75 else [1, 1, 1, 1] if win == 0.5 else [2, 2, 1, 1])
    changed = ({"loss.beta": beta} if beta != 0.2 else {}) | settings
    return State("ends-0", 0, changed, 0, 94, True, None, np.zeros(1), np.full(4, root_kl**2), worth)


def test_at_equal_kl_is_read_off_straight_lines_over_root_kl_and_never_beyond_them(monkeypatch):
    """The dial wins 0.5 at √KL 1, 0.75 at 3, so 0.625 at 2: mixout's 0.75 there is 12.5 points above; at 4 nothing is."""
    measured = Measured.__new__(Measured)
    measured.shared = {"reference_worth": [[0.5, 0.0, 0.5]] * 4}
    measured.states = [
        a_state(4.0, 0.5, 1.0), a_state(0.2, 0.75, 3.0),
        a_state(0.2, 0.75, 2.0, **{"mixout.p": 0.3}), a_state(0.2, 0.75, 4.0, **{"mixout.p": 0.6}),
        a_state(0.2, 0.75, 2.0, **{"mixout.p": 0.3, "loss.gamma": 0.0}),
    ]  # fmt: skip
    differences, inside, total = explicit.at_equal_kl(measured, explicit.ARMS["mixout (γ = β)"])
    assert differences.tolist() == pytest.approx([0.125])
    assert (inside, total) == (1, 2)
    assert explicit.at_equal_kl(measured, explicit.ARMS["mixout with γ = 0"])[0].tolist() == pytest.approx([0.125])
