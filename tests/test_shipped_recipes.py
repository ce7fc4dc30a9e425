"""Every recipe that comes with the package: short, true to its header, and trained on a tiny model of its own architecture.

Each family gets a random model of its model type and a byte tokenizer with a chat template of its structure: what opens the
text, what ends a turn, and what becomes of a system turn that is not there.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from pe_dpo.data import EncodedPair, prepare_pairs
from pe_dpo.model.base import end_token_ids, load_tokenizer
from pe_dpo.recipe import Recipe, find_recipe, load_recipe, recipe_header, recipe_names
from pe_dpo.recipe.strict_yaml import parse_document
from pe_dpo.training.train import train

CHATML = """\
{% if messages[0]['role'] != 'system' %}<|im_start|>system
SYSTEM<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAMA3 = """\
{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>

{{ message['content'] | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
INST = """\
{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }}[/INST]\
{% elif message['role'] == 'assistant' %} {{ message['content'] | trim }}{{ eos_token }}\
{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""
GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
{% for message in messages %}<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}
{{ message['content'] | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""


class Family(NamedTuple):
    """What tells a family of models from the others."""

    model_type: str
    template: str
    specials: dict[str, str]
    """Roles of transformers, and their tokens."""
    further: tuple[str, ...]
    """Special tokens without a role."""
    end_of_turn: str
    ends: tuple[str, ...]
    """What generation stops at, by the generation config."""
    options: dict[str, object]


FAMILIES = {
    "Qwen/Qwen2.5": Family(
        "qwen2", CHATML.replace("SYSTEM", "You are Qwen."), {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        ("<|im_start|>",), "<|im_end|>", ("<|im_end|>", "<|endoftext|>"), {"tie_word_embeddings": True},
    ),
    "HuggingFaceTB/SmolLM2": Family(
        "llama", CHATML.replace("SYSTEM", "You are SmolLM."),
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
        ("<|endoftext|>",), "<|im_end|>", ("<|im_end|>",), {"tie_word_embeddings": True},
    ),
    "meta-llama/Llama-3": Family(
        "llama", LLAMA3, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        ("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"), "<|eot_id|>", ("<|end_of_text|>", "<|eot_id|>"), {},
    ),
    "mistralai/Mistral-7B": Family(
        "mistral", INST, {"bos_token": "<s>", "eos_token": "</s>"}, ("[INST]", "[/INST]"), "</s>", ("</s>",), {},
    ),
    "google/gemma-2": Family(
        "gemma2", GEMMA, {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
        ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", ("<eos>", "<end_of_turn>"), {"head_dim": 16},
    ),
}  # fmt: skip
"""By the beginning of the base's name."""

ATTENTION, FEED_FORWARD = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
LINEAR = [f"self_attn.{name}" for name in ATTENTION] + [f"mlp.{name}" for name in FEED_FORWARD]
PAIRS = 12


def family_of(base: str) -> Family:
    (found,) = [family for name, family in FAMILIES.items() if base.startswith(name)]
    return found


def build_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """One token a byte, and the family's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=list(family.further), **family.specials)
    wrapped.chat_template = family.template
    return wrapped


def build_base(family: Family, folder: Path) -> Path:
    """A random model of two layers, 64 wide, so that nf4's blocks of 64 fit."""
    tokenizer = build_tokenizer(family)
    tokenizer.save_pretrained(folder)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in family.ends]
    config = AutoConfig.for_model(
        family.model_type, vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=tokenizer.bos_token_id, eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id, **family.options,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    GenerationConfig(eos_token_id=ends, bos_token_id=tokenizer.bos_token_id).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny base that stands for a base's name, built once."""

    @functools.cache
    def build(family_name: str) -> Path:
        return build_base(FAMILIES[family_name], tmp_path_factory.mktemp("bases") / family_name.replace("/", "-"))

    return lambda base: build(next(name for name in FAMILIES if base.startswith(name)))


@pytest.fixture(scope="session")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole dialogues in `chosen` and `rejected`, as the recipes' data set has them."""
    path = tmp_path_factory.mktemp("pairs") / "train.jsonl"
    rows = []
    for number in range(PAIRS):
        turns = [{"role": "user", "content": f"What is {number} and {number}?"}]
        answers = (f"It is {2 * number}.", "No idea" + "!" * (1 + number % 3))
        rows.append({
            side: [*turns, {"role": "assistant", "content": answer}]
            for side, answer in zip(("chosen", "rejected"), answers, strict=True)
        })  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Run(NamedTuple):
    """A shipped recipe trained for two steps on the tiny base of its architecture."""

    name: str
    recipe: Recipe
    folder: Path
    record: dict


@pytest.fixture(scope="module", params=recipe_names())
def run(
    request: pytest.FixtureRequest,
    base_of: Callable[[str], Path],
    conversations: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    folder = tmp_path_factory.mktemp("runs") / request.param
    base = base_of(load_recipe(request.param).model.base)
    recipe = load_recipe(request.param, [
        f"model.base={base}", f"data.train={conversations}", "train.max_steps=2", "train.pairs_per_step=2", f"output={folder}",
    ])  # fmt: skip
    train(recipe)
    return Run(request.param, recipe, folder, json.loads((folder / "run.json").read_text()))


def encode(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> list[EncodedPair]:
    """The recipe's pairs as it trains and evaluates on them."""
    base = recipe.model.base
    data = prepare_pairs(recipe.data, tokenizer=tokenizer, context_length=4096, end_token_ids=end_token_ids(base))
    return [*data.train, *data.held_out]


# ---------------------------------------------------------------- as text


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_fits_on_a_page(name: str) -> None:
    assert len(find_recipe(name).read_text(encoding="utf-8").splitlines()) <= 30


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_begins_with_its_hardware_and_memory_and_says_whether_they_were_measured(name: str) -> None:
    header = recipe_header(name)
    assert "GPU" in header.splitlines()[0]
    assert "GB" in header.splitlines()[0]
    assert "estimated" in header or "measured" in header


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_runs_into_a_folder_of_its_name(name: str) -> None:
    assert load_recipe(name).output == f"runs/{name}"


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_names_only_keys_that_differ_from_the_defaults(name: str, tmp_path: Path) -> None:
    """Leaving out a key changes the resolved recipe; the named loss and the output stand in every recipe, for the reader."""
    path, whole = find_recipe(name), load_recipe(name)
    sections = parse_document(path.read_text(encoding="utf-8"), name)[0]
    redundant = []
    for section, keys in sections.items():
        for key in keys if isinstance(keys, dict) else ():
            rest = {**sections, section: {other: value for other, value in keys.items() if other != key}}
            needed = (section, key) in [("model", "base"), ("data", "train"), ("loss", "preset")]
            if not needed and Recipe.model_validate(rest) == whole:
                redundant.append(f"{section}.{key}")
    assert redundant == []


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_s_name_begins_with_its_base(name: str) -> None:
    """qwen2.5-7b-dpo is for Qwen2.5-7B."""
    stem = load_recipe(name).model.base.split("/")[1].lower()
    family, size = name.split("-")[0], next(part for part in name.split("-") if part[0].isdigit() and part.endswith("b"))
    assert stem.startswith(family)
    assert f"-{size}" in stem


# ---------------------------------------------------------------- as a run


@pytest.mark.slow
def test_lora_sits_on_the_seven_linear_kinds_of_every_layer_and_nowhere_else(run: Run) -> None:
    expected = {
        f"base_model.model.model.layers.{layer}.{module}.lora_{side}.weight"
        for layer in range(2) for module in LINEAR for side in "AB"
    }  # fmt: skip
    assert set(load_file(run.folder / "adapter_model.safetensors")) == expected


@pytest.mark.slow
def test_every_part_of_the_adapter_moved(run: Run) -> None:
    """B starts at 0."""
    weights = load_file(run.folder / "adapter_model.safetensors")
    assert [name for name, weight in weights.items() if "lora_B" in name and not weight.any()] == []


def test_the_run_is_finished_after_two_steps(run: Run) -> None:
    assert (run.record["status"], run.record["step"]) == ("finished", 2)


def test_held_out_pairs_are_measured_before_and_after(run: Run) -> None:
    before, after = run.record["before"], run.record["after"]
    assert before["pairs"] == after["pairs"] == run.record["pairs"]["held_out"] == PAIRS - run.record["pairs"]["train"] >= 1
    assert after["logps/chosen"] != before["logps/chosen"]


def test_the_base_is_quantized_when_the_recipe_says_so(run: Run) -> None:
    """auto leaves these tiny bases as they are."""
    quantize = load_recipe(run.name).model.quantize
    assert run.record["base"]["quantize"] == ("nf4" if quantize == "nf4" else "none")
    assert len(run.record["base"]["quantized_layers"]) == (2 * len(LINEAR) if quantize == "nf4" else 0)


def test_the_reference_is_run_unless_gamma_is_zero(run: Run) -> None:
    assert run.record["reference_card"]["run_in_training"] is ("simpo" not in run.name and "mixout-ready" not in run.name)


def test_policy_and_reference_are_one_before_the_first_step(run: Run) -> None:
    assert run.record["start"]["largest_difference"] in (0.0, None)


def test_answers_end_with_the_family_s_end_of_turn_and_nothing_after_it(run: Run) -> None:
    """Byte tokens make the texts readable: the answer of pair n is 'It is 2n.' and the end of the turn."""
    tokenizer = load_tokenizer(run.recipe.model.base)
    end = family_of(load_recipe(run.name).model.base).end_of_turn
    texts = {tokenizer.decode(pair.chosen_ids).lstrip() for pair in encode(run.recipe, tokenizer)}
    assert texts == {f"It is {2 * number}.{end}" for number in range(PAIRS)}


def test_prompts_open_as_the_family_does(run: Run) -> None:
    """ChatML with its default system turn, the others with one BOS."""
    tokenizer = load_tokenizer(run.recipe.model.base)
    prompt = tokenizer.decode(encode(run.recipe, tokenizer)[0].prompt_ids)
    bos = tokenizer.bos_token
    assert prompt.startswith("<|im_start|>system\nYou are " if "im_start" in tokenizer.chat_template else f"{bos}")
    assert bos is None or "im_start" in bos or prompt.count(bos) == 1
