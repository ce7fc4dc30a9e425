"""`pe-dpo check`: all that can be known before training, without the weights of the base."""

import io
import json
import shutil

import pytest


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    """Loading a base fails the test."""
    from transformers import AutoModelForCausalLM

    def refuse(*arguments, **keywords):
        raise AssertionError("check loaded the weights of the base")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)


def test_check_tells_loss_base_reference_shape_and_steps(pe_dpo, recipe_file):
    """24 pairs in steps of 4 are 6; embeddings 320·64 twice and two layers make 115,008 parameters."""
    done = pe_dpo("check", recipe_file)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == "read 33 rows: train.jsonl (24), test.jsonl (9)"
    assert "loss: DPO, beta 0.1, gamma 0.1, margin 0, link logistic, reduce sum; formula: pe-dpo recipes show RECIPE" in lines
    assert "base: 0.1 M parameters, in 32 bits: 0.5 MB; context 256" in lines
    assert "reference: the base, adapters off" in lines
    assert "understood as prompt (text), chosen and rejected (text)" in lines
    assert "24 pairs to train on, 9 held out (test.jsonl)" in lines
    assert "6 optimizer steps an epoch of 4 pairs" in lines
    assert lines[-2].startswith("ready to train: on this CPU about ") and lines[-2].endswith(" of RAM beside Python's own;")
    assert lines[-1].startswith("on a card about ")


def test_check_prints_the_same_as_json(pe_dpo, recipe_file):
    done = pe_dpo("check", recipe_file, "--json")
    facts = json.loads(done.out)
    assert (done.code, done.err) == (0, "")
    assert facts["loss"]["kappa"] == 1.0
    assert facts["warnings"] == []
    size = {"parameters": 115008, "coded": 0, "left": 0, "experts": 0, "bytes": 4 * 115008}
    assert facts["base"] == {"quantize": "none", "context": 256} | size
    assert facts["reference"] == {"is": "the base, adapters off", "run_in_training": True}
    assert (facts["data"]["rows_read"], facts["data"]["kept"], facts["data"]["held_out"]) == (33, 24, 9)


def test_check_tells_the_steps_as_json_too(pe_dpo, recipe_file):
    assert json.loads(pe_dpo("check", recipe_file, "--json").out)["steps_per_epoch"] == 6


def test_check_writes_nothing(pe_dpo, recipe_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pe_dpo("check", recipe_file)
    assert list(tmp_path.iterdir()) == []


def test_a_loss_without_reference_is_said_to_need_none(pe_dpo, recipe_file):
    lines = pe_dpo("check", recipe_file, "--gamma", 0, "--margin", 1).out.splitlines()
    assert "reference: the base, adapters off; never run, since gamma is 0" in lines
    assert next(line for line in lines if line.startswith("loss: ")).endswith(
        ", beta 0.1, gamma 0, margin 1, link logistic, reduce sum; formula: pe-dpo recipes show RECIPE"
    )


def test_what_is_probably_not_meant_is_pointed_at(pe_dpo, recipe_file):
    done = pe_dpo("check", recipe_file, "--gamma", 0)
    assert done.code == 0
    assert "warning: loss: with gamma 0 and summed log-probs shorter answers win" in done.out


def test_a_hopeless_mixout_is_pointed_at_as_json_too(pe_dpo, recipe_file):
    done = pe_dpo("check", recipe_file, "--mixout", 0.9, "--json")
    assert (done.code, done.err) == (0, "")
    few_steps, few_units = json.loads(done.out)["warnings"]
    assert few_steps.startswith("mixout.p 0.9 trains each unit in 0.2 of 2 steps on average")
    assert few_units.startswith("mixout.p 0.9 keeps 6.4 of the 64 input units of the narrowest layer on average")


@pytest.mark.slow
def test_an_adapter_to_start_from_is_named_as_the_reference(pe_dpo, recipe_file, trained):
    start = ["--set", f"adapter.start={trained[0]}", "--set", "adapter.reference=adapter"]
    assert f"reference: a frozen copy of {trained[0]}" in pe_dpo("check", recipe_file, *start).out.splitlines()


@pytest.mark.parametrize(("arguments", "code", "message"), [
    (["--link", "hinge"], 2, "loss.gamma: with link hinge, gamma = beta and margin 0 every pair starts with zero gradient"),
    (["--set", "loss.betta=1"], 2, "--set loss.betta=1: loss.betta: unknown key; did you mean loss.beta?"),
    (["--set", "model.base=./nowhere"], 1, "./nowhere: no such folder; model.base is a folder with config.json, or a hub id"),
    (["--set", "data.train=nowhere.jsonl"], 1, "nowhere.jsonl: there is no such file or folder"),
    (["--set", "data.max_length=4"], 1, "no pair is left of 24 rows: 24 longer than max_length; raise data.max_length (4)"),
    (["--set", "data.max_length=9999"], 1, "data.max_length: 9999 tokens, but the model's context is 256; lower it"),
    (["--set", "adapter.start=.", "--set", "adapter.reference=base"], 1, "no adapter_config.json there"),
])  # fmt: skip
def test_what_training_would_fail_on_is_found(pe_dpo, recipe_file, arguments, code, message):
    done = pe_dpo("check", recipe_file, *arguments)
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith("error: ")
    assert message in done.err


def test_a_recipe_that_does_not_exist_is_a_usage_error(pe_dpo):
    done = pe_dpo("check", "nowhere.yaml")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: nowhere.yaml: no such file and no such recipe; ")


# ---------------------------------------------------------------- code of a model repository

MARKING = """
from pathlib import Path
Path({marker!r}).write_text("was here")
from transformers import PretrainedConfig, PreTrainedTokenizerFast


class Config(PretrainedConfig):
    model_type = "unheard_of"


class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def foreign_base(tiny_base, tmp_path):
    """Make a copy of the tiny base of which a part needs Python code from its folder; returns it and what the code writes."""

    def make(part):
        folder, marker = tmp_path / "foreign", tmp_path / "marker"
        shutil.copytree(tiny_base, folder)
        (folder / "code.py").write_text(MARKING.format(marker=str(marker)))
        if part == "config":
            changed = {"model_type": "unheard_of", "auto_map": {"AutoConfig": "code.Config"}}
            path = folder / "config.json"
        else:
            changed = {"tokenizer_class": "UnheardOf", "auto_map": {"AutoTokenizer": [None, "code.Tokenizer"]}}
            path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
        return folder, marker

    return make


@pytest.mark.parametrize("part", ["config", "tokenizer"])
def test_code_of_a_model_repository_is_never_run_whatever_is_answered(pe_dpo, recipe_file, foreign_base, monkeypatch, part):
    folder, marker = foreign_base(part)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    done = pe_dpo("check", recipe_file, "--set", f"model.base={folder}")
    assert not marker.exists()
    assert "[y/N]" not in done.out + done.err
    assert done.code == 1
    assert done.err == (
        f"error: {folder}: needs Python code from its own repository (auto_map), which is never run; convert it to a class of "
        "transformers, or take another\n"
    )


def test_code_beside_a_model_that_transformers_knows_is_not_needed(pe_dpo, recipe_file, foreign_base, monkeypatch):
    folder, marker = foreign_base("config")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    done = pe_dpo("check", recipe_file, "--set", f"model.base={folder}")
    assert (done.code, done.err) == (0, "")
    assert not marker.exists()


# ---------------------------------------------------------------- names of modules

NAMES = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"


@pytest.mark.parametrize(("targets", "wrong"), [
    ("[no_such_layer]", "no_such_layer"),
    ("[q_proj, v_porj]", "v_porj"),
    ("[q_proj, nope, layers.7.self_attn.k_proj]", "nope, layers.7.self_attn.k_proj"),
    ("[self_attn]", "self_attn"),
])  # fmt: skip
def test_a_target_that_matches_nothing_is_an_error_that_names_what_exists(pe_dpo, recipe_file, targets, wrong):
    done = pe_dpo("check", recipe_file, "--set", f"adapter.targets={targets}")
    assert done.code == 1
    assert done.err == f"error: adapter.targets: no linear layer of the base is called {wrong}; there are {NAMES}\n"


@pytest.mark.parametrize("targets", ["[q_proj]", "[layers.0.self_attn.q_proj, down_proj]", "[lm_head]"])
def test_targets_may_be_names_or_the_ends_of_paths(pe_dpo, recipe_file, targets):
    assert pe_dpo("check", recipe_file, "--set", f"adapter.targets={targets}").code == 0


def test_one_pair_is_shown_as_the_model_reads_it(pe_dpo, recipe_file):
    out = pe_dpo("check", recipe_file).out
    (prompt,) = (line for line in out.splitlines() if line.startswith("  prompt "))
    (chosen,) = (line.rstrip() for line in out.splitlines() if line.startswith("  chosen "))
    assert "<|im_start|>user\\nNumber " in prompt
    assert "«It is " in chosen
    assert chosen.endswith("<|im_end|>»")
    example = json.loads(pe_dpo("check", recipe_file, "--json").out)["example"]
    assert example["prompt"].startswith("<|im_start|>user\nNumber ")
    assert example["chosen"]["end"] == "<|im_end|>"


def test_many_rows_that_are_too_long_are_a_warning_with_the_remedy(pe_dpo, recipe_file):
    """The longest of the 33 pairs has 64 tokens."""
    done = pe_dpo("check", recipe_file, "--set", "data.max_length=60")
    (line,) = (line for line in done.out.splitlines() if line.startswith("warning: "))
    assert "rows (" in line
    assert "are left out because they are longer than 60 tokens: data.max_length: " in line
    assert json.loads(pe_dpo("check", recipe_file, "--set", "data.max_length=60", "--json").out)["warnings"] == [
        line.removeprefix("warning: ")
    ]


def test_check_takes_every_flag_of_train(pe_dpo):
    def flags(command):
        return {word.rstrip(":") for word in pe_dpo(command, "--help").out.replace("│", " ").split() if word.startswith("--")}

    assert flags("train") - {"--resume", "--overwrite", "--override"} <= flags("check")
