"""`pe-dpo convert`: the recipe on stdout or in a file, what differs on stderr, 1 where it is another objective."""

from pathlib import Path

import pytest

from pe_dpo.recipe import load_recipe

CONFIGS = Path(__file__).parents[1] / "convert" / "configs"
ZEPHYR, ORPO = CONFIGS / "zephyr-7b-dpo-qlora.yaml", CONFIGS / "axolotl-mistral-qlora-orpo.yml"


def test_the_recipe_alone_is_on_stdout(pe_dpo, tmp_path) -> None:
    done = pe_dpo("convert", ZEPHYR)
    assert done.code == 0
    path = tmp_path / "recipe.yaml"
    path.write_text(done.out, encoding="utf-8")
    assert load_recipe(path).loss.beta == 0.01
    for title in ("means something else here", "dropped"):
        assert f"\n{title}\n" in done.err


def test_another_objective_is_exit_code_1_and_the_recipe_is_written_all_the_same(pe_dpo, tmp_path) -> None:
    done = pe_dpo("convert", ORPO, "-o", tmp_path / "r.yaml")
    assert (done.code, done.out) == (1, "")
    assert "! rl: orpo" in done.err
    assert "the recipe is not the same objective: see the lines with ! above" in done.err
    assert load_recipe(tmp_path / "r.yaml").adapter.rank == 32


def test_a_file_that_is_there_is_not_written_over_without_a_word(pe_dpo, tmp_path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("mine")
    done = pe_dpo("convert", ZEPHYR, "-o", path)
    assert (done.code, done.err) == (
        2,
        f"error: {path}: exists already; name another file, or write over it with --overwrite\n",
    )
    assert path.read_text() == "mine"
    assert pe_dpo("convert", ZEPHYR, "-o", path, "--overwrite").code == 0
    assert load_recipe(path).loss.beta == 0.01


def test_cards_are_a_flag(pe_dpo) -> None:
    assert "pairs_per_step: 128" in pe_dpo("convert", ZEPHYR, "--gpus", 8).out


def test_unknown_keys_are_listed(pe_dpo, tmp_path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"{ZEPHYR.read_text()}\nnever_heard_of: 3\n")
    done = pe_dpo("convert", path)
    assert "no key of TRL, alignment-handbook that is known" in done.err
    assert "never_heard_of: 3" in done.err


@pytest.mark.parametrize("name", ["zephyr-7b-dpo-qlora.yaml", "8B_lora_dpo_single_device.yaml", "swift-cpo.sh"])
def test_a_screen_of_80_columns_is_enough(pe_dpo, name: str) -> None:
    done = pe_dpo("convert", CONFIGS / name, columns=80)
    assert [line for line in done.err.splitlines() if len(line) > 80] == []


@pytest.mark.slow
@pytest.mark.peer
def test_a_proof_says_how_far_the_losses_are_apart(pe_dpo) -> None:
    pytest.importorskip("trl", reason="TRL is not installed; it comes with the peer extra")
    done = pe_dpo("convert", CONFIGS / "llama3_lora_simpo.yaml", "--prove")
    assert "proof: the same loss as TRL 1.16.0's CPOTrainer, loss_type simpo, on 8 pairs (embedded)" in done.err
    assert "proof: none; TRL 1.16.0 may have this method" in pe_dpo("convert", ORPO, "--prove").err
