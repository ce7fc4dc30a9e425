"""A whole run: what it leaves, what it measures, and that an adapter to start from is treated as asked."""

import json
import mmap
import shutil

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from pe_dpo.errors import UsageError
from pe_dpo.evaluation.evaluate import evaluate
from pe_dpo.recipe import load_recipe
from pe_dpo.runs.files import RUN_FILE, read_object
from pe_dpo.runs.run import Run
from pe_dpo.training.peak import MemoryPeak
from pe_dpo.training.train import train
from pe_dpo.training.trainer import PairTrainer


@pytest.fixture(scope="module")
def run(tiny_recipe, tmp_path_factory):
    return train(tiny_recipe(tmp_path_factory.mktemp("runs") / "run"))


@pytest.mark.slow
def test_a_run_leaves_everything_that_others_need(run):
    names = {path.name for path in run.folder.iterdir()}
    assert names >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "README.md",
        "recipe.yaml",
        "run.json",
        "metrics.jsonl",
        "data_report.json",
        "eval_pairs.parquet",
        "checkpoint-6",
    }
    assert not any(name.startswith(".staging") or name.endswith(".partial") for name in names)


@pytest.mark.slow
def test_a_run_says_what_memory_it_took_and_what_was_counted(run):
    """115,008 weights of the base in float32, an adapter of 9,728 with gradient and two averages, and a row's activations."""
    memory = Run(run.folder).info.memory
    assert (memory["of"], {*memory}) == ("RAM", {"of", "counted", "measured"})
    assert 0.5e6 < memory["counted"] < 10e6
    assert 0 <= memory["measured"] < 1e9  # in a process that has run before, all may lie where memory was given back
    words = Run(run.folder).info.describe_memory()
    assert words.endswith(f" GB of RAM at the worst moment ({memory['counted'] / 1e9:.2f} GB counted)")
    assert f"Training took {words}." in (run.folder / "README.md").read_text(encoding="utf-8")


def test_a_peak_is_what_was_held_at_once_above_the_start():
    def hold() -> mmap.mmap:
        """Map 40 MB anew and touch them all: an array may lie in memory that the process already has."""
        memory = mmap.mmap(-1, 40_000_000)
        memory.write(bytes(40_000_000))
        return memory

    peak = MemoryPeak()
    held = [hold(), hold()]
    held.pop().close()
    assert 76e6 < peak.bytes() < 130e6
    assert len(held) == 1


@pytest.mark.slow
def test_the_tokenizer_of_a_run_and_of_a_checkpoint_is_the_bases_own(run, tiny_base):
    for folder in (run.folder, run.folder / "checkpoint-6"):
        for name in ("tokenizer.json", "chat_template.jinja"):
            assert (folder / name).read_bytes() == (tiny_base / name).read_bytes()
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast", "not a name that only transformers 5 knows"


@pytest.mark.slow
def test_what_a_run_writes_has_the_permissions_of_any_new_file(run, tmp_path):
    """safetensors writes for the owner alone."""
    (tmp_path / "new").touch()
    usual = (tmp_path / "new").stat().st_mode
    files = [path for path in run.folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".safetensors", ".parquet", ".json", ".pt", ".md"}
    assert [path.name for path in files if path.stat().st_mode != usual] == []


@pytest.mark.slow
def test_the_resolved_recipe_repeats_the_run_to_the_bit(run, tmp_path):
    again = train(load_recipe(run.folder / "recipe.yaml", [f"output={tmp_path / 'again'}"]))
    name = "adapter_model.safetensors"
    assert (again.folder / name).read_bytes() == (run.folder / name).read_bytes()
    assert again.after == run.after


class StopAfterFive(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("callbacks", "steps"), [((), [4, 6]), ((StopAfterFive(),), [4, 5])], ids=["evaluated", "not evaluated"]
)
def test_the_end_is_scored_once(make_recipe, run, monkeypatch, callbacks, steps):
    """Trainer evaluates the last step whatever `eval_every` is, but none that it was stopped after."""
    scored, score = [], PairTrainer.score_model
    monkeypatch.setattr(PairTrainer, "score_model", lambda self: scored.append(self.state.global_step) or score(self))
    ended = train(make_recipe("train.eval_every=4"), callbacks=callbacks)
    assert [step for step in scored if step] == steps
    losses = {line["step"]: line["eval_loss"] for line in Run(ended.folder).metrics if "eval_loss" in line}
    assert (ended.after["loss"] in losses.values()) == (ended.after == run.after) == (6 in losses) == (not callbacks)


def test_the_record_says_what_the_reference_was_and_what_everything_was_made_of(run):
    record = read_object(run.folder / RUN_FILE)
    assert record["status"] == "finished"
    assert record["reference_card"]["is"] == "the base, adapters off"
    assert record["reference_card"]["base_sha256"] == record["hashes"]["base"]
    assert record["start"]["largest_difference"] == 0.0
    assert {"torch", "transformers", "peft", "bitsandbytes"} <= record["versions"].keys()
    assert record["pairs"] == {"train": 24, "held_out": 9}
    assert json.loads((run.folder / "data_report.json").read_text())["kept"] == 24


def test_metrics_carry_trls_names_and_the_2x2_table(run):
    first = Run(run.folder).metrics[1]
    assert first.keys() >= {
        "step", "loss", "grad_norm", "learning_rate", "epoch", "rewards/chosen", "rewards/rejected", "rewards/accuracies",
        "rewards/margins", "logps/chosen", "logps/rejected", "accuracy/policy", "displacement/chosen",
        "regimes/policy_right_reference_wrong/pairs", "regimes/policy_right_reference_wrong/weight_share",
    }  # fmt: skip
    assert first["loss"] == pytest.approx(0.6931471805599453, rel=1e-6)
    assert first["rewards/accuracies"] == 0.5


def test_at_step_0_the_off_diagonal_of_the_table_is_empty_and_shares_are_those_of_the_pairs(run):
    zero = Run(run.folder).metrics[0]
    assert zero["step"] == 0
    assert zero["eval_regimes/policy_right_reference_wrong/pairs"] == 0
    assert zero["eval_regimes/policy_wrong_reference_right/pairs"] == 0
    right = zero["eval_regimes/policy_right_reference_right/pairs"]
    assert zero["eval_regimes/policy_right_reference_right/weight_share"] == pytest.approx(right / 9)


def test_evaluating_the_run_gives_the_numbers_that_training_ended_with(run):
    found = evaluate(run.folder)
    assert found.kind == "run"
    assert found.metrics == pytest.approx(run.after, rel=1e-9)
    low, high = found.intervals["accuracy/policy"]
    assert low <= run.after["accuracy/policy"] <= high


@pytest.mark.slow
def test_evaluating_a_run_whose_data_changed_is_refused(tiny_recipe, tiny_pairs, tmp_path):
    pairs = shutil.copytree(tiny_pairs, tmp_path / "pairs")
    result = train(tiny_recipe(tmp_path / "run", f"data.train={pairs}", "train.max_steps=1"))
    lines = (pairs / "test.jsonl").read_text().splitlines()
    (pairs / "test.jsonl").write_text("\n".join(lines[1:]))
    with pytest.raises(UsageError, match=r"the data are not those of the run any more.*with `data`"):
        evaluate(result.folder)


@pytest.mark.slow
def test_evaluating_a_run_whose_base_changed_is_refused(tiny_recipe, tiny_base, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    result = train(tiny_recipe(tmp_path / "run", f"model.base={base}", "train.max_steps=1"))
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] *= 1.5
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"is not the base of the run any more.*name the base with `base`"):
        evaluate(result.folder)


@pytest.mark.slow
def test_a_run_with_relative_paths_is_evaluated_from_any_folder(tiny_recipe, tiny_base, tmp_path, monkeypatch):
    shutil.copytree(tiny_base, tmp_path / "here" / "base")
    monkeypatch.chdir(tmp_path / "here")
    result = train(tiny_recipe(tmp_path / "run", "model.base=./base", "train.max_steps=1"))
    monkeypatch.chdir(tmp_path)
    assert evaluate(result.folder).metrics["loss"] == pytest.approx(result.after["loss"])


def test_a_plain_peft_folder_is_evaluated_with_the_tokenizer_of_its_base(run, tiny_base, tiny_pairs, tmp_path):
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(run.folder / name, tmp_path)
    found = evaluate(tmp_path, data=str(tiny_pairs / "test.jsonl"))
    assert found.kind == "adapter"
    assert found.metrics["logps/chosen"] == pytest.approx(run.after["logps/chosen"])


def test_held_out_pairs_are_on_disk_one_by_one(run):
    table = pyarrow.parquet.read_table(run.folder / "eval_pairs.parquet").to_pylist()
    assert [row["where"] for row in table] == [f"test.jsonl:{line}" for line in range(1, 10)]
    assert sum(row["loss"] for row in table) / 9 == pytest.approx(run.after["loss"])


@pytest.mark.slow
def test_an_adapter_and_a_merged_model_are_evaluated_like_the_run(run, tiny_base, tiny_pairs, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    data = str(tiny_pairs / "test.jsonl")
    as_adapter = evaluate(run.folder, data=data).metrics
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), run.folder).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(run.folder).save_pretrained(tmp_path / "merged")
    as_model = evaluate(tmp_path / "merged", data=data, base=str(tiny_base))
    assert as_model.kind == "model"
    for key in ("loss", "accuracy/policy", "displacement/chosen", "logps/rejected"):
        assert as_model.metrics[key] == pytest.approx(as_adapter[key], rel=1e-4)


def test_metrics_of_held_out_pairs_do_not_depend_on_the_batch_size(run):
    from pe_dpo.data import prepare_pairs
    from pe_dpo.inference.scorer import Scorer
    from pe_dpo.model.base import inspect_base, load_base, load_tokenizer

    recipe = load_recipe(run.folder / "recipe.yaml")
    model = load_base(inspect_base(**recipe.model.model_dump()))
    pairs = prepare_pairs(
        recipe.data, tokenizer=load_tokenizer(recipe.model.base), context_length=256, end_token_ids=()
    ).held_out
    cpu = torch.device("cpu")
    scored = [Scorer("padded", cpu, token_budget=budget).score_pairs(model, pairs) for budget in (1, 300, 10**6)]
    for other in scored[1:]:
        assert torch.allclose(other.chosen, scored[0].chosen, rtol=1e-6)
        assert torch.equal(other.rejected_lengths, scored[0].rejected_lengths)


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["base", "adapter"])
def test_training_on_from_an_sft_adapter_uses_the_reference_that_was_named(run, make_recipe, reference):
    start = (f"adapter.start={run.folder}", f"adapter.reference={reference}", "adapter.rank=16", "adapter.alpha=32")
    result = train(make_recipe(*start, "adapter.dropout=0.3", "train.max_steps=1", output=reference))
    zero = Run(result.folder).metrics[0]
    if reference == "adapter":
        assert zero["eval_displacement/chosen"] == 0.0
        assert zero["eval_logps/chosen"] == pytest.approx(run.after["logps/chosen"], rel=1e-9)
        assert (result.folder / "reference" / "adapter_model.safetensors").is_file()
    else:
        assert zero["eval_displacement/chosen"] == pytest.approx(run.after["displacement/chosen"], rel=1e-9)
        assert result.start.largest_difference is None


@pytest.mark.slow
def test_a_tracker_of_transformers_gets_the_metrics(make_recipe):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(make_recipe("train.report_to=[tensorboard]", "train.max_steps=2"))
    events = next(result.folder.rglob("events.out.tfevents.*"))
    found = EventAccumulator(str(events.parent))
    found.Reload()
    assert "train/rewards/margins" in found.Tags()["scalars"]


@pytest.mark.slow
def test_a_scale_of_gamma_that_leaves_the_reference_behind_is_remarked(make_recipe):
    result = train(make_recipe("loss.beta=2.0", "loss.gamma=0.2x", "train.max_steps=1"))
    assert any(remark.startswith("δ = (γ−β)·sd(Δ0)") for remark in result.remarks)
