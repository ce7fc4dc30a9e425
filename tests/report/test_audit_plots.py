"""Figures of an audit show what the audit found, at its edges too."""

import numpy as np
import pytest
import torch

from pe_dpo.audit import audit as audit_module
from pe_dpo.audit.audit import CURVE, Audit
from pe_dpo.objective import PairLogprobs, PairTerms
from pe_dpo.recipe.loss_section import LossSection
from pe_dpo.report.audit_plots import audit_figures, save_audit_plots
from pe_dpo.report.style import style


@pytest.fixture(autouse=True)
def few_kappas(monkeypatch):
    """Nine of the 81 that a curve has."""
    monkeypatch.setattr(audit_module, "CURVE", CURVE[::10])


def audited(pairs=300, loss=None, spread=4.0, same_length=False):
    generator = np.random.default_rng(0)
    lengths = np.full((2, pairs), 8) if same_length else generator.integers(3, 40, (2, pairs))
    values = torch.from_numpy(-1.2 * lengths + spread * generator.normal(size=(2, pairs)))
    reference = PairLogprobs(*values, *torch.from_numpy(lengths))
    zeros = torch.zeros(pairs, dtype=torch.float64)
    keys = [str(index) for index in range(pairs)]
    return Audit(reference, loss or LossSection(gamma="0.9x"), PairTerms(zeros), keys)


@pytest.mark.slow
def test_bars_are_on_one_side_of_zero_and_count_the_pairs_that_are_shown():
    found = audited()
    (axes,) = audit_figures(found)["preference"].axes
    bars = [(bar.get_x(), bar.get_x() + bar.get_width(), bar.get_height()) for bar in axes.patches]
    assert all(left >= -1e-9 or right <= 1e-9 for left, right, height in bars if height)
    low, high = min(left for left, _, _ in bars), max(right for _, right, _ in bars)
    inside = ((found.preference >= low) & (found.preference <= high) & (found.preference != 0)).sum()
    assert sum(height for _, _, height in bars) == inside
    assert inside >= 0.98 * found.pairs


@pytest.mark.slow
def test_shares_are_those_of_the_curve_and_the_recipe_is_marked():
    found = audited()
    (axes,) = audit_figures(found)["weights"].axes
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["gradient where π0 is right"].get_ydata().tolist() == [at.weight_right for at in found.curve]
    assert lines["this recipe, κ = 0.9"].get_xdata()[0] == pytest.approx(0.9)


@pytest.mark.slow
def test_flip_times_rise_with_kappa():
    (axes,) = audit_figures(audited())["flips"].axes
    half = next(line for line in axes.lines if line.get_label() == "50% have flipped")
    assert np.all(np.diff(half.get_ydata()) > 0)
    assert axes.get_yscale() == "log"


def test_the_scatter_has_the_line_whose_slope_is_taken_off():
    found = audited()
    (axes,) = audit_figures(found)["length"].axes
    line = next(line for line in axes.lines if str(line.get_label()).startswith("least squares"))
    slope = np.diff(line.get_ydata())[0] / np.diff(line.get_xdata())[0]
    assert slope == pytest.approx(np.polyfit(found.length_difference, found.preference, 1)[0], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    {"pairs": 2}, {"same_length": True}, {"spread": 0.0, "same_length": True}, {"spread": 2000.0},
    {"loss": LossSection(link="hinge", margin=0.0, gamma=0.3)}, {"loss": LossSection(reduce="mean", gamma="5x")},
], ids=str)  # fmt: skip
def test_any_audit_can_be_drawn(options):
    """Two pairs; equal lengths; nothing but ties; flips beyond numbers; a hinge that flips none; κ off the panel."""
    figures = audit_figures(audited(**options))
    assert list(figures) == ["preference", "length", "weights", "flips"]
    for figure in figures.values():
        with style():
            figure.draw_without_rendering()


@pytest.mark.slow
def test_each_figure_is_a_file(tmp_path):
    files = save_audit_plots(audited(), tmp_path / "plots")
    assert [path.name for path in files] == ["audit-preference.png", "audit-length.png", "audit-weights.png", "audit-flips.png"]
    assert all(path.stat().st_size > 2000 for path in files)
    assert sorted((tmp_path / "plots").iterdir()) == sorted(files)
