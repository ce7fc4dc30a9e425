"""The pairs that are timed, of six shapes.

hh        real HH dialogues: long prompts, short answers
uf        random ids with lengths as in UltraFeedback
uf-graph  the same with four ranked answers to a prompt, every better one against every worse one
polite    a real set of short instructions and shorter answers
near      HH's dialogues with two answers that differ by a few tokens, as pairs made by editing have them
long      answers of about a thousand tokens to prompts of about a hundred

plain   = 2P + C + R    tokens that a pairwise trainer must feed, without padding
shared  =  P + C + R    tokens that remain when both answers share their prompt
scored  =      C + R    tokens with a log-prob
padded  = rows × longest row of the micro-batch
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from pe_dpo.data.pairs import EncodedPair

ShapeName = Literal["hh", "uf", "uf-graph", "polite", "near", "long"]

VOCABULARY = 8192
PAD, END = 0, 1
LONGEST_ROW = 1024
"""Tokens; also TRL's default `max_length`, so that nothing is cut on either side."""
PAIRS_PER_STEP: dict[str, int] = {"hh": 8, "uf": 4, "uf-graph": 6, "polite": 8, "near": 8, "long": 2}
MICROBATCHES = (8, 4, 2, 1)
LAST_TAG = "\n\nAssistant:"


class Facts(NamedTuple):
    """Token facts of a set of pairs."""

    pairs: int
    plain: int
    """Tokens, 2P + C + R over all pairs."""
    shared: int
    """Tokens, P + C + R over all pairs."""
    scored: int
    """Tokens, C + R over all pairs."""
    plain_over_shared: float
    padded_over_plain: dict[int, float]
    """By pairs per micro-batch, in the order of the pairs."""
    mean_lengths: dict[str, float]
    """Tokens of prompt, chosen, rejected."""


def scratch() -> Path:
    """Return the folder for what can be made again: the tokenizer and the random bases."""
    folder = Path(tempfile.gettempdir()) / "pe-dpo-benchmarks"
    folder.mkdir(exist_ok=True)
    return folder


def population(shape: ShapeName) -> list[EncodedPair]:
    """Return all pairs of a shape, in a random order with a fixed seed."""
    if shape == "uf-graph":
        return _uf_graphs(512)  # the pairs of one prompt lie together
    made = {"hh": _hh_pairs, "uf": _uf_pairs, "polite": _polite_pairs, "near": _near_pairs, "long": _long_pairs}
    pairs = made[shape]()
    order = np.random.default_rng(0).permutation(len(pairs))
    return [pairs[index] for index in order]


def draw(pairs: Sequence[EncodedPair], shape: ShapeName) -> list[EncodedPair]:
    """Return the optimizer batch to time: a sample whose ratios are close to those of the population."""
    size = PAIRS_PER_STEP[shape]
    if shape == "uf-graph":  # the pairs of one prompt lie together
        candidates = [list(pairs[start : start + size]) for start in range(0, len(pairs) - size + 1, 6)]
        return _nearest(candidates, pairs, size)
    return draw_pairs(pairs, size, seeds=1500)


def draw_pairs(pairs: Sequence[EncodedPair], count: int, *, seeds: int) -> list[EncodedPair]:
    """Return a sample of so many pairs whose ratios are close to those of the population.

    A search over fixed seeds takes the sample with the smallest summed relative deviation of padded/plain (all micro-batch
    sizes), plain/shared, scored/plain and tokens per pair.

    Args:
        pairs: the population.
        count: of the sample.
        seeds: how many samples to try.
    """
    generators = (np.random.default_rng(seed) for seed in range(seeds))
    candidates = [[pairs[i] for i in g.choice(len(pairs), count, replace=False)] for g in generators]
    return _nearest(candidates, pairs, min(count, max(MICROBATCHES)))


def _nearest(candidates: Sequence[list[EncodedPair]], pairs: Sequence[EncodedPair], size: int) -> list[EncodedPair]:
    wanted = _ratios(facts(pairs), size)
    return min(candidates, key=lambda sample: float(np.abs(np.log(_ratios(facts(sample), size) / wanted)).sum()))


def facts(pairs: Sequence[EncodedPair]) -> Facts:
    """Return the token facts of pairs, micro-batches taken in their order."""
    prompt, chosen, rejected = (
        np.array([len(getattr(pair, name)) for pair in pairs]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    )
    plain, shared, scored = 2 * prompt + chosen + rejected, prompt + chosen + rejected, chosen + rejected
    rows = prompt + np.maximum(chosen, rejected)
    padded = {}
    for size in MICROBATCHES:
        whole = len(rows) // size * size
        if whole:
            longest = rows[:whole].reshape(-1, size).max(axis=1)
            padded[size] = float(2 * size * longest.sum() / plain[:whole].sum())
    return Facts(
        pairs=len(pairs),
        plain=int(plain.sum()),
        shared=int(shared.sum()),
        scored=int(scored.sum()),
        plain_over_shared=float(plain.sum() / shared.sum()),
        padded_over_plain=padded,
        mean_lengths={"prompt": float(prompt.mean()), "chosen": float(chosen.mean()), "rejected": float(rejected.mean())},
    )


def histogram(pairs: Sequence[EncodedPair]) -> dict[str, Any]:
    """Return quantiles (10, 50, 90, 100 %) and counts in bins of 64 tokens, of each part's length."""
    bins = np.arange(0, LONGEST_ROW + 65, 64)
    report: dict[str, Any] = {"bin_edges_tokens": bins.tolist()}
    for part in ("prompt", "chosen", "rejected"):
        lengths = np.array([len(getattr(pair, f"{part}_ids")) for pair in pairs])
        quantiles = np.quantile(lengths, [0.1, 0.5, 0.9, 1.0])
        report[part] = {"quantiles_tokens": quantiles.tolist(), "pairs": np.histogram(lengths, bins)[0].tolist()}
    return report


def facts_lines(name: str, found: Facts) -> list[str]:
    """Return the facts as lines to print."""
    means = ", ".join(f"{part} {value:.0f}" for part, value in found.mean_lengths.items())
    padded = ", ".join(f"{value:.2f} at {size}" for size, value in found.padded_over_plain.items())
    return [
        f"{name}: {found.pairs} pairs; mean tokens: {means}; plain {found.plain}, shared {found.shared}, scored {found.scored}",
        f"  plain/shared {found.plain_over_shared:.2f}; padded/plain by pairs per micro-batch: {padded}",
    ]


def graph_tokens(pairs: Sequence[EncodedPair]) -> int:
    """Return the tokens that remain when every prompt and every answer of it is fed once."""
    prompts = {pair.prompt_key: len(pair.prompt_ids) for pair in pairs}
    answers = {(pair.prompt_key, ids.tobytes()): len(ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)}
    return sum(prompts.values()) + sum(answers.values())


def tokenizer() -> Any:
    """Return a byte-level BPE with 8192 tokens, trained on the HH file on first use and kept in the scratch folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    source = _hh_file()
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:12]
    path = scratch() / f"bpe-{VOCABULARY}-{digest}.json"
    if path.exists():
        return Tokenizer.from_file(str(path))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for row in _hh_rows() for text in (row["chosen"], row["rejected"]))
    bpe.train_from_iterator(texts, trainer)
    partial = path.with_suffix(f".{os.getpid()}")
    bpe.save(str(partial))
    partial.replace(path)
    return bpe


def shared_folder() -> Path:
    """Return the folder with the real data and models that are beside a checkout, not in it."""
    return Path(os.environ.get("PE_DPO_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def _hh_file() -> Path:
    path = shared_folder() / "data" / "hh-harmless" / "all.jsonl"
    if not path.is_file():
        raise SystemExit("benchmarks: no data/hh-harmless/all.jsonl in the shared folder; set PE_DPO_SHARED to that folder")
    return path


def _hh_rows() -> list[dict[str, str]]:
    with _hh_file().open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _hh_pairs() -> list[EncodedPair]:
    """The dialogues, cut after the last assistant tag that both sides share; rows beyond the cap or without a difference go."""
    bpe = tokenizer()
    pairs = []
    for number, row in enumerate(_hh_rows(), start=1):
        same = next((n for n, (a, b) in enumerate(zip(row["chosen"], row["rejected"], strict=False)) if a != b), None)
        cut = row["chosen"][:same].rfind(LAST_TAG) + len(LAST_TAG)
        if cut < len(LAST_TAG):
            continue
        prompt, chosen, rejected = row["chosen"][:cut], row["chosen"][cut:], row["rejected"][cut:]
        ids = [encoding.ids for encoding in bpe.encode_batch([prompt, chosen, rejected])]
        if chosen != rejected and len(ids[0]) + max(len(ids[1]), len(ids[2])) < LONGEST_ROW:
            pairs.append(_pair(ids[0], [*ids[1], END], [*ids[2], END], where=f"hh:{number}", key=prompt))
    return pairs


def _uf_lengths(count: int, answers: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Lognormal lengths: prompts (count,) with mean near 160, answers (count, answers) with mean near 320, capped."""
    prompt = np.exp(generator.normal(np.log(166) - 0.7**2 / 2, 0.7, count))
    common, own = generator.normal(size=(count, 1)), generator.normal(size=(count, answers))
    answer = np.exp(np.log(323) - 0.46**2 / 2 + 0.46 * (np.sqrt(0.1) * common + np.sqrt(0.9) * own))
    prompt = np.clip(prompt, 8, 512).astype(int)
    return prompt, np.clip(answer.astype(int), 4, (LONGEST_ROW - prompt)[:, None])


def _polite_pairs() -> list[EncodedPair]:
    bpe, pairs = tokenizer(), []
    source = shared_folder() / "data" / "rasbt-politeness" / "train.jsonl"
    for number, line in enumerate(source.read_text(encoding="utf-8").splitlines(), start=1):
        row = json.loads(line)
        prompt = f"\n\nHuman: {row['instruction']} {row['input']}{LAST_TAG}"
        texts = [prompt, f" {row['chosen']}", f" {row['rejected']}"]
        ids = [encoding.ids for encoding in bpe.encode_batch(texts)]
        if row["chosen"] != row["rejected"]:
            pairs.append(_pair(ids[0], [*ids[1], END], [*ids[2], END], where=f"polite:{number}", key=prompt))
    return pairs


def _near_pairs() -> list[EncodedPair]:
    """HH's chosen answers against the same with one to three tokens replaced."""
    generator, pairs = np.random.default_rng(3), []
    for pair in _hh_pairs():
        if len(pair.chosen_ids) < 6:
            continue
        edited = pair.chosen_ids.copy()
        places = generator.choice(len(edited) - 1, size=generator.integers(1, 4), replace=False)
        edited[places] = generator.integers(2, VOCABULARY, size=len(places))
        pairs.append(_pair(pair.prompt_ids, pair.chosen_ids, edited, where=pair.where, key=pair.prompt_key))
    return pairs


def _long_pairs(count: int = 512) -> list[EncodedPair]:
    generator = np.random.default_rng(4)
    prompts = generator.integers(64, 193, size=count)
    answers = generator.integers(850, 1151, size=(count, 2))
    return [_random_pairs(f"long:{n}", prompts[n], answers[n], generator)[0] for n in range(count)]


def _uf_pairs(count: int = 4096) -> list[EncodedPair]:
    generator = np.random.default_rng(1)
    prompts, answers = _uf_lengths(count, 2, generator)
    return [_random_pairs(f"uf:{n}", prompts[n], answers[n], generator)[0] for n in range(count)]


def _uf_graphs(count: int) -> list[EncodedPair]:
    """Four ranked answers to each prompt, every better one against every worse one: six pairs, lying together."""
    generator = np.random.default_rng(2)
    prompts, answers = _uf_lengths(count, 4, generator)
    return [pair for n in range(count) for pair in _random_pairs(f"uf-graph:{n}", prompts[n], answers[n], generator)]


def _random_pairs(where: str, prompt: int, answers: Sequence[int], generator: np.random.Generator) -> list[EncodedPair]:
    prompt_ids, *answer_ids = (generator.integers(2, VOCABULARY, size=length) for length in (prompt, *answers))
    for ids in answer_ids:
        ids[-1] = END
    return [_pair(prompt_ids, better, worse, where=where, key=where) for better, worse in combinations(answer_ids, 2)]


def _pair(prompt: Any, chosen: Any, rejected: Any, *, where: str, key: str) -> EncodedPair:
    prompt_ids, chosen_ids, rejected_ids = (np.asarray(part, dtype=np.int32) for part in (prompt, chosen, rejected))
    digest = hashlib.sha256(key.encode()).hexdigest()
    return EncodedPair(prompt_ids, chosen_ids, rejected_ids, margin=0.0, where=where, prompt_key=digest)


def _ratios(found: Facts, largest: int) -> np.ndarray:
    per_pair = found.plain / found.pairs
    padded = [ratio for size, ratio in found.padded_over_plain.items() if size <= largest]
    return np.array([per_pair, found.plain_over_shared, found.scored / found.plain, *padded])
