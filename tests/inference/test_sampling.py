"""Answers drawn from a model: from its distribution exactly, the same whatever else is drawn, and ended where they end."""

import copy
import math
from unittest import mock

import numpy as np
import pytest
import torch
from exact_lm import ANSWERS, END, PROMPTS, logprobs_of_all_answers, make_world
from scipy import stats
from transformers import GenerationConfig

from pe_dpo.inference import sampling
from pe_dpo.inference.policy import Policy
from pe_dpo.inference.sampling import gumbel_noise, sample
from pe_dpo.model.adapter import as_reference
from pe_dpo.model.attention import switch_on
from pe_dpo.model.base import end_token_ids, inspect_base, load_base, load_tokenizer
from pe_dpo.progress import progress, showing

TWO_TO_64 = 2**64


@pytest.fixture
def tiny(tiny_base):
    """The tiny base (context 256), in float32."""
    return load_base(inspect_base(str(tiny_base), quantize="none", dtype="float32"))


def prompts_of_many_lengths(count, seed=0, longest=30):
    generator = np.random.default_rng(seed)
    return [generator.integers(3, 250, size=generator.integers(1, longest)).astype(np.int32) for _ in range(count)]


def draw(model, prompts, names=None, *, ends=(), seed=0, tokens=20, budget=10_000, **options):
    policy = Policy(model, None, None, ends)
    return sample(policy, prompts, names, max_new_tokens=tokens, seed=seed, token_budget=budget, **options)


def ids_of(answers):
    return [answer.ids.tolist() for answer in answers]


def disturb(model, size=1.0):
    """Give a PEFT model adapters that do something."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += size * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------------ the distribution


@pytest.mark.slow
@pytest.mark.parametrize("side", ["policy", "reference"])
def test_answers_come_as_often_as_the_enumerated_model_says(side):
    """χ² over all 21 answers to each of two prompts, 4,000 draws each; both sides of one PEFT model."""
    world = make_world()
    disturb(world.policy, 0.1)
    draws = 4000
    prompts = [np.array(prompt, dtype=np.int32) for prompt in PROMPTS for _ in range(draws)]
    with torch.no_grad():
        policy = logprobs_of_all_answers(world.policy)
    assert (policy - world.base_logprobs).abs().max() > 0.5, "the two sides must differ for the test to tell them apart"
    if side == "policy":
        said, truth = draw(world.policy, prompts, ends=[END], tokens=2), policy
    else:
        with as_reference(world.policy):
            said, truth = draw(world.policy, prompts, ends=[END], tokens=2), world.base_logprobs
    numbers = {answer: number for number, answer in enumerate(ANSWERS)}
    for which, chances in enumerate(truth.exp().numpy()):
        found = [numbers[tuple(answer.ids.tolist())] for answer in said[which * draws : (which + 1) * draws]]
        counts, expected = np.bincount(found, minlength=len(ANSWERS)), draws * chances
        rare = expected < 5  # χ² wants five of each: the rare ones count as one
        counts, expected = (np.append(column[~rare], column[rare].sum()) for column in (counts, expected))
        kept = expected > 0
        assert stats.chisquare(counts[kept], expected[kept] * counts.sum() / expected.sum()).pvalue > 1e-3


def test_the_log_prob_of_an_answer_is_the_one_of_a_plain_forward(tiny):
    """Left padding, a cache, and rounds make no difference."""
    prompts = prompts_of_many_lengths(12)
    for prompt, answer in zip(prompts, draw(tiny, prompts, tokens=40), strict=True):
        ids = torch.tensor([[*prompt.tolist(), *answer.ids.tolist()]])
        with torch.no_grad():
            logprobs = tiny(ids).logits[0].log_softmax(dim=-1)
        wanted = logprobs[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None]).double().sum()
        assert answer.logprob == pytest.approx(float(wanted), abs=1e-4)


def test_the_noise_is_that_of_splitmix64():
    """Against the published generator in Python's own integers: Steele, Lea & Flood 2014, and Vigna's splitmix64.c."""

    def mixed(state):
        z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % TWO_TO_64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % TWO_TO_64
        return z ^ (z >> 31)

    def stream(state, size):
        return [mixed((state + (index + 1) * 0x9E3779B97F4A7C15) % TWO_TO_64) for index in range(size)]

    assert stream(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]  # its published test vector
    states = [17, -(2**62) - 5]
    noise = gumbel_noise(torch.tensor(states), torch.tensor([3, 3]), size=50)
    for state, row in zip(states, noise.tolist(), strict=True):
        bits = stream(stream(state % TWO_TO_64, 4)[3], 50)
        wanted = [-math.log(-math.log1p(-((value >> 11) + 0.5) / 2**53)) for value in bits]
        assert row == pytest.approx(wanted, rel=1e-12)


def test_the_noise_is_gumbel_and_independent_between_tokens_positions_and_answers():
    states = torch.tensor([sampling._state(0, str(index)) for index in range(40)])
    noise = torch.stack([gumbel_noise(states, torch.full_like(states, position), 100) for position in range(10)]).numpy()
    assert stats.kstest(noise.ravel(), "gumbel_r").pvalue > 1e-3
    for axis in range(3):
        neighbours = np.moveaxis(noise, axis, 0)
        correlation = np.corrcoef(neighbours[:-1].ravel(), neighbours[1:].ravel())[0, 1]
        assert abs(correlation) < 4 / np.sqrt(neighbours[1:].size)


def test_the_settings_of_the_base_s_generation_config_change_nothing(tiny):
    prompts = prompts_of_many_lengths(6)
    plain = ids_of(draw(tiny, prompts))
    settings = GenerationConfig(
        do_sample=True, temperature=0.1, top_k=1, top_p=0.1, repetition_penalty=9.0, no_repeat_ngram_size=1, max_length=3,
        min_new_tokens=15, suppress_tokens=[5, 6, 7], eos_token_id=list(range(200)), num_beams=3, use_cache=False,
    )  # fmt: skip
    tiny.generation_config = settings
    assert ids_of(draw(tiny, prompts)) == plain
    assert tiny.generation_config is settings


# ------------------------------------------------------------------------------------------------ the same answers


@pytest.mark.slow
def test_an_answer_does_not_depend_on_order_or_batches_or_company(tiny):
    prompts = prompts_of_many_lengths(12)
    names = [str(index) for index in range(12)]
    together = ids_of(draw(tiny, prompts, names))
    assert ids_of(draw(tiny, prompts[::-1], names[::-1]))[::-1] == together
    assert ids_of(draw(tiny, prompts, names, budget=120)) == together
    assert ids_of(draw(tiny, prompts, names, budget=1)) == together
    assert ids_of(draw(tiny, prompts[3:5], names[3:5])) == together[3:5]


@pytest.mark.slow
def test_regrouping_changes_nothing(tiny, monkeypatch):
    """Never, as soon as one has ended, and when it pays; also where answers of different lengths come together again."""
    prompts = prompts_of_many_lengths(12)
    ends = set(range(0, 320, 16))
    found, batches = [], []
    for price, check, budget in ((1e9, 8, 10_000), (0.0, 1, 10_000), (0.0, 3, 300), (0.2, 2, 300)):
        monkeypatch.setattr(sampling, "PRICE", price)
        monkeypatch.setattr(sampling, "CHECK", check)
        with mock.patch.object(sampling, "_extend", wraps=sampling._extend) as extend:
            found.append(ids_of(draw(tiny, prompts, ends=ends, tokens=33, budget=budget)))
        batches.append(extend.call_count)
    assert found[0] == found[1] == found[2] == found[3]
    assert batches[0] == 1
    assert batches[1] > 5
    assert batches[3] < batches[2]


def test_a_batch_goes_on_without_its_ended_rows_when_they_have_cost_what_reading_the_others_does():
    """Two of three rows of 10 tokens end at once: after 8 tokens they have cost 16, and to read the third again costs 18; after
    16 tokens 32 and 26."""
    regroup = sampling._Regroup({0}, width=10)
    stops = []
    for step in range(1, 25):
        ids = torch.ones(3, 10 + step, dtype=torch.long)
        ids[:2, 10:] = 0
        stops.append(bool(regroup(ids, None).all()))
    assert stops.index(True) + 1 == 16


def test_a_lower_limit_gives_the_beginning_of_the_same_answer(tiny):
    prompts = prompts_of_many_lengths(4)
    long = ids_of(draw(tiny, prompts, tokens=30))
    assert ids_of(draw(tiny, prompts, tokens=9)) == [ids[:9] for ids in long]


def test_other_names_and_other_seeds_give_other_answers(tiny):
    prompt = prompts_of_many_lengths(1) * 3
    one = ids_of(draw(tiny, prompt, ["a", "b", "c"]))
    assert len({tuple(ids) for ids in one}) == 3
    assert ids_of(draw(tiny, prompt, ["a", "b", "c"], seed=1)) != one
    assert ids_of(draw(tiny, prompt, ["a", "a", "a"])) == [one[0]] * 3


@pytest.mark.slow
def test_two_models_that_agree_almost_say_almost_the_same():
    """Shared noise: first tokens differ about as rarely as the distributions do (at most 2·TV), not as two draws would."""
    world = make_world()
    disturb(world.policy, 0.005)
    prompts = [np.array(PROMPTS[0], dtype=np.int32)] * 2000
    policy = [answer.ids[0] for answer in draw(world.policy, prompts, ends=[END], tokens=1)]
    with as_reference(world.policy):
        reference = [answer.ids[0] for answer in draw(world.policy, prompts, ends=[END], tokens=1)]
        ids = torch.tensor([PROMPTS[0]])
        q = world.policy(ids).logits[0, -1].softmax(-1)
    with torch.no_grad():
        p = world.policy(ids).logits[0, -1].softmax(-1)
    distance = 0.5 * float((p - q).abs().sum())
    differ = np.mean(np.array(policy) != np.array(reference))
    assert 0.01 < distance < 0.1
    assert differ < 2 * distance + 4 * math.sqrt(2 * distance / 2000)
    assert differ < 0.5 * (1 - float((p * q).sum())), "independent draws would differ that often"


# ------------------------------------------------------------------------------------------------ where answers end


def test_an_answer_ends_at_its_first_end_token_and_keeps_it(tiny):
    ends = set(range(0, 320, 8))
    said = draw(tiny, prompts_of_many_lengths(40), ends=ends, tokens=30)
    for answer in said:
        assert not ends & set(answer.ids[:-1].tolist())
        assert answer.ended == (answer.ids[-1] in ends)
        assert answer.ended or len(answer.ids) == 30
    assert {answer.ended for answer in said} == {True, False}


def test_an_answer_is_the_same_up_to_its_end_whatever_ends_it(tiny):
    prompts = prompts_of_many_lengths(10)
    ends = set(range(0, 320, 8))
    endless = ids_of(draw(tiny, prompts, tokens=30))
    for ids, ended in zip(endless, ids_of(draw(tiny, prompts, ends=ends, tokens=30)), strict=True):
        assert ids[: len(ended)] == ended


def test_answers_are_cut_where_the_context_ends(tiny):
    """A context of 256: prompts of 250 and 256 tokens leave room for 6, and for the one token that is always read."""
    prompts = [np.full(250, 5, np.int32), np.full(256, 5, np.int32), np.full(20, 5, np.int32)]
    assert [len(answer.ids) for answer in draw(tiny, prompts, tokens=24)] == [6, 1, 24]


@pytest.mark.slow
def test_a_model_that_begins_and_ends_with_the_same_token_answers(shared):
    """BOS = EOS = the only padding there is: a prompt that begins with it has not ended, an answer does with it."""
    folder = str(shared / "models" / "hh-dialogue-4m")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.bos_token_id == tokenizer.eos_token_id
    model = load_base(inspect_base(folder, quantize="none", dtype="float32"))
    end = tokenizer.eos_token_id
    text = tokenizer("\n\nHuman: How are you?\n\nAssistant:", add_special_tokens=False)["input_ids"]
    prompts = [np.array([end, *text], np.int32), np.array([end, *text[:4]], np.int32)] * 10
    said = draw(model, prompts, ends={end, *end_token_ids(folder)}, tokens=60)
    assert any(answer.ended for answer in said)
    assert all(end not in answer.ids[:-1] for answer in said)
    assert np.mean([len(answer.ids) for answer in said]) > 3


# ------------------------------------------------------------------------------------------------ what stays as it was


@pytest.mark.parametrize("training", [True, False])
def test_the_model_and_all_random_generators_stay_as_they_were(tiny, training):
    tiny.train(training)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy(), copy.deepcopy(tiny.config.to_dict())
    config = tiny.generation_config
    draw(tiny, prompts_of_many_lengths(3))
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert tiny.config.to_dict() == before[2]
    assert tiny.generation_config is config
    assert tiny.training is training


def test_a_model_whose_attention_is_switched_to_packed_rows_says_the_same(tiny):
    prompts = prompts_of_many_lengths(8)
    before = ids_of(draw(tiny, prompts))
    switch_on(tiny)
    assert ids_of(draw(tiny, prompts)) == before


@pytest.mark.slow
def test_a_model_that_computes_in_bfloat16_draws_from_its_own_distribution(tiny_base):
    """Rounding moves log-probs by up to 0.05 nats per √token; the draw itself is made in float64."""
    model = load_base(inspect_base(str(tiny_base), quantize="none", dtype="bfloat16"))
    prompts = prompts_of_many_lengths(8)
    for prompt, answer in zip(prompts, draw(model, prompts, budget=100), strict=True):
        ids = torch.tensor([[*prompt.tolist(), *answer.ids.tolist()]])
        with torch.no_grad():
            logprobs = model(ids).logits[0].float().log_softmax(dim=-1)
        wanted = logprobs[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None]).double().sum()
        assert abs(answer.logprob - float(wanted)) < 0.05 * math.sqrt(len(answer.ids))


def test_progress_counts_answers(tiny):
    seen = []
    with showing(lambda what, done, total: seen.append((done, total))), progress("drawing"):
        draw(tiny, prompts_of_many_lengths(5))
    assert seen[-1] == (5, 5)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_model_with_a_sliding_window_and_soft_capped_scores_is_drawn_from_right():
    """Gemma 2: its masks and caps must survive left padding, also with its attention switched to packed rows."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, sliding_window=6, max_position_embeddings=64, initializer_range=0.3, attn_logit_softcapping=5.0,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    generator = np.random.default_rng(0)
    prompts = [generator.integers(3, 60, size=size).astype(np.int32) for size in (2, 9, 14, 5)]
    switch_on(model)
    for prompt, answer in zip(prompts, draw(model, prompts), strict=True):
        ids = torch.tensor([[*prompt.tolist(), *answer.ids.tolist()]])
        with torch.no_grad():
            logprobs = model(ids).logits[0].log_softmax(dim=-1)
        wanted = logprobs[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None]).double().sum()
        assert answer.logprob == pytest.approx(float(wanted), abs=1e-3)
