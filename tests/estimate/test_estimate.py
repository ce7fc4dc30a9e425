"""The whole estimate: rows that fit a card, what does not fit and what would help, cards, lengths."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from pe_dpo.errors import RecipeError, UsageError
from pe_dpo.estimate import CARDS, estimate_run, find_card, knobs, local_card
from pe_dpo.estimate.estimate import duration
from pe_dpo.estimate.lengths import made_up_lengths, row_of
from pe_dpo.inference.scorer import DENSE_TOKENS
from pe_dpo.recipe import load_recipe

NAME = "llama-3.1-8b-dpo-norm"


@pytest.fixture(scope="module")
def on_24_gb():
    return estimate_run(load_recipe(NAME), find_card("24GB"))


@pytest.fixture(scope="module")
def on_8_gb():
    return estimate_run(load_recipe(NAME), find_card("8GB"))


def test_an_8b_model_in_4_bits_fits_24_gb_without_recomputing(on_24_gb):
    """Rows fill 85 % of the 18.3 GB that 6.37 GB leave of 24.7: 2,550 tokens of 5.9 MB and the transient ones."""
    setup, budget, fixed = on_24_gb.setup, on_24_gb.budget, sum(on_24_gb.setup.fixed().values())
    assert (on_24_gb.fits, setup.recomputes_above, setup.path) == (True, None, "varlen")
    assert budget == pytest.approx(2550, rel=0.02)
    peak, usable, tokens = sum(on_24_gb.parts.values()), on_24_gb.card.usable, on_24_gb.row.tokens
    assert peak == pytest.approx(fixed + 0.85 * (usable - fixed), rel=0.01)
    assert 0.98 * budget < tokens <= budget


def test_a_small_card_recomputes_and_the_check_before_training_is_the_worst(on_8_gb):
    fits, above, words = on_8_gb.fits, on_8_gb.setup.recomputes_above, on_8_gb.describe()
    assert not fits
    assert above < 400
    needed, check, least = on_8_gb.needed, on_8_gb.check, on_8_gb.least
    assert needed == check > least
    assert words.startswith(f"does not fit: {needed / 1e9:.1f} GB at least of 8 on RTX 4060; `pe-dpo estimate`")


def test_what_saves_memory_is_counted_each_by_itself(on_8_gb):
    found = {knob.setting.split(":")[0]: knob for knob in knobs(on_8_gb)}
    assert {*found} >= {"adapter.targets", "adapter.rank"}
    # Half the rank: half of 41.9 M parameters, of which the check has 16 bytes each, and of x·Aᵀ in its rows.
    saved = found["adapter.rank"].saved
    assert saved == pytest.approx(41_943_040 / 2 * 16, rel=0.1)


def test_no_setting_makes_other_codes_of_a_base_that_comes_as_codes(on_8_gb):
    """A recipe that asks for others is refused."""
    made = on_8_gb._replace(setup=on_8_gb.setup._replace(quantize="int8", with_experts=False))
    comes = made._replace(setup=made.setup._replace(stored=made.setup.coded))
    of_made, of_comes = ([knob.setting for knob in knobs(one)] for one in (made, comes))
    assert of_made == ["model.quantize: nf4", *of_comes]


@pytest.mark.slow
def test_nf4_and_recomputation_are_named_where_they_are_off():
    recipe = load_recipe(NAME, ["model.quantize=none", "train.gradient_checkpointing=false", "data.max_length=512"])
    found = estimate_run(recipe, find_card("12GB"))
    saved = {knob.setting: knob.saved for knob in knobs(found)}
    assert next(iter(saved)) == "model.quantize: nf4"
    # 6.98e9 weights at 2 bytes against codes, less what the largest, 14,336 × 4,096, may take in 16 bits as it passes.
    assert saved["model.quantize: nf4"] == pytest.approx(6_979_321_856 * (2 - 0.515869), abs=2 * 14336 * 4096)
    kept = load_recipe(NAME, ["train.gradient_checkpointing=false"])
    saved = {knob.setting: knob.saved for knob in knobs(estimate_run(kept, find_card("12GB")))}
    assert saved["train.gradient_checkpointing: true"] > 5e9
    assert saved["train.optimizer: adamw_bnb_8bit"] == pytest.approx(41_943_040 * (8 - 2.1), rel=1e-3)


@pytest.mark.slow
def test_the_reference_costs_a_pass_over_each_pair_once_or_in_every_step():
    lengths = made_up_lengths(load_recipe(NAME), (170, 320, 320), pairs=12_800, held_out=0)
    card = find_card("H200")
    twice = ["train.epochs=2", "data.eval=0.0"]
    stored, asked = (
        estimate_run(load_recipe(NAME, [*twice, f"reference.policy={policy}"]), card, lengths=lengths)
        for policy in ("auto", "step")
    )
    assert stored.steps == asked.steps == 200
    assert stored.seconds == pytest.approx(200 * stored.step.seconds + 100 * stored.reference.seconds)
    assert asked.seconds == pytest.approx(200 * stored.step.seconds + 200 * stored.reference.seconds)
    without = estimate_run(load_recipe("llama-3.1-8b-simpo", ["train.epochs=2"]), card, lengths=lengths)
    assert without.seconds == pytest.approx(200 * without.step.seconds)


@pytest.mark.slow
def test_a_run_over_an_adapter_counts_both(tmp_path):
    """The frozen one has rank 4 on q_proj of two layers: 2 · 4 · (4096 + 4096) numbers."""
    import json

    import torch
    from safetensors.torch import save_file

    names = [f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_" for layer in (0, 1)]
    tensors = {f"{name}A.weight": torch.zeros(4, 4096) for name in names}
    save_file(tensors | {f"{name}B.weight": torch.zeros(4096, 4) for name in names}, tmp_path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "base_model_name_or_path": "x"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    over = estimate_run(load_recipe(NAME, [f"adapter.over={tmp_path}"]), find_card("24GB")).setup
    assert (over.frozen, over.trained) == (65_536, 41_943_040)
    start = estimate_run(load_recipe(NAME, [f"adapter.start={tmp_path}", "adapter.reference=base"]), find_card("24GB")).setup
    assert (start.frozen, start.trained, start.rank) == (0, 65_536, 4)
    assert [(weight.path, layers) for weight, layers in start.adapted] == [("model.layers.#.self_attn.q_proj", 2)]


def test_data_that_are_not_here_need_their_lengths():
    with pytest.raises(RecipeError, match=r"or give the mean lengths of its pairs in `tokens`, and how many in `pairs`"):
        estimate_run(load_recipe(NAME, ["data.train=some/dataset"]), find_card("24GB"))


def test_made_up_lengths_have_the_means_and_stay_below_the_longest():
    found = made_up_lengths(load_recipe(NAME, ["data.max_length=4096"]), (170, 320, 300), pairs=60_000, source="x")
    assert found.means() == pytest.approx((170, 320, 300), rel=0.05)
    kept = made_up_lengths(load_recipe(NAME, ["data.max_length=1000"]), (170, 320, 300), pairs=60_000)
    assert max(len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in kept.sample) <= 1000
    assert 50_000 < kept.pairs + kept.held_out < 60_000
    assert re.fullmatch(r"around the means given; \d+% of them, longer than data.max_length 1000, are left out", kept.source)
    cut = made_up_lengths(load_recipe(NAME, ["data.max_length=400"]), (170, 320, 300), pairs=60_000, cut=True)
    assert max(len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in cut.sample) == 400
    assert (cut.pairs, cut.held_out) == (58_000, 2_000)
    assert row_of(cut.sample[:3], "varlen").tokens == sum(
        len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) - 2 for p in cut.sample[:3]
    )
    with pytest.raises(UsageError, match="three mean lengths"):
        made_up_lengths(load_recipe(NAME), (170, 320), pairs=10)


@pytest.mark.parametrize(("asked", "name"), [
    ("RTX 4090", "RTX 4090"), ("4090", "RTX 4090"), ("h200", "H200"), ("NVIDIA H200", "H200"), ("24GB", "RTX 4090"),
    ("NVIDIA GeForce RTX 3090", "RTX 3090"), ("80 GB", "H100"), ("a100", "A100 40GB"), ("A100-SXM4-80GB", "A100 80GB"),
])  # fmt: skip
def test_a_card_is_found_by_name_or_size(asked, name):
    assert find_card(asked).name == name


def test_a_size_that_no_card_has_is_one_of_that_size():
    card = find_card("20GB")
    assert card.name == "a card of 20 GB, as fast as an RTX 4080"
    assert card.bytes == pytest.approx(19.6e9)
    with pytest.raises(UsageError, match=r"`gpu`: TPU is not in the table; name one of RTX 3060, RTX 3090"):
        find_card("TPU")


def test_cards_have_less_memory_than_the_box_says_and_a_source():
    assert all(0.85 < card.bytes / (card.box * 2**30) <= 1 and card.source for card in CARDS)
    assert len({card.name for card in CARDS}) == len(CARDS)


@pytest.mark.parametrize(("name", "gigabytes", "found"), [
    ("NVIDIA H200", 150.1, "H200"),
    ("NVIDIA GeForce RTX 5070 Ti", 17.1, "NVIDIA GeForce RTX 5070 Ti (taken to be as fast as an RTX 4080)"),
])  # fmt: skip
def test_the_card_of_this_machine_has_the_memory_that_torch_says(monkeypatch, name, gigabytes, found):
    import torch

    properties = SimpleNamespace(name=name, total_memory=int(gigabytes * 1e9))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    card = local_card()
    assert (card.name, card.bytes) == (found, pytest.approx(gigabytes * 1e9, rel=1e-6))


@pytest.mark.parametrize(("seconds", "words"), [(50, "50 s"), (720, "12 min"), (7800, "2 h 10"), (274_000, "3 d 4 h")])
def test_a_time_is_said_for_people(seconds, words):
    assert duration(seconds) == words


@pytest.mark.slow
def test_a_pair_that_is_longer_than_what_fits_recomputes_alone():
    """On 16 GB the longest pairs recompute and the others do not: rows are filled up to what fits."""
    found = estimate_run(load_recipe(NAME), find_card("16GB"))
    above, budget = found.setup.recomputes_above, found.budget
    assert above == budget > 1024
    longest = row_of([found.lengths.longest], "varlen")
    assert found.setup.recomputes(longest)
    assert not found.setup.recomputes(longest._replace(tokens=budget))


def test_rows_whose_attention_has_a_mask_are_no_longer_than_such_rows_are_made():
    """Gemma-2 has capped scores, which no variable-length kernel computes; on this card 8,500 tokens would fit."""
    found = estimate_run(load_recipe("gemma-2-9b-simpo"), find_card("24GB"))
    assert (found.setup.path, found.budget) == ("dense", DENSE_TOKENS)
    assert found.row.tokens <= DENSE_TOKENS


def test_padded_rows_are_counted_for_layers_that_do_not_attend():
    found = estimate_run(load_recipe("qwen3.5-4b-dpo"), find_card("24GB"))
    assert found.setup.path == "padded"
    assert found.row.columns > found.row.scored > 0
    assert found.peak <= found.card.usable
    assert np.isclose(found.parts["head"], 248_320 * found.row.scored * 4)
