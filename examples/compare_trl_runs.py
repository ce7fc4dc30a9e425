"""Two runs of TRL, held against each other pair by pair: its logs have means alone, which cannot tell luck from a difference.

python examples/compare_trl_runs.py FIRST SECOND PAIRS.jsonl BASE      # folders with adapters that TRL saved, and their base
"""

import json
import sys
from pathlib import Path

from pe_dpo import compare, evaluate
from pe_dpo.metrics.catalogue import METRICS
from pe_dpo.metrics.estimates import mean_change


def logged(folders: list[str]) -> str:
    """Return what TRL wrote of the last evaluation of each, from trainer_state.json in the folder or its newest checkpoint."""
    found = compare([max(Path(folder).rglob("trainer_state.json"), key=step) for folder in folders])
    return "\n".join(f"{run.run}: {found.metric} {run.value:.4f}" for run in found.runs)


def step(state: Path) -> int:
    """Return up to which optimizer step a state goes: names would have checkpoint-9 after checkpoint-10."""
    return int(json.loads(state.read_text(encoding="utf-8"))["global_step"])


def difference(folders: list[str], pairs: str, base: str, *, metric: str = "accuracy/policy") -> str:
    """Return the mean difference of a metric, second minus first, with its 95 % interval over the prompts of the pairs.

    Both are measured on the same pairs, on a base loaded as in training (here: not quantized); of Δ > Δ0 the name is
    accuracy/shift. What a share loses of a pair's size, `table.delta("policy")` has, in nats.
    """
    tables = [evaluate(folder, data=pairs, base=base, quantize="none").scored.in_order() for folder in folders]
    first, second = (METRICS[metric].numerator(table) for table in tables)
    change, low, high = mean_change(second - first, tables[0].prompt_key)
    words = "can be told from chance" if low > 0 or high < 0 else "cannot be told from chance"
    return f"{metric}: {change:+.3f} [{low:+.3f}, {high:+.3f}] on {len(tables[0])} pairs; this {words}"


if __name__ == "__main__":
    *folders, pairs, base = sys.argv[1:]
    print(logged(folders))
    print(difference(folders, pairs, base))
