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


@pytest.mark.parametrize("remark", ["both answers became less likely than under the reference (…)", "saturated: …"])
def test_the_command_explains_the_warning_with_which_it_ends_and_names_what_comes_next(monkeypatch, tmp_path, capsys, remark):
    from pe_dpo.cli.quickstart import quickstart
    from pe_dpo.quickstart import demo
    from pe_dpo.training import train as room

    folder = tmp_path / "a run"
    result = room.TrainResult(folder, {}, {}, room.StartCheck(1, 0.0, 0.0, 0.0), 64, None, [remark])
    monkeypatch.setattr(room, "train", lambda recipe, callbacks: result)
    monkeypatch.setattr(demo, "quickstart_recipe", lambda overrides: None)
    monkeypatch.setenv("COLUMNS", "80")
    with console._until_the_command_ends:
        quickstart()
    said = " ".join(capsys.readouterr().out.split())
    assert ("no failure of this one" in said and "loss.sft_weight=0.1" in said) == remark.startswith("both answers")
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
