"""What a run says of itself while it trains: when, how often, and with what to turn."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tables
import torch
from one_base import train
from recorded import recording
from transformers import TrainerCallback

from pe_dpo.data.pairs import EncodedPair
from pe_dpo.metrics.catalogue import pair_metrics
from pe_dpo.objective import Loss, PairLogprobs
from pe_dpo.recipe.loss_section import LossSection
from pe_dpo.runs.files import RUN_FILE, read_object
from pe_dpo.runs.run import Run
from pe_dpo.runs.writing import RunWriter
from pe_dpo.training.diagnostics import diagnose_pairs
from pe_dpo.training.monitor import PATIENCE, Monitor, train_probe

COUNT = 40


def scored(chosen_shift=0.0, rejected_shift=0.0, *, loss=None, lean=None, lengths=(20, 20)):
    """40 pairs whose reference leans from −20 to 20 nats, and a policy that moved each answer by so much."""
    loss = Loss(**(loss or LossSection()).coefficients())
    lean = torch.linspace(-20, 20, COUNT, dtype=torch.float64) if lean is None else lean
    rejected = torch.full((COUNT,), -60.0, dtype=torch.float64)
    counts = [torch.as_tensor(side).expand(COUNT) for side in lengths]
    reference = PairLogprobs(rejected + lean, rejected, *counts)
    policy = PairLogprobs(reference.chosen + chosen_shift, reference.rejected + rejected_shift, *counts)
    return tables.table_of(policy, reference, loss(policy, reference, torch.zeros(COUNT)), loss)


def metrics(*shifts, loss=None, **options):
    return pair_metrics(scored(*shifts, loss=loss, **options), is_fixed_set=True)


def remarks(*shifts, loss=None, **options):
    """What is said of the pairs after they moved."""
    loss = loss or LossSection()
    found = metrics(*shifts, loss=loss, **options)
    return diagnose_pairs(found, metrics(loss=loss, **options), loss)


# ---------------------------------------------------------------- what is seen


def test_a_policy_that_learns_what_it_should_is_left_alone():
    assert remarks(2.0, -2.0) == {}


def test_both_answers_falling_is_seen():
    said = remarks(-1.0, -5.0)
    assert said.keys() == {"both_fell"}
    assert "(chosen -1.00, rejected -5.00 nats; 100% of the chosen fell)" in said["both_fell"]
    assert "loss.sft_weight" in said["both_fell"]


def test_a_fall_that_a_coin_could_explain_is_not_called_one():
    """Seven of twelve chosen fell by a nat, the others rose by a little."""
    fell = torch.where(torch.arange(COUNT) % 12 < 7, -1.0, 0.1).double()
    assert "both_fell" not in remarks(fell, -3.0)


def test_a_chosen_answer_that_loses_half_a_nat_per_token_is_called_a_collapse():
    """10 nats over 20 tokens."""
    assert "collapsed" in remarks(-10.0, -30.0)
    assert "collapsed" not in remarks(-9.8, -30.0)


def test_a_loss_above_that_of_the_start_is_seen():
    assert "overfitted" in remarks(-1.0, 1.0)
    assert "overfitted" not in remarks(1.0, -1.0)


def test_pairs_that_the_loss_is_done_with_are_called_saturated_with_what_to_turn():
    """A shift of 40 nats at β = 0.1 is a score of 4, weight 0.018."""
    said = remarks(20.0, -20.0)
    assert "100% of the pairs pull with less than a twentieth" in said["saturated"]
    assert "lower beta and gamma together" in said["saturated"]


def test_pairs_out_of_the_reach_of_the_loss_are_called_saturated_and_gamma_named():
    """γ = 5β, all Δ0 = 20: the score starts at (β − γ)·20 = −8, and Δπ has to reach κ·Δ0 = 100."""
    lean = torch.full((COUNT,), 20.0, dtype=torch.float64)
    said = remarks(0.1, 0.0, loss=LossSection(gamma="5x"), lean=lean)
    assert "100% of the pairs pull with full weight" in said["saturated"]
    assert "asks for Δπ of 100 nats" in said["saturated"]
    assert "bring loss.gamma closer to loss.beta" in said["saturated"]


def test_a_few_pairs_that_take_all_of_the_gradient_are_seen():
    """γ = 0, β = 1: weights σ(−Δ0), Δ0 = 60 for all but two."""
    lean = torch.full((COUNT,), 60.0, dtype=torch.float64)
    lean[:2] = -5.0
    said = remarks(0.1, 0.0, loss=LossSection(beta=1.0, gamma=0.0), lean=lean)
    assert "40 pull like 2" in said["concentrated"]


def test_pairs_given_up_while_wrong_are_called_satisfied_early():
    """Δπ = Δ0 + 15: z = 1.5 for all, and the pairs with Δ0 < −15 are still wrong: 22 of 40, in steps of 80/39 from −60."""
    lean = torch.linspace(-60, 20, COUNT, dtype=torch.float64)
    said = remarks(8.0, -7.0, lean=lean)
    assert "content (z >= 0) with 55% of the pairs" in said["satisfied_early"]
    assert "loss.reference_floor: 0 (HyPO)" in said["satisfied_early"]


def test_a_logistic_loss_that_has_only_begun_is_not_satisfied_early():
    """z = 0.01 and weight a half, for wrong pairs too."""
    assert "satisfied_early" not in remarks(0.05, -0.05, lean=torch.linspace(-60, 20, COUNT, dtype=torch.float64))


def test_a_hinge_gives_wrong_pairs_up_at_once():
    loss = LossSection(link="hinge", margin=0.001)
    said = remarks(0.05, -0.05, loss=loss, lean=torch.linspace(-60, 20, COUNT, dtype=torch.float64))
    assert "satisfied_early" in said


@pytest.mark.parametrize(
    ("per_token", "word", "turn"), [(0.1, "longer", "length_penalty > 0"), (-0.1, "shorter", "sft_weight")]
)
def test_preferences_that_move_with_length_are_seen(per_token, word, turn):
    chosen = torch.arange(COUNT) + 10
    said = remarks(per_token * (chosen - 30).double(), 0.0, lengths=(chosen, 30))
    assert f"the policy learns {word} answers" in said["length_drift"]
    assert turn in said["length_drift"] and "loss.reduce: mean" in said["length_drift"]


def test_frozen_log_probs_are_seen_where_pairs_pull():
    assert "not one log-prob has changed" in remarks(0.0, 0.0)["frozen"]


def test_the_same_log_probs_without_any_pull_are_not_called_frozen():
    assert "frozen" not in remarks(0.0, 0.0, loss=LossSection(link="hinge", margin=-1000.0))


# ---------------------------------------------------------------- when it is said


@pytest.fixture
def monitor(tmp_path: Path) -> Monitor:
    return Monitor(RunWriter(tmp_path), LossSection(), metrics())


def evaluation(*shifts):
    return {f"eval_{key}": value for key, value in metrics(*shifts).items()} | {"epoch": 1.0}


def test_a_remark_is_due_once_when_seen_twice_in_a_row(monitor):
    fell = evaluation(-1.0, -5.0)
    due = [monitor.look(step, fell) for step in (10, 20, 30, 40)]
    assert [found.keys() for found in due] == [set(), {"both_fell"}, set(), set()]


def test_what_is_seen_now_and_then_is_not_said(monitor):
    fell, well = evaluation(-1.0, -5.0), evaluation(2.0, -2.0)
    assert not any(monitor.look(step, line) for step, line in enumerate([fell, well, fell, well, fell, well], start=1))


def test_the_evaluation_before_training_is_not_judged(monitor):
    line = evaluation(0.0, 0.0)
    assert not monitor.look(0, line) and not monitor.look(1, line)
    assert monitor.look(2, line).keys() == {"frozen"}


def test_a_dead_gradient_is_said_after_ten_lines_of_it(monitor):
    line = {"loss": 0.0, "weight/mean": 0.0}
    due = [monitor.look(step, line) for step in range(1, 13)]
    assert [step for step, found in enumerate(due, start=1) if found] == [PATIENCE["windows"]]
    assert "no pair pulls any more" in due[9]["dead"]


def test_other_lines_are_passed_over(monitor):
    assert monitor.look(3, {"step": 3, "remark": "both_fell", "words": "…"}) == {}


def test_a_resumed_run_reads_over_numbers_that_were_not_finite(monitor):
    assert monitor.look(4, {"eval_loss": None, "eval_pairs": 40.0, "eval_logps/chosen": -61.0}) == {}
    assert monitor.look(5, {"loss": None, "weight/mean": None}) == {}
    assert monitor.conclude({}, has_moved=True) == []


def test_at_the_end_stands_what_is_so_then_and_what_was_said_on_the_way(monitor):
    for step in (10, 20):
        monitor.look(step, evaluation(-1.0, -5.0))
    assert monitor.conclude(metrics(-2.0, -5.0), has_moved=True)[0].startswith("both answers became less likely")
    assert monitor.conclude(metrics(2.0, -5.0), has_moved=True)[0].startswith("step 20: both answers became less likely")


def test_what_cost_most_of_the_result_is_said_first_whatever_was_found_first(monitor):
    """50 and 60 nats over 20 tokens and a loss that rose: collapsed, fallen and overfitted in one; what is over comes last."""
    monitor.said = {"dead": (5, "no pair pulls any more")}
    said = [line.split()[0] for line in monitor.conclude(metrics(-60.0, -50.0), has_moved=False)]
    assert said == ["nothing", "the", "both", "the", "step"]
    chosen, loss = (line for line in monitor.conclude(metrics(-60.0, -50.0), has_moved=False) if line.startswith("the "))
    assert chosen.startswith("the chosen answers lost 3.00 nats per token") and loss.startswith("the loss of the watched")


def test_without_held_out_pairs_the_last_look_is_what_stands_at_the_end(monitor):
    monitor.look(10, {key.replace("eval_", "probe_"): value for key, value in evaluation(-1.0, -5.0).items()})
    assert len(monitor.conclude({}, has_moved=True)) == 1


# ---------------------------------------------------------------- in a run

WRONG_WAY = ("train.epochs=4", "train.eval_every=1")


@pytest.fixture(scope="module")
def make_wrong_way(tiny_recipe, tiny_pairs, tmp_path_factory):
    """A recipe whose held-out pairs have their labels swapped: what it learns makes their loss worse from the first step on."""
    rows = [json.loads(line) for line in (tiny_pairs / "test.jsonl").read_text().splitlines()]
    swapped = [json.dumps(row | {"chosen": row["rejected"], "rejected": row["chosen"]}) for row in rows]
    held_out = tmp_path_factory.mktemp("swapped") / "test.jsonl"
    held_out.write_text("\n".join(swapped) + "\n")
    train_file = tiny_pairs / "train.jsonl"
    return lambda output: tiny_recipe(output, *WRONG_WAY, f"data.train={train_file}", f"data.eval={held_out}")


@pytest.fixture(scope="module")
def wrong_way(make_wrong_way, tmp_path_factory):
    """Such a run of 12 steps, and what it said."""
    with recording() as lines:
        return train(make_wrong_way(tmp_path_factory.mktemp("runs") / "run")), lines


def remark_lines(folder):
    return [line for line in Run(folder).metrics if "remark" in line]


@pytest.mark.slow
def test_a_run_says_a_remark_once_and_keeps_it_with_its_step(wrong_way):
    run, lines = wrong_way
    written = remark_lines(run.folder)
    assert ("overfitted", 2) in {(line["remark"], line["step"]) for line in written}
    for line in written:
        assert lines.count(f"warning: step {line['step']}: {line['words']}") == (line["step"] < run.steps)
    assert len({line["remark"] for line in written}) == len(written)
    assert read_object(run.folder / RUN_FILE)["remarks"] == run.remarks
    assert any(remark.startswith("the loss of the watched pairs is above") for remark in run.remarks)


@pytest.mark.slow
def test_every_line_of_metrics_is_json_without_a_nan(wrong_way):
    """Python reads NaN, other readers do not."""

    def refuse(constant):
        raise AssertionError(constant)

    lines = (wrong_way[0].folder / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line, parse_constant=refuse) for line in lines)


@pytest.mark.slow
def test_a_resumed_run_does_not_say_it_again(wrong_way, make_wrong_way, tmp_path, logged: list[str]):
    run, _ = wrong_way
    recipe = make_wrong_way(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(recipe, callbacks=[StopAfter(8)])
    logged.clear()
    result = train(recipe, resume=True)
    assert "resuming from" in "\n".join(logged)
    assert remark_lines(result.folder) == remark_lines(run.folder)
    assert result.remarks == run.remarks
    assert not any("warning: step" in line for line in logged)


class StopAfter(TrainerCallback):
    """Kills the run once a checkpoint of this step is written."""

    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step >= self.step:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_run_that_holds_nothing_out_watches_training_pairs(make_recipe):
    run = train(make_recipe("data.eval=0", "train.eval_every=2"))
    lines = [line for line in Run(run.folder).metrics if "probe_loss" in line]
    assert [line["step"] for line in lines] == [0, 2, 4, 6]
    assert lines[0]["probe_loss"] == pytest.approx(math.log(2))
    assert lines[0]["probe_pairs"] == 24
    assert lines[-1]["probe_loss"] < lines[0]["probe_loss"]
    assert not any(key.startswith("eval_") for line in lines for key in line)
    assert (run.before, run.after) == ({}, {})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["train.learning_rate=1.0e-12"], "frozen"),
        (["loss.link=hinge", "loss.margin=-1000"], "dead"),
    ],
)
def test_a_run_that_cannot_learn_says_why(make_recipe, overrides, name):
    run = train(make_recipe(*overrides, "train.epochs=4", "train.eval_every=3"))
    assert [line["remark"] for line in remark_lines(run.folder)] == [name]


def test_training_windows_know_how_far_their_pairs_moved_since_step_0(wrong_way):
    """The first step's pairs have not moved yet, the last one's have."""
    run, _ = wrong_way
    windows = [line for line in Run(run.folder).metrics if "loss" in line]
    changes = [[value for key, value in line.items() if "/mean_change" in key] for line in (windows[0], windows[-1])]
    assert set(changes[0]) == {0.0}
    assert all(changes[1])


# ---------------------------------------------------------------- the probe


def pair(number):
    ids = np.array([number, number // 7], dtype=np.int32)
    return EncodedPair(ids, ids + 1, ids + 2, 0.0, f"train.jsonl:{number}", str(number))


def test_the_probe_is_the_same_in_every_order_and_as_large_as_it_says():
    pairs = [pair(number) for number in range(20_000)]
    probe = train_probe(pairs)
    assert len(probe) == 256
    assert [one.where for one in train_probe(pairs[::-1])] == [one.where for one in probe]
    assert len(train_probe(pairs[:5000])) == 100
    assert len(train_probe(pairs[:500])) == 32
    assert len(train_probe(pairs[:20])) == 20
