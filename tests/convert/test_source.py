"""Whose settings a file has is found in its keys or in the program of its line, and what is not known is said."""

from pathlib import Path

import pytest

from pe_dpo.convert.source import read_source
from pe_dpo.errors import UsageError

CONFIGS = Path(__file__).parent / "configs"


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "config.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize(("name", "tool"), [
    ("zephyr-7b-dpo-qlora.yaml", "trl"), ("unsloth-zephyr-dpo.yaml", "trl"), ("trl-dpo-lora.sh", "trl"),
    ("llama-3-8b-instruct-simpo.yaml", "simpo"), ("axolotl-instruct-dpo-lora-8b.yml", "axolotl"),
    ("llama3_lora_dpo.yaml", "llama-factory"), ("8B_lora_dpo_single_device.yaml", "torchtune"),
    ("swift-dpo-lora.sh", "ms-swift"),
])  # fmt: skip
def test_a_published_file_is_known_by_its_keys(name: str, tool: str) -> None:
    assert read_source(CONFIGS / name).name == tool


@pytest.mark.parametrize(("line", "tool", "program"), [
    ("trl dpo --beta 0.2", "trl", "trl dpo"),
    ("accelerate launch --num_processes 4 examples/scripts/dpo.py --beta 0.2", "trl", "examples/scripts/dpo.py"),
    ("ACCELERATE_LOG_LEVEL=info accelerate launch scripts/run_simpo.py --beta 2.5 --gamma_beta_ratio 0.5", "simpo", None),
    ("NPROC_PER_NODE=2 swift rlhf --rlhf_type dpo", "ms-swift", "swift rlhf"),
    ("llamafactory-cli train --stage dpo --pref_beta 0.1", "llama-factory", "llamafactory-cli train"),
    ("tune run lora_dpo_single_device --config config.yaml batch_size=8", "torchtune", "tune run"),
])  # fmt: skip
def test_a_line_of_arguments_is_known_by_its_program(write, line: str, tool: str, program: str | None) -> None:
    write("loss: {_component_: torchtune.rlhf.loss.DPOLoss}\nbatch_size: 4\n")
    source = read_source(write(f"#!/bin/bash\n{line}\n", "train.sh"))
    assert source.name == tool
    assert program is None or source.program == program


def test_a_script_that_trains_with_no_known_tool_is_an_error_that_names_them(write) -> None:
    with pytest.raises(UsageError, match=r"run\.sh: no line in it trains with a tool that is known") as caught:
        read_source(write("megatron rlhf --beta 0.2\n", "run.sh"))
    assert "a line with swift rlhf" in str(caught.value)


@pytest.mark.parametrize(
    "before", ["pip install trl peft", "tune download a/b --output-dir c", "cp dpo.py /tmp", "axolotl preprocess c.yaml"]
)
def test_lines_that_train_nothing_are_passed_over(write, before: str) -> None:
    assert read_source(write(f"{before}\nswift rlhf --beta 0.2\n", "run.sh")).values == {"beta": 0.2}


def test_arguments_are_read_as_what_they_are(write) -> None:
    line = (
        "python dpo.py --beta 5e-2 --use_peft --no_remove_unused_columns --loss_type sigmoid sft --lora-r=8 --seed 1 # tried\n"
    )
    source = read_source(write(line, "run.sh"))
    assert source.values == {
        "beta": 0.05, "use_peft": True, "remove_unused_columns": False, "loss_type": ["sigmoid", "sft"], "lora_r": 8, "seed": 1,
    }  # fmt: skip


def test_arguments_win_over_the_file_that_they_name(write) -> None:
    write("model_name_or_path: base\nbeta: 0.1\nlearning_rate: 1e-6\n", "c.yaml")
    source = read_source(write("trl dpo --config c.yaml \\\n  --beta 0.5\n", "run.sh"))
    assert source.values == {"model_name_or_path": "base", "beta": 0.5, "learning_rate": 1e-6}


def test_a_script_says_how_many_cards_it_starts(write) -> None:
    script = "n=4\nNPROC_PER_NODE=$n swift rlhf --rlhf_type dpo --gradient_accumulation_steps $(expr 16 / $n)\n"
    source = read_source(write(script, "run.sh"))
    assert (source.cards, source.values["gradient_accumulation_steps"]) == (4, 4)
    assert read_source(write("accelerate launch --num_processes=8 dpo.py --beta 1\n", "run.sh")).cards == 8


def test_keys_of_no_known_tool_are_an_error_that_names_what_each_tool_has(write) -> None:
    with pytest.raises(UsageError, match=r"config\.yaml: no tool is known whose settings these are") as caught:
        read_source(write("alpha: 1\n"))
    for words in ("gamma_beta_ratio", "rlhf_type", "_component_", "sequence_len", "finetuning_type", "dataset_mixer"):
        assert words in str(caught.value)


def test_keys_of_two_tools_are_an_error_that_names_both(write) -> None:
    message = r"not clear: rl as Axolotl has them; pref_beta as LLaMA-Factory has them\. Each tool's file has"
    with pytest.raises(UsageError, match=message):
        read_source(write("rl: dpo\npref_beta: 0.1\n"))


@pytest.mark.parametrize(("text", "name", "words"), [
    ("[1, 2]", "a.yaml", "holds no settings: a mapping of keys"), ("a: [", "a.yaml", "cannot be read as YAML or JSON"),
    ("trl dpo --config there.yaml", "a.sh", "its settings are in there.yaml, which is not there"),
])  # fmt: skip
def test_what_cannot_be_read_is_said_with_the_remedy(write, text: str, name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        read_source(write(text, name))


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone\.yaml: cannot be read: No such file or directory; name a file of settings"):
        read_source(tmp_path / "gone.yaml")


@pytest.mark.parametrize(("before", "line", "cards"), [
    ("", "accelerate launch --num_processes 4 dpo.py", 4),
    ("", "torchrun --nnodes 2 --nproc_per_node 8 dpo.py", 16),
    ("", "accelerate launch --config_file ds.yaml dpo.py", 3),
    ("", "accelerate launch --config_file elsewhere.yaml dpo.py", None),
    ("", "CUDA_VISIBLE_DEVICES=0,1,2,3 llamafactory-cli train", 4),
    ("export CUDA_VISIBLE_DEVICES=0,1", "trl dpo", 2),
    ("", "CUDA_VISIBLE_DEVICES=0,1 swift rlhf", None),  # one model over two cards
    ("", "NPROC_PER_NODE=2 swift rlhf", 2),
])  # fmt: skip
def test_a_script_says_on_how_many_cards_it_is_run(write, before: str, line: str, cards: int | None) -> None:
    write("compute_environment: LOCAL_MACHINE\nnum_processes: 3\n", "ds.yaml")
    assert read_source(write(f"{before}\n{line} --beta 0.2\n", "run.sh")).cards == cards


def test_what_the_shell_does_with_the_output_is_no_argument(write) -> None:
    source = read_source(write("trl dpo --beta 0.2 --output_dir out --bf16 True 2>&1 | tee train.log\n", "run.sh"))
    assert source.values == {"beta": 0.2, "output_dir": "out", "bf16": True}


def test_variables_are_completed_as_a_shell_does(write) -> None:
    text = (
        'MODEL=a/b\nexport BETA=0.3\ntrl dpo --beta $BETA --lora_r ${RANK:-8} --output_dir "runs/${MODEL##*/}-dpo" --seed $1\n'
    )
    source = read_source(write(text, "run.sh"))
    assert source.values == {"beta": 0.3, "lora_r": 8, "output_dir": "runs/b-dpo", "seed": "$1"}


def test_yes_and_off_are_booleans_as_in_the_tools(write) -> None:
    source = read_source(write("model_name_or_path: a\nuse_peft: no\nload_in_4bit: off\nbf16: yes\nlearning_rate: 1e-6\n"))
    assert source.values == {
        "model_name_or_path": "a", "use_peft": False, "load_in_4bit": False, "bf16": True, "learning_rate": 1e-6,
    }  # fmt: skip


def test_a_merged_mapping_is_a_part(write) -> None:
    text = (
        "base_model: b\nx-common: &common {type: chat_template.default, split: train}\ndatasets:\n  - {path: d, <<: *common}\n"
    )
    assert read_source(write(f"{text}rl: dpo\n")).values["datasets"] == [
        {"path": "d", "type": "chat_template.default", "split": "train"}
    ]


def test_a_value_that_stands_for_a_part_of_others_is_no_setting(write) -> None:
    text = "model: {_component_: torchtune.models.llama3.lora_llama3_8b}\nroot: /m\nfolder: ${root}/llama\n"
    source = read_source(write(f"{text}checkpointer: {{checkpoint_dir: '${{folder}}/8B'}}\n"))
    assert source.values["checkpointer.checkpoint_dir"] == "/m/llama/8B"
    assert not {"root", "folder"} & source.values.keys()
