"""Every recipe that comes with the package: short, true to its header, and trained on a tiny model of its own architecture.

Each family gets a random model of its model type and a byte tokenizer with a chat template of its structure: what opens the
text, what ends a turn, and what becomes of a system turn that is not there.
"""

import functools
import json
import re
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from pe_dpo.cli import main
from pe_dpo.data import EncodedPair, prepare_pairs
from pe_dpo.data.template import set_template
from pe_dpo.merging.merge import merge
from pe_dpo.model.base import end_token_ids, load_tokenizer
from pe_dpo.recipe import PRESETS, Recipe, find_recipe, load_recipe, recipe_header, recipe_names
from pe_dpo.recipe.strict_yaml import parse_document
from pe_dpo.training.train import train

CHATML = """\
{% if messages[0]['role'] != 'system' %}<|im_start|>system
SYSTEM<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
PLAIN_CHATML = "{% for" + CHATML.split("{% for", 1)[1]
# The last turn has a think block, empty without reasoning; with thinking off the generation prompt has it.
QWEN3 = """\
{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['role'] == 'assistant' and loop.last %}<think>
{{ message['reasoning_content'] }}
</think>

{% endif %}{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""
# The system turn has the date and the mode; with thinking off every answer has an empty think block.
SMOLLM3 = """\
{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}
<|im_start|>system
Today Date: {{ strftime_now("%d %B %Y") }}
Reasoning Mode: {{ "/think" if enable_thinking else "/no_think" }}

{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['role'] == 'assistant' and not enable_thinking %}<think>

</think>
{% endif %}{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if not enable_thinking %}<think>

</think>
{% endif %}{% endif %}"""
LLAMA3 = """\
{{ bos_token }}<|start_header_id|>system<|end_header_id|>

Today Date: DATE

<|eot_id|>{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>

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
# A whole dialogue ends with the EOS that generation never reaches, since it stops at <|end|>.
PHI4 = """\
{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"""


LINEAR = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
FUSED = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]
DELTA = [f"linear_attn.{name}" for name in ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj")] + LINEAR[4:]


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
    """Of the model's configuration."""
    opening: str
    """The prompt of the question Q, up to the answer."""
    linear: tuple[list[str], list[str]] = (LINEAR, LINEAR)
    """The adapted modules of both layers."""
    layers: str = "model.layers"
    """Where they stand."""
    vision: dict[str, object] | None = None
    """The configuration of its tower, where the language model is a part of the base."""


LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 10_000.0, "partial_rotary_factor": 0.75,
    "short_factor": [1.0] * 6, "long_factor": [4.0] * 6,
}  # fmt: skip
FAMILIES = {
    "Qwen/Qwen2.5": Family(
        "qwen2", CHATML.replace("SYSTEM", "You are Qwen."), {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        ("<|im_start|>",), "<|im_end|>", ("<|im_end|>", "<|endoftext|>"), {"tie_word_embeddings": True},
        "<|im_start|>system\nYou are Qwen.<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n",
    ),
    "Qwen/Qwen3-4B-Instruct-2507": Family(
        "qwen3", PLAIN_CHATML, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        ("<|im_start|>",), "<|im_end|>", ("<|im_end|>", "<|endoftext|>"), {"tie_word_embeddings": True, "head_dim": 32},
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n",
    ),
    "Qwen/Qwen3": Family(
        "qwen3", QWEN3, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        ("<|im_start|>",), "<|im_end|>", ("<|im_end|>", "<|endoftext|>"), {"head_dim": 32},
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    "Qwen/Qwen3.5": Family(
        "qwen3_5", QWEN3, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        ("<|im_start|>",), "<|im_end|>", ("<|im_end|>", "<|endoftext|>"),
        {"head_dim": 16, "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4,
         "linear_num_key_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", (DELTA, LINEAR),
        vision={"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64},
    ),
    "HuggingFaceTB/SmolLM3": Family(
        "smollm3", SMOLLM3, {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
        ("<|im_start|>", "<|endoftext|>"), "<|im_end|>", ("<|im_end|>",),
        {"tie_word_embeddings": True, "no_rope_layers": [1, 0]},
        f"<|im_start|>system\nToday Date: {date.today():%d %B %Y}\nReasoning Mode: /no_think\n\n"
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n",
    ),
    "meta-llama/Llama-3.1": Family(
        "llama", LLAMA3.replace("DATE", "26 Jul 2024"), {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        ("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"), "<|eot_id|>", ("<|end_of_text|>", "<|eot_id|>"),
        {"rope_parameters": LLAMA3_ROPE},
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "meta-llama/Llama-3.2": Family(
        "llama", LLAMA3.replace("DATE", '{{ strftime_now("%d %b %Y") }}'),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        ("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"), "<|eot_id|>", ("<|end_of_text|>", "<|eot_id|>"),
        {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
        f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: {date.today():%d %b %Y}\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "mistralai/Mistral-7B": Family(
        "mistral", INST, {"bos_token": "<s>", "eos_token": "</s>"}, ("[INST]", "[/INST]"), "</s>", ("</s>",),
        {"sliding_window": None}, "<s>[INST] Q[/INST]",
    ),
    "google/gemma-2": Family(
        "gemma2", GEMMA, {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
        ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", ("<eos>", "<end_of_turn>"), {"head_dim": 16},
        "<bos><start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\n",
    ),
    "google/gemma-3": Family(
        "gemma3_text", GEMMA, {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
        ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", ("<eos>", "<end_of_turn>"),
        {"head_dim": 16, "sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]},
        "<bos><start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\n",
    ),
    "google/gemma-3-4b": Family(
        "gemma3", GEMMA, {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
        ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", ("<eos>", "<end_of_turn>"),
        {"head_dim": 16, "sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]},
        "<bos><start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\n", layers="model.language_model.layers",
        vision={"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
                "patch_size": 14},
    ),
    "microsoft/Phi-4-mini": Family(
        "phi3", PHI4, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        ("<|user|>", "<|assistant|>", "<|end|>"), "<|end|><|endoftext|>", ("<|end|>", "<|endoftext|>"),
        {"tie_word_embeddings": True, "original_max_position_embeddings": 1024, "rope_parameters": LONG_ROPE},
        "<|user|>Q<|end|><|assistant|>", (FUSED, FUSED),
    ),
}  # fmt: skip
"""By the beginning of the base's name; of several the longest counts."""

PAIRS = 12


def family_of(run: "Run") -> Family:
    return FAMILIES[family_name(load_recipe(run.name).model.base)]


def family_name(base: str) -> str:
    return max((name for name in FAMILIES if base.startswith(name)), key=len)


ONE_OF_EACH_TYPE = sorted(
    {FAMILIES[family_name(load_recipe(name).model.base)].model_type: name for name in recipe_names()}.values()
)


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
    tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id}
    language = {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 4096, **tokens, **family.options,
    }  # fmt: skip
    torch.manual_seed(0)
    if family.vision is None:
        AutoModelForCausalLM.from_config(AutoConfig.for_model(family.model_type, **language)).save_pretrained(folder)
    else:
        config = AutoConfig.for_model(family.model_type, text_config=language, vision_config=family.vision)
        AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    GenerationConfig(eos_token_id=ends, bos_token_id=tokenizer.bos_token_id).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny base that stands for a base's name, built once."""

    @functools.cache
    def build(name: str) -> Path:
        return build_base(FAMILIES[name], tmp_path_factory.mktemp("bases") / name.replace("/", "-"))

    return lambda base: build(family_name(base))


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
        f"model.base={base}", f"data.train={conversations}", "train.max_steps=2", "train.pairs_per_step=2",
        "train.eval_every=2", "train.save_every=2", f"output={folder}",
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
def test_a_recipe_s_name_is_its_base_and_its_loss(name: str) -> None:
    """qwen2.5-7b-dpo is for Qwen2.5-7B."""
    (base,) = {name.removesuffix(f"-{loss}") for loss in ("mixout-ready", *PRESETS) if name.endswith(f"-{loss}")}
    assert load_recipe(name).model.base.split("/")[1].lower().startswith(base)


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_read_without_scrolling_sideways(name: str) -> None:
    assert max(map(len, find_recipe(name).read_text(encoding="utf-8").splitlines())) <= 80


# ---------------------------------------------------------------- as a run


@pytest.mark.slow
def test_lora_sits_on_the_linear_kinds_of_every_layer_and_nowhere_else(run: Run) -> None:
    family = family_of(run)
    expected = {
        f"base_model.model.{family.layers}.{layer}.{module}.lora_{side}.weight"
        for layer, modules in enumerate(family.linear) for module in modules for side in "AB"
    }  # fmt: skip
    assert set(load_file(run.folder / "adapter_model.safetensors")) == expected


@pytest.mark.slow
def test_every_part_of_the_adapter_moved(run: Run) -> None:
    """B starts at 0."""
    weights = load_file(run.folder / "adapter_model.safetensors")
    assert [name for name, weight in weights.items() if "lora_B" in name and not weight.any()] == []


@pytest.mark.slow
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
    linear = sum(map(len, family_of(run).linear))
    assert len(run.record["base"]["quantized_layers"]) == (linear if quantize == "nf4" else 0)


def test_the_reference_is_run_unless_gamma_is_zero(run: Run) -> None:
    assert run.record["reference_card"]["run_in_training"] is ("simpo" not in run.name and "mixout-ready" not in run.name)


def test_policy_and_reference_are_one_before_the_first_step(run: Run) -> None:
    assert run.record["start"]["largest_difference"] in (0.0, None)


def test_answers_end_with_the_family_s_end_of_turn_and_nothing_after_it(run: Run) -> None:
    """Byte tokens make the texts readable: the answer of pair n is 'It is 2n.' and the end of the turn."""
    tokenizer = load_tokenizer(str(run.folder))
    texts = {tokenizer.decode(pair.chosen_ids).lstrip() for pair in encode(run.recipe, tokenizer)}
    assert texts == {f"It is {2 * number}.{family_of(run).end_of_turn}" for number in range(PAIRS)}


def test_prompts_open_as_the_family_does(run: Run) -> None:
    """With one BOS, the date of the run, and where the base may think an empty think block before the answer."""
    tokenizer = load_tokenizer(str(run.folder))
    prompts = [tokenizer.decode(pair.prompt_ids) for pair in encode(run.recipe, tokenizer)]
    assert {re.sub(r"What is (\d+) and \1\?", "Q", prompt) for prompt in prompts} == {family_of(run).opening}


@pytest.mark.peer
@pytest.mark.parametrize(("name", "published"), [
    ("gemma-2-9b-simpo", "gemma"), ("gemma-3-1b-dpo", "gemma3"), ("gemma-3-4b-dpo", "gemma3"),
    ("llama-3.1-8b-simpo", "llama3_1"), ("llama-3.2-3b-hinge", "llama3_2"), ("qwen2.5-7b-dpo", "qwen2_5"),
    ("qwen3-4b-dpo", "qwen3_instruct_2507"), ("qwen3-8b-gdpo", "qwen3"), ("qwen3.5-4b-dpo", "qwen3_5_think"),
    ("qwen3.5-4b-dpo", "qwen3_5_nothink"),
])  # fmt: skip
def test_the_published_templates_end_prompts_and_answers_as_those_here(name: str, published: str, conversations: Path) -> None:
    trl = pytest.importorskip("trl")
    family = FAMILIES[family_name(load_recipe(name).model.base)]
    tokenizer = build_tokenizer(family)
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{published}.jinja").read_text()
    data = load_recipe(name, [f"data.train={conversations}"]).data
    set_template(tokenizer, data)
    pair = prepare_pairs(data, tokenizer=tokenizer, end_token_ids=tokenizer.convert_tokens_to_ids(list(family.ends))).train[0]
    assert tokenizer.decode(pair.prompt_ids).endswith(f"What is 0 and 0?<{family.opening.partition('Q<')[2]}")
    assert tokenizer.decode(pair.chosen_ids) == f"It is 0.{family.end_of_turn}"


@pytest.mark.parametrize("run", ONE_OF_EACH_TYPE, indirect=True)
def test_check_finds_nothing_in_the_way(run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["pe-dpo", "check", str(run.folder / "recipe.yaml")])
    with pytest.raises(SystemExit) as ended:
        main()
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0
    assert lines[-1].startswith("on a card about 0.")
    assert [line for line in lines if line.startswith("warning: ")] == []


# ---------------------------------------------------------------- merged


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """In training mode without dropout: in evaluation, bitsandbytes may repack 4-bit weights on a CPU."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


@pytest.mark.slow
@pytest.mark.parametrize("run", ONE_OF_EACH_TYPE, indirect=True)
def test_a_run_merges_into_the_model_that_plain_peft_makes_of_its_base(run: Run, tmp_path: Path) -> None:
    """What training changed arrives to 1 %, after two steps of a small learning rate."""
    verdict = merge(run.folder, tmp_path / "merged")
    assert (verdict.describe(), verdict.faults) == ("serves what was trained", [])
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    quantized = {"quantization_config": nf4} if run.record["base"]["quantize"] == "nf4" else {}
    model, ids = AutoModelForCausalLM.from_pretrained(run.recipe.model.base, **quantized), torch.arange(3, 123).view(2, 60)
    reference = logits(model, ids)
    trained = logits(PeftModel.from_pretrained(model, run.folder), ids)
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), ids)
    assert (merged - trained).abs().max() < 0.01 * (trained - reference).abs().max()
