"""vLLM on merged models and adapters, and its server by the commands that are printed, against transformers in float32."""

import ast
import json
import re
import shlex
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from random_adapters import random_adapter

from benchmarks.engines.compare import equal, expected_answer, greedy_faults, largest_difference
from benchmarks.engines.worker import EngineError, ask, environment
from pe_dpo import train
from pe_dpo.merging.adapter_package import package_adapter
from pe_dpo.merging.merge import merge
from pe_dpo.merging.servers import VLLM_RANKS, VLLM_WITHOUT_ADAPTERS
from pe_dpo.merging.source import open_source
from pe_dpo.recipe import recipe_from_yaml
from pe_dpo.runs.serving import model_commands

pytestmark = [
    pytest.mark.engine("vllm"),
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore:Setting `save_embedding_layers`:UserWarning",
        "ignore:Could not find a config file:UserWarning",
        "ignore:`lora_bias=True` was passed but the targeted layer:UserWarning",
        "ignore:.*LoRA tensor.* have invalid shape:UserWarning",
    ),
]

Made = Callable[[str], Path]


@pytest.fixture(scope="module")
def made(artefact: Made, made_once: Callable[[str, Callable[[Path], object]], Path]) -> Made:
    """Artefacts, and besides: a run over an adapter, a base of 4-bit codes with a run on it, and merges in float32."""

    def fill(name: str, folder: Path) -> None:
        match name:
            case "sft":
                random_adapter(get("base"), folder, r=3, lora_alpha=3, target_modules=["q_proj", "up_proj"])
            case "run-over" | "run-codes":
                recipe = (get("run-none") / "recipe.yaml").read_text(encoding="utf-8")
                changes = [f"output={folder}", f"adapter.over={get('sft')}"]
                if name == "run-codes":
                    changes = [f"output={folder}", f"model.base={get('codes')}", "model.quantize=auto"]
                train(recipe_from_yaml(recipe, name, changes))
            case "codes":
                save_codes(get("base"), folder)
            case _:
                merge(get(name.removeprefix("merged-float32-")), folder, dtype="fp32", pairs=0)

    def get(name: str) -> Path:
        ours = name in ("sft", "run-over", "run-codes", "codes") or name.startswith("merged-float32-")
        return made_once(f"engines-vllm-{name}", partial(fill, name)) if ours else artefact(name)

    return get


def save_codes(base: Path, folder: Path) -> None:
    """Save a base as codes of 4 bits without double quantization, as they are published."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=how).save_pretrained(folder)
    for path in base.glob("*token*"):
        shutil.copy(path, folder)


def packaged(run: Path, folder: Path) -> list[str]:
    """Package a run's adapter, and return the words of the command that is printed for it, as a shell reads them."""
    with open_source(run, pairs=0) as source:
        ((_, command, _),), _ = package_adapter(source, folder)
    assert command is not None
    return shlex.split(command)


def test_a_merged_model_answers_as_in_transformers(
    artefact: Made, request_of_all: dict[str, Any], expected: Callable[[str], dict[str, Any]]
) -> None:
    answer, wanted = ask("vllm", artefact("merged"), request_of_all), expected("merged")
    assert largest_difference(answer, wanted) < 1e-4
    assert [equal(answer, wanted, part) for part in ("tokens", "rendered")] == [400, len(request_of_all["chats"])]
    assert greedy_faults(answer, wanted) == []


def test_two_adapters_and_the_base_are_served_at_once(made: Made, request_of_all: dict[str, Any]) -> None:
    """One of them is a run's over another adapter: the sum of both, whose rank is that of both together."""
    served = {"run-none": made("run-none"), "run-over": made("run-over")}
    assert json.loads((served["run-over"] / "adapter_config.json").read_text())["r"] == 11
    question = {part: request_of_all[part][:3] for part in ("ids", "greedy")} | {"new_tokens": 8}
    answer = ask("vllm", made("base"), question | {"options": {"loras": [*map(str, served.values()), None]}})
    models = [made("merged-float32-run-none"), made("merged-float32-run-over"), made("base")]
    for number, model in enumerate(models):
        part = {name: [question[name][number]] for name in ("ids", "greedy")} | {"new_tokens": 8}
        own = {name: [answer[name][number]] for name in ("logprobs", "greedy")}
        assert largest_difference(own, expected_answer(model, part)) < 1e-4
        assert greedy_faults(own, expected_answer(model, part)) == []


@pytest.mark.parametrize(
    ("run", "others"),
    [("run-none", ["base"]), ("run-nf4", ["base", "merged-original"]), ("run-codes", ["base", "codes"])],
)
def test_the_command_that_is_printed_serves_what_was_trained(
    run: str, others: list[str], made: Made, request_of_all: dict[str, Any], tmp_path: Path
) -> None:
    """It computes in bfloat16, whose noise is far below what base, adapter or codes change."""
    question = {part: request_of_all[part][:3] for part in ("ids", "chats", "greedy")} | {"new_tokens": 8}
    answer = ask("vllm", made(run), question | {"options": {"command": packaged(made(run), tmp_path / "package")}})
    wanted = expected_answer(made(f"merged-float32-{run}"), question)
    noise = largest_difference(answer, wanted)
    assert noise < 0.5
    assert min(largest_difference(answer, expected_answer(made(other), question)) for other in others) > 4 * noise
    assert equal(answer, wanted, "rendered") == 3
    assert greedy_faults(answer, wanted, near_tie=2 * noise) == []  # each of two tokens may move by it


def test_the_command_that_is_printed_serves_a_merged_model(artefact: Made, request_of_all: dict[str, Any]) -> None:
    question = {part: request_of_all[part][:3] for part in ("ids", "texts", "chats", "greedy")} | {"new_tokens": 8}
    words = shlex.split(model_commands(str(artefact("merged")))[0])
    answer = ask("vllm", artefact("merged"), question | {"options": {"command": words}})
    wanted = expected_answer(artefact("merged"), question)
    assert largest_difference(answer, wanted) < 0.5
    assert [equal(answer, wanted, part) for part in ("tokens", "rendered")] == [3, 3]
    assert greedy_faults(answer, wanted, near_tie=0.5) == []


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "does not yet support DoRA"),
    "bias": ({"lora_bias": True}, "does not support LoRA bias"),
    "whole": ({"modules_to_save": ["input_layernorm"]}, "Unsupported modules_to_save"),
    "tokens": ({"trainable_token_indices": [7, 5]}, "is unsupported LoRA weight"),
    "rows": ({"resize": 544}, "is unsupported LoRA weight"),
    "rank": ({"r": 65}, "is greater than max_lora_rank"),
    "plain": ({"r": 3}, ""),
}


def test_what_is_said_to_be_refused_is_refused(made: Made, tmp_path: Path) -> None:
    for name, (settings, _) in REFUSED.items():
        random_adapter(made("base"), tmp_path / name, **settings)
    answer = ask("vllm", made("base"), {"options": {"tried": [str(tmp_path / name) for name in REFUSED]}})
    for (_, words), refusal in zip(REFUSED.values(), answer["refused"], strict=True):
        assert (words in refusal) if words else (refusal is None)


def test_without_its_plugin_the_command_of_an_nf4_run_is_refused(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "")
    with pytest.raises(EngineError, match="Unknown quantization method: bitsandbytes"):
        ask("vllm", made("base"), {"options": {"command": packaged(made("run-nf4"), tmp_path / "package")}})


def source_of(file: str) -> str:
    (path,) = environment("vllm").glob(f"lib/python3*/site-packages/vllm/{file}")
    return path.read_text(encoding="utf-8")


def test_ranks_and_classes_are_those_of_vllm() -> None:
    ranks = re.search(r"MaxLoRARanks = Literal\[(.*?)\]", source_of("config/lora.py"))
    assert ranks is not None and tuple(map(int, ranks[1].split(","))) == VLLM_RANKS
    registry = source_of("model_executor/models/registry.py")
    for name in sorted(VLLM_WITHOUT_ADAPTERS):
        place = re.search(rf'"{name}": \(\s*"(\w+)",\s*"(\w+)",?\s*\)', registry)
        assert place is not None, name
        bases = re.search(rf"^class {place[2]}\((.*?)\):", source_of(f"model_executor/models/{place[1]}.py"), re.M | re.S)
        assert bases is not None and "SupportsLoRA" not in bases[1], name


def test_vllm_still_finds_no_layer_of_a_text_adapter_in_a_multimodal_model() -> None:
    """vllm#48019: `model.layers.` is left as it is, and the layers lie under `language_model.model.`."""
    tree = ast.parse(source_of("model_executor/models/qwen3_vl.py"))
    whole = next(node for node in tree.body if getattr(node, "name", "") == "Qwen3VLForConditionalGeneration")
    mapper = next(node for node in ast.walk(whole) if isinstance(node, ast.Assign) and "hf_to_vllm_mapper" in ast.unparse(node))
    prefixes = ast.literal_eval(mapper.value.keywords[0].value)  # type: ignore[attr-defined]
    assert not any("model.layers.0.".startswith(prefix) for prefix in prefixes)
    assert prefixes["model.language_model."] == "language_model.model."
