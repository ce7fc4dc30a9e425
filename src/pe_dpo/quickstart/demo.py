"""The quickstart's main job: the embedded base and pairs through the same road as anybody's."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pe_dpo.data.settings import prepare_from_settings
from pe_dpo.quickstart.world import write_pairs
from pe_dpo.recipe import Recipe, load_recipe

FOLDER = Path(__file__).parent
BASE = FOLDER / "base"


class Answers(NamedTuple):
    """One held-out question and what it is answered."""

    question: str
    wanted: str
    base: str
    tuned: str


def quickstart_recipe(overrides: Sequence[str] = (), *, runs: Path = Path("runs")) -> Recipe:
    """Write the embedded pairs beside the runs and return the recipe that trains on them.

    Args:
        overrides: "section.key=value", as for `load_recipe`; they win.
        runs: folder of runs; the pairs go into `quickstart-data` there, the run into the first free `quickstart`,
            `quickstart-2`, ….
    """
    data = runs / "quickstart-data"
    paths = {"model.base": BASE, "data.train": data, "output": _free_folder(runs / "quickstart")}
    recipe = load_recipe(
        FOLDER / "recipe.yaml",
        [*(f"{key}={json.dumps(str(path))}" for key, path in paths.items()), *overrides],
    )
    write_pairs(data)
    return recipe


def compare_answers(recipe: Recipe, *, count: int) -> list[Answers]:
    """Return answers of the base and of the tuned model to held-out questions, from one loaded base.

    Args:
        recipe: of a finished run.
        count: how many questions, spread over the held-out pairs.
    """
    from pe_dpo.inference.generation import greedy_answers
    from pe_dpo.model.adapter import as_reference, load_adapter_for_evaluation
    from pe_dpo.model.base import end_token_ids, inspect_base, load_base, load_tokenizer

    base, tokenizer = recipe.model.base, load_tokenizer(recipe.model.base)
    facts = inspect_base(**recipe.model.model_dump())
    ends = {tokenizer.eos_token_id, *end_token_ids(base)}
    held_out = prepare_from_settings(
        recipe.data, tokenizer=tokenizer, context_length=facts.context_length, end_token_ids=ends
    ).held_out
    chosen = [held_out[index * len(held_out) // count] for index in range(count)]
    model: Any = load_adapter_for_evaluation(load_base(facts), recipe.output)
    prompts = [pair.prompt_ids for pair in chosen]

    def answers() -> list[str]:
        return greedy_answers(model, tokenizer, prompts, max_new_tokens=40, end_token_ids=ends, device="cpu")

    tuned = answers()
    with as_reference(model):
        untuned = answers()
    questions = [_last_turn(tokenizer, pair.prompt_ids) for pair in chosen]
    wanted = [tokenizer.decode(pair.chosen_ids, skip_special_tokens=True) for pair in chosen]
    return [Answers(*row) for row in zip(questions, wanted, untuned, tuned, strict=True)]


def _last_turn(tokenizer: Any, prompt_ids: Any) -> str:
    """The last user turn of a rendered prompt, for people."""
    text = tokenizer.decode(prompt_ids)
    return str(text.split("<|user|>")[-1].split("<|end|>")[0])


def _free_folder(folder: Path) -> Path:
    number, free = 1, folder
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free
