"""A tokenizer's files, carried: the base's bytes, and what had to change, where the base has it."""

import json
from pathlib import Path
from typing import Any

import pytest
from toy_tokenizers import CHATML, build_tokenizer

from pe_dpo.model.base import load_tokenizer
from pe_dpo.model.tokenizer_files import save_tokenizer, tokenizer_files

OTHER = CHATML.replace("assistant", "answerer")
CODE = {"AutoTokenizer": ["tokenization_toy.ToyTokenizer", None]}
NAMED = {"default": CHATML, "rag": "{{ messages }}"}


def old_base(folder: Path, **more: Any) -> Path:
    """A base whose tokenizer was written by transformers 4, its template in tokenizer_config.json."""
    built = build_tokenizer(template=CHATML)
    built.backend_tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "<e>", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 512,
        **special,
        "chat_template": CHATML,
        **more,
    }
    settings = {key: value for key, value in settings.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=4), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    (folder / "vocab.json").write_text("{}", encoding="utf-8")
    return folder


def new_base(folder: Path) -> Path:
    """The same, written by transformers 5."""
    build_tokenizer(template=CHATML).save_pretrained(folder)
    return folder


def settings_of(files: dict[str, bytes]) -> Any:
    return json.loads(files["tokenizer_config.json"])


def test_the_files_of_a_base_are_carried_byte_for_byte(tmp_path: Path, warned: list[str]) -> None:
    base = old_base(tmp_path)
    assert tokenizer_files(load_tokenizer(str(base)), [base]) == {path.name: path.read_bytes() for path in base.iterdir()}
    assert not warned


def test_a_path_where_the_tokenizer_once_lay_goes(tmp_path: Path, warned: list[str]) -> None:
    places = {"name_or_path": "/home/me/base", "special_tokens_map_file": "/root/.cache/special_tokens_map.json"}
    base = old_base(tmp_path, **places)
    kept = settings_of(tokenizer_files(load_tokenizer(str(base)), [base]))
    assert kept == {key: value for key, value in json.loads((base / "tokenizer_config.json").read_text()).items()
                    if key not in places}  # fmt: skip
    assert not warned


def test_a_recipes_template_goes_where_the_base_has_its_own(tmp_path: Path) -> None:
    """A chat_template.jinja beside it would count for some readers, and the old text in tokenizer_config.json for others."""
    base = old_base(tmp_path)
    tokenizer = load_tokenizer(str(base))
    tokenizer.chat_template = OTHER
    files = tokenizer_files(tokenizer, [base])
    assert files.keys() == {path.name for path in base.iterdir()}
    before = json.loads((base / "tokenizer_config.json").read_text())
    assert list(settings_of(files).items()) == list({**before, "chat_template": OTHER}.items())


def test_every_place_of_a_template_has_the_recipes_one(tmp_path: Path) -> None:
    base = old_base(tmp_path)
    (base / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    (base / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}), encoding="utf-8")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "rag.jinja").write_text(NAMED["rag"], encoding="utf-8")
    tokenizer = load_tokenizer(str(base))
    assert tokenizer.chat_template == NAMED
    assert tokenizer_files(tokenizer, [base])["chat_template.jinja"].decode() == CHATML
    tokenizer.chat_template = OTHER
    files = tokenizer_files(tokenizer, [base])
    assert files["chat_template.jinja"].decode() == settings_of(files)["chat_template"] == OTHER
    assert json.loads(files["chat_template.json"]) == {"chat_template": OTHER}
    assert not any(name.startswith("additional_chat_templates") for name in files)


def test_a_template_is_given_to_a_base_that_has_none(tmp_path: Path) -> None:
    base = old_base(tmp_path, chat_template=None)
    tokenizer = load_tokenizer(str(base))
    tokenizer.chat_template = NAMED
    files = tokenizer_files(tokenizer, [base])
    assert settings_of(files)["chat_template"] == [{"name": name, "template": text} for name, text in NAMED.items()]


def test_what_version_5_wrote_is_spelled_as_versions_before_know_it(tmp_path: Path, warned: list[str]) -> None:
    base = new_base(tmp_path)
    before = json.loads((base / "tokenizer_config.json").read_text())
    assert before["tokenizer_class"] == "TokenizersBackend" and "additional_special_tokens" not in before
    files = tokenizer_files(load_tokenizer(str(base)), [base])
    after = settings_of(files)
    assert after.pop("additional_special_tokens") == before.pop("extra_special_tokens") == ["<|im_start|>", "<|im_end|>"]
    assert after == before | {"tokenizer_class": "PreTrainedTokenizerFast"}
    assert files["chat_template.jinja"].decode() == CHATML and not warned


def test_the_name_of_code_that_does_not_come_along_goes(tmp_path: Path) -> None:
    without = json.loads((old_base(tmp_path) / "tokenizer_config.json").read_text())
    tokenizer = load_tokenizer(str(tmp_path))
    files = tokenizer_files(tokenizer, [old_base(tmp_path, auto_map=CODE)])
    assert settings_of(files) == without


def test_a_class_that_only_config_json_says_is_written_where_there_is_none(tmp_path: Path) -> None:
    base = old_base(tmp_path, tokenizer_class=None)
    config = json.dumps({"model_type": "gpt2"}).encode()
    (base / "config.json").write_bytes(config)
    tokenizer = build_tokenizer(template=CHATML)
    assert settings_of(tokenizer_files(tokenizer, [base]))["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_the_first_folder_that_has_the_tokenizer_counts(tmp_path: Path, warned: list[str]) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "run").mkdir()
    base, run = old_base(tmp_path / "base", eos_token="<|im_end|>"), old_base(tmp_path / "run")
    (base / "special_tokens_map.json").unlink()  # which would count more
    files = tokenizer_files(load_tokenizer(str(run)), [base, run])
    assert files == {path.name: path.read_bytes() for path in run.iterdir()} and not warned


def test_a_tokenizer_that_no_folder_has_is_written_anew_and_that_is_said(tmp_path: Path, warned: list[str]) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "out").mkdir()
    base, tokenizer = old_base(tmp_path / "base"), build_tokenizer(template=OTHER, merges=(("a", "b"),))
    save_tokenizer(tokenizer, tmp_path / "out", [base])
    assert len(warned) == 1 and f"{base}: its files are not read as the tokenizer in use" in warned[0]
    saved = load_tokenizer(str(tmp_path / "out"))
    assert saved("ab").input_ids == tokenizer("ab").input_ids != load_tokenizer(str(base))("ab").input_ids
    assert saved.chat_template == OTHER
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize("content", ["[]", "{"])
def test_settings_that_cannot_be_read_are_written_anew(content: str, tmp_path: Path, warned: list[str]) -> None:
    base = old_base(tmp_path)
    (base / "tokenizer_config.json").write_text(content, encoding="utf-8")
    files = tokenizer_files(build_tokenizer(template=CHATML), [base])
    assert settings_of(files)["eos_token"] == "<e>" and len(warned) == 1
