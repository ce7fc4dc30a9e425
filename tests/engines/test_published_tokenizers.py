"""Published tokenizers and templates in the GGUF files that are written of them, as llama.cpp and mistral.rs read them.

`make engines` fetches the tokenizers; without them these tests are skipped.
"""

import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf_models import save_random_model

from benchmarks.engines.texts import CHATS, varied_texts
from benchmarks.engines.worker import EngineError, ask
from pe_dpo.export.gguf_file import write_gguf
from pe_dpo.export.gguf_tokenizer import Vocabulary

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[2] / ".tokenizers"
FAMILIES = {
    "llama2": "llama",
    "llama3_1": "llama",
    "llama3_2": "llama",
    "mistral_nemo": "mistral",
    "qwen2_5": "qwen2",
    "qwen3": "qwen3",
}
ENGINES = [pytest.param(name, marks=pytest.mark.engine(name)) for name in ("xllamacpp", "mistralrs")]


@pytest.fixture(scope="module")
def published(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Callable[[str], tuple[Any, Path]]:
    """A published tokenizer, and the GGUF file of a random model with it, in a folder of its own."""

    def get(name: str) -> tuple[Any, Path]:
        from transformers import AutoTokenizer

        if not (FOLDER / name / "tokenizer.json").is_file():
            pytest.skip("needs published tokenizers: make tokenizers")

        def fill(folder: Path) -> None:
            shutil.copytree(FOLDER / name, folder / "model")
            sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "tie_word_embeddings": True}
            save_random_model(
                folder / "model", FAMILIES[name], vocab_size=len(AutoTokenizer.from_pretrained(FOLDER / name)), **sizes
            )
            (folder / "gguf").mkdir()
            write_gguf(folder / "model", folder / "gguf" / "model.gguf", kind="f16")

        folder = made_once(f"published-{name}", fill)
        return AutoTokenizer.from_pretrained(folder / "model"), folder / "gguf" / "model.gguf"

    return get


def differing(engine: str, tokenizer: Any, file: Path, *, options: dict[str, Any] | None = None) -> list[str]:
    """The texts that an engine reads as other tokens, of 400."""
    texts = varied_texts()
    found = ask(engine, file, {"texts": texts, "options": {"vocabulary": len(tokenizer), **(options or {})}})["tokens"]
    wanted = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    return [text for text, one, other in zip(texts, found, wanted, strict=True) if one != other]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["llama3_1", "llama3_2", "qwen2_5", "qwen3"])
def test_400_texts_are_the_same_tokens(published: Callable[[str], tuple[Any, Path]], name: str, engine: str) -> None:
    """But for what the export says of Qwen: it normalizes letters of two characters, and engines that read GGUF do not."""
    normalized = [text for text in varied_texts() if unicodedata.is_normalized("NFC", text)]
    assert len(normalized) == 357
    found = differing(engine, *published(name))
    assert found == [] if name.startswith("llama") else not set(found) & set(normalized)


@pytest.mark.engine("xllamacpp")
def test_of_llama_2_only_texts_that_begin_with_a_space_are_other_tokens(published: Callable[[str], tuple[Any, Path]]) -> None:
    """As the export says: llama.cpp puts a space before every text."""
    found = differing("xllamacpp", *published("llama2"))
    assert len(found) == 4
    assert all(text.startswith(" ") for text in found)


@pytest.mark.engine("mistralrs")
def test_mistral_rs_reads_tokenizers_of_sentencepiece_as_another_kind(published: Callable[[str], tuple[Any, Path]]) -> None:
    """It takes the scores of a GGUF file for those of a unigram model; with the model's own tokenizer.json it is right."""
    assert len(differing("mistralrs", *published("llama2"))) > 200


@pytest.mark.engine("xllamacpp")
def test_llama_cpp_does_not_start_on_the_template_of_mistral_nemo(published: Callable[[str], tuple[Any, Path]]) -> None:
    """As the export says; without it, its own renders chats the same. Texts with combining marks are other tokens."""
    tokenizer, file = published("mistral_nemo")
    with pytest.raises(EngineError, match="selectattr: unknown test 'tool_calls'"):
        ask("xllamacpp", file, {})
    remarks = Vocabulary(file.parents[1] / "model", len(tokenizer)).remarks
    assert any('does not read selectattr("tool_calls", "undefined")' in remark and "no-jinja" in remark for remark in remarks)
    assert any("those with combining marks (Hindi" in remark for remark in remarks)
    found = differing("xllamacpp", tokenizer, file, options={"jinja": False})
    assert len(found) == 44
    assert all(any(unicodedata.category(letter).startswith("M") for letter in text) for text in found)
    rendered = ask("xllamacpp", file, {"chats": CHATS, "options": {"jinja": False}})["rendered"]
    wanted = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in CHATS]
    assert rendered == [text.removeprefix("<s>") for text in wanted]


@pytest.mark.engine("xllamacpp")
@pytest.mark.parametrize("name", ["llama3_1", "llama3_2", "qwen2_5", "qwen3"])
def test_chats_are_rendered_the_same(published: Callable[[str], tuple[Any, Path]], name: str) -> None:
    """llama.cpp takes the template's BOS away and puts it before the tokens."""
    tokenizer, file = published(name)
    request = {"chats": CHATS, "new_tokens": 1, "options": {"completions": True}}
    answer = ask("xllamacpp", file, request)
    rendered = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in CHATS]
    assert answer["rendered"] == [text.removeprefix(tokenizer.bos_token or "\0") for text in rendered]
    lengths = [len(tokenizer(text, add_special_tokens=False).input_ids) for text in rendered]
    assert answer["chat_lengths"] == lengths
