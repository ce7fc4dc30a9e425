"""What `export --gguf-lora` writes, added by the real llama.cpp to its base, against the policy and against PEFT."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import byte_level, save_random_model, save_tokenizer
from random_adapters import random_adapter
from toy_tokenizers import CHATML
from typer.testing import CliRunner

from benchmarks.engines.compare import largest_difference
from benchmarks.engines.worker import ask
from pe_dpo import train
from pe_dpo.cli import app
from pe_dpo.export.gguf_adapter import write_gguf_adapter
from pe_dpo.export.gguf_file import write_gguf
from pe_dpo.inference.policy import load_policy
from pe_dpo.model.adapter_files import AdapterFiles
from pe_dpo.recipe import recipe_from_yaml

pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
IDS = [*range(3, 30), *range(40, 3, -3)]


def expected_of(model: Any) -> dict[str, list[list[float]]]:
    with torch.no_grad():
        rows = model(input_ids=torch.tensor([IDS])).logits[0, :-1].float().log_softmax(-1)
    return {"logprobs": [rows.gather(-1, torch.tensor(IDS[1:])[:, None])[:, 0].tolist()]}


def served(base: Path, lora: Path | None = None) -> dict[str, Any]:
    return ask("xllamacpp", base, {"ids": [IDS], "options": {"lora": str(lora.absolute())} if lora else {}})


def pe_dpo(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def base(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    def fill(folder: Path) -> None:
        save_tokenizer(folder, byte_level(None), template=CHATML)
        save_random_model(folder, "llama", dtype=torch.float32)

    return made_once("base-for-llama-cpp", fill)


@pytest.fixture
def tuned(base: Path, tiny_pairs: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A run of three large steps that computed in float32, so that what it trained is known to 1e-5 nats."""

    def make(quantize: str) -> Path:
        settings = {
            "model": {"base": str(base), "quantize": quantize, "dtype": "float32"},
            "adapter": {"rank": 4},
            "data": {"train": str(tiny_pairs / "train.jsonl"), "eval": str(tiny_pairs / "test.jsonl")},
            "train": {"learning_rate": 2e-2, "pairs_per_step": 8, "max_steps": 3, "warmup": 0},
            "output": str(tmp_path / "run"),
        }
        train(recipe_from_yaml(json.dumps(settings), "recipe", ()))
        return tmp_path / "run"

    return make


def printed_commands(run: Path, lora: Path) -> list[list[str]]:
    """The commands that are printed with an adapter, by what stands before them."""
    output = pe_dpo("export", str(run), "--gguf-lora", "-o", str(lora))
    lines = [line.partition(": ")[2] for line in output.splitlines() if "pe-dpo" in line or "llama-server" in line]
    return [shlex.split(line) for line in lines]


@pytest.mark.slow
def test_the_commands_that_are_printed_serve_the_policy(tuned: Callable[[str], Path], base: Path, tmp_path: Path) -> None:
    run = tuned("nf4")
    plain, gguf, server = printed_commands(run, tmp_path / "mine.gguf")
    assert plain[:2] == gguf[:2] == ["pe-dpo", "export"] and server[:2] == ["llama-server", "-m"] and server[3] == "--lora"
    pe_dpo(*plain[1:])
    pe_dpo(*gguf[1:])
    policy = load_policy(run, device="cpu")
    with policy.evaluating():
        expected = expected_of(policy.model)
        with policy.reference():
            reference = expected_of(policy.model)
    model, lora = Path(server[2]), Path(server[4])
    assert largest_difference(served(model, lora), expected) < 5e-2
    exact = write_gguf(tmp_path / "mine-base", tmp_path / "exact.gguf", kind="f32").path
    assert largest_difference(served(exact, lora), expected) < 1e-4
    assert largest_difference(served(exact), reference) < 1e-4
    other = write_gguf(base, tmp_path / "other.gguf", kind="f32").path
    assert largest_difference(served(other, lora), expected) > 0.5
    assert largest_difference(reference, expected) > 0.5


@pytest.mark.slow
def test_a_base_that_was_not_quantized_is_exported_as_it_is(tuned: Callable[[str], Path], base: Path, tmp_path: Path) -> None:
    run = tuned("none")
    gguf, server = printed_commands(run, tmp_path / "mine.gguf")
    assert gguf[:5] == ["pe-dpo", "export", str(base), "--gguf", "f32"]
    pe_dpo(*gguf[1:], "--no-check")
    policy = load_policy(run, device="cpu")
    with policy.evaluating():
        assert largest_difference(served(Path(server[2]), Path(server[4])), expected_of(policy.model)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"k_proj": 5, "down_proj": 40}}),
        ("qwen2", {"use_rslora": True}),
        ("qwen3", {"rank_pattern": {"lm_head": 2}}),
    ],
)
def test_an_adapter_is_in_llama_cpp_what_it_is_in_peft(tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    base = tmp_path / "base"
    save_tokenizer(base, byte_level(None))
    save_random_model(base, family, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    tuned = random_adapter(base, tmp_path / "adapter", target_modules=targets, **settings)
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    ranks = write_gguf_adapter(AdapterFiles(tmp_path / "adapter"), base, tmp_path / "lora.gguf", description="")
    assert len(ranks) == 15
    facts = write_gguf(base, tmp_path / "base.gguf", kind="f32")
    expected = expected_of(tuned)
    assert largest_difference(served(facts.path, tmp_path / "lora.gguf"), expected) < 1e-4
    with tuned.disable_adapter():
        assert largest_difference(expected_of(tuned), expected) > 0.5
