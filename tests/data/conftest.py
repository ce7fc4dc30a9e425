"""Toy tokenizers and the data files of a test."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy_tokenizers import CHATML, build_tokenizer
from transformers import PreTrainedTokenizerFast


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, EOS `<e>`, no BOS, no chat template."""
    return build_tokenizer()


@pytest.fixture
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes with a ChatML template whose turns end with `<|im_end|>`, which is EOS."""
    return build_tokenizer(template=CHATML, eos="<|im_end|>")


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as JSON lines and return the file."""

    def write(*rows: Any, name: str = "train.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write
