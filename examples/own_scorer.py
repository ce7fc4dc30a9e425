"""Who wins, by a scorer of your own: a function of prompts and answers that returns a number for each, higher is better.

pe-dpo eval RUN --prompts 64 --scorer examples/own_scorer.py:polite      # from the command line
python examples/own_scorer.py RUN                                        # the same from Python
"""

import sys
from pathlib import Path

WORDS = ("please", "thank", "dear", "kind", "welcome", "certainly", "lovely", "travels")


def polite(prompts: list, answers: list[str]) -> list[float]:
    """Return how many polite words each answer has, per ten words; a prompt is text, or messages with role and content."""
    return [10 * sum(word in answer.lower() for word in WORDS) / max(1, len(answer.split())) for answer in answers]


def win_rate(run: str, prompts: int = 64) -> dict:
    """Sample the policy's answers and the reference's to the same held-out prompts, and return how often the policy's wins."""
    from pe_dpo import evaluate
    from pe_dpo.recipe.schema import GenerationSection

    asked = GenerationSection(prompts=prompts, max_new_tokens=40)
    found = evaluate(run, generation=asked, scorer=f"{__file__}:polite")
    found.save(Path(run))  # so that `pe-dpo report` and `compare --metric win_rate` show it
    return found.generation["win_rate"]


if __name__ == "__main__":
    won = win_rate(sys.argv[1])
    low, high = won["interval"]
    print(f"the policy's answer is the more polite one in {won['mean']:.1%} of prompts [{low:.1%}, {high:.1%}], ties count ½")
