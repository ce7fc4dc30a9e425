"""Go's own text/template renders what we write, as our blocks say and, where nothing is told, as the chat template does."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from chat_templates import STYLES, random_chats, styled
from toy_tokenizers import build_tokenizer

from benchmarks.engines.worker import ask
from pe_dpo.data.pairs import RowError
from pe_dpo.data.template import Template
from pe_dpo.export.ollama import OTHERS, checked_blocks, differences, modelfile
from pe_dpo.recipe.data_section import DataSection

pytestmark = pytest.mark.engine("go_template")

REAL = Path(__file__).parents[2] / ".tokenizers"


def rendered(template: str, chats: Any, folder: Path, **options: str) -> list[str]:
    (folder / "Modelfile").write_text(f'FROM ./x.gguf\nTEMPLATE """{template}"""\nPARAMETER stop "x"\n', encoding="utf-8")
    answer = ask("go_template", folder / "Modelfile", {"chats": chats, "options": options})
    return list(answer["rendered"])


def check(tokenizer: Any, folder: Path, *, adds_bos: bool) -> None:
    """On every kind of chat Go must render what the chat template does, unless the difference is told."""
    template = Template(tokenizer, DataSection(train="-", template="chat"))
    blocks = checked_blocks(template, tokenizer.bos_token or "", adds_bos=adds_bos)
    added = tokenizer.bos_token if adds_bos else ""
    told = " ".join(differences(blocks, template, added, cuts_thoughts=False))
    for name, (_, chats) in OTHERS.items():
        for chat, text in zip(chats, rendered(blocks.go_template(), list(chats), folder), strict=True):
            try:
                is_equal = added + text == template.render(tuple(chat), opens=True)
            except RowError:
                is_equal = False
            assert is_equal or name in told, name
    chats = random_chats(60)
    assert rendered(blocks.go_template(), chats, folder) == [blocks.render(chat) for chat in chats]


@pytest.mark.parametrize("style", STYLES)
def test_go_renders_each_style_as_told(style: str, tmp_path: Path) -> None:
    check(styled(style), tmp_path, adds_bos=False)


@pytest.mark.parametrize("style", ["llama2", "llama3", "gemma3", "mistral", "mistral3"])
def test_go_renders_each_style_as_told_where_llama_cpp_adds_bos(style: str, tmp_path: Path) -> None:
    check(styled(style), tmp_path, adds_bos=True)


def test_thoughts_are_cut_as_ollama_cuts_them_for_qwen3(tmp_path: Path) -> None:
    template = Template(styled("qwen3"), DataSection(train="-", template="chat"))
    go = checked_blocks(template, "", adds_bos=False).go_template()
    (chat,) = OTHERS["thoughts in an earlier answer"][1]
    assert rendered(go, [chat], tmp_path, family="qwen3") == [template.render(tuple(chat), opens=True)]
    assert rendered(go, [chat], tmp_path) != [template.render(tuple(chat), opens=True)]


def test_the_modelfile_of_an_export_renders_as_its_model(artefact: Any, request_of_all: dict[str, Any], expected: Any) -> None:
    chats = request_of_all["chats"]
    model = artefact("merged")
    text, told = modelfile(model, "x.gguf")
    assert told == [] or "messages of one role in a row" in told[0]
    found = ask("go_template", artefact("gguf-f32") / "Modelfile", {"chats": chats})["rendered"]
    assert found == expected("merged")["rendered"]
    assert (artefact("gguf-f32") / "Modelfile").read_text(encoding="utf-8").splitlines()[1:] == text.splitlines()[1:]


@pytest.mark.parametrize("name", ["deepseek_v3", "gemma3", "llama3_1", "llama3_2", "mistral_nemo", "qwen2_5", "qwen3"])
def test_go_renders_published_templates_as_told(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    if not (REAL / name / "tokenizer.json").is_file():
        pytest.skip("needs real tokenizers: make tokenizers")
    tokenizer = AutoTokenizer.from_pretrained(REAL / name)
    check(tokenizer, tmp_path, adds_bos=not name.startswith("qwen"))


@pytest.mark.peer
def test_go_renders_the_templates_that_trl_ships_as_told(tmp_path: Path) -> None:
    """All 41 are blocks on ordinary chats."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None and spec.origin is not None
    files = sorted(Path(spec.origin).parent.glob("chat_templates/*.jinja"))
    names = [file for file in files if "training" not in file.name]
    assert len(names) > 40
    for file in names:
        check(build_tokenizer(template=file.read_text(encoding="utf-8"), bos="<s>", eos="</s>"), tmp_path, adds_bos=False)
