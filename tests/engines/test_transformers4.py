"""What is written is read by the last transformers before 5 as it is by 5: the numbers, the tokens, the rendered chats."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from benchmarks.architectures.models import ARCHITECTURES
from benchmarks.engines.compare import equal, expected_answer, largest_difference
from benchmarks.engines.texts import CHATS, varied_texts
from benchmarks.engines.worker import EngineError, ask
from pe_dpo.merging.merge import merge
from pe_dpo.model.adapter import attach_adapter, save_adapter
from pe_dpo.model.base import auto_class, inspect_base, load_base, load_tokenizer
from pe_dpo.model.tokenizer_files import save_tokenizer

ENGINE = "transformers4"
pytestmark = pytest.mark.engine(ENGINE)
IDS = [torch.randint(10, 500, (300,), generator=torch.Generator().manual_seed(seed)).tolist() for seed in range(2)]
"""Longer than any length from which positions are scaled, and than any window."""
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}
LOCAL_AND_GLOBAL = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 54321.0}}  # fmt: skip
"""Bases of 10,000 are what is read where nothing is understood."""


def test_a_merged_model_is_read_alike(artefact: Any, request_of_all: dict[str, Any], expected: Any) -> None:
    for name in ("merged", "merged-original", "merged-none"):
        answer = ask(ENGINE, artefact(name), request_of_all)
        assert largest_difference(answer, expected(name)) < 1e-4, name
        for part in ("tokens", "rendered", "greedy"):
            assert equal(answer, expected(name), part) == len(expected(name)[part]), (name, part)


def test_what_version_5_writes_by_itself_is_not(
    artefact: Any, request_of_all: dict[str, Any], expected: Any, tmp_path: Path
) -> None:
    """The failing control: positions are not scaled, which nothing says, and no tokenizer loads."""
    own = tmp_path / "own"
    shutil.copytree(artefact("merged"), own)
    hf.AutoConfig.from_pretrained(own).save_pretrained(own)
    answer = ask(ENGINE, own, {"ids": request_of_all["ids"]})
    assert largest_difference(answer, expected("merged")) > 1.0
    hf.AutoTokenizer.from_pretrained(own).save_pretrained(own)
    with pytest.raises(EngineError, match=r"TokenizersBackend does not exist|'list' object has no attribute 'keys'"):
        ask(ENGINE, own, {"texts": ["a"]})


def test_the_adapter_of_a_run_and_its_package_are_read_alike(artefact: Any, request_of_all: Any, expected: Any) -> None:
    wanted, options = expected("merged-none-float32"), {"base": str(artefact("base"))}
    for name in ("run-none", "adapter-none"):
        answer = ask(ENGINE, artefact(name), {**request_of_all, "greedy": [], "options": options})
        assert largest_difference(answer, wanted) < 1e-4, name
        for part in ("tokens", "rendered"):
            assert equal(answer, wanted, part) == len(wanted[part]), (name, part)


FAMILIES: dict[str, dict[str, Any]] = {
    "llama3": {},
    "qwen2.5": {"rope_parameters": YARN},
    "qwen3": {"rope_parameters": YARN},
    "mistral": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "gemma2": {"rope_parameters": {"rope_type": "default", "rope_theta": 54321.0}},
    "gemma3": {"rope_parameters": LOCAL_AND_GLOBAL},
    "gemma3-4b": {"rope_parameters": LOCAL_AND_GLOBAL},
    "qwen2.5-vl": {},
    "qwen3-moe": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 54321.0}},
}
"""What differs from the table of architectures: positions."""


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_merged_model_of_each_kind_of_positions_is_read_alike(
    name: str, artefact: Callable[[str], Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    ARCHITECTURES[name].save(base)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config.get("text_config", config).update(FAMILIES[name])
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    hf.AutoTokenizer.from_pretrained(artefact("base")).save_pretrained(base)
    model = attach_adapter(load_base(inspect_base(str(base), quantize="none")), rank=4, alpha=8)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            parameter.data.normal_(0, 0.05)
    save_adapter(model, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "out", base=str(base), quantize="none", dtype="fp32", pairs=0)
    kind = auto_class(hf.AutoConfig.from_pretrained(tmp_path / "out"))
    network = kind.from_pretrained(tmp_path / "out", dtype=torch.float32, attn_implementation="eager").eval()
    read = expected_answer(tmp_path / "out", {"ids": IDS}, network=network)
    assert largest_difference(ask(ENGINE, tmp_path / "out", {"ids": IDS}), read) < 1e-4
    hf.AutoConfig.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "out")
    with suppress(EngineError):  # refused, which is better
        assert largest_difference(ask(ENGINE, tmp_path / "out", {"ids": IDS}), read) > 0.1, "as version 5 alone writes it"


@pytest.mark.real
@pytest.mark.parametrize("name", ["qwen3", "qwen2_5", "llama3_1", "mistral_nemo", "gemma", "gemma3"])
def test_a_real_tokenizer_is_carried(name: str, tmp_path: Path) -> None:
    base = Path(__file__).parents[2] / ".tokenizers" / name
    if not (base / "tokenizer.json").is_file():
        pytest.skip("needs real tokenizers: make tokenizers")
    tokenizer = load_tokenizer(str(base))
    save_tokenizer(tokenizer, tmp_path, [base])
    assert (tmp_path / "tokenizer_config.json").read_bytes() == (base / "tokenizer_config.json").read_bytes()
    chats = [list(chat) for chat in CHATS if chat[0]["role"] != "system"] if tokenizer.chat_template else []
    texts = varied_texts()
    answer = ask(ENGINE, tmp_path, {"texts": texts, "chats": chats, "options": {"special_tokens": True}})
    assert answer["tokens"] == [tokenizer(text).input_ids for text in texts]
    render = tokenizer.apply_chat_template
    assert answer["rendered"] == [render(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
