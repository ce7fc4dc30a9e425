"""Which runs the three experiments are made of, as sweeps in the words of `pe-dpo sweep`.

learning   when learning happens: κ × link × seed, from π = π0 and from a start that is courteous and wrong
explicit   what pulls toward π0 where overfitting happens: β, mixout, dropout, scales and stops, γ = β and γ = 0
luck       draws of the pairs × seeds of the training × configurations × snapshots, and the same on shuffled labels
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.study.vale import MOST_TOKENS, make_start, write_held_out, write_pairs
from pe_dpo.experiments.plan import SweepPlan, make_plan
from pe_dpo.quickstart.demo import BASE

NAMES = ("learning", "explicit", "luck")

KAPPAS = ("0", "0.5x", "1x", "2x", "4x", "8x")
LEARNING_SEEDS, EXPLICIT_DRAWS = (10, 11, 12, 13, 14), 8
BETAS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0)
RATES, SCALES, STOPS = (0.3, 0.6, 0.9), (0.25, 0.5, 0.75), 5
LUCK_DRAWS, LUCK_SEEDS = 4, 4
LUCK_LOSSES = {
    "dpo": (False, ["gamma=1x"]),
    "margin": (False, ["gamma=0", "margin=1"]),
    "shuffled": (True, ["gamma=1x"]),
}
"""Arm: (whether labels are shuffled, settings)."""

COMMON: dict[str, Any] = {
    "model": {"base": str(BASE), "quantize": "none"},
    "adapter": {"rank": 8, "alpha": 16},
    "loss": {"beta": 0.5},
    "train": {
        **{"learning_rate": 1e-3, "pairs_per_step": 32, "tokens_per_microbatch": 4096},
        **{"eval_every": 100_000, "save_every": 100_000, "log_every": 10},
    },
    "generation": {"prompts": 160, "max_new_tokens": MOST_TOKENS},
}


@dataclass(frozen=True)
class Part:
    """One sweep of an experiment: its runs share the pairs and the start."""

    name: str
    pairs: int
    draw: int
    grids: list[list[str]]
    seeds: list[int]
    settings: dict[str, dict[str, Any]]
    """Section: key: value, beside COMMON."""
    flipped: float = 0.0
    shuffled: bool = False
    has_start: bool = False

    def plan(self, folder: Path) -> SweepPlan:
        """Write its pairs, its start and its recipe where they are missing, and return the sweep."""
        place = folder / self.name
        data, held_out, start = place / "pairs.jsonl", folder / "held-out.jsonl", folder / "start"
        if not data.is_file():
            write_pairs(data, self.pairs, self.draw, flipped=self.flipped, shuffled=self.shuffled)
        if not held_out.is_file():
            write_held_out(held_out)
        if self.has_start and not start.is_dir():
            make_start(start)
        recipe = {section: {**values, **self.settings.get(section, {})} for section, values in COMMON.items()}
        recipe["data"] = {"train": str(data), "eval": str(held_out)}
        if self.has_start:
            recipe["adapter"] = {"start": str(start), "reference": "base"}
        (place / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return make_plan(place / "recipe.yaml", self.grids, folder=place / "sweep", seeds=self.seeds)


def parts(name: str) -> Iterator[Part]:
    """Yield the sweeps of an experiment, those first whose results are needed most."""
    if name == "learning":
        arms = [
            [f"gamma={','.join(KAPPAS)}"],
            [f"gamma={','.join(KAPPAS)}", "link=hinge", "margin=0.1"],
            ["loss=simpo", "beta=2"],
        ]
        along = {"train": {"epochs": 2}, "generation": {"snapshots": 3}}
        for start in (False, True):
            start_name = "from-courteous" if start else "from-reference"
            yield Part(start_name, 1000, 0, arms, list(LEARNING_SEEDS), along, has_start=start)
    elif name == "explicit":
        betas, rates = (",".join(map(str, values)) for values in (BETAS, RATES))
        ends = [[f"beta={betas}"], [f"beta={betas}", "gamma=0"]]
        ends += [[f"{dial}={rates}", *gamma] for gamma in ([], ["gamma=0"]) for dial in ("mixout", "dropout")]
        short = {"loss": {"beta": 0.2}, "train": {"epochs": 10, "pairs_per_step": 16}, "generation": {"prompts": 240}}
        along = {**short, "generation": {"prompts": 240, "snapshots": STOPS, "scales": list(SCALES)}}
        for draw in range(EXPLICIT_DRAWS):
            yield Part(f"ends-{draw}", 150, draw, ends, [draw], short, flipped=0.2)
            yield Part(f"along-{draw}", 150, draw, [["gamma=0,1x"]], [draw], along, flipped=0.2)
    else:
        along = {"train": {"epochs": 4}, "generation": {"snapshots": 2}}
        for draw in range(LUCK_DRAWS):
            for arm, (is_shuffled, settings) in LUCK_LOSSES.items():
                grid = ["beta=0.1,0.5,2", "lr=1e-3,2e-3", *settings]
                yield Part(f"{arm}-{draw}", 300, draw, [grid], list(range(LUCK_SEEDS)), along, shuffled=is_shuffled)
