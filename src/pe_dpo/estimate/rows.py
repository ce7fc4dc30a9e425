"""How many tokens a row may have, and which rows recompute their activations: the rule, for those who count and who measure."""

from collections.abc import Callable
from typing import Literal, NamedTuple

CPU_TOKENS = 1024
"""On a CPU longer rows gain little, and memory grows with them: eight HH pairs in two rows took half the memory of
one row, and 0.95 (float32) or 1.09 (bfloat16) of its time (benchmarks/results)."""
FEWEST_CPU_TOKENS = 512
"""Where all pairs are short: half the activations of 1,024."""
TREE_SHARE = 1 / 8
"""Of a machine's memory that a row's activations may take where a longer row spares reading something twice. Of all memory and
not of what is free: a run that is resumed has the rows that it had."""
NUMBERS_A_TOKEN = 32
"""Activations that a layer keeps of a token, in numbers of 32 bits, as a multiple of the hidden size (benchmarks/results)."""
MOST_TOKENS = 16384
"""On a GPU neither: at 8192 tokens the dequantization of an 8B base is 2 % of a step."""
FEWEST_TOKENS = 1024
"""Rows that hold less than this are slow enough that recomputing activations is the better deal. Counted, not measured: at 8B
in nf4 the codes of a layer are turned into values once a row, which at 1,024 tokens is a third of a row's time."""
SHARE_OF_FREE = 0.85
"""The rest is for fragmentation."""

Keeping = Literal["as asked", "recomputed", "offloaded"]
"""What a row keeps for the backward: what the recipe says, what layers begin with, or that on the host."""


class RowPlan(NamedTuple):
    """Rows of a run on a GPU."""

    tokens: int
    """Most of one row."""
    above: int | None
    """Rows of more tokens recompute; None where that is as the recipe says."""
    offloads: bool


def cpu_rows(longest: int, memory: int, *, hidden: int, layers: int) -> tuple[int, int]:
    """Return the most tokens of a row on a CPU, and of one that spares reading something twice.

    Args:
        longest: tokens of the longest pair alone, for which there has to be memory anyway.
        memory: bytes that the machine, or the container, has.
        hidden: size of the base's hidden states.
        layers: of the base.
    """
    tokens = max(FEWEST_CPU_TOKENS, min(longest, CPU_TOKENS))
    fitting = int(TREE_SHARE * memory / (4 * NUMBERS_A_TOKEN * hidden * layers))
    return tokens, max(tokens, min(fitting, MOST_TOKENS))


def plan_rows(
    asked: int | Literal["auto"], checkpointing: bool | Literal["auto"], longest: int, fitting: Callable[[Keeping], int]
) -> RowPlan:
    """Return the rows of a run on a GPU.

    Args:
        asked: most tokens of a row, by the recipe.
        checkpointing: likewise.
        longest: tokens of the longest pair alone.
        fitting: returns how many tokens fit; asked in the order of `Keeping`, and only as far as needed.
    """
    kept = fitting("as asked")
    budget = max(1, min(kept, MOST_TOKENS)) if asked == "auto" else asked
    if checkpointing != "auto" or kept >= max(FEWEST_TOKENS if asked == "auto" else budget, longest):
        return RowPlan(budget, None, False)
    recomputed, offloads = fitting("recomputed"), False
    if recomputed < longest:
        recomputed, offloads = fitting("offloaded"), True
    if asked == "auto" and kept < FEWEST_TOKENS:
        budget = max(1, min(recomputed, MOST_TOKENS))
    return RowPlan(budget, kept, offloads)  # rows are filled up to the budget; a pair that is longer has a row of its own
