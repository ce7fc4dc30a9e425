"""Numbers that no run can mean, which are refused, and those that few do, which are pointed at.

The schema bounds what can be computed at all (`LARGEST`, say), so that every recorded recipe stays readable; these bounds are
about sense, and hold for what is asked for now.
"""

from typing import NamedTuple

from pe_dpo.errors import RecipeError
from pe_dpo.recipe.schema import Recipe


class Range(NamedTuple):
    """What a number may be, and what it usually is."""

    key: str
    possible: tuple[float, float]
    usual: tuple[float, float]
    why: str
    """Of both bounds, as the end of a message."""


RANGES = (
    Range("train.learning_rate", (1e-12, 10), (1e-8, 0.05),
          "Adam moves every number of the adapter by about that much in each step; LoRA takes 1e-6 to 1e-3"),
    Range("train.epochs", (0, 1000), (0, 20), "after one to three the answers are learned by heart"),
    Range("train.max_steps", (1, 1e8), (1, 1e6), "a step takes seconds"),
    Range("train.pairs_per_step", (1, 1e6), (1, 4096), "published runs take 8 to 512"),
    Range("train.tokens_per_microbatch", (1, 1e8), (1, 1e6), "it is what lies in memory at once; auto finds what fits"),
    Range("train.weight_decay", (0, 1e3), (0, 1), "it is multiplied by the learning rate, and published runs take 0 to 0.1"),
    Range("adapter.rank", (1, 16384), (1, 1024), "published adapters take 4 to 256, and memory grows with it"),
    Range("adapter.alpha / adapter.rank", (1e-4, 1e4), (0.01, 100), "the update is scaled by it, and so is the learning rate"),
    Range("adapter.dropout", (0, 1), (0, 0.5), "beyond it the mask is most of what is learned"),
    Range("data.max_length", (2, 1e8), (16, 1e6), "it counts the tokens of prompt and answer together"),
    Range("loss.beta", (1e-6, 1e4), (1e-3, 100),
          "published losses take 0.01 to 10; above, a nat saturates the link, below, nothing holds the policy back"),
    Range("loss.gamma", (0, 1e4), (0, 100), "it stands beside beta, for which published losses take 0.01 to 10"),
    Range("loss.margin", (-1e6, 1e6), (-1e3, 1e3), "it is subtracted from beta times a difference of log-probs"),
    Range("loss.sft_weight", (0, 1e4), (0, 10), "it stands beside a preference loss of weight 1"),
)  # fmt: skip
"""By measure of published runs and of what float32 bears; the bounds of what is usual are generous."""


def number_of(recipe: Recipe, key: str) -> float | None:
    """Return the number of a recipe that a range is about; None where it has none yet, or leaves it to be found."""
    if key == "adapter.alpha / adapter.rank":
        return recipe.adapter.alpha / recipe.adapter.rank
    if key == "loss.gamma":
        return None if recipe.loss.is_calibrated else recipe.loss.gamma_value
    section, _, name = key.partition(".")
    found = getattr(getattr(recipe, section), name)
    return None if found is None or isinstance(found, str) else float(found)


def check_ranges(recipe: Recipe) -> list[str]:
    """Return what is possible in a recipe but hardly meant, in words.

    Raises:
        RecipeError: a number is out of any range; says all that are.
    """
    refused, unusual = [], []
    for key, possible, usual, why in RANGES:
        number = number_of(recipe, key)
        if number is not None and not possible[0] <= number <= possible[1]:
            refused.append(f"{key}: {number:g} is not between {possible[0]:g} and {possible[1]:g}: {why}")
        elif number is not None and not usual[0] <= number <= usual[1]:
            unusual.append(f"{key}: {number:g} is unusual (between {usual[0]:g} and {usual[1]:g} is not): {why}")
    rate, decay = recipe.train.learning_rate, recipe.train.weight_decay
    if rate * decay >= 1:
        refused.append(
            f"train.weight_decay: {decay:g} at learning_rate {rate:g} takes {rate * decay:g} of every number away in each "
            "step; their product must be below 1"
        )
    if refused:
        raise RecipeError("\n".join(refused))
    return unusual
