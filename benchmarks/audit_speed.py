"""Seconds of `pe-dpo audit` on 10,000 pairs whose reference log-probs are in the store: a fresh process each round.

With the tokenizer's own threads, as from a shell; torch has one thread.
"""

import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.results import Settings, save, temporary_folder
from benchmarks.rounds import spread
from pe_dpo.quickstart.demo import BASE

PAIRS, QUICK_PAIRS = 10_000, 500
WORDS = "the a an old new small large red blue of in on with river house dog cat tea bread runs sits says was is not very"
VARIANTS = {"tables": [], "json": ["--json"], "plots": ["--plots", "plots"]}


@dataclass(frozen=True)
class AuditSettings(Settings):
    """Results that lie in audit.json."""

    @property
    def name(self) -> str:
        """Name of the results."""
        return "-".join(["audit"] + ["quick"] * self.is_quick)


def run_audit(settings: Settings) -> None:
    """Fill a store for synthetic pairs under the quickstart's base, time audits from it, print and save."""
    settings = AuditSettings("audit", rounds=settings.rounds, is_quick=settings.is_quick, out=settings.out)
    work = temporary_folder()
    pairs = QUICK_PAIRS if settings.is_quick else PAIRS
    recipe = write_world(work, pairs)
    os.environ["PE_DPO_CACHE"] = str(work)
    fill_store(recipe)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    order = random.Random(0)
    for number in range(1, settings.rounds + 1):
        for name in order.sample(list(VARIANTS), len(VARIANTS)):
            found[name].append(_timed(work, recipe, VARIANTS[name]))
        print(
            f"  round {number}: " + ", ".join(f"{name} {found[name][-1]['wall_seconds']:.1f} s" for name in VARIANTS),
            flush=True,
        )
    for name, rounds in found.items():
        wall, cpu = (spread([one[key] for one in rounds]) for key in ("wall_seconds", "cpu_seconds"))
        print(f"{name:8} wall {wall!s} s, CPU {cpu!s} s")
    parts = _parts(recipe)
    print("CPU seconds within one: " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in parts.items()))
    print(save(settings, {"pairs": pairs, "rounds": found, "cpu_seconds_of_parts": parts}))


def write_world(folder: Path, pairs: int) -> Path:
    """Write pairs of random words with lengths like HH's and a recipe on the quickstart's base; return the recipe."""
    draw, words = random.Random(0), WORDS.split()

    def text(low: int, high: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(low, high)))

    rows = ({"prompt": text(20, 90), "chosen": text(3, 40), "rejected": text(3, 40)} for _ in range(pairs))
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = folder / "audit.yaml"
    recipe.write_text(
        f"model: {{base: '{BASE}', quantize: none}}\n"
        f"data: {{train: '{folder / 'train.jsonl'}', eval: 0}}\n"
        "loss: {preset: dpo, gamma: 0.9x}\n"
        f"output: '{folder / 'run'}'\n",
        encoding="utf-8",
    )
    return recipe


def fill_store(path: Path) -> None:
    """Write a log-prob for every answer of a recipe's training pairs: drawn, not computed, which takes seconds not minutes."""
    from pe_dpo.inference.policy import load_policy
    from pe_dpo.inference.reference import open_reference
    from pe_dpo.inference.reference_store import StoredLogprob, answer_key
    from pe_dpo.inference.scorer import choose_scorer
    from pe_dpo.recipe import load_recipe
    from pe_dpo.training.preparation import prepare_run

    recipe, draw = load_recipe(path), random.Random(1)
    data = prepare_run(recipe).data
    policy = load_policy(recipe, device="cpu")
    scorer = choose_scorer(policy.model, data.train, token_budget=1024)
    reference = open_reference(policy, scorer, caching="store")
    answers = ((pair.prompt_ids, ids) for pair in data.train for ids in (pair.chosen_ids, pair.rejected_ids))
    rows = {answer_key(*answer): StoredLogprob(draw.gauss(-3.0, 0.5) * len(answer[1]), len(answer[1])) for answer in answers}
    reference.store.put(reference.key, rows)


def _timed(folder: Path, recipe: Path, options: list[str]) -> dict[str, float]:
    """Wall and CPU seconds of one audit in a fresh process, imports and all."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "pe_dpo", "audit", str(recipe), *options]
    shell = {key: value for key, value in os.environ.items() if key != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run(command, cwd=folder, env=shell, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the audit failed:\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_seconds": time.perf_counter() - start, "cpu_seconds": cpu}


def _parts(path: Path) -> dict[str, float]:
    """CPU seconds of what an audit does, one after the other in this process."""

    from pe_dpo.audit.audit import Audit
    from pe_dpo.data import prepare_pairs
    from pe_dpo.inference.pairs import pair_terms
    from pe_dpo.inference.reference import stored_logprobs
    from pe_dpo.model.base import end_token_ids, inspect_base, load_tokenizer
    from pe_dpo.recipe import load_recipe

    found: dict[str, float] = {}

    def part(name: str, work: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = work()
        found[name] = time.process_time() - start
        return result

    recipe = load_recipe(path)
    facts = part("base inspected", lambda: inspect_base(**recipe.model.model_dump()))
    tokenizer = part("tokenizer", lambda: load_tokenizer(recipe.model.base))
    prepare = partial(prepare_pairs, recipe.data, tokenizer=tokenizer, context_length=facts.context_length)
    data = part("pairs read and tokenized", lambda: prepare(end_token_ids=end_token_ids(recipe.model.base)))
    reference = part("log-probs from the store", lambda: stored_logprobs(facts, data.train, device="cpu"))
    keys, terms = [pair.prompt_key for pair in data.train], pair_terms(data.train)
    part("audit", lambda: Audit(reference, recipe.loss, terms, keys))
    return found
