"""Golden prompts in the real llama.cpp: rounding is a near tie at most, another model is an alarm."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import save_random_model, sentence_piece
from safetensors.torch import load_file, save_file

import pe_dpo
from benchmarks.engines.worker import ask
from pe_dpo.export.gguf_file import write_gguf
from pe_dpo.export.gguf_folder import export_gguf
from pe_dpo.export.golden_file import GoldenMatch, compare_answer, load_golden

BASE = Path(pe_dpo.__file__).parent / "quickstart" / "base"

pytestmark = [pytest.mark.slow, pytest.mark.engine("xllamacpp")]


def answered(gguf: Path, exported: Path, **options: Any) -> list[GoldenMatch]:
    """What llama.cpp answers to the golden prompts of an export, told by ids and log-probs."""
    golden = load_golden(exported / "golden_prompts.jsonl")
    request = {"greedy": [one.prompt_ids for one in golden], "new_tokens": 32, "options": options}
    request["ids"] = [one.prompt_ids + one.token_ids for one in golden]
    found = ask("xllamacpp", gguf, request)
    return [
        compare_answer(one, token_ids=ids, log_probs=log_probs[-len(one.token_ids) :])
        for one, ids, log_probs in zip(golden, found["greedy"], found["logprobs"], strict=True)
    ]


@pytest.fixture(scope="session")
def vale(made_once: Callable[..., Path]) -> Path:
    """The quickstart's base, exported."""
    return made_once("golden-vale", lambda folder: _export(BASE, folder, "f32"))


@pytest.fixture(scope="session")
def random_llama(made_once: Callable[..., Path]) -> Path:
    """A random model, many of whose leads are small, with a tokenizer as of SentencePiece."""

    def make(folder: Path) -> None:
        sentence_piece(folder)
        save_random_model(folder, "llama", tie_word_embeddings=True)

    return made_once("golden-random", make)


def _export(model: Path, folder: Path, kind: Any) -> None:
    export_gguf(model, folder / "out", kind=kind, prompts=None, is_checked=True, has_card=False)


def test_a_cache_in_fewer_bits_is_no_other_model(vale: Path) -> None:
    """Measured: log-probs moved by 0.0004 (f16) and 0.008 nats (q8_0); 0.18 may be."""
    for options in ({"cache": "f16", "flash": True}, {"cache": "q8_0", "flash": True}):
        assert {one.verdict for one in answered(vale / "out", vale / "out", **options)} == {"equal"}


@pytest.mark.parametrize(("kind", "cache", "near_ties"), [("f32", "f16", 0), ("f32", "q8_0", 4), ("q8_0", "q8_0", 5)])
def test_what_rounding_flips_are_near_ties(random_llama: Path, tmp_path: Path, kind: str, cache: str, near_ties: int) -> None:
    """Flipped at leads of 0.027 nats at most by a cache in q8_0, of 0.2 by weights in q8_0; log-probs moved by 0.3 at most."""
    _export(random_llama, tmp_path, kind)
    found = [one.verdict for one in answered(tmp_path / "out", tmp_path / "out", cache=cache, flash=cache == "q8_0")]
    assert "other" not in found
    assert abs(found.count("near tie") - near_ties) <= 1  # which of them flip is a matter of the machine's kernels


@pytest.mark.parametrize("rope", [
    {"rope_type": "default", "rope_theta": 50000.0}, {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
])  # fmt: skip
def test_other_positions_are_an_alarm(vale: Path, tmp_path: Path, rope: dict[str, Any]) -> None:
    """With another base of the rotations no token of a short answer changes by more than a near tie, but log-probs do."""
    model = Path(shutil.copytree(BASE, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}), encoding="utf-8")
    facts = write_gguf(model, tmp_path / "model.gguf", kind="f32")
    assert "other" in {one.verdict for one in answered(facts.path, vale / "out", cache="f16")}


def test_another_adapter_is_an_alarm(vale: Path, tmp_path: Path) -> None:
    """An update of rank 4 of a third of the attention weights' size."""
    model = Path(shutil.copytree(BASE, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, weight in tensors.items():
        if "self_attn" in name:
            down, up = (torch.randn(shape, generator=generator) for shape in ((4, weight.shape[1]), (weight.shape[0], 4)))
            update = up @ down
            tensors[name] = (weight.float() + 0.3 * update * weight.float().norm() / update.norm()).to(weight.dtype)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    facts = write_gguf(model, tmp_path / "model.gguf", kind="f32")
    assert "other" in {one.verdict for one in answered(facts.path, vale / "out", cache="f16")}


def test_the_first_space_that_sentencepiece_loses_is_no_difference(tmp_path: Path) -> None:
    """The model says words alone, and the tokenizer takes a space off the start of a text, as Llama 2's does."""
    model = tmp_path / "model"
    sentence_piece(model)
    save_random_model(model, "llama")
    parts = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    parts["decoder"]["decoders"].append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    (model / "tokenizer.json").write_text(json.dumps(parts), encoding="utf-8")
    (model / "chat_template.jinja").write_text("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")
    tensors = load_file(model / "model.safetensors")
    others = [index for token, index in parts["model"]["vocab"].items() if not token.startswith("▁")]
    tensors["lm_head.weight"][others] = tensors["lm_head.weight"][len(parts["model"]["vocab"]) :] = 0
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    _export(model, tmp_path, "f32")
    golden = load_golden(tmp_path / "out" / "golden_prompts.jsonl")
    chats = [[{"role": "user", "content": one.prompt}] for one in golden]
    request = {"chats": chats, "new_tokens": 32, "options": {"completions": True}}
    texts = ask("xllamacpp", tmp_path / "out", request)["completions"]
    assert texts == [" " + one.text for one in golden]
    assert [compare_answer(one, text=text).verdict for one, text in zip(golden, texts, strict=True)] == ["equal"] * 5
