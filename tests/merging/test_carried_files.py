"""A base as it is published, in the words of transformers 4: what lies beside its merged weights, and in a packaged adapter."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from random_adapters import random_adapter

from pe_dpo.merging.adapter_package import package_adapter
from pe_dpo.merging.merge import merge
from pe_dpo.merging.source import open_source

CODE = {"auto_map": {"AutoConfig": "configuration_x.X", "AutoTokenizer": "tokenization_x.X"}}
SCALING = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 64,
           "rope_type": "llama3"}  # fmt: skip
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}


def rewrite(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=4), encoding="utf-8")


@pytest.fixture(scope="module")
def base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("carried") / "base"
    shutil.copytree(tiny_base, folder)
    config = json.loads((folder / "config.json").read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype")
    rewrite(folder / "config.json", config | {"rope_theta": theta, "rope_scaling": SCALING})
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": settings.pop("extra_special_tokens", []),
    }
    settings["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").unlink()
    rewrite(folder / "tokenizer_config.json", settings)
    rewrite(folder / "special_tokens_map.json", {"eos_token": settings["eos_token"]})
    (folder / "LICENSE").write_text("as it is", encoding="utf-8")
    rewrite(folder / "preprocessor_config.json", {"image_processor_type": "XImageProcessor"})
    random_adapter(folder, folder.parent / "adapter")
    return folder


@pytest.fixture(params=[{}, CODE], ids=["plain", "with code"])
def published(request: pytest.FixtureRequest, base: Path) -> Iterator[dict[str, Any]]:
    """The base's own JSON files by name, before code is named in them."""
    own = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in base.glob("*.json")}
    texts = {path.name: path.read_text(encoding="utf-8") for path in base.glob("*.json")}
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        if request.param:
            rewrite(base / name, own[name] | request.param)
    yield own
    for name, text in texts.items():
        (base / name).write_text(text, encoding="utf-8")


def merged(base: Path, out: Path, **settings: Any) -> Path:
    merge(base.parent / "adapter", out, base=str(base), quantize="none", pairs=0, **settings)
    return out


def test_a_merged_model_has_the_bases_files_without_the_names_of_code(
    published: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    out = merged(base, tmp_path / "out")
    others = {"model.safetensors", "merge_report.json", "README.md"}
    assert {path.name for path in out.iterdir()} - others == {path.name for path in base.iterdir()} - others
    for name, content in published.items():
        assert list(json.loads((out / name).read_text(encoding="utf-8")).items()) == list(content.items()), name
        if "auto_map" not in (base / name).read_text(encoding="utf-8"):
            assert (out / name).read_bytes() == (base / name).read_bytes(), name
    assert (out / "LICENSE").read_text() == "as it is"


def test_another_dtype_is_all_that_a_merge_in_it_changes(base: Path, tmp_path: Path) -> None:
    out, own = merged(base, tmp_path / "out", dtype="bf16"), json.loads((base / "config.json").read_text())
    assert json.loads((out / "config.json").read_text()) == own | {"torch_dtype": "bfloat16"}


def test_a_packaged_adapter_has_the_bases_tokenizer(base: Path, tmp_path: Path) -> None:
    with open_source(base.parent / "adapter", base=str(base), quantize="none", pairs=0) as source:
        package_adapter(source, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} >= TOKENIZER
    for name in TOKENIZER:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    weights = tmp_path / "out" / "adapter_model.safetensors"
    assert weights.stat().st_mode == (tmp_path / "out" / "README.md").stat().st_mode
