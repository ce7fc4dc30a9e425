"""`pe-dpo eval` on sampled answers: KL to the reference, win rates, and what is written where."""

import json
import re
import shutil

import numpy as np
import pyarrow.parquet
import pytest
import torch

SAMPLING = ("--prompts", 5, "--samples", 2, "--max-new-tokens", 8)
PAIRS_COLUMNS = {
    *("where", "prompt_key", "policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected", "chosen_lengths"),
    *("rejected_lengths", "loss", "score", "weight", "chosen_reward", "rejected_reward", "initial_chosen", "initial_rejected"),
    *("prompt", "chosen", "rejected"),
}
ANSWERS_COLUMNS = {
    *("prompt_key", "prompt", "sample", "answer", "tokens", "ended", "kl", "log_policy", "log_reference", "entropy"),
}
JUDGED_COLUMNS = {"score", "reference_answer", "reference_tokens", "reference_score"}


def table_of(path):
    return pyarrow.parquet.read_table(path)


def printed(done):
    assert (done.code, done.err) == (0, "")
    return json.loads(done.out)


@pytest.fixture(scope="module")
def long_trained(pe_dpo, recipe_file, tmp_path_factory):
    """A run that has gone somewhere: 4 steps at a high rate."""
    folder = tmp_path_factory.mktemp("runs") / "far"
    done = pe_dpo("train", recipe_file, "-o", folder, "--set", "train.max_steps=4", "--lr", "5e-2")
    assert (done.code, done.err) == (0, "")
    return folder


@pytest.fixture
def run(long_trained, tmp_path):
    """A copy to write into."""
    shutil.copytree(long_trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def by_length(tmp_path_factory):
    """A scorer that likes short answers, and checks what it is shown."""
    path = tmp_path_factory.mktemp("scorer") / "by_length.py"
    path.write_text(
        "def score(prompts, answers):\n"
        "    assert len(prompts) == len(answers) and all(prompt.startswith('Number ') for prompt in prompts)\n"
        "    return [-len(answer) for answer in answers]\n"
    )
    return f"{path}:score"


@pytest.fixture(scope="module")
def sampled(pe_dpo, long_trained, by_length, tmp_path_factory):
    """A copy of the run that was evaluated on answers that were judged, and what was printed."""
    folder = shutil.copytree(long_trained, tmp_path_factory.mktemp("sampled") / "run")
    return folder, pe_dpo("eval", folder, *SAMPLING, "--scorer", by_length)


@pytest.mark.slow
def test_answers_outlive_a_scorer_that_fails(pe_dpo, run, tmp_path):
    (tmp_path / "fails.py").write_text("def score(prompts, answers):\n    raise RuntimeError('out of credits')\n")
    with pytest.raises(RuntimeError, match="out of credits"):
        pe_dpo("eval", run, *SAMPLING, "--scorer", f"{tmp_path / 'fails.py'}:score")
    answers = table_of(run / "generations.parquet")
    assert (answers.num_rows, set(answers.column_names)) == (10, ANSWERS_COLUMNS)
    assert json.loads((run / "evaluation.json").read_text())["generation"]["kl"]["mean"] > 0


@pytest.mark.slow
def test_a_trained_run_outlives_its_scorer_and_what_will_run_is_said_before(pe_dpo, recipe_file, by_length, tmp_path):
    (tmp_path / "fails.py").write_text("def score(prompts, answers):\n    raise RuntimeError('out of credits')\n")
    short = ("--set", "train.max_steps=1", "--set", "generation.prompts=3", "--set", "generation.max_new_tokens=4")
    failed = pe_dpo("train", recipe_file, "-o", tmp_path / "run", *short, "--scorer", f"{tmp_path / 'fails.py'}:score")
    assert failed.code != 0 and "RuntimeError: out of credits; judge it with: pe-dpo eval" in failed.err
    said = f"answers are judged by the function score of {tmp_path / 'fails.py'}, whose Python runs here"
    assert failed.out.splitlines()[0] == said
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
    assert "reference_answer" in table_of(tmp_path / "run" / "generations.parquet").column_names
    card = (tmp_path / "run" / "README.md").read_text()
    assert card.count("Moved toward chosen (by summed log-probs): ") == 1 and " that π0 ranks right" in card
    checked = pe_dpo("check", recipe_file, *short, "--scorer", "operator:eq")
    assert "sampled answers would be judged by the function eq of the module operator" in checked.out


@pytest.mark.slow
def test_eval_of_a_run_writes_what_it_measured_into_the_run(sampled):
    run, done = sampled
    assert (done.code, done.err) == (0, "")
    pairs, answers = table_of(run / "eval_pairs.parquet"), table_of(run / "generations.parquet")
    assert set(pairs.column_names) == PAIRS_COLUMNS
    assert pairs.num_rows == 9
    assert set(answers.column_names) == ANSWERS_COLUMNS | JUDGED_COLUMNS
    assert answers.num_rows == 10
    assert set(answers["prompt_key"].to_pylist()) == set(sorted(pairs["prompt_key"].to_pylist())[:5])
    report = json.loads((run / "evaluation.json").read_text())
    assert set(report) == {"pairs", "intervals", "generation"}
    assert report["generation"]["kl"]["mean"] == pytest.approx(np.mean(answers["kl"].to_pylist()), rel=1e-12)
    assert report["generation"]["kl"]["mean"] > 0.01
    wins = [
        1.0 if ours > theirs else 0.5 if ours == theirs else 0.0
        for ours, theirs in zip(answers["score"].to_pylist(), answers["reference_score"].to_pylist(), strict=True)
    ]
    assert report["generation"]["win_rate"]["mean"] == pytest.approx(np.mean(wins))
    assert answers["score"].to_pylist() == [-len(text) for text in answers["answer"].to_pylist()]
    assert answers["reference_score"].to_pylist() == [-len(text) for text in answers["reference_answer"].to_pylist()]
    for words in ("5 held-out prompts × 2 sampled answers, at most 8 tokens", "KL(π‖π0), nats per token", "length-controlled"):
        assert words in done.out
    assert f"written to {run}" in done.out


@pytest.mark.slow
def test_the_text_of_pairs_is_written_beside_their_numbers(pe_dpo, run):
    assert pe_dpo("eval", run).code == 0
    row = table_of(run / "eval_pairs.parquet").to_pylist()[0]
    assert "Number 24, warm or round?" in row["prompt"]
    assert (row["chosen"], row["rejected"]) == ("It is warm", "Who cares, round")


@pytest.mark.slow
def test_the_policy_of_step_0_is_kept_or_known_to_be_the_reference(pe_dpo, run):
    """As training wrote it down; without that, a run that starts at the reference was the reference."""
    path = run / "eval_pairs.parquet"
    table = table_of(path)
    torch.testing.assert_close(
        torch.tensor(table["initial_chosen"].to_pylist()),
        torch.tensor(table["reference_chosen"].to_pylist()),
        rtol=0,
        atol=1e-4,
    )
    kept = [float(number) for number in range(9)]
    column = table.column_names.index("initial_rejected")
    pyarrow.parquet.write_table(table.set_column(column, "initial_rejected", pyarrow.array(kept)), path)
    assert pe_dpo("eval", run).code == 0
    assert table_of(path)["initial_rejected"].to_pylist() == kept
    path.unlink()
    assert pe_dpo("eval", run).code == 0
    again = table_of(path)
    assert again["initial_rejected"].to_pylist() == again["reference_rejected"].to_pylist()


@pytest.mark.slow
def test_an_evaluation_without_sampling_leaves_the_sampled_answers_that_are_there(pe_dpo, run, sampled):
    for name in ("evaluation.json", "generations.parquet"):
        shutil.copy(sampled[0] / name, run)
    again = printed(pe_dpo("eval", run, "--json"))
    assert "generation" not in again
    before, after = (json.loads((folder / "evaluation.json").read_text()) for folder in (sampled[0], run))
    assert after["generation"] == before["generation"]
    (run / "generations.parquet").unlink()
    assert pe_dpo("eval", run).code == 0
    assert "generation" not in json.loads((run / "evaluation.json").read_text())


@pytest.mark.slow
def test_the_same_seed_gives_the_same_answers_and_another_one_others(pe_dpo, run, sampled, tmp_path):
    answers = [table_of(sampled[0] / "generations.parquet")["answer"].to_pylist()]
    for seed in (0, 1):
        assert pe_dpo("eval", run, *SAMPLING, "--seed", seed, "-o", tmp_path / "out").code == 0
        answers.append(table_of(tmp_path / "out" / "generations.parquet")["answer"].to_pylist())
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.slow
def test_the_recipe_says_how_many_prompts_when_nobody_else_does(pe_dpo, run):
    recipe = run / "recipe.yaml"
    text = recipe.read_text()
    assert "generation:" in text
    recipe.write_text(text.replace("prompts: 0", "prompts: 3").replace("max_new_tokens: 128", "max_new_tokens: 4"))
    generation = printed(pe_dpo("eval", run, "--json"))["generation"]
    assert {key: generation[key] for key in ("prompts", "samples", "max_new_tokens")} == {
        "prompts": 3, "samples": 1, "max_new_tokens": 4,
    }  # fmt: skip
    assert "generation" not in printed(pe_dpo("eval", run, "--prompts", 0, "--json"))


@pytest.mark.slow
@pytest.mark.parametrize("asked", [("--data", "{test}"), ("--quantize", "nf4"), ("--base", "{base}")])
def test_what_is_not_the_run_s_own_measurement_is_not_written_into_it(pe_dpo, run, tiny_pairs, tiny_base, asked):
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    arguments = [str(word).format(test=tiny_pairs / "test.jsonl", base=tiny_base) for word in asked]
    assert pe_dpo("eval", run, *arguments).code == 0
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before


@pytest.mark.slow
def test_it_is_written_into_the_folder_that_was_named(pe_dpo, run, tiny_pairs, tmp_path):
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    assert pe_dpo("eval", run, "--data", tiny_pairs / "test.jsonl", "-o", tmp_path / "elsewhere").code == 0
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == {"eval_pairs.parquet", "evaluation.json"}
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before


@pytest.mark.slow
def test_a_merged_model_is_measured_against_its_base_as_the_run_was(
    pe_dpo, sampled, tiny_base, tiny_pairs, tmp_path, by_length
):
    """One after the other instead of both at once: the same answers, the same KL but for float32's rounding."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (run, _), merged = sampled, tmp_path / "merged"
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    PeftModel.from_pretrained(base, str(run)).merge_and_unload().save_pretrained(merged)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(merged)
    wanted = json.loads((run / "evaluation.json").read_text())["generation"]
    options = (
        "--data",
        tiny_pairs / "test.jsonl",
        "--base",
        tiny_base,
        "--scorer",
        by_length,
        "-o",
        tmp_path / "two",
        "--json",
    )
    found = printed(pe_dpo("eval", merged, *SAMPLING, *options))["generation"]
    one, two = (table_of(folder / "generations.parquet") for folder in (run, tmp_path / "two"))
    for column in ("prompt_key", "answer", "tokens", "reference_answer"):
        assert one[column].to_pylist() == two[column].to_pylist()
    for column in ("kl", "log_policy", "log_reference", "entropy"):
        assert one[column].to_pylist() == pytest.approx(two[column].to_pylist(), abs=1e-4)
    assert found["win_rate"]["mean"] == wanted["win_rate"]["mean"]
    assert found["data_prefix_kl"]["per_answer"]["mean"] == pytest.approx(
        wanted["data_prefix_kl"]["per_answer"]["mean"], abs=1e-4
    )


def test_sampling_from_a_merged_model_without_a_reference_is_refused(pe_dpo, tiny_base, tiny_pairs):
    done = pe_dpo("eval", tiny_base, "--data", tiny_pairs / "test.jsonl", "--prompts", 3)
    assert done.code == 2
    assert "name it with --base" in done.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--scorer", "operator:eq"), "of eval and sweep: --prompts 100"),
        (("--prompts", 3, "--scorer", "no_such_module_here:score"), "install it, or name a file"),
        (("-o", "/nowhere/at/all"), "there is no folder /nowhere/at; make it first"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(pe_dpo, run, arguments, words):
    done = pe_dpo("eval", run, *arguments)
    assert done.code == 2
    assert words in " ".join(done.err.split())
    assert re.sub(r"answers are judged by the function .*\n", "", done.out) == ""  # which is said before it is imported


def test_eval_says_how_to_measure_kl_when_nothing_was_sampled(pe_dpo, run):
    assert "to measure KL(π‖π0) on sampled answers: --prompts 100" in pe_dpo("eval", run).out


@pytest.mark.slow
def test_eval_samples_the_answers_that_training_sampled_at_its_end(pe_dpo, recipe_file, tmp_path):
    """From the adapter on disk, alone: the same noise, the same policy, the same numbers."""
    run = tmp_path / "run"
    settings = [
        part for prompts in ("prompts=4", "samples=2", "max_new_tokens=6") for part in ("--set", f"generation.{prompts}")
    ]
    done = pe_dpo("train", recipe_file, "-o", run, "--lr", "3e-2", *settings)
    assert (done.code, done.err) == (0, "")
    trained, report = table_of(run / "generations.parquet").to_pylist(), json.loads((run / "evaluation.json").read_text())
    evaluated = printed(pe_dpo("eval", run, "--json"))["generation"]
    again = table_of(run / "generations.parquet").to_pylist()
    assert len(trained) == 8
    for before, after in zip(trained, again, strict=True):
        assert {**before, "kl": 0, "entropy": 0, "log_policy": 0, "log_reference": 0} == {
            **after, "kl": 0, "entropy": 0, "log_policy": 0, "log_reference": 0,
        }  # fmt: skip
        for name in ("kl", "entropy", "log_policy", "log_reference"):
            assert before[name] == pytest.approx(after[name], abs=1e-4)
    assert evaluated["kl"]["mean"] == pytest.approx(report["generation"]["kl"]["mean"], abs=1e-5)
