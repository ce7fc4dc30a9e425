"""Adapters as GGUF files; `tests/engines/test_llama_cpp_adapter.py` has them in llama.cpp."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from random_adapters import random_adapter
from typer.testing import CliRunner

from pe_dpo.cli import app
from pe_dpo.errors import UsageError
from pe_dpo.export.gguf_adapter import write_gguf_adapter
from pe_dpo.model.adapter_files import AdapterFiles

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{words}")
    for words in (
        "Setting `save_embedding_layers`",
        "Model has `tie_word_embeddings",
        "`lora_bias=True` was passed",
        ".*LoRA tensor.* have invalid shape",
    )
]


def write(base: Path, folder: Path, **settings: Any) -> Any:
    """A random adapter as a GGUF file, read again; and its files."""
    random_adapter(base, folder / "adapter", **settings).save_pretrained(folder / "adapter", save_embedding_layers=False)
    adapter = AdapterFiles(folder / "adapter")
    write_gguf_adapter(adapter, base, folder / "lora.gguf", description="LoRA on a base")
    return GGUFReader(folder / "lora.gguf"), adapter


def test_matrices_keep_the_numbers_of_training(tiny_base: Path, tmp_path: Path) -> None:
    """alpha 12, rank 4; v_proj has rank 2 and its own alpha of 30: B is 30 / 12 of what it was."""
    settings = {"target_modules": ["v_proj", "down_proj"], "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 30}}
    settings["target_modules"] += ["up_proj"]
    file, adapter = write(tiny_base, tmp_path, **settings)
    said = {name: field.contents() for name, field in file.fields.items()}
    assert (said["general.type"], said["adapter.type"], said["adapter.lora.alpha"]) == ("adapter", "lora", 12.0)
    assert (said["general.architecture"], said["general.description"]) == ("llama", "LoRA on a base")
    written = {tensor.name: tensor.data for tensor in file.tensors}
    assert len(written) == 12
    prefix = "base_model.model.model.layers.1"
    for ours, theirs, factor in (("attn_v", "self_attn.v_proj", 2.5), ("ffn_down", "mlp.down_proj", 1.0)):
        a, b = (adapter.tensors.read(f"{prefix}.{theirs}.lora_{part}.weight").numpy() for part in "AB")
        assert np.array_equal(written[f"blk.1.{ours}.weight.lora_a"], a)
        assert np.array_equal(written[f"blk.1.{ours}.weight.lora_b"], b * np.float32(factor))


def test_an_alpha_of_zero_stays_no_change(tiny_base: Path, tmp_path: Path) -> None:
    """llama.cpp reads 0 as "no alpha", a scaling of 1."""
    file, _ = write(tiny_base, tmp_path, lora_alpha=0)
    assert file.fields["adapter.lora.alpha"].contents() == 1.0
    assert not any(tensor.data.any() for tensor in file.tensors if tensor.name.endswith("lora_b"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, r"proj\.weight has DoRA"),
        ({"modules_to_save": ["lm_head"]}, r"lm_head\.weight is saved whole"),
        ({"target_modules": ["embed_tokens"]}, r"embed_tokens\.weight has LoRA on the embedding"),
        ({"lora_bias": True, "target_modules": ["q_proj"]}, "q_proj.* has a trained bias|q_proj.bias is no tensor"),
        ({"trainable_token_indices": [3, 4]}, r"embed_tokens\.weight is saved whole"),
    ],
)
def test_what_no_gguf_adapter_says_is_refused(tiny_base: Path, tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=f"{words}.*merge it, and export the merged model"):
        write(tiny_base, tmp_path, **settings)
    assert not list(tmp_path.glob("*.gguf*")) and not list(tmp_path.glob(".*"))


def test_a_head_that_is_tied_to_the_embedding_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tied = tmp_path / "tied"
    shutil.copytree(tiny_base, tied)
    AutoModelForCausalLM.from_pretrained(tiny_base, tie_word_embeddings=True).save_pretrained(tied)
    with pytest.raises(UsageError, match="head that is tied"):
        write(tied, tmp_path, target_modules=["lm_head"], ensure_weight_tying=False)


@pytest.mark.parametrize(
    ("make", "arguments", "words"),
    [
        (lambda folder: None, ["-o", "a.gguf"], "is no run and no adapter"),
        (lambda folder: (folder / "run.json").touch(), [], "goes with -o FILE"),
        (lambda folder: (folder / "run.json").touch(), ["-o", "a.gguf", "--gguf", "f16"], "with nothing else"),
        (lambda folder: (folder / "run.json").touch(), ["-o", "model"], "a new file that ends in .gguf"),
        (
            lambda folder: (folder / "adapter_config.json").touch(),
            ["-o", "a.gguf"],
            "--onto adapter --quantize none -o PACKAGE",
        ),
    ],
)
def test_requests_that_make_no_sense_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], object], arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path)
    result = CliRunner().invoke(app, ["export", str(tmp_path), "--gguf-lora", *arguments])
    assert isinstance(result.exception, UsageError) and words in str(result.exception)
