"""Win rates: which scorers there are, what they are shown, and what is made of their scores."""

import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from pe_dpo.errors import ModelError, UsageError
from pe_dpo.evaluation.judge import check_scorer, judge, length_controlled, open_scorer, prompts_as_written, win_rate
from pe_dpo.metrics.table import AnswerTable
from pe_dpo.recipe.data_section import DataSection
from pe_dpo.recipe.schema import GenerationSection

TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
WORDS = ("[UNK]", "user", "assistant", "good", "bad", "question")


def answers_of(*texts, prompt_keys=None):
    """Sampled answers as far as a judge looks at them: one token a word."""
    keys = prompt_keys or [str(index) for index in range(len(texts))]
    tokens, nothing = np.array([len(text.split()) for text in texts]), np.zeros(len(texts))
    return AnswerTable(
        prompt_key=keys, sample=nothing, answer=list(texts), tokens=tokens, ended=nothing, kl=nothing, log_policy=nothing,
        log_reference=nothing, entropy=nothing,
    )  # fmt: skip


def judged(policy, reference, scorer=lambda prompts, answers: [float(answer.split()[0]) for answer in answers], **options):
    """What a judge makes of the policy's and the reference's answers, whose first words are their scores."""
    answers = answers_of(*policy, **options)
    prompts = {key: f"prompt {key}" for key in answers.prompt_key}
    return judge("test", scorer, answers, [(text, len(text.split())) for text in reference], prompts)


# ------------------------------------------------------------------------------------------------ Python functions


@pytest.fixture
def scorer_file(tmp_path):
    def write(body):
        path = tmp_path / "my_scorer.py"
        path.write_text(body)
        return f"{path}:score"

    return write


def test_a_function_in_a_file_scores(scorer_file):
    scorer = open_scorer(scorer_file("def score(prompts, answers):\n    return [len(a) for a in answers]\n"), device="cpu")
    assert scorer(["x", "y"], ["one", "three"]) == [3, 5]


def test_a_function_in_a_module_scores():
    assert open_scorer("operator:eq", device="cpu")(["same"], ["same"]) is True


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("{tmp}/none.py:score", "there is no file .*none.py"),
        ("no_such_module_here:score", "No module named 'no_such_module_here'; install it, or name a file"),
        ("operator:no_such", "operator has no function no_such; write one: def no_such"),
        ("operator:__name__", "operator has no function __name__"),
    ],
)
def test_a_scorer_that_is_not_there_is_named(tmp_path, name, words):
    with pytest.raises(UsageError, match=words):
        open_scorer(name.format(tmp=tmp_path), device="cpu")


@pytest.mark.parametrize(
    ("name", "prompts", "words"),
    [
        ("operator:eq", 0, "say how many prompts to ask: generation.prompts=100"),
        ("none.py:score", 3, "there is no file none.py"),
        ("no_such_module_here:score", 3, "No module named 'no_such_module_here'"),
    ],
)
def test_a_scorer_that_cannot_judge_is_found_before_anything_of_it_is_run(name, prompts, words):
    with pytest.raises(UsageError, match=words):
        check_scorer(name, [GenerationSection(prompts=3), GenerationSection(prompts=prompts)])


def test_what_is_no_function_is_taken_for_a_model(tmp_path):
    with pytest.raises(ModelError, match=r"neither module:function, file\.py:function nor a model"):
        open_scorer(str(tmp_path / "nothing"), device="cpu")


def test_a_scorer_sees_prompts_and_answers_of_both_sides_in_order():
    seen = []

    def scorer(prompts, answers):
        seen.append((prompts, answers))
        return [0.0] * len(answers)

    judged(["a", "b"], ["c", "d"], scorer)
    assert seen == [(["prompt 0", "prompt 1"], ["a", "b"]), (["prompt 0", "prompt 1"], ["c", "d"])]


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ([1.0], "1 score for 2 answers"),
        ([1.0, float("nan")], "the score of answer 2 is nan"),
        (None, "it must return one number for each answer"),
        (["good", 1.0], "it must return one number for each answer"),
    ],
)
def test_scores_that_are_none_are_refused(scores, words):
    with pytest.raises(UsageError, match=words):
        judged(["a", "b"], ["c", "d"], lambda prompts, answers: scores)


def test_an_error_inside_the_scorer_is_not_hidden():
    def scorer(prompts, answers):
        raise TypeError("its own fault")

    with pytest.raises(TypeError, match="its own fault"):
        judged(["a"], ["b"], scorer)


def test_scores_may_be_a_tensor():
    answers = judged(["a", "b"], ["c", "d"], lambda prompts, answers: torch.tensor([1.0, 2.0]))
    assert answers.score.tolist() == [1.0, 2.0]


# ------------------------------------------------------------------------------------------------ reward models


@pytest.fixture
def make_reward_model(tmp_path):
    """Save a random Llama with a head of so many labels, and a tokenizer of a word per token; return its folder."""

    def make(kind=LlamaForSequenceClassification, labels=1, template=TEMPLATE):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_labels=labels, pad_token_id=None, initializer_range=0.5,
        )  # fmt: skip
        kind(config).save_pretrained(tmp_path)
        words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path)
        return str(tmp_path)

    return make


def reward(folder, words):
    """The logit behind the last of some words, by hand."""
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    ids = torch.tensor([[WORDS.index(word) for word in words.split()]])
    with torch.no_grad():
        return float(model.score(model.model(ids).last_hidden_state)[0, -1, 0])


def test_a_reward_model_reads_its_chat_template(make_reward_model):
    folder = make_reward_model()
    found = open_scorer(folder, device="cpu")(["question", "question question"], ["good", "bad bad"])
    wanted = ["user question assistant good", "user question question assistant bad bad"]
    assert found == pytest.approx([reward(folder, words) for words in wanted], abs=1e-6)
    assert abs(found[0] - found[1]) > 1e-3


def test_a_reward_model_reads_the_turns_of_a_conversation(make_reward_model):
    folder = make_reward_model()
    turns = (
        {"role": "user", "content": "bad"},
        {"role": "assistant", "content": "bad"},
        {"role": "user", "content": "question"},
    )
    found = open_scorer(folder, device="cpu")([turns], ["good"])
    assert found == pytest.approx([reward(folder, "user bad assistant bad user question assistant good")], abs=1e-6)


def test_a_reward_model_without_a_template_reads_question_and_answer(make_reward_model):
    folder = make_reward_model(template=None)
    assert open_scorer(folder, device="cpu")(["question"], ["good"]) == pytest.approx(
        [reward(folder, "question good")], abs=1e-6
    )


def test_a_classifier_of_two_labels_is_refused_before_it_is_loaded(make_reward_model):
    with pytest.raises(ModelError, match="has 2 labels; a reward model has one"):
        open_scorer(make_reward_model(labels=2), device="cpu")


def test_a_language_model_is_refused_as_a_reward_model(make_reward_model):
    """transformers would load it with a random head and a warning."""
    scorer = open_scorer(make_reward_model(LlamaForCausalLM), device="cpu")
    with pytest.raises(ModelError, match=r"score.weight is not in its files, so its scores would be random"):
        scorer(["question"], ["good"])


# ------------------------------------------------------------------------------------------------ win rates


def test_wins_ties_and_losses_by_hand():
    """Three wins, three ties, six losses of twelve prompts: (3 + 3/2) / 12; the error is that of twelve numbers."""
    found = win_rate(judged(["3", "2", "1", "0"] * 3, ["1", "2", "2", "5"] * 3))
    assert found["mean"] == 4.5 / 12
    assert found["standard_error"] == pytest.approx(np.std([1, 0.5, 0, 0] * 3, ddof=1) / math.sqrt(12))
    half = 2.200985 * found["standard_error"]  # Student's t with 11 degrees of freedom
    assert found["interval"] == pytest.approx([0.375 - half, 0.375 + half], abs=1e-6)
    assert found["ties"] == 0.25
    assert found["score_difference"]["mean"] == (2 + 0 - 1 - 5) / 4


def test_answers_to_one_prompt_count_as_one_for_the_interval():
    policy, reference = ["1"] * 10 + ["0"] * 10, ["0"] * 10 + ["1"] * 10
    apart = win_rate(judged(policy, reference))
    together = win_rate(judged(policy, reference, prompt_keys=["a"] * 10 + ["b"] * 10))
    assert apart["mean"] == together["mean"] == 0.5
    assert together["standard_error"] == pytest.approx(0.5)
    assert apart["standard_error"] == pytest.approx(0.5 / math.sqrt(19))


def test_when_all_win_the_interval_still_leaves_room():
    found = win_rate(judged(["1"] * 10, ["0"] * 10))
    assert found["mean"] == 1.0
    assert found["interval"] == pytest.approx([0.7225, 1.0], abs=1e-4)  # Wilson, 10 of 10
    assert 0.9 < found["length_controlled"]["mean"] < 1


def test_with_one_prompt_there_is_no_interval():
    found = win_rate(judged(["1", "0"], ["0", "0"], prompt_keys=["a", "a"]))
    assert found["interval"] is None
    assert found["length_controlled"]["interval"] is None


def planted(generator, ability, slope, prompts, samples):
    """Wins with a known dependence on length; returns wins, length differences, prompts."""
    longer = generator.normal(20, 40, size=prompts * samples).round()
    chance = 1 / (1 + np.exp(-(ability + slope * np.tanh(longer / longer.std()))))
    wins = (generator.random(len(longer)) < chance).astype(float)
    return wins, longer, [str(index // samples) for index in range(len(longer))]


def test_length_control_finds_the_planted_ability():
    """Its 95 % intervals hold σ(0.4) in 300 repeats about as often as they say; the raw win rate is far off."""
    generator = np.random.default_rng(0)
    truth, hits, raw = 1 / (1 + math.exp(-0.4)), 0, []
    for _ in range(300):
        wins, longer, prompts = planted(generator, ability=0.4, slope=2.0, prompts=150, samples=2)
        found = length_controlled(wins, longer, prompts)
        hits += found["interval"][0] < truth < found["interval"][1]
        raw.append(wins.mean())
    assert 0.91 < hits / 300 < 0.985
    assert np.mean(raw) > truth + 0.05


def test_a_judge_of_length_alone_has_no_preference_at_equal_length():
    """Longer always wins: the raw rate says how often the policy is longer, the controlled one that nothing else is there."""
    generator = np.random.default_rng(0)
    longer = generator.normal(30, 40, size=2000).round()
    wins = (np.sign(longer) + 1) / 2
    found = length_controlled(wins, longer, [str(index) for index in range(2000)])
    assert wins.mean() > 0.7
    assert abs(found["mean"] - 0.5) < 0.06
    assert found["slope"] > 3


def test_length_control_without_a_difference_in_length_is_the_raw_rate():
    wins = np.array([1.0, 1.0, 0.5, 0.0] * 50)
    found = length_controlled(wins, np.zeros(200), [str(index) for index in range(200)])
    assert found["mean"] == pytest.approx(wins.mean(), abs=1e-3)
    half = 1.96 * wins.std() / math.sqrt(200)
    assert found["interval"] == pytest.approx([wins.mean() - half, wins.mean() + half], abs=0.01)


def test_length_control_agrees_with_an_independent_optimizer():
    from scipy.optimize import minimize

    wins, longer, prompts = planted(np.random.default_rng(3), 0.2, 1.0, prompts=120, samples=1)
    wins[:10] = 0.5
    slope = np.tanh(longer / longer.std())

    def negative(weights):
        z = weights[0] + weights[1] * slope
        return (
            -np.sum(wins * -np.logaddexp(0, -z) + (1 - wins) * -np.logaddexp(0, z))
            + weights[0] ** 2 / 200
            + weights[1] ** 2 / 12.5
        )

    wanted = minimize(negative, np.zeros(2), tol=1e-12).x
    found = length_controlled(wins, longer, prompts)
    assert found["mean"] == pytest.approx(1 / (1 + math.exp(-wanted[0])), abs=1e-5)
    assert found["slope"] == pytest.approx(wanted[1], abs=1e-4)


# ------------------------------------------------------------------------------------------------ what a scorer is shown


def test_prompts_are_shown_as_their_rows_say_them(tiny_pairs):
    from pe_dpo.data.pairs import prompt_key

    found = prompts_as_written(DataSection(train=str(tiny_pairs)))
    assert len(found) == 33
    assert found[prompt_key("Number 24, warm or round?")] == "Number 24, warm or round?"
    assert len(prompts_as_written(DataSection(train="elsewhere"), str(tiny_pairs / "test.jsonl"))) == 9


def test_prompts_of_a_held_out_file_elsewhere_are_found_too(tiny_pairs):
    data = DataSection(train=str(tiny_pairs / "train.jsonl"), eval=str(tiny_pairs / "test.jsonl"))
    assert len(prompts_as_written(data)) == 33


def test_prompts_of_all_places_are_found_each_by_its_own_columns(tmp_path):
    for name, column in (("a", "prompt"), ("b", "q"), ("c", "prompt"), ("d", "prompt")):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"{column}": "{name}?", "chosen": "yes", "rejected": "no"}}\n')
    mapped = {"path": str(tmp_path / "b.jsonl"), "columns": {"prompt": "q"}, "weight": 0.5}
    data = DataSection(train=[str(tmp_path / "a.jsonl"), mapped], eval=[str(tmp_path / "c.jsonl"), str(tmp_path / "[d].jsonl")])
    assert sorted(prompts_as_written(data).values()) == ["a?", "b?", "c?", "d?"]
    assert list(prompts_as_written(data, str(tmp_path / "c.jsonl")).values()) == ["c?"]
