"""The quickstart itself: the embedded world on the road that everybody's data take."""

import pytest
from world import is_right, manners

from pe_dpo.cli import console
from pe_dpo.quickstart.demo import PAIRS, compare_answers, quickstart_recipe
from pe_dpo.training.train import train


def test_the_recipe_stands_on_nothing_but_the_package_and_finds_a_free_folder(tmp_path):
    runs = tmp_path / "runs #1: mine"
    recipe = quickstart_recipe(["loss.gamma=0", "loss.margin=1"], runs=runs)
    assert (recipe.loss.gamma_value, recipe.model.quantize) == (0, "nf4")
    assert recipe.output == str(runs / "quickstart")
    assert recipe.data.train == str(PAIRS)
    assert not runs.exists()
    (runs / "quickstart").mkdir(parents=True)
    assert quickstart_recipe(runs=runs).output == str(runs / "quickstart-2")
    assert quickstart_recipe(["output=elsewhere"], runs=runs).output == "elsewhere"


@pytest.mark.parametrize(("remark", "turned", "is_explained"), [
    ("both answers became less likely than under the reference (…)", {}, True),
    ("both answers became less likely than under the reference (…)", {"seed": 3}, True),
    ("both answers became less likely than under the reference (…)", {"gamma": "0.5x"}, False),
    ("saturated: …", {}, False),
])  # fmt: skip
def test_the_command_explains_the_warning_of_its_own_run_in_its_numbers(
    monkeypatch, tmp_path, capsys, remark, turned, is_explained
):
    """1.2 nats at 0.1 a token are 12 tokens."""
    from pe_dpo.cli import held_out
    from pe_dpo.cli.quickstart import quickstart
    from pe_dpo.quickstart import demo
    from pe_dpo.training import train as room

    folder, after = tmp_path / "a run", {"displacement/chosen": -1.2, "displacement/chosen_per_token": -0.1}
    result = room.TrainResult(folder, {}, after, room.StartCheck(1, 0.0, 0.0, 0.0), 64, None, [remark])
    monkeypatch.setattr(room, "train", lambda recipe, callbacks: result)
    monkeypatch.setattr(demo, "quickstart_recipe", lambda overrides: None)
    monkeypatch.setattr(demo, "compare_answers", lambda recipe, count: [])
    monkeypatch.setattr(held_out, "show_change", lambda *given, **options: None)
    with console._until_the_command_ends:
        quickstart(**turned)
    said = capsys.readouterr().out
    assert ("here by 1.2 nats in 12 tokens, 0.10 a token." in said and "loss.sft_weight=0.1" in said) == is_explained
    assert said.index(f"warning: {remark}") < said.index("the run lies in")
    assert all(f"pe-dpo {command} '{folder}'" in said for command in ("report", "merge", "serve"))


@pytest.mark.slow
def test_quickstart_turns_a_base_that_ranks_half_of_the_pairs_wrong_into_one_that_ranks_nearly_all_right(tmp_path):
    recipe = quickstart_recipe(runs=tmp_path)
    result = train(recipe)
    assert 0.45 < result.before["accuracy/policy"] < 0.65
    assert result.after["accuracy/policy"] > 0.88
    assert result.after["regimes/policy_right_reference_wrong/pairs"] > 50
    questions, _, base, tuned = zip(*compare_answers(recipe, count=12), strict=True)
    polite = [sum(manners(text) == "courteous" for text in texts) for texts in (base, tuned)]
    right = [
        sum(is_right([{"role": "user", "content": question}], text) for question, text in zip(questions, texts, strict=True))
        for texts in (base, tuned)
    ]
    assert polite[1] >= polite[0] + 3
    assert right[1] >= right[0]
