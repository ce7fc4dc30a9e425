"""What goes wrong is one message and an exit code: no traceback, and nothing half-written in the output folder."""

import json
import logging
import shutil
import subprocess
import sys

import pytest

from pe_dpo.cli import main
from pe_dpo.errors import UsageError


def assert_refused(done, code, *words):
    """One message on stderr that says all of `words`."""
    assert (done.code, done.err.count("error: ")) == (code, 1)
    assert done.err.startswith("error: ")
    assert "Traceback" not in done.err
    for word in words:
        assert word in done.err


def is_empty(folder):
    return not folder.exists() or not list(folder.iterdir())


def test_the_installed_program_prints_one_message_and_leaves_with_its_code(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("model: {base: b}\ndata: {train: d}\nlr: 1\n")
    done = subprocess.run([sys.executable, "-m", "pe_dpo", "train", str(path)], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {path}:3: lr: unknown key; here it is train.learning_rate\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.yaml"]


@pytest.mark.parametrize(("text", "words"), [
    ("model: [\n", ("bad.yaml:2: not readable as YAML",)),
    ("", ("bad.yaml: a recipe is a mapping of sections", "found an empty file")),
    ("model: {base: b}\ndata: {train: d}\nloss: {betta: 1}\n", ("bad.yaml:3: loss.betta: unknown key",)),
    ("model: {base: b}\ndata: {train: d}\nloss: {link: hinge}\n", ("bad.yaml:3: loss.gamma: ", "set margin > 0")),
    ("model: {base: b}\ndata: {train: d}\nadapter: {init: pissa}\n", ("bad.yaml:3: adapter.init: ", "use init: default")),
])  # fmt: skip
def test_a_malformed_recipe_starts_nothing(pe_dpo, tmp_path, text, words):
    (tmp_path / "bad.yaml").write_text(text)
    done = pe_dpo("train", tmp_path / "bad.yaml", "-o", tmp_path / "run")
    assert_refused(done, 2, *words)
    assert done.out == ""
    assert not (tmp_path / "run").exists()


def test_all_faults_are_in_the_one_message(pe_dpo, tmp_path):
    (tmp_path / "bad.yaml").write_text("model: {base: b}\ndata: {train: d}\nlr: 1\nadapter: {rank: 0}\n")
    done = pe_dpo("train", tmp_path / "bad.yaml", "--beta", -1)
    assert_refused(done, 2, "bad.yaml:3: lr: ", "bad.yaml:4: adapter.rank: ", "loss.beta: found -1")


@pytest.fixture
def bad_world(tmp_path, tiny_base, trained):
    """Settings of which each makes training impossible, by name."""
    (tmp_path / "torn.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "cho\n')
    (tmp_path / "wrong.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(trained[0] / name, adapter)
    weightless = tmp_path / "weightless"
    shutil.copytree(tiny_base, weightless, ignore=shutil.ignore_patterns("*.safetensors"))
    return {
        "missing data": (f"data.train={tmp_path / 'nowhere.jsonl'}", "there is no such file or folder"),
        "torn data": (f"data.train={tmp_path / 'torn.jsonl'}", "torn.jsonl:2: "),
        "data of another shape": (f"data.train={tmp_path / 'wrong.jsonl'}", "question"),
        "empty data": (f"data.train={tmp_path / 'empty.jsonl'}", "no row can be used of 0 read: the file is empty"),
        "missing base": (f"model.base={tmp_path / 'nowhere'}", "no such folder; model.base is a folder with config.json"),
        "unreachable base": ("model.base=nobody/nothing", "nobody/nothing: no model found there"),
        "adapter as base": (f"model.base={adapter}", "is an adapter, not a base; name its base in model.base"),
        "base without weights": (f"model.base={weightless}", "cannot be loaded"),
    }  # fmt: skip


BAD_WORLDS = ["missing data", "torn data", "data of another shape", "empty data", "missing base", "unreachable base",
              "adapter as base", "base without weights"]  # fmt: skip


@pytest.mark.parametrize("name", BAD_WORLDS)
def test_training_on_what_cannot_be_used_fails_with_one_message(pe_dpo, recipe_file, tmp_path, bad_world, name):
    setting, words = bad_world[name]
    done = pe_dpo("train", recipe_file, "-o", tmp_path / "run", "--set", setting)
    assert_refused(done, 1, words)
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_a_base_with_torn_weights_is_refused(pe_dpo, recipe_file, tmp_path, tiny_base):
    torn = tmp_path / "torn"
    shutil.copytree(tiny_base, torn)
    weights = (torn / "model.safetensors").read_bytes()
    (torn / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    done = pe_dpo("train", recipe_file, "-o", tmp_path / "run", "--set", f"model.base={torn}")
    assert_refused(done, 1, f"{torn}/model.safetensors: cannot be read")


@pytest.mark.parametrize("name", [name for name in BAD_WORLDS if name != "base without weights"])
def test_training_that_never_began_leaves_nothing(pe_dpo, recipe_file, tmp_path, bad_world, name):
    """Weights are read last; until then nothing is written."""
    pe_dpo("train", recipe_file, "-o", tmp_path / "run", "--set", bad_world[name][0])
    assert is_empty(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["missing data", "base without weights"])
def test_training_that_failed_at_its_start_can_be_started_again(pe_dpo, recipe_file, tmp_path, bad_world, name):
    pe_dpo("train", recipe_file, "-o", tmp_path / "run", "--set", bad_world[name][0])
    done = pe_dpo("train", recipe_file, "-o", tmp_path / "run")
    assert (done.code, done.err) == (0, "")


def test_overwrite_keeps_the_old_run_when_the_new_one_cannot_begin(pe_dpo, recipe_file, tmp_path, trained):
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    done = pe_dpo("train", recipe_file, "-o", folder, "--overwrite", "--set", "data.train=nowhere.jsonl")
    assert done.code == 1
    assert (folder / "adapter_model.safetensors").exists()


def test_a_folder_with_a_run_in_it_is_left_as_it_was(pe_dpo, recipe_file, trained):
    folder, _ = trained
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    done = pe_dpo("train", recipe_file, "-o", folder)
    assert_refused(done, 2, "--resume goes on with it, --overwrite removes it, --output moves")
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != ".lock"} == {
        name: time for name, time in before.items() if name != ".lock"
    }


@pytest.mark.parametrize("flag", [[], ["--overwrite"]])
def test_a_folder_with_other_peoples_files_is_never_touched(pe_dpo, recipe_file, tmp_path, flag):
    (tmp_path / "thesis.tex").write_text("mine")
    done = pe_dpo("train", recipe_file, "-o", tmp_path, *flag)
    assert_refused(done, 2, "is not empty and not a run of pe-dpo; choose another --output")
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_an_output_below_a_file_is_refused(pe_dpo, recipe_file, tmp_path):
    (tmp_path / "file").write_text("")
    done = pe_dpo("train", recipe_file, "-o", tmp_path / "file" / "run")
    assert_refused(done, 2, f"{tmp_path / 'file' / 'run'}: cannot be written: Not a directory; choose another place")


def test_resuming_what_never_ran_is_refused(pe_dpo, recipe_file, tmp_path):
    done = pe_dpo("train", recipe_file, "-o", tmp_path / "run", "--resume")
    assert_refused(done, 2, "there is no run to resume; leave --resume out")


def test_resuming_with_another_loss_is_refused_with_the_difference(pe_dpo, recipe_file, trained):
    done = pe_dpo("train", recipe_file, "-o", trained[0], "--resume", "--beta", 0.5)
    wanted = "use the old settings, name what you mean to change with --override (loss.beta), or another --output"
    assert_refused(done, 2, "loss.beta: 0.1 → 0.5", wanted)


def test_what_cannot_be_overridden_is_named_with_the_flag(pe_dpo, recipe_file, trained):
    done = pe_dpo("train", recipe_file, "-o", trained[0], "--resume", "--override", "rank=2")
    assert_refused(done, 2, "--override rank: cannot change in a run that goes on: what the checkpoint holds belongs to")
    done = pe_dpo("train", recipe_file, "-o", trained[0], "--override", "lr=1.0e-3")
    assert_refused(done, 2, "--override is for a run that goes on; use it with --resume")


@pytest.mark.parametrize("command", ["eval", "merge", "chat", "serve", "export"])
def test_a_run_that_kept_no_best_says_which_key_keeps_one(pe_dpo, trained, tmp_path, command):
    more = {"merge": ["-o", tmp_path / "m"], "export": ["--gguf-lora", "-o", tmp_path / "l.gguf"]}.get(command, [])
    done = pe_dpo(command, trained[0], "--best", *more)
    assert_refused(done, 2, f"{trained[0]}: has no best adapter; a run keeps one with train.keep_best")


@pytest.mark.parametrize("output", ["runs #2", "a: b", "2026", "true"])
def test_any_name_can_be_given_to_the_output_flag(pe_dpo, recipe_file, monkeypatch, output):
    asked = []

    def stop(recipe, **options):
        asked.append(recipe.output)
        raise UsageError("enough")

    monkeypatch.setattr("pe_dpo.training.train.train", stop)
    assert_refused(pe_dpo("train", recipe_file, "-o", output), 2, "enough")
    assert asked == [output]


def test_an_interrupt_is_one_word_and_the_code_of_the_signal(monkeypatch, capsys):
    """130 = 128 + SIGINT."""

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("pe_dpo.cli.app", interrupt)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_fault_of_this_program_is_not_dressed_up_as_the_users(monkeypatch):
    def fail():
        raise ZeroDivisionError

    monkeypatch.setattr("pe_dpo.cli.app", fail)
    with pytest.raises(ZeroDivisionError):
        main()


@pytest.mark.parametrize(("arguments", "both"), [
    (["--set", "loss.beta=1", "--set", "loss.beta=2"], "--set loss.beta=1 and --set loss.beta=2"),
    (["--beta", 1, "--set", "loss.beta=2"], "--set loss.beta=2 and --beta 1"),
    (["--beta", 1, "--set", " loss.beta =1"], "--set  loss.beta =1 and --beta 1"),
    (["--set", "loss={beta: 2}", "--set", "loss.beta=1"], "--set loss={beta: 2} and --set loss.beta=1"),
    (["--beta", 1, "--beta=2"], "--beta 1 and --beta 2"),
    (["-o", "here", "--output", "there"], "-o here and --output there"),
    (["-o", "here", "--set", "output=there"], "--set output=there and --output here"),
])  # fmt: skip
def test_a_setting_that_is_given_twice_is_an_error_that_names_both(pe_dpo, recipe_file, tmp_path, monkeypatch, arguments, both):
    monkeypatch.chdir(tmp_path)
    assert_refused(pe_dpo("train", recipe_file, *arguments), 2, f"{both}: ", "is given twice; give it once")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("arguments", "both"), [
    (["sweep", "RECIPE", "--plan", "--prompts", 5, "--set", "generation.prompts=6"],
     "--set generation.prompts=6 and --prompts 5"),
    (["sweep", "RECIPE", "--plan", "--set", "loss.beta=5", "--set", "loss.beta=6"], "--set loss.beta=5 and --set loss.beta=6"),
    (["check", "RECIPE", "--gamma", 0, "--set", "loss.gamma=1"], "--set loss.gamma=1 and --gamma 0"),
    (["audit", "RECIPE", "--loss", "dpo", "--loss", "simpo"], "--loss dpo and --loss simpo"),
    (["eval", "RUN", "--seed", 1, "--seed", 2], "--seed 1 and --seed 2"),
])  # fmt: skip
def test_no_command_takes_a_setting_twice(pe_dpo, recipe_file, trained, arguments, both):
    places = {"RECIPE": recipe_file, "RUN": trained[0]}
    assert_refused(pe_dpo(*(places.get(word, word) for word in arguments)), 2, f"{both}: ", "is given twice; give it once")


def test_a_value_that_looks_like_an_option_is_not_counted(pe_dpo, recipe_file, tmp_path):
    done = pe_dpo("check", recipe_file, "--beta", "0.2", "--set", "output=--beta")
    assert (done.code, done.err) == (0, "")


# ---------------------------------------------------------------- eval


@pytest.mark.parametrize(("arguments", "words"), [
    (["nowhere"], ("nowhere: no such folder; name a run, an adapter or a model on disk",)),
    (["RUN", "--quantize", "int3"], ("--quantize int3: write nf4, nf4-single, fp4, fp4-single, int8 or none",)),
    (["BASE"], ("is not a run folder, so there are no held-out pairs of its own; name them with --data",)),
    (["EMPTY", "--data", "PAIRS"], ("is neither a run (run.json), an adapter (adapter_config.json) nor a model",)),
])  # fmt: skip
def test_a_target_that_cannot_be_evaluated_is_a_usage_error(pe_dpo, tmp_path, tiny_base, tiny_pairs, trained, arguments, words):
    places = {"RUN": trained[0], "BASE": tiny_base, "PAIRS": tiny_pairs, "EMPTY": tmp_path}
    done = pe_dpo("eval", *(places.get(word, word) for word in arguments))
    assert_refused(done, 2, *words)
    assert done.out == ""


def test_a_run_that_was_stopped_before_its_adapter_is_told_with_its_status(pe_dpo, trained, tmp_path):
    folder = tmp_path / "stopped"
    folder.mkdir()
    shutil.copy(trained[0] / "recipe.yaml", folder)
    (folder / "run.json").write_text(json.dumps({"status": "interrupted"}))
    assert_refused(pe_dpo("eval", folder), 2, "this run has no adapter yet (status: interrupted); finish it with")


def test_a_run_whose_data_is_gone_fails_with_the_file(pe_dpo, trained, tmp_path):
    folder = tmp_path / "moved"
    shutil.copytree(trained[0], folder)
    recipe = (folder / "recipe.yaml").read_text()
    data = next(line for line in recipe.splitlines() if line.startswith("  train: "))
    (folder / "recipe.yaml").write_text(recipe.replace(data, "  train: ./gone.jsonl"))
    assert_refused(pe_dpo("eval", folder), 1, "./gone.jsonl: there is no such file or folder")


def test_a_torn_adapter_is_refused(pe_dpo, trained, tmp_path):
    folder = tmp_path / "torn"
    shutil.copytree(trained[0], folder)
    weights = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert_refused(pe_dpo("eval", folder), 1, f"{folder}")


def test_pairs_into_a_folder_that_is_not_there_are_refused(pe_dpo, trained, tmp_path):
    assert_refused(pe_dpo("eval", trained[0], "--pairs", tmp_path / "nowhere" / "pairs.parquet"), 2, "nowhere")


# ---------------------------------------------------------------- arguments and flags


def test_an_argument_that_the_library_names_is_the_flag_of_a_command():
    from typer.main import get_command

    from pe_dpo.cli import app, options

    flags = {flag for command in get_command(app).commands.values() for option in command.params for flag in option.opts}
    assert set(options._FLAGS.values()) <= flags


@pytest.mark.parametrize(("message", "line"), [
    ("x: name it with `base`, or `max_new_tokens` 5", "x: name it with --base, or --max-new-tokens 5"),
    ("`overrides` a.b=1: `scales` and another `folder`", "--set a.b=1: --scale and another --output"),
    ("q.jsonl:1: expected `prompt`; see `pe-dpo eval RUN`", "q.jsonl:1: expected `prompt`; see `pe-dpo eval RUN`"),
])  # fmt: skip
def test_a_person_reads_flags_where_the_library_names_arguments(pe_dpo, recipe_file, monkeypatch, message, line):
    """In an error and in what is logged; other names and commands stay as they are."""

    def stop(recipe, **options):
        logging.getLogger("pe_dpo.training").warning(message)
        raise UsageError(message)

    monkeypatch.setattr("pe_dpo.training.train.train", stop)
    done = pe_dpo("train", recipe_file)
    assert (done.code, done.err, done.out) == (2, f"error: {line}\n", f"warning: {line}\n")


def test_memory_that_runs_out_where_nothing_can_be_split_is_a_line(pe_dpo, trained, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    monkeypatch.setattr("pe_dpo.merging.write.merge_tensor", fail)
    done = pe_dpo("merge", trained[0], "-o", tmp_path / "out", "--pairs", 0)
    assert_refused(done, 1, "out of memory (", "can't allocate memory", "pe-dpo estimate")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("arguments", "words"), [
    (["sweep", "my.yaml", "--seeds", "1,2"],
     "--seeds 1,2: how many seeds is wanted, not which; they count up from train.seed: --seeds 2"),
    (["train", "my.yaml", "--beta=0.1,0.2"],
     "--beta 0.1,0.2: one number is wanted; a run for each of several: pe-dpo sweep RECIPE --grid beta=0.1,0.2"),
    (["compare", "runs/one", "--repeats", "1,000"], "--repeats 1,000: one number is wanted, without commas; for example 1"),
    (["eval", "runs/one", "--seed", "1,2"], "--seed 1,2: one number is wanted, without commas; for example 1"),
])  # fmt: skip
def test_several_numbers_where_one_is_wanted_are_refused_with_what_to_type(pe_dpo, arguments, words):
    assert_refused(pe_dpo(*arguments), 2, f"error: {words}\n")


def test_a_command_without_its_arguments_says_what_is_missing(pe_dpo):
    done = pe_dpo("train")
    assert done.code == 2 and "Missing" in done.err and "Traceback" not in done.err
