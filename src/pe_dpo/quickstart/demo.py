"""The quickstart's main job: the embedded base and pairs through the same road as anybody's.

The base is made by `tools/make_base.py`, the pairs by `tools/world.py`.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from pe_dpo.recipe import Recipe, load_recipe

FOLDER = Path(__file__).parent
BASE = FOLDER / "base"
PAIRS = FOLDER / "pairs"


def quickstart_recipe(overrides: Sequence[str] = (), *, runs: Path = Path("runs")) -> Recipe:
    """Return the recipe that trains the embedded base on the embedded pairs.

    Args:
        overrides: "section.key=value", as for `load_recipe`; they win.
        runs: The folder of runs; the run goes into the first free one of `quickstart`, `quickstart-2`, … there.
    """
    output, number = runs / "quickstart", 1
    while output.exists():
        number += 1
        output = runs / f"quickstart-{number}"
    embedded = {"model.base": BASE, "data.train": PAIRS, "output": output}
    return load_recipe(
        FOLDER / "recipe.yaml", [*(f"{key}={json.dumps(str(path))}" for key, path in embedded.items()), *overrides]
    )


def compare_answers(recipe: Recipe, *, count: int) -> list[tuple[str, str, str, str]]:
    """Return held-out questions with the preferred answer, the base's and the tuned model's, from one loaded base.

    Args:
        recipe: The recipe of a finished run.
        count: How many questions, spread over the held-out pairs.
    """
    from pe_dpo.inference.inputs import read_inputs
    from pe_dpo.inference.policy import load_policy
    from pe_dpo.inference.sampling import answer_text, sample

    info, tokenizer, data, *_ = read_inputs(recipe)
    pairs = [data.held_out[index * len(data.held_out) // count] for index in range(count)]
    policy = load_policy(recipe.output, info=info, tokenizer=tokenizer, device="cpu")

    def answers() -> list[str]:
        said = sample(policy, [pair.prompt_ids for pair in pairs], max_new_tokens=40, temperature=0)
        return [answer_text(tokenizer, answer.ids) for answer in said]

    tuned = answers()
    with policy.reference():
        untuned = answers()
    questions = [tokenizer.decode(pair.prompt_ids).split("<|user|>")[-1].split("<|end|>")[0] for pair in pairs]
    expected = [tokenizer.decode(pair.chosen_ids, skip_special_tokens=True) for pair in pairs]
    return list(zip(questions, expected, untuned, tuned, strict=True))
