"""The audit: its numbers by hand and brute force, the same under π0 → π0^α, and from the store without the base's weights."""

import json
import math
import shutil
import struct
from dataclasses import asdict

import numpy as np
import pytest
import torch

from pe_dpo.audit.audit import KAPPAS, Audit, audit
from pe_dpo.audit.forecast import AGREEMENTS, FLIP_QUANTILES, forecast
from pe_dpo.audit.quantization_error import quantization_error
from pe_dpo.errors import ModelError, UsageError
from pe_dpo.inference.reference import check_finite
from pe_dpo.metrics.estimates import pairs_worth, wilson_interval
from pe_dpo.metrics.reference_accuracy import ReferenceAccuracy
from pe_dpo.objective import Loss, PairLogprobs, PairTerms
from pe_dpo.recipe import recipe_from_yaml
from pe_dpo.recipe.loss_section import LossSection
from pe_dpo.training.train import train


def doubles(values):
    return torch.as_tensor(values, dtype=torch.float64)


def logprobs(chosen, rejected, chosen_lengths, rejected_lengths):
    return PairLogprobs(doubles(chosen), doubles(rejected), torch.as_tensor(chosen_lengths), torch.as_tensor(rejected_lengths))


@pytest.fixture
def four():
    """By sums Δ0 is 4, −6, 0 and 2; per token 2, −1, −1 and −1; lengths differ by −2, −2, −2 and −6."""
    return logprobs([-4, -10, -8, -12], [-8, -4, -8, -14], [2, 4, 4, 4], [4, 2, 6, 7]), ["a", "b", "c", "d"]


def random_pairs(pairs=400, seed=0):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(3, 40, (2, pairs))
    values = -1.2 * lengths + generator.normal(0, 3, (2, pairs))
    return logprobs(*values, *lengths), [str(index // 2) for index in range(pairs)]


def audited(loss, reference, keys):
    return Audit(reference, loss, PairTerms(torch.zeros(len(keys), dtype=torch.float64)), keys)


def foreseen(loss, gamma, reference):
    zeros = torch.zeros(len(reference.chosen), dtype=torch.float64)
    return forecast(Loss(**loss.coefficients(gamma)), reference, PairTerms(zeros))


# ---------------------------------------------------------------- what the reference prefers


def test_right_wrong_and_ties_by_sums_and_per_token(four):
    """Per token: −4/2+8/4 = 0, −10/4+4/2 = −0.5, −8/4+8/6 = −0.67, −12/4+14/7 = −1."""
    found = audited(LossSection(gamma=0.1), *four)
    assert (found.by_sum.right, found.by_sum.wrong, found.by_sum.ties) == (0.5, 0.25, 1)
    assert (found.per_token.right, found.per_token.wrong, found.per_token.ties) == (0.0, 0.75, 1)
    assert found.disagreement == 0.5  # the first and the last pair are right by sums alone
    assert (found.pairs, found.prompts) == (4, 4)


def test_spread_and_correlation_are_those_of_numpy():
    reference, keys = random_pairs()
    found = audited(LossSection(), reference, keys)
    difference = (reference.chosen_lengths - reference.rejected_lengths).numpy()
    for ranking, values in (
        (found.by_sum, (reference.chosen - reference.rejected).numpy()),
        (
            found.per_token,
            (reference.chosen / reference.chosen_lengths - reference.rejected / reference.rejected_lengths).numpy(),
        ),
    ):
        assert ranking.spread == pytest.approx(np.std(values, ddof=1), rel=1e-12)
        assert ranking.length_correlation == pytest.approx(np.corrcoef(values, difference)[0, 1], rel=1e-9)
        slope = np.polyfit(difference, values, 1)[0]
        assert ranking.right_at_equal_length == pytest.approx(np.mean(values - slope * difference > 0), abs=1e-12)


def test_pairs_that_repeat_each_other_count_once_in_the_interval():
    """Ten pairs four times over know a share as the ten do, as on every other page (`pairs_worth`)."""
    values, once = np.array([1.0, -1.0] * 5), [str(number) for number in range(10)]
    alone = ReferenceAccuracy(values, np.arange(10.0), once)
    assert alone.right_interval == wilson_interval(0.5, 10)
    copies = ReferenceAccuracy(np.repeat(values, 4), np.arange(40.0), np.repeat(once, 4).tolist())
    assert copies.right_interval == wilson_interval(0.5, pairs_worth(np.repeat(values > 0, 4), np.repeat(once, 4).tolist()))


def test_equal_lengths_leave_the_correlation_open():
    ranking = ReferenceAccuracy(np.array([1.0, -2.0, 4.0]), np.zeros(3), ["a", "b", "c"])
    assert math.isnan(ranking.length_correlation)
    assert ranking.right_at_equal_length == pytest.approx(2 / 3)


# ---------------------------------------------------------------- what the loss makes of it


@pytest.mark.parametrize("gamma", [0.0, 0.05, 0.1, 0.25])
@pytest.mark.parametrize("margin", [0.0, 0.8])
def test_the_gradient_at_step_zero_is_that_of_the_formula(gamma, margin):
    """w = σ((γ−β)·Δ0 + m)."""
    reference, _ = random_pairs()
    preference = (reference.chosen - reference.rejected).numpy()
    weights = 1 / (1 + np.exp(-((gamma - 0.1) * preference + margin)))
    found = foreseen(LossSection(margin=margin), gamma, reference)
    assert found.weight_right == pytest.approx(weights[preference > 0].sum() / weights.sum(), rel=1e-9)
    assert found.weight_wrong == pytest.approx(weights[preference < 0].sum() / weights.sum(), rel=1e-9)
    assert found.effective == pytest.approx(weights.sum() ** 2 / (400 * (weights**2).sum()), rel=1e-9)
    assert found.saturated == pytest.approx(np.mean((weights < 0.05) | (weights > 0.95)), abs=1e-12)
    assert found.loss == pytest.approx(-np.log(1 - weights).mean(), rel=1e-9)
    assert found.delta == pytest.approx((gamma - 0.1) * preference.std(ddof=1), rel=1e-9, abs=1e-12)
    assert found.hinge_accuracy == pytest.approx(np.mean((preference > 0) | (gamma * preference + margin > 0)), abs=1e-12)


def test_flip_times_are_quantiles_over_the_wrong_pairs():
    """Ten pairs, wrong by 1 … 9 nats and one right, at β = γ = 1: e^c + c − 1 for c = 1, 5 and 9 (order statistics)."""
    reference = logprobs([-1, -2, -3, -4, -5, -6, -7, -8, -9, 1], [0] * 10, [1] * 10, [1] * 10)
    found = foreseen(LossSection(beta=1.0), 1.0, reference)
    assert FLIP_QUANTILES == (0.1, 0.5, 0.9)
    assert found.flip_times == pytest.approx([math.exp(c) + c - 1 for c in (1, 5, 9)], rel=1e-12)
    assert found.never_flips == 0


def test_a_hinge_that_rests_before_it_flips_a_pair_never_does():
    """Margin 2.5 and γ = β = 1: pairs wrong by 1 and 2 nats flip after βc = 1 and 2, the other seven are content before."""
    reference = logprobs([-1, -2, -3, -4, -5, -6, -7, -8, -9, 1], [0] * 10, [1] * 10, [1] * 10)
    loss = LossSection(beta=1.0, link="hinge", margin=2.5)
    found = foreseen(loss, 1.0, reference)
    assert found.flip_times == (1.0, math.inf, math.inf)
    assert found.never_flips == pytest.approx(7 / 9)
    assert found.hinge_accuracy == 0.3
    assert found.saturated is None


def test_idealized_accuracy_is_the_share_above_its_threshold():
    """P(κ·Δ0 + logit(p)/β > 0)."""
    reference, _ = random_pairs()
    preference = (reference.chosen - reference.rejected).numpy()
    found = foreseen(LossSection(), 0.07, reference)
    expected = [np.mean(0.7 * preference + math.log(p / (1 - p)) / 0.1 > 0) for p in AGREEMENTS]
    assert found.ideal_accuracy == pytest.approx(expected, abs=1e-12)


def test_where_no_pair_pulls_shares_are_unknown():
    reference, keys = random_pairs(20)
    loss = LossSection(link="hinge", margin=0.5)
    found = foreseen(loss.model_copy(update={"margin": 0.0}), 0.1, reference)
    assert math.isnan(found.weight_right)
    assert math.isnan(found.effective)
    assert "no pair has a gradient at step 0" in audited(loss.model_copy(update={"margin": 0.0}), reference, keys).warnings[0]


def test_the_audit_tells_four_kappas_with_all_else_as_in_the_recipe():
    reference, keys = random_pairs()
    loss = LossSection(beta=0.2, margin=0.4, gamma="1.5x")
    found = audited(loss, reference, keys)
    assert [one.kappa for one in found.kappas] == list(KAPPAS) == [0, 0.5, 1, 2]
    for one in found.kappas:
        assert one == foreseen(loss, one.gamma, reference)
    assert found.recipe.gamma == pytest.approx(0.3)


@pytest.mark.slow
def test_a_loss_per_token_is_audited_per_token():
    """Dividing by lengths beforehand and auditing sums of one token gives the same outlooks, scales and correlations."""
    reference, keys = random_pairs()
    divided = logprobs(
        reference.chosen / reference.chosen_lengths, reference.rejected / reference.rejected_lengths, [1] * 400, [1] * 400
    )
    per_token = audited(LossSection(reduce="mean", gamma="0.5x"), reference, keys)
    summed = audited(LossSection(gamma="0.5x"), divided, keys)
    for one, other in zip((per_token.recipe, *per_token.curve), (summed.recipe, *summed.curve), strict=True):
        close(asdict(one), asdict(other))
    assert per_token.label_fit.scale == pytest.approx(summed.label_fit.scale, rel=1e-9)
    assert per_token.ranking == per_token.per_token


def test_the_three_ways_are_told_with_what_each_would_give():
    reference, keys = random_pairs()
    found = audited(LossSection(gamma="0.9x"), reference, keys)
    assert list(found.ways) == ["auto", "balance:0.5", "scale:1"]
    for way in found.ways.values():
        assert found.forecast(way.gamma) == foreseen(LossSection(), way.gamma, reference)
    assert found.forecast(found.ways["balance:0.5"].gamma).weight_right == pytest.approx(0.5, abs=1e-9)


@pytest.mark.parametrize("gamma", ["auto", "balance:0.6", "scale:2"])
def test_a_recipe_that_asks_for_one_of_them_gets_its_number(gamma):
    reference, keys = random_pairs()
    found = audited(LossSection(gamma=gamma), reference, keys)
    assert found.recipe == found.forecast(found.ways[gamma].gamma)
    assert found.asked_gamma == gamma


def test_a_share_that_cannot_be_is_an_error_only_where_the_recipe_asks_for_it():
    """With a margin of 30 all pairs weigh 1 at γ = 0, and six of ten are right."""
    reference, keys = random_pairs()
    reference = reference._replace(rejected=reference.rejected - 6)
    found = audited(LossSection(margin=30.0), reference, keys)
    assert found.ways["balance:0.5"].startswith("no gamma gives this share")
    with pytest.raises(UsageError, match=r"loss\.gamma: balance:0\.1: no gamma gives this share"):
        audited(LossSection(gamma="balance:0.1", margin=30.0), reference, keys)


# ---------------------------------------------------------------- π0 → π0^α


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.25, 4.0])
@pytest.mark.parametrize("loss", [
    {"gamma": 0.03}, {"gamma": "0.5x", "reduce": "mean", "margin": 0.2}, {"gamma": "2x", "link": "hinge", "margin": 1.0},
])  # fmt: skip
def test_nothing_depends_on_how_sharp_the_reference_is_once_beta_and_gamma_are_divided(loss, alpha):
    reference, keys = random_pairs()
    sharper = reference._replace(chosen=alpha * reference.chosen, rejected=alpha * reference.rejected)
    section = LossSection(beta=0.1, **loss)
    gamma = section.gamma / alpha if isinstance(section.gamma, float) else section.gamma
    before = audited(section, reference, keys)
    after = audited(section.model_copy(update={"beta": 0.1 / alpha, "gamma": gamma}), sharper, keys)
    nats = {"spread", "robust_spread"}
    for one, other in ((before.by_sum, after.by_sum), (before.per_token, after.per_token)):
        close(vars(one), {**vars(other), **{name: getattr(other, name) / alpha for name in nats}})
    assert after.disagreement == before.disagreement
    for one, other in zip((before.recipe, *before.kappas), (after.recipe, *after.kappas), strict=True):
        close(asdict(one), {**asdict(other), "gamma": other.gamma * alpha})
    for one, other in zip(before.ways.values(), after.ways.values(), strict=True):
        if isinstance(one, str):
            assert other == one
        else:
            assert other.gamma * alpha == pytest.approx(one.gamma, rel=1e-6)
    assert after.label_fit.bits_per_pair == pytest.approx(before.label_fit.bits_per_pair, rel=1e-6, abs=1e-9)
    assert [line.split()[0] for line in after.warnings] == [line.split()[0] for line in before.warnings]


def close(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        if value is None:
            assert other[name] is None
            continue
        assert other[name] == pytest.approx(value, rel=1e-6, abs=1e-9, nan_ok=True), name


# ---------------------------------------------------------------- warnings


def warned(loss, reference, keys):
    return "\n".join(audited(loss, reference, keys).warnings)


@pytest.mark.slow
def test_scores_that_spread_too_wide_are_warned_of():
    reference, keys = random_pairs()
    assert "δ = (γ−β)·sd(Δ0) = " in warned(LossSection(gamma="3x"), reference, keys)
    assert "bring gamma closer to beta" in warned(LossSection(gamma="3x"), reference, keys)
    assert "δ = " not in warned(LossSection(gamma="1x"), reference, keys)
    assert "lower both, or use reduce: mean" in warned(LossSection(gamma="3x"), reference, keys)
    assert "δ = " in warned(LossSection(gamma="9x", beta=2.0, reduce="mean"), reference, keys)
    assert "use reduce: mean" not in warned(LossSection(gamma="9x", beta=2.0, reduce="mean"), reference, keys)


@pytest.mark.slow
def test_what_endangers_the_result_most_is_what_is_recommended_first():
    """No gradient before everything, swapped labels before a wide spread; without either, to train, with what speaks for it."""
    reference, keys = random_pairs()
    swapped = reference._replace(rejected=reference.rejected + 12)
    dead = audited(LossSection(link="hinge", margin=0.0), swapped, keys)
    assert dead.recommendation.startswith("do this first: set margin > 0, or gamma different from beta; since no pair has a")
    wide = audited(LossSection(reduce="mean", gamma="9x", beta=2.0), swapped, keys)
    assert wide.recommendation.startswith("do this first: look whether chosen and rejected are swapped")
    assert [("swapped" in line, "δ = " in line) for line in wide.warnings[:2]] == [(True, False), (False, True)]
    plain = audited(LossSection(reduce="mean"), reference, keys)
    wrong = plain.recipe.weight_wrong
    assert plain.recommendation.startswith(
        "train it as it is; since at step 0 100% of the pairs pull, and those that the reference ranks wrong have "
        f"{wrong:.0%} of the gradient"
    )
    assert json.loads(json.dumps(plain.to_dict()))["recommendation"] == plain.recommendation


def test_an_uneven_gradient_is_warned_of():
    reference, keys = random_pairs()
    loss = LossSection(beta=1.0, gamma=0.0, margin=-30.0)
    assert "the gradient is as uneven as if" in warned(loss, reference, keys)


@pytest.mark.slow
def test_preferences_that_measure_length_are_warned_of():
    reference, keys = random_pairs()
    assert "Δ0 mostly measures length (correlation -0.9" in warned(LossSection(), reference, keys)
    assert "consider reduce: mean" in warned(LossSection(), reference, keys)
    assert "mostly measures length" not in warned(LossSection(reduce="mean"), reference, keys)


def test_a_reference_that_says_nothing_is_warned_of():
    reference, keys = random_pairs()
    assert "says nothing about these preferences that 400 pairs could show" in warned(LossSection(), reference, keys)


def test_a_reference_that_prefers_the_rejected_answers_is_warned_of():
    reference, keys = random_pairs()
    better = reference._replace(rejected=reference.rejected + 12)
    assert "the reference prefers the rejected answers" in warned(LossSection(reduce="mean"), better, keys)


def test_information_that_is_length_alone_is_warned_of():
    """Labels prefer the shorter answer in 70 % of pairs; for the same length π0 likes both as well."""
    generator = np.random.default_rng(3)
    lengths = np.sort(generator.integers(20, 60, (2, 500)), axis=0)
    flipped = generator.random(500) < 0.3
    lengths[:, flipped] = lengths[::-1, flipped]
    reference = logprobs(*(-1.2 * lengths + generator.normal(0, 3, (2, 500))), *lengths)
    text = warned(LossSection(), reference, [str(index) for index in range(500)])
    assert "what the reference says about these preferences is length alone" in text


def test_a_hinge_that_leaves_most_wrong_pairs_is_warned_of():
    reference, keys = random_pairs()
    assert "stay wrong for good" in warned(LossSection(preset="rso", margin=0.1), reference, keys)


@pytest.mark.slow
def test_flips_beyond_any_run_are_warned_of():
    reference, keys = random_pairs()
    wide = reference._replace(chosen=20 * reference.chosen, rejected=20 * reference.rejected)
    assert "times as long to flip as with gamma 0" in warned(LossSection(), wide, keys)
    assert "; use reduce: mean, or set reference_floor: 0" in warned(LossSection(), wide, keys)  # sd(Δ0) is above 1/β


def test_few_prompts_are_warned_of():
    reference, keys = random_pairs(20)
    assert "10 prompts are few" in warned(LossSection(), reference, keys)


# ---------------------------------------------------------------- the noise of quantization


def test_noise_is_told_apart_from_tempering():
    """η = 0.1·Δ0 for all pairs: slope 1.1, and reliability 1 − (0.1/1.1)²."""
    reference, _ = random_pairs()
    tempered = reference._replace(chosen=1.1 * reference.chosen, rejected=1.1 * reference.rejected)
    zeros = torch.zeros(400, dtype=torch.float64)
    found = quantization_error(tempered, reference, Loss(0.1, 0.1), PairTerms(zeros), quantize="nf4", against="float32")
    assert found.slope == pytest.approx(1.1, rel=1e-12)
    assert found.reliability == pytest.approx(1 - (0.1 / 1.1) ** 2, rel=1e-9)
    assert (found.flips, found.flips_per_token) == (0, 0)
    preference = (reference.chosen - reference.rejected).numpy()
    assert found.rms == pytest.approx(np.sqrt(np.mean((0.1 * preference) ** 2)), rel=1e-9)
    assert found.weight_change == pytest.approx(0, abs=1e-15)  # γ = β: η cancels


def test_noise_by_hand(four):
    """Log-probs of the chosen move by +1, +7, +1 and −3 nats over 33 tokens; Δ0 4, −6, 0, 2 → 5, 1, 1, −1: three flip."""
    exact, _ = four
    noisy = exact._replace(chosen=exact.chosen + doubles([1, 7, 1, -3]))
    zeros = torch.zeros(4, dtype=torch.float64)
    found = quantization_error(noisy, exact, Loss(0.1, 0.0), PairTerms(zeros), quantize="nf4", against="float32")
    assert found.shift_per_token == pytest.approx(6 / 33)
    assert found.slope == pytest.approx((20 - 6 + 0 - 2) / (16 + 36 + 0 + 4))
    assert found.rms == pytest.approx(((1 + 49 + 1 + 9) / 4) ** 0.5)
    assert found.reliability == pytest.approx(1 - np.var([1, 7, 1, -3]) / np.var([5, 1, 1, -1]))
    assert found.flips == 0.75
    weights = [1 / (1 + np.exp(0.1 * np.array(values))) for values in ([5, 1, 1, -1], [4, -6, 0, 2])]
    assert found.weight_change == pytest.approx(np.abs(weights[0] - weights[1]).mean(), rel=1e-9)


@pytest.mark.slow
def test_the_noise_of_nf4_is_measured_on_a_model(make_recipe, tmp_path):
    store = f"reference.store={tmp_path / 's.sqlite'}"
    found = audit(make_recipe("loss.gamma=0.5x", store), with_quantization_error=True)
    error = found.quantization_error
    assert (error.quantize, error.against, error.pairs) == ("nf4", "float32", 24)
    assert 0 < error.rms < found.by_sum.spread
    assert 0.5 < error.slope < 2
    assert 0 < error.weight_change < 0.5
    other = audit(make_recipe("model.quantize=nf4", "loss.gamma=0.5x", store), with_quantization_error=True)
    assert other.quantization_error == error


# ---------------------------------------------------------------- from the store


@pytest.fixture(scope="module")
def first(tiny_recipe, tmp_path_factory):
    """An audit of the tiny world, and the store that it left."""
    folder = tmp_path_factory.mktemp("first")
    return audit(tiny_recipe(folder / "run", f"reference.store={folder / 'store.sqlite'}")), folder / "store.sqlite"


@pytest.fixture
def stored(first, tmp_path):
    """The setting that names a copy of its store."""
    return f"reference.store={shutil.copy(first[1], tmp_path / 'store.sqlite')}"


@pytest.fixture
def no_weights(monkeypatch):
    """Loading a base fails from here on."""
    from transformers import AutoModelForCausalLM

    def refuse(*arguments, **keywords):
        raise AssertionError("the weights of the base were read")

    return lambda: monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)


@pytest.mark.slow
def test_a_second_audit_reads_no_weights_and_finds_the_same(make_recipe, no_weights, first, stored):
    no_weights()
    second = audit(make_recipe(stored))
    assert (first[0].reference["was_run"], second.reference["was_run"]) == (True, False)
    assert second.to_dict() | {"reference": None} == first[0].to_dict() | {"reference": None}
    assert audit(make_recipe(stored, "loss.preset=simpo")).pairs == 24


@pytest.mark.slow
def test_after_training_an_audit_reads_no_weights(make_recipe, no_weights, tmp_path):
    store = f"reference.store={tmp_path / 'store.sqlite'}"
    train(make_recipe(store, "train.epochs=1"))
    no_weights()
    assert not audit(make_recipe(store)).reference["was_run"]


@pytest.mark.slow
@pytest.mark.parametrize("change", ["model.quantize=nf4", "model.dtype=bfloat16", "train.packing=false"])
def test_another_reference_is_not_taken_from_the_store(make_recipe, change, stored):
    assert audit(make_recipe(stored, change)).reference["was_run"]


@pytest.mark.slow
def test_where_nothing_is_to_be_stored_the_model_is_run(make_recipe, tmp_path):
    store = f"reference.store={tmp_path / 'store.sqlite'}"
    once = audit(make_recipe(store, "reference.policy=step"))
    again = audit(make_recipe(store, "reference.policy=step"))
    assert once.reference["was_run"]
    assert again.reference["was_run"]


@pytest.mark.slow
def test_a_stale_store_is_found_where_the_model_is_run(make_recipe, first, tmp_path, logged: list[str]):
    """Half of the pairs are stored, and wrong; the other half has to be run, and a look at the stored ones finds them out."""
    import sqlite3

    from pe_dpo.inference import reference_store

    path = tmp_path / "store.sqlite"
    audit(make_recipe(f"reference.store={path}", "data.limit=12"))
    with sqlite3.connect(path) as connection:
        connection.text_factory = bytes
        names = dict(connection.execute("SELECT id, name FROM reference").fetchall())
        for number, key, value in connection.execute("SELECT reference, key, value FROM answer").fetchall():
            name = names[number] if isinstance(names[number], str) else names[number].decode()
            logprob, tokens = struct.unpack("<dq", value[:16])
            moved = reference_store._with_checksum(struct.pack("<dq", logprob + 3, tokens), name.encode(), key)
            connection.execute("UPDATE answer SET value = ? WHERE reference = ? AND key = ?", (moved, number, key))
    lines = logged
    found = audit(make_recipe(f"reference.store={path}"))
    assert found.reference["was_run"]
    assert any("the stored reference was not this one" in line for line in lines)
    assert vars(found.by_sum) == vars(first[0].by_sum)


@pytest.mark.slow
def test_the_audited_log_probs_are_those_that_training_uses(make_recipe, tmp_path):
    """Step 0 of training on the same pairs, held out as well: the same loss and the same share of right pairs."""
    recipe = make_recipe(f"reference.store={tmp_path / 's.sqlite'}", "loss.gamma=0.5x", "data.limit=9")
    found = audit(recipe)
    from pe_dpo.inference.reference import reference_logprobs
    from pe_dpo.training.preparation import prepare_run
    from pe_dpo.training.train import build_trainer

    trainer = build_trainer(recipe, prepare_run(recipe))
    ours = trainer.reference.logprobs(trainer.train_dataset)
    assert np.array_equal(found.preference, (ours.chosen - ours.rejected).numpy())
    facts, _, data, *_ = prepare_run(recipe)
    assert reference_logprobs(recipe, facts, data.train)[0].chosen.tolist() == ours.chosen.tolist()


@pytest.mark.slow
def test_an_adapter_as_the_reference_is_run_as_such(make_recipe, first, stored):
    plain, store = first[0], stored
    trained = train(make_recipe(store, "train.max_steps=1", output="sft")).folder
    start = f"adapter={{start: '{trained}', reference: adapter}}"
    frozen = audit(make_recipe(store, start))
    assert frozen.reference["is"].startswith("a frozen copy of ")
    assert not np.array_equal(plain.preference, frozen.preference)
    raw = audit(make_recipe(store, f"adapter={{start: '{trained}', reference: base}}"))
    assert np.array_equal(plain.preference, raw.preference)
    assert any("starts from an adapter that is not its reference" in line for line in raw.warnings)
    assert not any("starts from an adapter" in line for line in frozen.warnings)


def test_log_probs_that_are_no_numbers_are_named(make_recipe):
    from pe_dpo.training.preparation import prepare_run

    pairs = prepare_run(make_recipe()).data.train
    chosen = torch.zeros(len(pairs), dtype=torch.float64)
    chosen[4] = float("nan")
    with pytest.raises(ModelError, match=r"train\.jsonl:5: its log-probs under the reference are not finite \(1 such pairs\)"):
        check_finite(PairLogprobs(chosen, chosen * 0, chosen, chosen), pairs)


@pytest.mark.slow
def test_an_audit_is_json(make_recipe, stored):
    found = audit(make_recipe(stored, "loss.preset=rso", "data.limit=8"), with_quantization_error=True).to_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert set(found["curve"]) >= {"kappa", "weight_right", "flip_times"}
    assert len(found["curve"]["kappa"]) == len(found["curve"]["flip_times"]) == 81


@pytest.mark.real
def test_on_real_pairs_summed_log_probs_mostly_measure_length(shared, tmp_path):
    """A real model of 260 K parameters and real short answers; and what κ does to their gradient."""
    recipe = recipe_from_yaml(
        f"model: {{base: '{shared / 'models' / 'stories260k'}'}}\n"
        f"data: {{train: '{shared / 'data' / 'rasbt-politeness'}', limit: 100}}\n"
        f"reference: {{store: '{tmp_path / 's.sqlite'}'}}\n"
        "output: out\n",
        "real",
    )
    found = audit(recipe)
    assert found.by_sum.length_correlation < -0.8
    assert any("mostly measures length" in line for line in found.warnings)
    assert found.disagreement > 0.2
    without, _, equal, double = found.kappas
    assert without.weight_right < 0.2 < equal.weight_right < 0.8 < double.weight_right
    assert equal.weight_right == found.by_sum.right
    assert without.flip_times[1] < equal.flip_times[1] < double.flip_times[1]


def test_a_tokenizer_of_another_model_is_named_before_the_base_is_read(make_recipe, tiny_base, tmp_path, monkeypatch):
    other = shutil.copytree(tiny_base, tmp_path / "base")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": 40, "pad_token_id": None, "eos_token_id": 2}))
    monkeypatch.setattr("pe_dpo.inference.policy.load_base", lambda *args, **kwargs: pytest.fail("the base was loaded"))
    with pytest.raises(ModelError, match=r"train\.jsonl:1: has token \d+, but the model knows 40 tokens"):
        audit(make_recipe(f"model.base={other}"))


# ---------------------------------------------------------------- a β and a weight of each pair


def test_pairs_of_two_betas_are_foretold_as_two_sets_with_as_many_losses():
    """β 0.1 and 0.4 with κ = 1.1: the mean of two audits, shares of Σ β·w; the second set flips 16 times as fast."""
    reference, keys = random_pairs()
    one, other = (PairLogprobs(*(column[part] for column in reference)) for part in (slice(0, 200), slice(200, 400)))
    terms = PairTerms(torch.zeros(400), doubles([0.1] * 200 + [0.4] * 200))
    found = forecast(Loss(0.1, 0.11), reference, terms)
    first, second = foreseen(LossSection(beta=0.1), 0.11, one), foreseen(LossSection(beta=0.4), 0.44, other)
    assert found.loss == pytest.approx((first.loss + second.loss) / 2, rel=1e-12)
    assert found.ideal_accuracy == pytest.approx(np.mean([first.ideal_accuracy, second.ideal_accuracy], axis=0), rel=1e-12)
    pulls = [Loss(beta, 1.1 * beta)(of, of, torch.zeros(200)).weight for beta, of in ((0.1, one), (0.4, other))]
    pull, right = torch.cat([pulls[0], 4 * pulls[1]]), reference.chosen > reference.rejected
    assert found.weight_right == pytest.approx((pull[right].sum() / pull.sum()).item(), rel=1e-12)
    alone = forecast(Loss(0.1, 0.11), other, PairTerms(torch.zeros(200), doubles([0.4] * 200)))
    assert alone.flip_times == pytest.approx(np.divide(second.flip_times, 16), rel=1e-12)
    assert alone.delta == pytest.approx(second.delta, rel=1e-12)
    found = Audit(reference, LossSection(), terms, keys)
    assert all("finds one number, and each pair has a γ in a fixed ratio" in str(why) for why in found.ways.values())


def test_weights_count_in_step_0_and_in_flips_and_one_of_zero_stays_wrong(four):
    """Δ0 = 4, −6, 0 and 2 with weights 1, 0, 1 and 2, γ = β: w = ½ each, so right has (1 + 2)/4; the wrong pair never flips."""
    reference, keys = four
    found = forecast(Loss(0.1, 0.1, margin=0.0), reference, PairTerms(torch.zeros(4), None, doubles([1, 0, 1, 2])))
    assert found.weight_right == pytest.approx(0.75)
    assert (found.weight_wrong, found.never_flips) == (0.0, 1.0)
    assert found.loss == pytest.approx(np.log(2))
    assert found.ideal_accuracy[1] == 0.75
    hinge = Loss(0.1, 0.1, margin=1.0, link="hinge")  # −γ·Δ0 − m is below 0 for all, and the wrong pair of weight 0 stays
    assert forecast(hinge, reference, PairTerms(torch.zeros(4), None, doubles([1, 0, 1, 2]))).hinge_accuracy == 0.75
    twice = forecast(Loss(0.1, 0.1), reference, PairTerms(torch.zeros(4), None, doubles([2, 2, 2, 2])))
    once = forecast(Loss(0.1, 0.1), reference, PairTerms(torch.zeros(4)))
    assert twice.flip_times[0] == pytest.approx(once.flip_times[0] / 2)
    balanced = Audit(*four[:1], LossSection(gamma="balance:0.5"), PairTerms(torch.zeros(4), None, doubles([1, 3, 1, 1])), keys)
    assert balanced.recipe.weight_right == pytest.approx(0.5, abs=1e-9)
