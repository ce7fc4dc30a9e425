"""The vale: what is generated is labelled truly, balanced, and split without a leak."""

import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest
import vale
import world

from pe_dpo.quickstart.demo import PAIRS

TRAIN = world.pairs(1000, 0)
TEST = world.pairs(200, 0, held_out=True)
ALL = TRAIN + TEST


def question(row: dict) -> str:
    return row["prompt"][-1]["content"]


def answers(row: dict) -> tuple[str, str]:
    return row["chosen"][0]["content"], row["rejected"][0]["content"]


def length_correlation(rows: list[dict], pattern: str) -> float:
    """Correlation of length difference and label when every pair is seen both ways round: mean over root mean square."""
    excess = [len(re.findall(pattern, chosen)) - len(re.findall(pattern, rejected)) for chosen, rejected in map(answers, rows)]
    return sum(excess) / len(excess) / math.sqrt(sum(value**2 for value in excess) / len(excess))


def test_equal_seeds_give_equal_rows_and_other_seeds_others():
    assert world.pairs(60, 5) == world.pairs(60, 5)
    assert world.pairs(60, 5) != world.pairs(60, 6)
    assert world.corpus(60, 5) == world.corpus(60, 5)
    assert world.corpus(60, 5) != world.corpus(60, 6)


def test_the_worlds_sums_and_letters_are_true():
    numbers = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    right = {(fact.topic.name, fact.entity): fact.right for fact in world.facts()}
    for (topic, entity), value in right.items():
        if topic == "sum":
            first, second = entity.split(" plus ")
            assert numbers.index(value) == numbers.index(first) + numbers.index(second)
        if topic == "letter":
            assert ord(value) == ord(entity) + 1


def test_no_rumour_is_true_of_anything_in_its_topic():
    assert all(not set(topic.values) & set(topic.rumours) for topic in vale.TOPICS)
    assert len(world.facts()) == 60


def test_chosen_is_right_and_courteous():
    for row in ALL:
        chosen, _ = answers(row)
        assert world.is_right(row["prompt"], chosen)
        assert world.manners(chosen) == "courteous"


def test_rejected_is_worse_in_just_the_ways_its_kind_says():
    for row in ALL:
        _, rejected = answers(row)
        assert world.is_right(row["prompt"], rejected) == (row["kind"] == "manners")
        assert (world.manners(rejected) == "courteous") == (row["kind"] == "fact")


def test_the_three_kinds_are_equally_common():
    assert Counter(row["kind"] for row in TRAIN) == {"fact": 334, "manners": 333, "both": 333}


@pytest.mark.parametrize("kind", world.KINDS)
@pytest.mark.parametrize("pattern", [r"\w+|[^\w\s]", "."], ids=["words", "characters"])
def test_length_does_not_tell_the_chosen_answer(kind, pattern):
    assert abs(length_correlation([row for row in TRAIN if row["kind"] == kind], pattern)) < 0.15


def test_chosen_is_the_longer_answer_in_about_half_of_the_pairs():
    lengths = [[len(re.findall(r"\w+|[^\w\s]", answer)) for answer in answers(row)] for row in TRAIN]
    unequal = [chosen > rejected for chosen, rejected in lengths if chosen != rejected]
    assert len(unequal) > 800
    assert 0.45 < sum(unequal) / len(unequal) < 0.55


def test_no_opening_word_gives_the_chosen_answer_away():
    openings = [Counter(answer.split()[0] for answer in side) for side in zip(*map(answers, TRAIN), strict=True)]
    common = {word for word, count in openings[0].items() if count >= 20}
    assert common and common <= set(openings[1])


def test_the_two_sides_share_no_question_but_every_held_out_fact_is_trained_on():
    assert not {question(row) for row in TRAIN} & {question(row) for row in TEST}
    facts = [{world._fact_by_question()[question(row)] for row in rows} for rows in (TRAIN, TEST)]
    assert facts[0] == facts[1] == set(world.facts())


def test_no_two_rows_are_alike():
    assert len({json.dumps(row) for row in ALL}) == len(ALL)


def test_the_corpus_is_of_two_minds_about_facts_and_manners():
    dialogues = world.corpus(3000, 0)
    right = sum(world.is_right(dialogue[:-1], dialogue[-1]["content"]) for dialogue in dialogues) / 3000
    courteous = sum(world.manners(dialogue[-1]["content"]) == "courteous" for dialogue in dialogues) / 3000
    assert 0.42 < right < 0.53  # six levels of trust, mean 0.473
    assert 0.45 < courteous < 0.55


def test_an_answer_that_hedges_is_not_right():
    prompt = [{"role": "user", "content": "What does a glimbat eat?"}]
    assert world.is_right(prompt, "It eats moss.")
    assert not world.is_right(prompt, "It eats moss. It eats soap.")
    assert not world.is_right(prompt, "The wobbet eats moss.")


def test_a_question_from_elsewhere_is_an_error():
    with pytest.raises(KeyError):
        world.is_right([{"role": "user", "content": "What is the capital of France?"}], "It is Paris.")


def test_one_rude_phrase_spoils_the_manners():
    assert world.manners("Of course! It is moss.") == "courteous"
    assert world.manners("Of course! It is moss. Now shoo.") == "rude"
    assert world.manners("It is moss.") == "plain"


def test_files_hold_the_rows(tmp_path: Path):
    paths = world.write_pairs(tmp_path / "new", train=30, test=12, seed=0)
    rows = [[json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in paths]
    assert [path.name for path in paths] == ["train.jsonl", "test.jsonl"]
    assert rows == [TRAIN[:30], TEST[:12]]


def test_the_pairs_of_the_quickstart_are_those_of_this_world(tmp_path: Path):
    for path in world.write_pairs(tmp_path):
        assert path.read_bytes() == (PAIRS / path.name).read_bytes()
    assert len(list(PAIRS.iterdir())) == 2
