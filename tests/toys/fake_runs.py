"""Run folders and sweep folders without training: all files that a run leaves, filled from a small world of normal variates.

A pair has a lean: how the run's training signal moves its preference, per unit of √KL. A point's settings say how far it drifts
(√KL: smaller with a larger β, with mixout, with a smaller learning rate; least at κ = 1.2), and `quality` how much better or
worse than the others it uses that drift. So at equal KL all points are the same by construction, except those with a quality.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
import tables
import torch

from pe_dpo.disk import write_atomically
from pe_dpo.metrics.catalogue import pair_metrics, share_intervals
from pe_dpo.metrics.table import PairTable
from pe_dpo.objective import Loss, PairLogprobs
from pe_dpo.recipe import Recipe, describe, recipe_from_yaml, recipe_to_yaml
from pe_dpo.recipe.names import SHORT_NAMES
from pe_dpo.runs.files import scaled_folder

GRID: tuple[dict[str, Any], ...] = (
    {},
    {"loss.beta": 0.025},
    {"loss.beta": 0.4},
    {"loss.gamma": "0x"},
    {"loss.gamma": "0.5x"},
    {"loss.gamma": "2x"},
    {"mixout.p": 0.5},
)
"""What seven points turn away from DPO with β = 0.1: nothing, β twice, γ three times, mixout."""
WORDS = ("red", "green", "blue", "round", "square", "small & light", "large", "sweet", "<b>sour</b>", "bitter", "näher", "犬")


class World(NamedTuple):
    """Held-out pairs as the reference sees them; arrays over pairs unless said otherwise."""

    prompt: np.ndarray
    """Index of each pair's prompt."""
    chosen: np.ndarray
    """log π0 of the chosen answer, nats."""
    rejected: np.ndarray
    chosen_lengths: np.ndarray
    rejected_lengths: np.ndarray
    lean: np.ndarray
    """How far training moves Δπ of a pair, in standard units."""
    ease: np.ndarray
    """Over prompts: how much further than others the policy drifts on a prompt, a factor."""


def write_sweep(
    folder: Path,
    settings: Sequence[Mapping[str, Any]] = GRID,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    pairs: int = 60,
    prompts: int = 40,
    snapshots: int = 2,
    scales: Sequence[float] = (),
    samples: int = 2,
    steps: int = 12,
    scored: bool = True,
    quality: Mapping[str, float] | None = None,
    unfinished: Sequence[str] = (),
    seed: int = 0,
) -> Path:
    """Write a sweep folder with a run folder for each point and seed, and return it.

    Args:
        folder: is made.
        settings: of each point, the dotted recipe keys that are turned away from the base recipe; {} is the base itself.
        seeds: of training.
        pairs: held-out pairs.
        prompts: of them and of sampled answers; pairs share prompts where there are fewer.
        snapshots: measured earlier states of each run, evenly spaced over its steps.
        scales: at which the end of each run is measured too; its √KL is that share of the run's.
        samples: answers to each prompt; 0 leaves generations.parquet out.
        steps: optimizer steps, a line of metrics.jsonl each.
        scored: whether answers have scores, and those of the reference.
        quality: added to the mean lean of the named points.
        unfinished: names of points whose last run was killed.
        seed: of the world.
    """
    world = make_world(pairs, prompts, seed)
    folder.mkdir(parents=True)
    base = make_recipe({})
    write_atomically(folder / "recipe.yaml", recipe_to_yaml(base))
    points = []
    for setting in settings:
        name = point_name(setting)
        for run_seed in seeds:
            run = folder / "runs" / name / f"seed-{run_seed}"
            write_run(
                run,
                setting,
                world,
                seed=run_seed,
                snapshots=snapshots,
                scales=scales,
                samples=samples,
                steps=steps,
                scored=scored,
                quality=(quality or {}).get(name, 0.0),
                finished=name not in unfinished or run_seed != seeds[-1],
            )
            points.append({"name": name, "settings": dict(setting), "seed": run_seed, "folder": f"runs/{name}/seed-{run_seed}"})
    grids = [" ".join(f"{key}={value}" for key, value in setting.items()) for setting in settings if setting]
    write_atomically(folder / "sweep.json", json.dumps({"grids": grids, "seeds": list(seeds), "points": points}, indent=1))
    return folder


def write_run(
    folder: Path,
    setting: Mapping[str, Any],
    world: World,
    *,
    seed: int = 0,
    snapshots: int = 2,
    scales: Sequence[float] = (),
    samples: int = 2,
    steps: int = 12,
    scored: bool = True,
    quality: float = 0.0,
    finished: bool = True,
) -> Path:
    """Write the folder of one run and return it; arguments as `write_sweep`."""
    recipe = make_recipe(setting, seed=seed, output=folder)
    folder.mkdir(parents=True)
    write_atomically(folder / "recipe.yaml", recipe_to_yaml(recipe))
    drifts = {step: drift(recipe, step / steps) for step in range(steps + 1)}
    states = {step: policy_pairs(world, way, seed, quality) for step, way in drifts.items()}
    measured = {step: metrics_of(recipe, world, state) for step, state in states.items()}
    lines: list[dict[str, Any]] = []
    for step, metrics in measured.items():
        if step:
            lines.append({"step": step, **metrics, "grad_norm": 1.0 / step, "learning_rate": 1e-5, "tokens_per_second": 900.0})
        if step in (0, steps) or step % max(1, steps // 4) == 0:
            lines.append({"step": step, **{f"eval_{key}": value for key, value in metrics.items()}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    record: dict[str, Any] = {
        "status": "finished" if finished else "training",
        "versions": {"pe-dpo": "0.1.0", "torch": "2.13.0"},
        "hashes": {"data": "d" * 64, "held_out": f"{len(world.chosen):064x}", "base": "b" * 64},
        "base": {"id": "a/base", "revision": None, "quantize": "none", "dtype": "float32", "parameters": 1_000_000},
        "loss": describe(recipe.loss)._asdict(),
        "pairs": {"train": 500, "held_out": len(world.chosen)},
        "start": {"pairs": 16, "largest_difference": 0.0, "loss": 0.6931471805599453, "score": 0.0},
        "before": measured[0],
    }
    if finished:
        record |= {"step": steps, "after": measured[steps], "remarks": [], "seconds": 12.5 + seed}
        earlier = [round(steps * number / (snapshots + 1)) for number in range(1, snapshots + 1)]
        for step, where in {**{step: f"snapshots/step-{step:06d}" for step in earlier}, steps: "."}.items():
            write_state(folder / where, recipe, world, states[step], drifts[step], seed, samples=samples, scored=scored)
        for scale in scales:
            way, where = scale * drifts[steps], scaled_folder(folder, scale)
            state = policy_pairs(world, way, seed, quality)
            write_state(where, recipe, world, state, way, seed, samples=samples, scored=scored)
    write_atomically(folder / "run.json", json.dumps(record, indent=1))
    return folder


def make_world(pairs: int = 60, prompts: int = 40, seed: int = 0) -> World:
    """Return held-out pairs; prompt numbers go round, so that the first prompts have a pair more."""
    random = np.random.default_rng([seed, 1])
    lengths = random.integers(4, 60, (2, pairs)).astype(float)
    prompt = np.arange(pairs) % prompts
    return World(
        prompt=prompt,
        chosen=-1.5 * lengths[0] + random.normal(0, 2, pairs),
        rejected=-1.5 * lengths[1] + random.normal(0, 2, pairs),
        chosen_lengths=lengths[0],
        rejected_lengths=lengths[1],
        lean=0.5 + random.normal(0, 0.5, prompts)[prompt] + random.normal(0, 1, pairs),
        ease=np.exp(random.normal(0, 0.3, prompts)),
    )


def make_recipe(setting: Mapping[str, Any], *, seed: int = 0, output: Path = Path("runs")) -> Recipe:
    """Return a checked recipe with these dotted keys set."""
    text = f"model: {{base: a/base}}\ndata: {{train: pairs}}\noutput: '{output}'\n"
    return recipe_from_yaml(text, "test", [f"{key}={value}" for key, value in {**setting, "train.seed": seed}.items()])


def point_name(setting: Mapping[str, Any]) -> str:
    """Return a name as sweeps give it: "beta=0.1,gamma=0.5x", or "base" for nothing turned."""
    short = {key: name for name, key in reversed(SHORT_NAMES.items())}
    text = {key: f"{value:g}" if isinstance(value, float) else str(value) for key, value in sorted(setting.items())}
    return ",".join(f"{short.get(key, key)}={value}" for key, value in text.items()) or "base"


def drift(recipe: Recipe, fraction: float) -> float:
    """Return √KL of a run after a fraction of its steps, in √nats."""
    kappa = recipe.loss.gamma_value / recipe.loss.beta
    way = (0.1 / recipe.loss.beta) ** 0.4 * (1 + 0.2 * (kappa - 1.2) ** 2) * (1 - recipe.mixout.p) ** 0.7
    way *= (1 - recipe.adapter.dropout) ** 0.5
    return float(way * (recipe.train.learning_rate / 2e-5) ** 0.5 * fraction**0.5)


def policy_pairs(world: World, way: float, seed: int, quality: float) -> tuple[np.ndarray, np.ndarray]:
    """Return log π of the chosen and of the rejected answers after a drift of `way`."""
    random, own = np.random.default_rng([seed, 2]), np.random.default_rng([seed, round(1e6 * way)])
    luck = random.normal(0, 0.05) + random.normal(0, 0.3, len(world.lean)) + own.normal(0, 0.3, len(world.lean))
    shift = 2 * way * (world.lean + luck + quality) * world.ease[world.prompt]
    return world.chosen - way + shift / 2, world.rejected - way - shift / 2


def metrics_of(recipe: Recipe, world: World, state: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    """Return the metrics of a state as a run writes them."""
    return pair_metrics(scored_state(recipe, world, state), is_fixed_set=True)


def scored_state(recipe: Recipe, world: World, state: tuple[np.ndarray, np.ndarray]) -> PairTable:
    """Return a state as a table of pairs."""
    lengths = [torch.from_numpy(field) for field in (world.chosen_lengths, world.rejected_lengths)]
    policy = PairLogprobs(*(torch.from_numpy(field) for field in state), *lengths)
    reference = PairLogprobs(torch.from_numpy(world.chosen), torch.from_numpy(world.rejected), *lengths)
    margins, loss = torch.zeros(len(world.chosen), dtype=torch.float64), Loss(**recipe.loss.coefficients())
    table = tables.table_of(policy, reference, loss(policy, reference, margins))
    return replace(table, prompt_key=[prompt_key(prompt) for prompt in world.prompt])


def write_state(
    folder: Path,
    recipe: Recipe,
    world: World,
    state: tuple[np.ndarray, np.ndarray],
    way: float,
    seed: int,
    *,
    samples: int,
    scored: bool,
) -> None:
    """Write what is measured of a run at one step: eval_pairs.parquet, generations.parquet, evaluation.json."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = {"where": [f"test.jsonl:{row + 1}" for row in range(len(world.chosen))],
               "prompt_key": [prompt_key(prompt) for prompt in world.prompt]}  # fmt: skip
    texts = {"prompt": [prompt_text(prompt) for prompt in world.prompt],
             "chosen": [f"{WORDS[row % len(WORDS)]}, of course" for row in range(len(world.chosen))],
             "rejected": [f"Who cares? <script>alert({row})</script>" for row in range(len(world.chosen))]}  # fmt: skip
    numbers = {name: field for name, field in scored_state(recipe, world, state).columns().items() if name not in columns}
    initial = {"initial_chosen": world.chosen, "initial_rejected": world.rejected}
    pyarrow.parquet.write_table(pyarrow.table(columns | numbers | initial | texts), folder / "eval_pairs.parquet")
    metrics = metrics_of(recipe, world, state)
    found: dict[str, Any] = {"pairs": metrics, "intervals": share_intervals(metrics)}
    if samples:
        answers = sampled_answers(world, way, seed, samples, scored)
        pyarrow.parquet.write_table(pyarrow.table(answers), folder / "generations.parquet")
        found["generation"] = generation_summary(answers, len(world.ease), samples)
    write_atomically(folder / "evaluation.json", json.dumps(found, indent=1))


def sampled_answers(world: World, way: float, seed: int, samples: int, scored: bool) -> dict[str, Any]:
    """Return the columns of generations.parquet; KL(π‖π0) per answer has mean way² times the prompt's ease, squared."""
    random = np.random.default_rng([seed, 3, round(1e6 * way)])
    prompt = np.repeat(np.arange(len(world.ease)), samples)
    ease = (world.ease**2 / (world.ease**2).mean())[prompt]
    kl = way**2 * ease * random.gamma(8, 1 / 8, len(prompt))
    tokens = random.integers(5, 60, len(prompt))
    noise = random.normal(0, 1, (3, len(prompt)))
    columns = {
        "prompt_key": [prompt_key(index) for index in prompt],
        "prompt": [prompt_text(index) for index in prompt],
        "sample": np.tile(np.arange(samples), len(world.ease)),
        "answer": [f"{WORDS[index % len(WORDS)]} it is" for index in prompt],
        "tokens": tokens,
        "ended": tokens < 58,
        "kl": kl,
        "log_policy": -1.2 * tokens,
        "log_reference": -1.2 * tokens - kl - np.sqrt(2 * kl) * noise[0],
        "entropy": tokens * (1.4 - 0.1 * way),
    }
    if not scored:
        return columns
    return columns | {
        "score": 0.8 * way - 0.25 * way**2 + noise[1],
        "reference_answer": ["plain"] * len(prompt),
        "reference_tokens": random.integers(5, 60, len(prompt)),
        "reference_score": noise[2],
    }


def generation_summary(columns: Mapping[str, Any], prompts: int, samples: int) -> dict[str, Any]:
    """Return the "generation" part of evaluation.json; standard errors are over prompts."""

    def mean(values: Any) -> dict[str, float]:
        by_prompt = np.asarray(values, float).reshape(prompts, samples).mean(1)
        return {"mean": float(by_prompt.mean()), "standard_error": float(by_prompt.std(ddof=1) / prompts**0.5)}

    found = {
        "prompts": prompts,
        "samples": samples,
        "max_new_tokens": 64,
        "seed": 0,
        "kl": mean(columns["kl"]),
        "kl_per_token": mean(columns["kl"] / columns["tokens"]),
        "kl_k1": mean(columns["log_policy"] - columns["log_reference"]),
        "entropy_per_token": {"mean": float(columns["entropy"].sum() / columns["tokens"].sum()), "standard_error": 0.01},
        "tokens": mean(columns["tokens"]),
        "ended": float(columns["ended"].mean()),
        "distinct_1": 0.4,
        "distinct_2": 0.8,
    }
    if "score" in columns:
        ahead = np.sign(columns["score"] - columns["reference_score"])
        found["win_rate"] = mean((ahead + 1) / 2)
    return found


def prompt_key(prompt: int) -> str:
    """Return a key of 64 hexadecimal digits, as those of real prompts."""
    return f"{prompt + 1:064x}"


def prompt_text(prompt: int) -> str:
    """Return the prompt's text, with characters that a page must escape."""
    return f"Number {prompt}: {WORDS[prompt % len(WORDS)]} or <i>not</i>?"
