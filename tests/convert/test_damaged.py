"""Files that are damaged, or hold other values than a tool expects: one line says where, what, and what to do."""

import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from pe_dpo.convert.convert import Conversion, convert
from pe_dpo.convert.source import read_source
from pe_dpo.errors import UsageError

Converted = Callable[..., Conversion]


@pytest.mark.parametrize(("tool", "more", "words"), [
    ("trl", "beta: [0.1, 0.2]", r"beta: found \[0.1, 0.2\]; a number is expected"),
    ("trl", "beta: true", "beta: found true; a number is expected"),
    ("trl", "beta: 0\nloss_type: ipo", "beta: found 0; it is above 0"),
    ("trl", "rpo_alpha: {a: 1}", "rpo_alpha: found {a: 1}; a number is expected"),
    ("trl", "loss_type: [sigmoid, sft]\nloss_weights: abc", "loss_weights: found abc; a number is expected"),
    ("trl", "dataset_mixer: {a: x}", "dataset_mixer: found {a: x}; a number is expected"),
    ("trl", "dataset_mixer: {a: 1, b: 1}\ndataset_configs: [x]", r"dataset_configs: \[x\] has 1 entries for 2 data sets"),
    ("trl", "dataset_name: {x: y}", "{x: y} is no path and no name of a data set"),
    ("trl", "gamma_beta_ratio: x\ndataset_mixer: {a: 1}", "gamma_beta_ratio: found x; a number is expected"),
    ("axolotl", "datasets: [null]", "null is no path and no name of a data set"),
    ("axolotl", "datasets: x", "names no data.train: datasets: x is none"),
    ("axolotl", "dpo_loss_weights: x", "dpo_loss_weights: found x; a number is expected"),
    ("axolotl", "rl: simpo\nsimpo_gamma: [1]", r"simpo_gamma: found \[1\]; a number is expected"),
    ("llama-factory", "pref_loss: simpo\nsimpo_gamma: [1]", r"simpo_gamma: found \[1\]; a number is expected"),
    ("llama-factory", "quantization_bit: four", "quantization_bit: found four; a number is expected"),
    ("ms-swift", "rlhf_type: simpo\nsimpo_gamma: [1]", r"simpo_gamma: found \[1\]; a number is expected"),
    ("torchtune", "max_steps_per_epoch: x", "max_steps_per_epoch: found x; a number is expected"),
])  # fmt: skip
def test_a_value_of_another_kind_is_named(converted: Converted, tool: str, more: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        converted(tool, more)


@pytest.mark.parametrize(("text", "words"), [
    ("model_name_or_path: a\nbeta: 0.1\nbeta: 0.2\n", "beta is written twice, on lines 2 and 3; keep the one that is meant"),
    ("a: &a {x: *a}\nmodel_name_or_path: a\ndataset_name: b\n", "a part of it holds itself"),
    (f"a: {'[' * 3000}\n", "nested too deeply"),
    ("model_name_or_path: a\nuse_peft: true\n", r"names no data.train \(dataset_name\)"),
    ("use_peft: true\ndataset_name: a\n", r"names no model.base \(model_name_or_path\)"),
])  # fmt: skip
def test_what_cannot_be_settings_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=words):
        convert(path)


@pytest.mark.parametrize("name", ["pairs.jsonl", "train.sh", "config.yaml"])
def test_a_file_of_megabytes_is_not_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text('{"prompt": "x"}\n' * 200_000, encoding="utf-8")
    with pytest.raises(UsageError, match="has 3 MB, and settings have some kB"):
        convert(path)


@pytest.mark.parametrize("name", ["train.py", "train.ipynb"])
def test_python_is_not_read_and_what_to_write_is_said(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("trainer = DPOTrainer(model, args=DPOConfig(beta=0.1))\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"Python is not read; write what it gives .* model_name_or_path"):
        convert(path)


@pytest.mark.parametrize(("name", "text", "title"), [
    ("train.sh", "accelerate launch open_instruct/dpo_tune_cache.py --model_name_or_path a --dpo_beta 5\n", "open-instruct"),
    ("dpo.yaml", "model_name_or_path: a\ndataset_mixer: {b: 1.0}\ndpo_loss_type: dpo_norm\ndpo_beta: 5\n", "open-instruct"),
    ("train.sh", "deepspeed --module openrlhf.cli.train_dpo --pretrain a --dataset b --beta 0.1\n", "OpenRLHF"),
])  # fmt: skip
def test_a_tool_that_is_not_read_is_named_and_not_taken_for_trl(tmp_path: Path, name: str, text: str, title: str) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=f"{title}'s, whose settings are not read"):
        convert(path)


def test_bytes_before_the_text_and_ends_of_lines_of_windows_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xef\xbb\xbfmodel_name_or_path: a\r\ndataset_name: c\r\nuse_peft: true\r\nbeta: 0.3\r\n")
    assert convert(path).recipe.loss.beta == 0.3


@pytest.mark.parametrize(("text", "said"), [
    ("a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{p: *a{n - 1}, q: *a{n - 1}}}\n" for n in range(1, 40)), "more than 100,000"),
    ("a0: &a0 [1, 2]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)), "more than 100,000 values"),
    ("a: " + "[" * 100_000, "nested too deeply"),
    ("a: " + "9" * 10_000, "limit"),
    ("? [a]\n: 1", "cannot be read as YAML or JSON"),
    ("model_name_or_path: x\n" + "".join(f"{key}: {f'${{{value}}}' * 500}\n" for key, value in pairwise("abcdefghi")), ""),
])  # fmt: skip
def test_settings_that_are_made_to_grow_end_at_once(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    began = time.process_time()
    try:
        read_source(path)
    except UsageError as error:
        assert said in str(error)
    else:
        assert not said
    assert time.process_time() - began < 2
