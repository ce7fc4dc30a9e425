"""KL(π‖π0), entropy and length on sampled answers, against a model small enough to write down whole."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pyarrow.parquet
import pytest
import torch
from exact_lm import ANSWERS, END, PROMPTS, logprobs_of_all_answers, make_world
from torch import Tensor

from pe_dpo.data.pairs import EncodedPair
from pe_dpo.errors import ModelError, UsageError
from pe_dpo.inference import divergence
from pe_dpo.inference.divergence import compare_logits, data_prefix_kl, divergences, store_logits
from pe_dpo.inference.drift import Questions, distinct, measure_drift
from pe_dpo.inference.policy import Policy
from pe_dpo.inference.scorer import Scorer, choose_scorer
from pe_dpo.metrics.estimates import clustered_mean, clustered_ratio
from pe_dpo.model.adapter import POLICY, as_reference, attach_adapter
from pe_dpo.model.base import inspect_base, load_base, load_tokenizer
from pe_dpo.recipe.schema import GenerationSection

pytestmark = pytest.mark.slow


class Truth(NamedTuple):
    """What the 21 answers to one prompt come to under π, each with its chance; (21,) float64."""

    chance: Tensor
    kl: Tensor
    """Σ_t KL(π(·|y_<t) ‖ π0(·|y_<t)), from the enumerated answers' chances alone."""
    k1: Tensor
    entropy: Tensor
    tokens: Tensor
    ended: Tensor

    def mean(self, name):
        return float((self.chance * getattr(self, name)).sum())

    def sd(self, name):
        values = getattr(self, name)
        return math.sqrt(float((self.chance * (values - self.mean(name)) ** 2).sum()))


def enumerate_truth(policy, reference):
    """The truth of one prompt from log π and log π0 of all answers, (21,) each."""
    first = [answer[0] for answer in ANSWERS]

    def conditionals(logprobs):
        """log-chance of each first token, and of each second one after it, by adding up answers."""
        firsts = {
            x: torch.logsumexp(torch.stack([lp for lp, f in zip(logprobs, first, strict=True) if f == x]), 0) for x in first
        }
        seconds = {
            x: torch.stack([lp - firsts[x] for lp, answer in zip(logprobs, ANSWERS, strict=True) if answer[0] == x])
            for x in firsts
            if x != END
        }
        return firsts, seconds

    (p1, p2), (q1, q2) = conditionals(policy), conditionals(reference)
    kl_first = sum(p1[x].exp() * (p1[x] - q1[x]) for x in p1)
    h_first = -sum(p1[x].exp() * p1[x] for x in p1)
    kl = [kl_first + (0 if x == END else (p2[x].exp() * (p2[x] - q2[x])).sum()) for x in first]
    entropy = [h_first + (0 if x == END else -(p2[x].exp() * p2[x]).sum()) for x in first]
    tokens = torch.tensor([len(answer) for answer in ANSWERS], dtype=torch.float64)
    ended = torch.tensor([answer[-1] == END for answer in ANSWERS], dtype=torch.float64)
    return Truth(policy.exp(), torch.stack(kl), policy - reference, torch.stack(entropy), tokens, ended)


class Words:
    """As much of a tokenizer as the exact world needs."""

    bos_token_id = None

    def decode(self, ids, skip_special_tokens=False):
        return " ".join(str(int(id)) for id in ids if not (skip_special_tokens and int(id) == END))


def disturb(model, size):
    """Give a PEFT model adapters that do something."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += size * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def moved():
    """The exact world with a policy about a tenth of a nat from its reference, and the truth of each prompt."""
    world = make_world()
    disturb(world.policy, 0.015)
    with torch.no_grad():
        policy = logprobs_of_all_answers(world.policy)
    return world.policy, [enumerate_truth(*rows) for rows in zip(policy, world.base_logprobs, strict=True)]


def pairs_of(prompts, answers=((1, END), (2, END))):
    """Pairs with keys of their own, so that several may have one prompt."""
    chosen, rejected = (np.array(answer, dtype=np.int32) for answer in answers)
    return [
        EncodedPair(np.array(prompt, dtype=np.int32), chosen, rejected, 0.0, f"row {index}", f"{index:04d}")
        for index, prompt in enumerate(prompts)
    ]


def drift_of(model, pairs, tokenizer=None, **changes):
    seed, ends, budget = (changes.pop(name, default) for name, default in (("seed", 0), ("ends", {END}), ("budget", 4000)))
    settings = GenerationSection(**{"prompts": len(pairs), "samples": 1, "max_new_tokens": 2, **changes})
    scorer = Scorer("padded", torch.device("cpu"), token_budget=budget)
    return measure_drift(policy_of(model, tokenizer, ends), scorer, pairs, settings, seed=seed)


def policy_of(model, tokenizer=None, ends=()):
    return Policy(model, tokenizer or Words(), None, ends)


def rows_of(drift):
    """The sampled answers one by one."""
    columns = {**drift.table.columns(), "ids": drift.ids, "prompt_ids": drift.asked.prompts}
    return [SimpleNamespace(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]


@pytest.fixture(scope="module")
def many(moved):
    """3,000 answers to each of the two prompts."""
    model, _ = moved
    return [drift_of(model, pairs_of([prompt]), samples=3000) for prompt in PROMPTS]


# ------------------------------------------------------------------------------------------------ against the truth


def test_the_truth_is_the_truth(moved):
    """The enumerated KL both ways: a sum over answers of log-ratios, and of the chain rule's terms."""
    for truth in moved[1]:
        assert truth.mean("kl") == pytest.approx(truth.mean("k1"), abs=1e-12)
        assert truth.mean("entropy") == pytest.approx(float(-(truth.chance * truth.chance.log()).sum()), abs=1e-12)
        assert 0.02 < truth.mean("kl") < 0.5


def test_every_answer_has_the_numbers_of_the_enumeration(many, moved):
    numbers = {answer: number for number, answer in enumerate(ANSWERS)}
    for drift, truth in zip(many, moved[1], strict=True):
        which = [numbers[tuple(answer.ids.tolist())] for answer in rows_of(drift)]
        assert len(set(which)) > 15
        for name, wanted in (("kl", truth.kl), ("entropy", truth.entropy), ("tokens", truth.tokens), ("ended", truth.ended)):
            found = torch.tensor([float(getattr(answer, name)) for answer in rows_of(drift)], dtype=torch.float64)
            torch.testing.assert_close(found, wanted[which], rtol=0, atol=1e-10)
        ratio = torch.tensor([answer.log_policy - answer.log_reference for answer in rows_of(drift)], dtype=torch.float64)
        torch.testing.assert_close(ratio, truth.k1[which], rtol=0, atol=1e-10)
        logprob = torch.tensor([answer.log_policy for answer in rows_of(drift)], dtype=torch.float64)
        torch.testing.assert_close(logprob, truth.chance.log()[which], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["kl", "k1", "entropy", "tokens", "ended"])
def test_the_means_are_unbiased(many, moved, name):
    """Within four standard errors of the truth, the errors taken from the enumerated variances."""
    for drift, truth in zip(many, moved[1], strict=True):
        values = [a.log_policy - a.log_reference if name == "k1" else float(getattr(a, name)) for a in rows_of(drift)]
        z = (np.mean(values) - truth.mean(name)) / (truth.sd(name) / math.sqrt(len(values)))
        assert abs(z) < 4


def test_rao_blackwell_saves_as_many_answers_as_the_enumerated_variances_say(many, moved):
    for drift, truth in zip(many, moved[1], strict=True):
        kl = np.array([answer.kl for answer in rows_of(drift)])
        k1 = np.array([answer.log_policy - answer.log_reference for answer in rows_of(drift)])
        wanted = (truth.sd("k1") / truth.sd("kl")) ** 2
        assert wanted > 5, "the point of the estimator"
        assert k1.var() / kl.var() == pytest.approx(wanted, rel=0.25)


def test_the_standard_error_is_honest_over_repeats(moved):
    """40 seeds with 50 independent prompts of two answers: z-scores have mean 0 and variance 1."""
    model, truths = moved
    pairs = pairs_of([PROMPTS[0]] * 50)
    scores = {"kl": [], "kl_k1": [], "tokens": []}
    for seed in range(40):
        summary = drift_of(model, pairs, samples=2, seed=seed).summary()
        for name in scores:
            truth = truths[0].mean("k1" if name == "kl_k1" else name)
            scores[name].append((summary[name]["mean"] - truth) / summary[name]["standard_error"])
    for values in scores.values():
        assert abs(np.mean(values)) < 4 / math.sqrt(40)
        assert 0.55 < np.var(values) < 1.8, "χ² with 39 degrees of freedom: 1 ± 4 standard errors"


def test_the_summary_has_what_evaluation_json_promises(moved):
    model, _ = moved
    drift = drift_of(model, pairs_of(PROMPTS * 5), samples=3)
    summary = json.loads(json.dumps(drift.summary()))
    assert {key: summary[key] for key in ("prompts", "samples", "max_new_tokens", "seed")} == {
        "prompts": 10, "samples": 3, "max_new_tokens": 2, "seed": 0,
    }  # fmt: skip
    answers = rows_of(drift)
    total = sum(answer.tokens for answer in answers)
    assert summary["kl"]["mean"] == pytest.approx(np.mean([answer.kl for answer in answers]), rel=1e-12)
    assert summary["kl_per_token"]["mean"] == pytest.approx(sum(answer.kl for answer in answers) / total, rel=1e-12)
    assert summary["entropy_per_token"]["mean"] == pytest.approx(sum(answer.entropy for answer in answers) / total, rel=1e-12)
    assert summary["ended"] == np.mean([answer.ended for answer in answers])
    assert all(summary[name]["standard_error"] > 0 for name in ("kl", "kl_per_token", "kl_k1", "entropy_per_token", "tokens"))
    assert summary["sampler_error"] < 1e-5, "generation casts logits to float32"


def test_with_one_prompt_there_is_no_standard_error(moved):
    assert drift_of(moved[0], pairs_of(PROMPTS[:1]), samples=5).summary()["kl"]["standard_error"] is None


def test_the_kl_along_the_data_is_that_of_its_prefixes(moved):
    """Of the chosen answers 1 END and 3 4, whoever gave them."""
    model, truths = moved
    pairs = [*pairs_of(PROMPTS[:1], ((1, END), (2, END))), *pairs_of(PROMPTS[1:], ((3, 4), (2, END)))]
    wanted = [float(truths[0].kl[ANSWERS.index((1, END))]), float(truths[1].kl[ANSWERS.index((3, 4))])]
    found = data_prefix_kl(policy_of(model), pairs, token_budget=4000)
    assert found["per_answer"]["mean"] == pytest.approx(np.mean(wanted), abs=1e-10)
    assert found["per_token"]["mean"] == pytest.approx(sum(wanted) / 4, abs=1e-10)


def test_two_whole_models_come_to_the_same_as_one_with_adapters(moved, tmp_path):
    model, _ = moved
    prompts = [np.array(prompt, dtype=np.int32) for prompt in PROMPTS for _ in ANSWERS]
    answers = [np.array(answer, dtype=np.int32) for answer in ANSWERS] * 2
    wanted = divergences(policy_of(model), prompts, answers, token_budget=40)
    store_logits(policy_of(model), prompts, answers, tmp_path, token_budget=40)
    with as_reference(model):
        base = policy_of(model.get_base_model())
        assert divergences(base, prompts, answers, token_budget=40, stored=tmp_path).tolist() == wanted.tolist()


def test_models_with_vocabularies_of_different_sizes_are_refused(moved, tiny_base, tmp_path):
    prompts, answers = [np.array([1, 2], np.int32)], [np.array([3], np.int32)]
    store_logits(policy_of(moved[0]), prompts, answers, tmp_path, token_budget=40)
    other = policy_of(load_base(inspect_base(str(tiny_base), quantize="none")))
    with pytest.raises(ModelError, match="vocabularies of 5 and 320 tokens"):
        divergences(other, prompts, answers, token_budget=40, stored=tmp_path)


def test_logits_that_do_not_fit_on_the_disk_are_refused_before_any_is_made(moved, tmp_path, monkeypatch):
    monkeypatch.setattr(divergence.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    with pytest.raises(UsageError, match="ask fewer `prompts`"):
        prompts, answers = [np.array([1], np.int32)] * 3, [np.array([2], np.int32)] * 3
        store_logits(policy_of(moved[0]), prompts, answers, tmp_path, token_budget=9)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ a model with words


@pytest.fixture
def make_tiny(tiny_base):
    """The tiny base with an adapter that does something; (model, tokenizer)."""

    def make(quantize="none", dtype="float32", size=0.1):
        base = load_base(inspect_base(str(tiny_base), quantize=quantize, dtype=dtype))
        model = attach_adapter(base, rank=4, alpha=8)
        if size:
            disturb(model, size)
        return model, load_tokenizer(str(tiny_base))

    return make


def worded_pairs(tokenizer, count=9):
    """Pairs whose prompts have many lengths."""
    pairs = []
    for index in range(count):
        prompt, chosen, rejected = (
            np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
            for text in ("What is " + "very " * index + "red?", "It is" + "!" * index, "Who knows")
        )
        pairs.append(EncodedPair(prompt, chosen, rejected, 0.0, f"row {index}", f"{(index * 37) % 100:02d}"))
    return pairs


def as_pairs(drift):
    """Sampled answers as pairs, so that the scorer of training can look at them."""
    return [
        EncodedPair(answer.prompt_ids, answer.ids, answer.ids[::-1].copy(), 0.0, "", answer.prompt_key)
        for answer in rows_of(drift)
    ]


@pytest.mark.parametrize(
    ("quantize", "dtype", "tolerance"), [("none", "float32", 1e-4), ("nf4", "float32", 1e-4), ("nf4", "bfloat16", 5e-2)]
)
@pytest.mark.parametrize("packing", [True, False])
def test_log_probs_are_those_of_the_scorer(make_tiny, quantize, dtype, tolerance, packing):
    """Also where attention is switched to packed rows, and on a 4-bit base; nats by √token."""
    model, tokenizer = make_tiny(quantize, dtype)
    pairs = worded_pairs(tokenizer)
    scorer = choose_scorer(model, pairs, packing=packing, token_budget=400)
    drift = drift_of(model, pairs, tokenizer, max_new_tokens=24, ends=set(range(0, 320, 16)), samples=2)
    policy = scorer.score_pairs(model, as_pairs(drift))
    with as_reference(model):
        reference = scorer.score_pairs(model, as_pairs(drift))
    roots = policy.chosen_lengths.double().sqrt()
    for name, wanted in (("log_policy", policy.chosen), ("log_reference", reference.chosen)):
        found = torch.tensor([getattr(answer, name) for answer in rows_of(drift)], dtype=torch.float64)
        assert float(((found - wanted) / roots).abs().max()) < tolerance
    assert drift.sampler_error < tolerance
    assert all(answer.kl > 0 for answer in rows_of(drift))


def test_neither_order_nor_budget_nor_tiles_change_a_number(make_tiny, monkeypatch):
    model, tokenizer = make_tiny()
    pairs = worded_pairs(tokenizer)
    one = drift_of(model, pairs, tokenizer, max_new_tokens=12)
    monkeypatch.setattr(divergence, "TILE", 700)
    monkeypatch.setattr(divergence, "LOGITS", 5000)
    other = drift_of(model, pairs[::-1], tokenizer, max_new_tokens=12, budget=60)
    assert [answer.prompt_key for answer in rows_of(one)] == sorted(pair.prompt_key for pair in pairs)
    for a, b in zip(rows_of(one), rows_of(other), strict=True):
        assert (a.prompt_key, a.answer, a.ids.tolist()) == (b.prompt_key, b.answer, b.ids.tolist())
        assert [a.kl, a.log_policy, a.log_reference, a.entropy] == pytest.approx(
            [b.kl, b.log_policy, b.log_reference, b.entropy], abs=1e-4
        )


def test_the_first_prompts_are_the_same_in_a_larger_set_of_pairs():
    pairs = pairs_of([(1, 2), (3,), (4, 3, 2), (2, 2)])
    few = Questions(pairs[::-1] * 2, GenerationSection(prompts=2, samples=2))
    assert list(zip(few.keys, few.numbers, strict=True)) == [("0000", 0), ("0000", 1), ("0001", 0), ("0001", 1)]
    many = Questions(pairs, GenerationSection(prompts=99, samples=2))
    assert (few.keys, few.numbers) == (many.keys[:4], many.numbers[:4])
    assert all(ids is other for ids, other in zip(few.prompts, many.prompts, strict=False))


def test_a_prompt_that_was_shortened_for_some_pairs_is_asked_at_its_longest():
    whole, short = pairs_of([(1, 2, 3), (2, 3)])
    short = EncodedPair(short.prompt_ids, short.chosen_ids, short.rejected_ids, 0.0, "", whole.prompt_key)
    asked = Questions([short, whole, short], GenerationSection(prompts=5))
    assert [ids.tolist() for ids in asked.prompts] == [[1, 2, 3]]


def test_a_policy_that_has_not_moved_is_at_distance_zero_exactly(make_tiny):
    model, tokenizer = make_tiny(size=0)
    drift = drift_of(model, worded_pairs(tokenizer), tokenizer, max_new_tokens=12)
    assert [answer.log_policy for answer in rows_of(drift)] == [answer.log_reference for answer in rows_of(drift)]
    assert max(abs(answer.kl) for answer in rows_of(drift)) < 1e-6
    assert drift.summary()["kl_k1"] == {"mean": 0.0, "standard_error": 0.0}


def test_the_model_is_left_as_it_was(make_tiny):
    model, tokenizer = make_tiny()
    model.train()
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    state = torch.random.get_rng_state()
    drift_of(model, worded_pairs(tokenizer), tokenizer, max_new_tokens=4)
    assert model.training
    assert model.active_adapters == [POLICY]
    assert trainable == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(parameter.grad is None and torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_model_that_is_not_itself_in_padded_batches_is_sampled_alone(make_tiny, monkeypatch):
    """It loses its mask in generation: what is padded sees the padding."""
    model, tokenizer = make_tiny()
    pairs = worded_pairs(tokenizer)
    wanted = drift_of(model, pairs, tokenizer, max_new_tokens=12)
    causal_lm = model.get_base_model()
    prepare = causal_lm.prepare_inputs_for_generation

    def without_mask(*args, **kwargs):
        inputs = prepare(*args, **kwargs)
        return {name: value for name, value in inputs.items() if name not in ("attention_mask", "position_ids")}

    monkeypatch.setattr(causal_lm, "prepare_inputs_for_generation", without_mask)
    found = drift_of(model, pairs, tokenizer, max_new_tokens=12)
    assert [answer.answer for answer in rows_of(found)] == [answer.answer for answer in rows_of(wanted)]
    assert found.sampler_error < 1e-4


def test_tokens_that_a_model_rules_out_do_not_make_its_numbers_infinite():
    """−∞ among the logits of both models: 0·log 0 = 0. What only the reference rules out is infinitely far."""
    policy = torch.tensor([[0.0, 1.0, -torch.inf]])
    reference = torch.tensor([[1.0, 0.0, -torch.inf]])
    kl, log_p, log_q, entropy = compare_logits(policy, reference, torch.tensor([1]), torch.tensor([0]), 1)[0].tolist()
    p, q = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))
    assert kl == pytest.approx(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)), abs=1e-6)
    assert (log_p, log_q) == pytest.approx((math.log(p), math.log(q)), abs=1e-6)
    assert entropy == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), abs=1e-6)
    assert compare_logits(policy, policy.roll(1), torch.tensor([1]), torch.tensor([0]), 1)[0, 0] == torch.inf


def test_a_small_kl_survives_large_logits():
    """Logits around 1,000 differ by 1e-3: in float32 the normalisers alone are off by 6e-5, the KL is 1.2e-7 ± 1e-8."""
    generator = torch.Generator().manual_seed(0)
    wide = 1000 + torch.randn(64, 50, generator=generator, dtype=torch.float64)
    moved = wide + 1e-3 * torch.randn(64, 50, generator=generator, dtype=torch.float64)
    policy, reference = wide.float(), moved.float()
    p, q = policy.double().log_softmax(1), reference.double().log_softmax(1)
    truth = float((p.exp() * (p - q)).sum())
    found = float(
        compare_logits(policy, reference, torch.zeros(64, dtype=torch.long), torch.zeros(64, dtype=torch.long), 1)[0, 0]
    )
    assert found == pytest.approx(truth, rel=0.15)


# ------------------------------------------------------------------------------------------------ what is written, statistics


def test_answers_are_written_one_by_one(moved, tmp_path):
    model, _ = moved
    drift = drift_of(model, pairs_of(PROMPTS), samples=2)
    replace(drift.table, score=np.array([1.0, 2.0, 3.0, 4.0])).save(tmp_path / "generations.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "generations.parquet")
    types = {field.name: str(field.type) for field in table.schema}
    assert types == {
        "prompt_key": "string", "prompt": "string", "sample": "int64", "answer": "string", "tokens": "int64", "ended": "bool",
        "kl": "double", "log_policy": "double", "log_reference": "double", "entropy": "double", "score": "double",
    }  # fmt: skip
    rows = table.to_pylist()
    assert [(row["prompt_key"], row["sample"], row["prompt"]) for row in rows] == [
        ("0000", 0, "1 2"), ("0000", 1, "1 2"), ("0001", 0, "4 3 2"), ("0001", 1, "4 3 2"),
    ]  # fmt: skip
    assert [row["tokens"] for row in rows] == [len(row["answer"].split()) + row["ended"] for row in rows]
    assert [path.name for path in tmp_path.iterdir()] == ["generations.parquet"]


def test_distinct_n_grams_by_hand():
    texts = [[1, 2, 1], [2, 1], []]
    assert distinct(texts, 1) == 2 / 5
    assert distinct(texts, 2) == 2 / 3  # (1 2) (2 1), (2 1)
    assert distinct(texts, 4) == 0.0


def test_clusters_of_one_size_have_the_standard_error_of_their_means():
    values = [1.0, 3.0, 2.0, 6.0, 5.0, 5.0]
    means = [2.0, 4.0, 5.0]
    found = clustered_mean(values, ["a", "a", "b", "b", "c", "c"])
    assert found == {"mean": pytest.approx(22 / 6), "standard_error": pytest.approx(np.std(means, ddof=1) / math.sqrt(3))}


def test_the_clustered_error_is_honest_where_the_plain_one_is_not():
    """Prompts of one to five answers that share an effect: 95 % intervals of a ratio hold the truth, 1,000 repeats."""
    generator = np.random.default_rng(0)
    hits = plain_hits = 0
    for _ in range(1000):
        clusters = np.repeat(np.arange(80), generator.integers(1, 6, size=80))
        tokens = generator.integers(5, 50, size=len(clusters))
        kl = tokens * (2.0 + generator.normal(size=80)[clusters] + 0.3 * generator.normal(size=len(clusters)))
        found = clustered_ratio(kl, tokens, clusters.tolist())
        plain = clustered_ratio(kl, tokens, list(range(len(clusters))))
        hits += abs(found["mean"] - 2.0) < 1.96 * found["standard_error"]
        plain_hits += abs(plain["mean"] - 2.0) < 1.96 * plain["standard_error"]
    assert 0.92 < hits / 1000 < 0.97
    assert plain_hits / 1000 < 0.85
