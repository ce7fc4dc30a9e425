"""Where the same word means something else there: each with the number that is right here, worked by hand."""

import json
from pathlib import Path

import pytest

from pe_dpo.convert.convert import convert
from pe_dpo.data import DataReport
from pe_dpo.data.reading import read_places
from pe_dpo.data.sources import find_places
from pe_dpo.errors import UsageError
from pe_dpo.objective import preference_loss


def words_on(found, there: str) -> str:
    """What is said of a key, wherever it is said."""
    return next(one.words for one in (*found.differences, *found.dropped) if one.there.startswith(there))


def breaking(found) -> list[str]:
    return [one.there for one in (*found.differences, *found.dropped) if one.breaks]


# The loss


@pytest.mark.parametrize(("tool", "text"), [
    ("trl", "loss_type: ipo\nbeta: 0.1"), ("llama-factory", "pref_loss: ipo\npref_beta: 0.1"),
    ("axolotl", "rl: ipo\nrl_beta: 0.1"),
    ("ms-swift", "loss_type: ipo\nbeta: 0.1"), ("axolotl", "dpo_loss_type: [ipo]\nrl_beta: 0.1"),
])  # fmt: skip
def test_ipo_aims_at_5_nats_per_token_as_there(converted, tool: str, text: str) -> None:
    """1/(2·0.1) = 5; where Δ per token is 5, the loss is 0."""
    import torch

    found = converted(tool, text)
    coefficients = {key: value for key, value in found.recipe.loss.coefficients().items() if key != "margin_scale"}
    chosen, rejected, length = torch.tensor([50.0]), torch.tensor([0.0]), torch.tensor([10])
    zero = torch.zeros(1)
    loss = preference_loss(chosen, rejected, zero, zero, chosen_lengths=length, rejected_lengths=length, **coefficients).loss
    assert float(loss) == pytest.approx(0, abs=1e-12)
    assert found.loss is not None and found.loss.factor == pytest.approx(0.01)
    assert any("1/(2β) = 5 nats per token" in one.words for one in found.differences)


def test_a_likelihood_beside_ipo_is_weighted_by_beta_squared_as_ipo_is(converted) -> None:
    """TRL: L = ipo + 0.5·NLL; ours is β² of it: sft_weight 0.5·0.04."""
    assert converted(
        "trl", "loss_type: [ipo, sft]\nloss_weights: [1.0, 0.5]\nbeta: 0.2"
    ).recipe.loss.sft_weight == pytest.approx(0.02)


@pytest.mark.parametrize("tool", ["trl", "ms-swift"])
def test_hinge_is_the_one_with_margin_1(converted, tool: str) -> None:
    loss = converted(tool, "loss_type: hinge\nbeta: 0.2").recipe.loss
    assert (loss.link, loss.margin, loss.beta, loss.gamma_value, loss.reduce) == ("hinge", 1.0, 0.2, 0.2, "sum")


def test_a_cpo_hinge_has_no_reference(converted) -> None:
    loss = converted("trl", "loss_type: hinge\nbeta: 0.2\ncpo_alpha: 0.0").recipe.loss
    assert (loss.link, loss.margin, loss.beta, loss.gamma_value, loss.sft_weight) == ("hinge", 1.0, 0.2, 0.0, 0.0)


@pytest.mark.parametrize(("tool", "text", "margin", "sft_weight"), [
    ("trl", "loss_type: simpo\nbeta: 2.0\nsimpo_gamma: 1.2\ncpo_alpha: 0.0", 1.2, 0.0),
    ("trl", "loss_type: simpo\nbeta: 2.0", 0.5, 1.0),  # TRL's own defaults, its silent likelihood among them
    ("axolotl", "rl: simpo\nrl_beta: 2.0\nsimpo_gamma: 0.7", 0.7, 1.0),
    ("axolotl", "rl: simpo\nrl_beta: 2.0\nsimpo_gamma: 0.7\ncpo_alpha: 0.25", 0.7, 0.25),
    ("llama-factory", "pref_loss: simpo\npref_beta: 2.0", 0.5, 0.0),
    ("ms-swift", "rlhf_type: simpo", 1.0, 1.0),
    ("ms-swift", "rlhf_type: simpo\nsimpo_gamma: 0.3\ncpo_alpha: 0", 0.3, 0.0),
])  # fmt: skip
def test_simpos_gamma_is_the_margin_and_its_silent_likelihood_is_written(
    converted, tool: str, text: str, margin: float, sft_weight: float
) -> None:
    found = converted(tool, text)
    loss = found.recipe.loss
    assert (loss.margin, loss.sft_weight, loss.gamma_value, loss.beta, loss.reduce) == (margin, sft_weight, 0.0, 2.0, "mean")
    assert f"loss.margin {margin:g}" in words_on(found, "simpo_gamma")


def test_gamma_beta_ratio_times_beta_is_the_margin(converted) -> None:
    loss = converted("trl", "beta: 2.5\ngamma_beta_ratio: 0.55").recipe.loss
    assert (loss.preset, loss.margin) == ("simpo", pytest.approx(1.375))


def test_the_defaults_of_simpos_trainer_are_its_own(converted) -> None:
    """β 2, ratio ¼, learning rate 5e-5 (transformers'), no likelihood."""
    recipe = converted("trl", "gamma_beta_ratio: 0.25").recipe
    assert (recipe.loss.beta, recipe.loss.margin, recipe.loss.sft_weight, recipe.train.learning_rate) == (2.0, 0.5, 0.0, 5e-5)


def test_simpos_hinge_begins_at_1_plus_the_margin(converted) -> None:
    """max(0, 1 − β(Δ − ratio)) = max(0, −(βΔ − (1 + β·ratio)))."""
    loss = converted("trl", "beta: 2.0\ngamma_beta_ratio: 0.5\nloss_type: hinge").recipe.loss
    assert (loss.link, loss.reduce, loss.margin, loss.gamma_value) == ("hinge", "mean", 2.0, 0.0)


@pytest.mark.parametrize(("tool", "text", "weight", "words"), [
    ("trl", "rpo_alpha: 0.3", 0.3, "per pair here, per token of the batch there"),
    ("ms-swift", "rpo_alpha: 0.3", 0.3, "per pair here, per token of the batch there"),
    ("trl", "loss_type: [sigmoid, sft]\nloss_weights: [0.5, 0.2]", 0.4, "per pair here, per token of the batch there"),
    ("trl", "loss_type: sigmoid\ncpo_alpha: 0.7", 0.7, "per pair here, per token of the batch there"),
    ("llama-factory", "pref_ftx: 0.3", 0.3, None),
])  # fmt: skip
def test_a_likelihood_has_its_weight_and_what_it_is_a_mean_of(converted, tool, text, weight, words) -> None:
    found = converted(tool, text)
    assert found.recipe.loss.sft_weight == pytest.approx(weight)
    said = [one.words for one in found.differences if "per token of the batch" in one.words]
    assert len(said) == (words is not None)
    assert ("per pair there too" in found.text) == (words is None)


def test_weights_of_a_list_are_a_factor_of_the_whole_loss(converted) -> None:
    found = converted("trl", "loss_type: [sigmoid, sft]\nloss_weights: [0.5, 0.2]")
    assert found.loss is not None and found.loss.factor == 2.0
    assert "weighted by 0.5 there; the loss and its gradient here are 2 times those" in words_on(found, "loss_type")


@pytest.mark.parametrize("text", ["loss_type: [sigmoid, bco_pair, sft]\nloss_weights: [0.8, 0.2, 1.0]", "loss_type: apo_zero"])
def test_a_loss_that_is_not_here_breaks_the_objective_and_names_the_nearest(converted, text: str) -> None:
    found = converted("trl", text)
    assert found.is_another_objective
    assert "nearest: dpo" in found.dropped[0].words
    assert found.recipe.loss.preset == "dpo"


def test_sigmoid_norm_is_dpo_per_token_with_the_beta_there(converted) -> None:
    """β 0.1 by default there; the preset alone would take 5."""
    loss = converted("trl", "loss_type: sigmoid_norm").recipe.loss
    assert (loss.preset, loss.beta, loss.gamma_value, loss.reduce) == ("dpo-norm", 0.1, 0.1, "mean")


@pytest.mark.parametrize(("tool", "text", "smoothing", "mode"), [
    ("trl", "label_smoothing: 0.2", 0.0, "conservative"),  # TRL's DPO does not read it with sigmoid
    ("trl", "loss_type: robust\nlabel_smoothing: 0.2", 0.2, "unbiased"),
    ("trl", "label_smoothing: 0.2\nmax_prompt_length: 512", 0.2, "conservative"),  # a key of TRL before 0.29, which did
    ("trl", "loss_type: robust", 0.0, "unbiased"),  # the preset alone would take 0.1
    ("llama-factory", "dpo_label_smoothing: 0.2", 0.2, "conservative"),
    ("ms-swift", "label_smoothing: 0.2", 0.2, "conservative"),
    ("axolotl", "dpo_label_smoothing: 0.2", 0.0, "conservative"),
    ("trl", "label_smoothing: 0.2\ncpo_alpha: 1.0", 0.2, "conservative"),
    ("torchtune", "loss: {_component_: torchtune.rlhf.loss.DPOLoss, label_smoothing: 0.2}", 0.2, "conservative"),
])  # fmt: skip
def test_labels_are_smoothed_where_the_tool_does_it(converted, tool: str, text: str, smoothing: float, mode: str) -> None:
    loss = converted(tool, text).recipe.loss
    assert (loss.label_smoothing, loss.label_smoothing_mode) == (smoothing, mode)


def test_smoothed_simpo_turns_its_margin_there_and_so_is_another_objective(converted) -> None:
    found = converted("trl", "loss_type: simpo\nlabel_smoothing: 0.1")
    assert breaking(found) == ["label_smoothing: 0.1"]


def test_gdpo_of_axolotl_is_grpos_cousin_and_not_the_preset(converted) -> None:
    found = converted("axolotl", "rl: gdpo")
    assert found.is_another_objective
    assert found.recipe.loss.preset == "dpo"
    assert words_on(found, "rl: gdpo") == (
        "GRPO's cousin with several rewards, an online method: it samples answers and scores them; pairs that are there "
        "already are for dpo; the preset gdpo here is generalized DPO"
    )


def test_gamma_of_torchtunes_rso_is_beta(converted) -> None:
    loss = converted("torchtune", "loss: {_component_: torchtune.rlhf.loss.RSOLoss, gamma: 0.3}").recipe.loss
    assert (loss.preset, loss.beta, loss.gamma_value, loss.margin) == ("hinge", 0.3, 0.3, 1.0)


def test_reference_free_is_gamma_0(converted) -> None:
    assert converted("trl", "reference_free: true").recipe.loss.gamma_value == 0


@pytest.mark.parametrize(("tool", "text", "key"), [
    ("trl", "use_peft: false", "use_peft"), ("trl", "use_dora: true", "use_dora"),
    ("trl", "sync_ref_model: true", "sync_ref_model"),
    ("trl", "f_divergence_type: js_divergence", "f_divergence_type"), ("trl", "ld_alpha: 0.5", "ld_alpha"),
    ("trl", "use_weighting: true", "use_weighting"), ("trl", "lora_modules_to_save: [lm_head]", "lora_modules_to_save"),
    ("trl", "desirable_weight: 1.0", "KTO"), ("trl", "loss_type: simpo\nalpha: 0.25", "alpha"),
    ("axolotl", "adapter:", "adapter"), ("axolotl", "rl: orpo", "rl"), ("axolotl", "peft_use_dora: true", "peft_use_dora"),
    ("llama-factory", "finetuning_type: full", "finetuning_type"), ("llama-factory", "stage: kto", "stage"),
    ("llama-factory", "pref_loss: orpo", "pref_loss"), ("llama-factory", "pref_bco_weight: 0.5", "pref_bco_weight"),
    ("ms-swift", "tuner_type: full", "tuner_type"), ("ms-swift", "rlhf_type: kto", "rlhf_type"),
    ("torchtune", "dataset: {_component_: torchtune.datasets.hh_rlhf_helpful_dataset, train_on_input: true}", "dataset.train"),
])  # fmt: skip
def test_what_changes_the_objective_is_marked_and_a_recipe_is_written_all_the_same(converted, tool, text, key) -> None:
    found = converted(tool, text)
    assert found.is_another_objective
    assert any(key in there for there in breaking(found))
    assert found.recipe.model.base == "b"
    assert "NOT THE SAME OBJECTIVE" in found.text


@pytest.mark.parametrize(("tool", "text"), [
    ("trl", "use_dora: false\nsync_ref_model: false\nf_divergence_type: reverse_kl\nuse_weighting: false\nld_alpha: null"),
    ("axolotl", "peft_use_dora: false"), ("llama-factory", "use_dora: false\npref_bco_weight: 0.0"),
])  # fmt: skip
def test_what_is_off_changes_nothing(converted, tool: str, text: str) -> None:
    assert not converted(tool, text).is_another_objective


def test_a_trainer_that_only_the_files_name_tells_is_said(converted) -> None:
    """alignment-handbook's ORPO configuration has no key of its own."""
    found = converted("trl", "hub_model_id: zephyr-orpo-141b-A35b\nbeta: 0.05")
    assert "no key says which trainer reads the file; its names say orpo" in breaking(found)[0]


def test_a_name_with_dpo_in_it_is_dpos_whatever_else_it_says(converted) -> None:
    assert not converted("trl", "hub_model_id: zephyr-7b-sft-dpo").is_another_objective


def test_the_beta_of_kto_is_one_and_that_of_orpo_is_none(converted) -> None:
    """ORPO's is the weight of its odds ratio."""
    assert converted("trl", "desirable_weight: 1.0\nbeta: 0.3").recipe.loss.beta == 0.3
    assert converted("trl", "hub_model_id: orpo\nbeta: 0.3").recipe.loss.beta == 0.1


# The adapter


@pytest.mark.parametrize(("tool", "text", "dropout"), [
    ("trl", "lora_dropout: 0.05", 0.0), ("trl", "lora_dropout: 0.05\ndisable_dropout: false", 0.05),
    ("axolotl", "lora_dropout: 0.05", 0.0), ("llama-factory", "lora_dropout: 0.1", 0.0), ("ms-swift", "", 0.0),
    ("torchtune", "model: {_component_: torchtune.models.llama3.lora_llama3_8b, lora_dropout: 0.05}", 0.05),
])  # fmt: skip
def test_dropout_is_what_the_trainer_there_makes_of_it(converted, tool: str, text: str, dropout: float) -> None:
    assert converted(tool, text).recipe.adapter.dropout == dropout


@pytest.mark.parametrize(("tool", "text", "rank", "alpha"), [
    ("trl", "", 16, 32.0), ("trl", "lora_r: 64", 64, 32.0), ("trl", "lora_r: 64\nlora_alpha: 16", 64, 16.0),
    ("llama-factory", "", 8, 16.0), ("llama-factory", "lora_rank: 32", 32, 64.0), ("ms-swift", "", 8, 32.0),
    ("ms-swift", "lora_rank: 64", 64, 32.0), ("torchtune", "", 8, 16.0), ("axolotl", "lora_r: 64\nlora_alpha: 16", 64, 16.0),
])  # fmt: skip
def test_alpha_is_the_default_there_and_does_not_follow_the_rank(
    converted, tool: str, text: str, rank: int, alpha: float
) -> None:
    adapter = converted(tool, text).recipe.adapter
    assert (adapter.rank, adapter.alpha) == (rank, alpha)


@pytest.mark.parametrize(("tool", "text", "targets"), [
    ("trl", "", ["q_proj", "v_proj"]), ("trl", "lora_target_modules: all-linear", "all-linear"),
    ("llama-factory", "", "all-linear"),
    ("llama-factory", "lora_target: q_proj,v_proj", ["q_proj", "v_proj"]), ("ms-swift", "", "all-linear"),
    ("ms-swift", "target_regex: '.*[02468].q_proj'", [".*[02468].q_proj"]),
    ("axolotl", "lora_target_linear: true\nlora_target_modules: [q_proj]", "all-linear"),
    ("torchtune", "model: {_component_: torchtune.models.qwen2.lora_qwen2_7b, lora_attn_modules: [q_proj, output_proj], "
                  "apply_lora_to_mlp: true}", ["q_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]),
])  # fmt: skip
def test_targets_are_those_of_the_tool(converted, tool: str, text: str, targets) -> None:
    assert converted(tool, text).recipe.adapter.targets == targets


@pytest.mark.parametrize(("tool", "text", "quantize"), [
    ("trl", "", "none"), ("trl", "load_in_4bit: true", "nf4-single"), ("trl", "load_in_8bit: true", "int8"),
    ("trl", "load_in_4bit: true\nuse_bnb_nested_quant: true", "nf4"), ("axolotl", "adapter: qlora\nload_in_4bit: true", "nf4"),
    ("llama-factory", "quantization_bit: 4", "nf4"),
    ("llama-factory", "quantization_bit: 4\ndouble_quantization: false", "nf4-single"),
    ("trl", "load_in_4bit: true\nmodel_name_or_path: unsloth/zephyr-sft-bnb-4bit", "auto"),
    ("trl", "load_in_4bit: true\nbnb_4bit_quant_type: fp4", "fp4-single"),
    ("llama-factory", "quantization_bit: 4\nquantization_type: fp4", "fp4"),
    ("ms-swift", "quant_bits: 4", "nf4"), ("torchtune", "", "none"),
    ("torchtune", "model: {_component_: torchtune.models.llama3.qlora_llama3_8b}", "nf4"),
])  # fmt: skip
def test_the_base_is_held_as_there_and_never_quantized_unasked(converted, tool: str, text: str, quantize: str) -> None:
    assert converted(tool, text).recipe.model.quantize == quantize


@pytest.mark.parametrize(
    ("base", "is_whole"), [("Qwen/Qwen3-30B-A3B", False), ("mistralai/Mixtral-8x7B-v0.1", False), ("b", True)]
)
def test_experts_stay_in_16_bits_as_there(converted, base: str, is_whole: bool) -> None:
    recipe = converted("trl", f"load_in_4bit: true\nmodel_name_or_path: {base}").recipe
    assert recipe.model.quantize_experts == is_whole


def test_an_adapter_that_llama_factory_goes_on_with_has_the_raw_base_as_its_reference(converted) -> None:
    found = converted("llama-factory", "adapter_name_or_path: saves/sft\nlora_rank: 8")
    assert (found.recipe.adapter.start, found.recipe.adapter.reference) == ("saves/sft", "base")
    assert "reference is the raw base" in words_on(found, "adapter_name_or_path")


def test_a_new_adapter_of_llama_factory_lies_over_the_one_that_is_named(converted) -> None:
    """The old one is merged into the base there, which is so the reference."""
    found = converted("llama-factory", "adapter_name_or_path: saves/sft\ncreate_new_adapter: true\nlora_rank: 4")
    assert (found.recipe.adapter.over, found.recipe.adapter.rank, found.recipe.adapter.alpha) == ("saves/sft", 4, 8.0)
    assert not found.is_another_objective
    assert converted("llama-factory", "adapter_name_or_path: a,b\ncreate_new_adapter: true").is_another_objective


def test_an_adapter_in_the_place_of_the_base_stays_frozen_under_the_new_one(converted, tmp_path: Path) -> None:
    """As alignment-handbook's zephyr-7b-sft-qlora."""
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "adapter_config.json").write_text('{"base_model_name_or_path": "mistralai/Mistral-7B-v0.1"}')
    recipe = converted("trl", f"model_name_or_path: {tmp_path / 'sft'}").recipe
    assert (recipe.model.base, recipe.adapter.over) == ("mistralai/Mistral-7B-v0.1", str(tmp_path / "sft"))


def test_an_adapter_of_swift_is_its_own_reference_where_ref_adapters_says_so(converted) -> None:
    adapter = converted("ms-swift", "adapters: [sft]\nref_adapters: [sft]").recipe.adapter
    assert (adapter.start, adapter.reference) == ("sft", "adapter")


# The optimizer's side


@pytest.mark.parametrize(("tool", "text", "rate"), [
    ("trl", "", 1e-6), ("llama-factory", "", 5e-5), ("ms-swift", "", 1e-4), ("ms-swift", "tuner_type: full", 1e-5),
    ("torchtune", "", 1e-3), ("trl", "learning_rate: 5e-6", 5e-6),
])  # fmt: skip
def test_the_learning_rate_is_the_default_there(converted, tool: str, text: str, rate: float) -> None:
    assert converted(tool, text).recipe.train.learning_rate == rate


@pytest.mark.parametrize(("tool", "text", "cards", "pairs"), [
    ("trl", "", None, 8), ("trl", "per_device_train_batch_size: 4\ngradient_accumulation_steps: 4", 8, 128),
    ("axolotl", "micro_batch_size: 2\ngradient_accumulation_steps: 4", 2, 16), ("axolotl", "", None, 1),
    ("llama-factory", "", None, 8), ("ms-swift", "", None, 16), ("ms-swift", "per_device_train_batch_size: 3", 2, 18),
    ("torchtune", "gradient_accumulation_steps: 8", 1, 32),
])  # fmt: skip
def test_pairs_per_step_is_batch_times_accumulation_times_cards(converted, tool: str, text: str, cards, pairs: int) -> None:
    """swift: 16 pairs a step by default, ⌈16 / 3 / 2⌉ = 3 times 3 on 2 cards."""
    assert converted(tool, text, cards=cards).recipe.train.pairs_per_step == pairs


@pytest.mark.parametrize(("tool", "text", "warmup", "schedule"), [
    ("trl", "", 0.0, "linear"), ("trl", "warmup_ratio: 0.1\nlr_scheduler_type: cosine", 0.1, "cosine"),
    ("trl", "warmup_steps: 100\nwarmup_ratio: 0.1", 100.0, "linear"), ("axolotl", "", 0.03, "cosine"),
    ("axolotl", "warmup_steps: 10", 10.0, "cosine"), ("llama-factory", "", 0.0, "linear"), ("ms-swift", "", 0.0, "cosine"),
    ("torchtune", "", 0.0, "constant"),
    ("torchtune", "lr_scheduler: {_component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup, "
                  "num_warmup_steps: 100}", 100.0, "cosine"),
])  # fmt: skip
def test_warm_up_and_schedule_are_those_of_the_tool(converted, tool: str, text: str, warmup: float, schedule: str) -> None:
    train = converted(tool, text).recipe.train
    assert (train.warmup, train.schedule) == (warmup, schedule)


def test_a_lowest_rate_of_axolotl_is_another_schedule_here(converted) -> None:
    train = converted("axolotl", "cosine_min_lr_ratio: 0.1").recipe.train
    assert (train.schedule, train.schedule_args) == ("cosine_with_min_lr", {"min_lr_rate": 0.1})


@pytest.mark.parametrize(("tool", "text", "decay", "norm"), [
    ("trl", "", 0.0, 1.0), ("ms-swift", "", 0.1, 1.0), ("torchtune", "", 0.01, 0.0),
    ("axolotl", "weight_decay: 0.05", 0.05, 1.0),
])  # fmt: skip
def test_decay_and_clipping_are_those_of_the_tool(converted, tool: str, text: str, decay: float, norm: float) -> None:
    """torch's AdamW decays by 0.01 by itself, and torchtune clips nothing."""
    train = converted(tool, text).recipe.train
    assert (train.weight_decay, train.max_grad_norm) == (decay, norm)


@pytest.mark.parametrize(("tool", "text", "optimizer"), [
    ("trl", "", "adamw_torch_fused"), ("trl", "optim: adamw_hf", "adamw_torch"),
    ("trl", "optim: paged_adamw_32bit", "paged_adamw_32bit"),
    ("axolotl", "optimizer: adamw_bnb_8bit", "adamw_bnb_8bit"), ("torchtune", "", "adamw_torch"),
    ("torchtune", "optimizer: {_component_: bitsandbytes.optim.PagedAdamW8bit, lr: 1e-4}", "paged_adamw_8bit"),
])  # fmt: skip
def test_optimizers_have_transformers_names(converted, tool: str, text: str, optimizer: str) -> None:
    assert converted(tool, text).recipe.train.optimizer == optimizer


def test_an_optimizer_that_is_not_here_is_dropped_with_a_word(converted) -> None:
    found = converted("axolotl", "optimizer: muon")
    assert words_on(found, "optimizer: muon") == "no optimizer of that name is here; adamw_torch takes its place"


# The data


@pytest.mark.parametrize(("tool", "key", "text", "length"), [
    ("trl", "max_length", "", 1024), ("llama-factory", "cutoff_len", "", 2048), ("axolotl", "sequence_len", "", 512),
    ("trl", "max_length", "max_length: 512", 512), ("llama-factory", "cutoff_len", "cutoff_len: 4096", 4096),
])  # fmt: skip
def test_the_length_is_the_default_there_and_what_it_does_is_said(
    converted, tool: str, key: str, text: str, length: int
) -> None:
    found = converted(tool, text)
    assert (found.recipe.data.max_length, found.recipe.data.overlong) == (length, "drop")
    assert words_on(found, key)


@pytest.mark.parametrize(("tool", "text", "is_cut"), [("trl", "", True), ("llama-factory", "", True), ("axolotl", "", False)])
def test_a_length_cuts_there_where_it_does(converted, tool: str, text: str, is_cut: bool) -> None:
    found = converted(tool, text)
    assert any("cut" in one.words and "dropped" in one.words for one in found.differences) == is_cut


def test_rows_of_text_stay_as_they_are_in_trl_and_are_a_turn_here(converted) -> None:
    assert "data.template: plain leaves them" in words_on(converted("trl"), "rows of text")


@pytest.mark.parametrize(("strategy", "overlong"), [("drop", "drop"), ("raise", "error")])
def test_axolotl_drops_long_pairs_as_here_or_stops(converted, strategy: str, overlong: str) -> None:
    assert converted("axolotl", f"excess_length_strategy: {strategy}").recipe.data.overlong == overlong


@pytest.mark.parametrize(
    ("tool", "key"), [("axolotl", "val_set_size"), ("llama-factory", "val_size"), ("trl", "test_split_size")]
)
def test_a_share_is_held_out_and_a_number_of_rows_is_none(converted, tool: str, key: str) -> None:
    assert converted(tool, f"{key}: 0.1").recipe.data.eval == 0.1
    found = converted(tool, f"{key}: 2000")
    assert found.recipe.data.eval is None
    assert words_on(found, key) == ("2000 rows there; data.eval is a share here (0.05 without a word): 2000 / rows of the data")


@pytest.mark.parametrize("tool", ["trl", "axolotl", "llama-factory", "ms-swift", "torchtune"])
def test_where_nothing_is_held_out_nothing_is_here(converted, tool: str) -> None:
    assert converted(tool).recipe.data.eval == 0.0


def test_splits_and_subsets_are_those_of_the_places(converted) -> None:
    found = converted(
        "trl", "dataset_config: en\ndataset_train_split: train_prefs\ndataset_test_split: test_prefs\neval_strategy: steps"
    )
    train, held_out = found.recipe.data.train, found.recipe.data.eval
    assert (train.path, train.subset, train.split) == ("d", "en", "train_prefs")
    assert (held_out.path, held_out.subset, held_out.split) == ("d", "en", "test_prefs")


def test_a_mixture_has_its_weights(converted) -> None:
    places = "[{id: a/b, config: en, split: s, weight: 0.5}, {id: c/d}]"
    text = f"dataset_mixture: {{datasets: {places}, test_split_size: 0.02}}"
    data = converted("trl", text).recipe.data
    assert [(place.path, place.subset, place.split, place.weight) for place in data.train[:1]] == [("a/b", "en", "s", 0.5)]
    assert (data.train[1], data.eval) == ("c/d", 0.02)


def test_fractions_of_a_mixture_are_weights_of_places_of_one_size(converted) -> None:
    """TRL takes as much as it can without reading a row twice: all of the first, a third of the second."""
    found = converted("trl", "dataset_name:\ndatasets: [{path: a/b, fraction: 0.75}, {path: c/d, fraction: 0.25}]")
    assert "  train:\n    - a/b\n    - {path: c/d, weight: 0.333" in found.text
    assert found.recipe.data.train[1].weight == pytest.approx(1 / 3)
    assert "shares of the mixture" in words_on(found, "datasets.fraction")


@pytest.mark.parametrize(("about", "place"), [
    ({"file_name": "x.json", "formatting": "sharegpt"}, "x.json"),
    ({"hf_hub_url": "o/n", "subset": "en", "formatting": "sharegpt"}, {"path": "o/n", "subset": "en"}),
    ({"hf_hub_url": "o/n", "columns": {"prompt": "question", "chosen": "good", "rejected": "bad", "system": "system"}},
     {"path": "o/n", "columns": {"instruction": "question", "chosen": "good", "rejected": "bad"}}),
    ({"hf_hub_url": "o/n", "formatting": "openai",
      "columns": {"messages": "turns", "chosen": "chosen", "rejected": "rejected"}},
     {"path": "o/n", "columns": {"messages": "turns", "chosen": "chosen", "rejected": "rejected"}}),
])  # fmt: skip
def test_dataset_info_says_where_the_pairs_are_and_what_their_columns_are_called(converted, tmp_path, about, place) -> None:
    (tmp_path / "dataset_info.json").write_text(json.dumps({"d": {"ranking": True, **about}}), encoding="utf-8")
    train = converted("llama-factory").recipe.data.train
    if isinstance(place, str):
        assert train == str(tmp_path / place)
    else:
        assert train.model_dump(exclude_none=True, exclude_defaults=True) == place


ROWS = {
    "alpaca": ({"prompt": "question", "chosen": "good", "rejected": "bad", "system": "system"},
               {"question": "Is ice cold?", "good": "Yes.", "bad": "No.", "system": "Be brief."}),
    "sharegpt": ({"messages": "turns", "chosen": "chosen", "rejected": "rejected"},
                 {"turns": [{"from": "human", "value": "Is ice cold?"}], "chosen": {"from": "gpt", "value": "Yes."},
                  "rejected": {"from": "gpt", "value": "No."}}),
}  # fmt: skip


@pytest.mark.parametrize("formatting", ROWS)
def test_data_that_dataset_info_describes_are_read_by_the_recipe(converted, tmp_path, formatting: str) -> None:
    """LLaMA-Factory's file and its description, our loader: the same prompt and answers."""
    columns, row = ROWS[formatting]
    (tmp_path / "d.json").write_text(json.dumps([row]), encoding="utf-8")
    info = {"d": {"file_name": "d.json", "ranking": True, "formatting": formatting, "columns": columns}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    section = converted("llama-factory").recipe.data
    (pairs,) = read_places(find_places(section.train), section, DataReport(), side="train")
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [
        (({"role": "assistant", "content": "Yes."},), ({"role": "assistant", "content": "No."},))
    ]
    assert pairs[0].prompt[-1] == {"role": "user", "content": "Is ice cold?"}
    assert (len(pairs[0].prompt) == 2) == ("system" in columns)


def test_a_data_set_that_dataset_info_does_not_name_is_said(converted) -> None:
    assert "write the file or the hub's name" in words_on(converted("llama-factory"), "dataset: d")


def test_columns_of_axolotls_fields_are_a_map(converted) -> None:
    text = "datasets:\n  - path: d\n    type: {field_prompt: question, field_chosen: good, field_rejected: bad}"
    train = converted("axolotl", text).recipe.data.train
    assert train.columns == {"prompt": "question", "chosen": "good", "rejected": "bad"}


def test_names_of_swift_have_subset_and_rows(converted) -> None:
    found = converted("ms-swift", "dataset: ['hf::o/n:en#500']")
    assert (found.recipe.data.train.path, found.recipe.data.train.subset) == ("o/n", "en")
    assert "data.limit: 500" in words_on(found, "dataset: hf::o/n")


def test_data_of_torchtunes_builders_are_their_hub_names_and_columns(converted) -> None:
    found = converted("torchtune", "dataset: {_component_: torchtune.datasets.stack_exchange_paired_dataset}")
    train = found.recipe.data.train
    assert train.path == "lvwerra/stack-exchange-paired"
    assert train.columns == {"prompt": "question", "chosen": "response_j", "rejected": "response_k"}


# What nobody knows


@pytest.mark.parametrize("tool", ["trl", "axolotl", "llama-factory", "ms-swift", "torchtune"])
def test_unknown_keys_are_listed(converted, tool: str) -> None:
    assert converted(tool, "never_heard_of: 3").unknown == ["never_heard_of: 3"]


@pytest.mark.parametrize(("tool", "text", "words"), [
    ("axolotl", "datasets: [{path: d, shards: 4}]", "datasets.shards: 4"),
    ("trl", "dataset_name:\ndatasets: [{path: d, streaming: true}]", "datasets.streaming: true"),
])  # fmt: skip
def test_unknown_keys_of_a_data_set_are_listed(converted, tool: str, text: str, words: str) -> None:
    assert converted(tool, text).unknown == [words]


def test_intervals_are_steps_and_a_share_of_the_run_is_none(converted) -> None:
    found = converted("trl", "eval_strategy: steps\neval_steps: 50\nsave_steps: 0.25\nlogging_steps: 10")
    train = found.recipe.train
    assert (train.eval_every, train.save_every, train.log_every) == (50, None, 10)
    assert words_on(found, "save_steps") == "train.save_every is a number of steps; a tenth of the run by itself"


def test_evaluations_per_epoch_are_no_steps_between_them(converted) -> None:
    found = converted("axolotl", "evals_per_epoch: 4\nsaves_per_epoch: 1")
    assert (found.recipe.train.eval_every, found.recipe.train.save_every) == (None, None)
    assert words_on(found, "evals_per_epoch") == "train.eval_every: steps between evaluations"


def test_a_recipe_is_no_other_tools_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: {base: b}\ndata: {train: d}\n")
    with pytest.raises(UsageError, match="is a recipe already; pe-dpo check"):
        convert(path)


def test_a_file_without_base_or_data_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("use_peft: true\n")
    with pytest.raises(
        UsageError, match=r"c\.yaml: names no model\.base \(model_name_or_path\) and no data\.train \(dataset_name\); write"
    ):
        convert(path)


def test_each_line_says_where_it_came_from(converted) -> None:
    text = converted("trl", "beta: 0.3\nlr_scheduler_type: cosine").text
    assert "  beta: 0.3  # beta\n" in text
    assert "  learning_rate: 1.0e-06  # learning_rate, by default there\n" in text
    assert "  schedule: cosine  # lr_scheduler_type\n" in text


def test_that_one_card_is_assumed_is_said_where_nothing_says_how_many(converted) -> None:
    assumed = [row for row in converted("trl").differences if "one card is assumed" in row.words]
    assert [row.there for row in assumed] == ["per_device_train_batch_size: 8 by default there"]
    assert not [row for row in converted("trl", cards=2).differences if "one card is assumed" in row.words]


def test_a_variable_that_the_file_does_not_set_is_said(converted) -> None:
    rows = converted("trl", "output_dir: $RUNS/dpo").differences
    assert [row.there for row in rows if "has a variable" in row.words] == ["output_dir: $RUNS/dpo"]


def test_a_file_has_no_splits(converted) -> None:
    """Axolotl wants split: train beside every file; here a file is one split."""
    text = "datasets:\n  - {path: json, data_files: [./a.jsonl], split: train, type: chatml.intel}\n  - {path: d, split: train}"
    places = converted("axolotl", text).recipe.data.train
    assert [(one, None) if isinstance(one, str) else (one.path, one.split) for one in places] == [
        ("./a.jsonl", None), ("d", "train"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("tool", "text"),
    [
        ("axolotl", "datasets:\n  - {path: json, data_files: [./a.jsonl, ./b.jsonl], type: chatml.intel}"),
        ("trl", "datasets:\n  - {path: json, data_files: [./a.jsonl, ./b.jsonl]}"),
        ("trl", "datasets:\n  - {path: json, data_files: {train: [./a.jsonl, ./b.jsonl], test: ./c.jsonl}, split: train}"),
    ],
)
def test_each_of_several_files_is_a_place(converted, tool: str, text: str) -> None:
    places = converted(tool, text).recipe.data.train
    assert [one if isinstance(one, str) else one.path for one in places] == ["./a.jsonl", "./b.jsonl"]


@pytest.mark.parametrize(("tool", "data"), [("trl", None), ("llama-factory", None), ("ms-swift", 7)])
def test_a_seed_of_the_data_draws_their_order_and_in_swift_what_is_held_out_too(converted, tool: str, data) -> None:
    train = converted(tool, "seed: 3\ndata_seed: 7\nlogging_steps: 5").recipe.train
    assert (train.seed, train.seeds.order, train.seeds.data, train.log_every) == (3, 7, data, 5)
