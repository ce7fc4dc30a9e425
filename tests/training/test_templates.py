"""A run holds the template, its arguments and its date that it was trained with, and hands them on."""

import json
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, TrainerCallback

from pe_dpo.data import template as template_module
from pe_dpo.errors import RunFolderError
from pe_dpo.evaluation.evaluate import evaluate
from pe_dpo.export.gguf_tokenizer import Vocabulary
from pe_dpo.export.ollama import modelfile
from pe_dpo.merging.merge import merge
from pe_dpo.runs.run import Run
from pe_dpo.training.train import train

pytestmark = pytest.mark.slow

CLOCK = (
    "{{ 'Today is ' + strftime_now('%Y-%m-%d') + '. ' if strftime_now is defined }}{{ mood }}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class Day(date):
    """A date whose today can be set."""

    now = date(2026, 3, 1)

    @classmethod
    def today(cls) -> date:
        return cls.now


class StopAfterSaving(TrainerCallback):
    """The end of the process, after a checkpoint."""

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


@pytest.fixture
def recipe(make_recipe: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(template_module, "date", Day)
    monkeypatch.setattr(Day, "now", date(2026, 3, 1))
    (tmp_path / "own.jinja").write_text(CLOCK, encoding="utf-8")
    return make_recipe(
        f"data.template={tmp_path / 'own.jinja'}",
        "data.template_args={mood: 'Be kind. '}",
        "train.max_steps=2",
        "train.save_every=1",
    )


def test_a_run_is_resumed_and_evaluated_on_another_day_with_the_date_on_which_it_began(recipe: Any) -> None:
    folder = Path(recipe.output)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, callbacks=[StopAfterSaving()])
    Day.now = date(2026, 3, 2)
    result = train(recipe, resume=True)
    assert json.loads((folder / "data_report.json").read_text())["template_date"] == "2026-03-01"
    assert Run(folder).recipe.data.template_date == date(2026, 3, 1)
    pairs = Run(folder).pairs()
    assert pairs is not None and {prompt.split("<|im_start|>")[0] for prompt in pairs.prompt} == {
        "Today is 2026-03-01. Be kind. "
    }
    assert evaluate(folder).metrics["accuracy/policy"] == result.after["accuracy/policy"]
    again = train(Run(folder).recipe.model_copy(update={"output": f"{folder}-again"}))
    assert again.after == result.after
    later = recipe.model_copy(update={"data": recipe.data.model_copy(update={"template_date": date(2026, 3, 2)})})
    with pytest.raises(RunFolderError, match="the run started with other inputs"):
        train(later, resume=True)


def test_the_template_and_its_arguments_go_into_run_merged_model_gguf_and_modelfile(recipe: Any, tmp_path: Path) -> None:
    result = train(recipe.model_copy(update={"train": recipe.train.model_copy(update={"max_steps": 1})}))
    merged = tmp_path / "merged"
    merge(result.folder, merged, pairs=0)
    for folder in (result.folder, merged):
        text = AutoTokenizer.from_pretrained(folder).apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
        assert text.endswith("Be kind. <|im_start|>user\nHi<|im_end|>\n")
    size = json.loads((merged / "config.json").read_text())["vocab_size"]
    assert "Be kind. " in (Vocabulary(merged, size).chat_template or "")
    assert "Be kind. {{ end }}<|im_start|>user" in modelfile(merged, "x.gguf")[0]
