"""Impossible recipes: each fault names file and line, the key, what was found, and what to do."""

import pytest

from pe_dpo.errors import RecipeError
from pe_dpo.recipe import Recipe, recipe_from_yaml

NEEDED = {"model": "model: {base: b}", "data": "data: {train: d}", "output": "output: o"}


def read(text: str, *overrides: str) -> Recipe:
    """The recipe in `text`, with the needed sections that it lacks added below, so that lines count from its first."""
    added = [line for name, line in NEEDED.items() if not any(row.startswith(f"{name}:") for row in text.splitlines())]
    return recipe_from_yaml("\n".join([text, *added]), "bad.yaml", overrides)


def faults_of(text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read(text, *overrides)
    return str(caught.value).splitlines()


MALFORMED = [
    # keys that nobody knows
    ("loss: {betta: 0.1}", "1: loss.betta", "unknown key; did you mean loss.beta?"),
    ("adapter:\n  rank: 8\n  alhpa: 16", "3: adapter.alhpa", "unknown key; did you mean adapter.alpha?"),
    ("model: {base: b, quantise: nf4}", "1: model.quantise", "unknown key; did you mean model.quantize?"),
    ("beta: 0.1", "1: beta", "unknown key here; did you mean loss.beta?"),
    ("train: {gamma: 1}", "1: train.gamma", "unknown key here; did you mean loss.gamma?"),
    ("loss: {adapter: x}", "1: loss.adapter", "unknown key here; did you mean adapter?"),
    ("model: {base: b, adaptr: x}", "1: model.adaptr", "unknown key; did you mean adapter?"),
    ("train: {adapter: 1}", "1: train.adapter", "unknown key here; did you mean train.seeds.adapter?"),
    ("masks: 1", "1: masks", "unknown key here; did you mean train.seeds.masks?"),
    ("zzz: 1", "1: zzz", "unknown key; `pe-dpo recipes schema` lists what there is"),
    # keys of other tools
    ("loss: {simpo_gamma: 0.5}", "1: loss.simpo_gamma", "here it is loss.margin (that is the margin; gamma here is"),
    ("loss: {gamma_beta_ratio: 0.5}", "1: loss.gamma_beta_ratio", "here it is loss.margin (times beta; that is the margin"),
    ("num_train_epochs: 3", "1: num_train_epochs", "here it is train.epochs"),
    ("loss: {loss_type: hinge}", "1: loss.loss_type", "here it is loss.preset"),
    ("train:\n  per_device_train_batch_size: 4", "2: train.per_device_train_batch_size", "here it is train.pairs_per_step"),
    ("train: {gradient_accumulation_steps: 4}", "1: train.gradient_accumulation_steps", "accumulation is derived"),
    ("model: {base: b, load_in_4bit: true}", "1: model.load_in_4bit", "here it is model.quantize: nf4"),
    ("model: {base: b, trust_remote_code: true}", "1: model.trust_remote_code", "is never run"),
    ("adapter: {lora_alpha: 16}", "1: adapter.lora_alpha", "here it is adapter.alpha"),
    ("adapter: {target_modules: [q_proj]}", "1: adapter.target_modules", "here it is adapter.targets"),
    ("adapter: {modules_to_save: [lm_head]}", "1: adapter.modules_to_save", "LoRA only"),
    ("loss: {rpo_alpha: 1}", "1: loss.rpo_alpha", "here it is loss.sft_weight"),
    ("train: {output_dir: x}", "1: train.output_dir", "here it is output"),
    ("train: {warmup_ratio: 0.1}", "1: train.warmup_ratio", "here it is train.warmup"),
    ("train: {load_best_model_at_end: true}", "1: train.load_best_model_at_end", "write train.keep_best (its metric"),
    ("push_to_hub: true", "1: push_to_hub", "not in training: pe-dpo export --push"),
    ("train: {torch_compile: true}", "1: train.torch_compile", "compilation is not used"),
    ("data: {train: d, max_prompt_length: 5}", "1: data.max_prompt_length", "data.max_length (of prompt and answer together"),
    ("train: {data_seed: 5}", "1: train.data_seed", "here it is train.seeds.order"),
    ("adapter: {lora_rank: 5}", "1: adapter.lora_rank", "here it is adapter.rank"),
    ("sequence_len: 5", "1: sequence_len", "(longer pairs are dropped here, not cut; see data.overlong)"),
    ("cutoff_len: 5", "1: cutoff_len", "here it is data.max_length (longer pairs are dropped here"),
    ("val_set_size: 0.1", "1: val_set_size", "here it is data.eval (a share"),
    ("pref_loss: sigmoid", "1: pref_loss", "here it is loss.preset (sigmoid is dpo; "),
    ("pref_beta: 0.1", "1: pref_beta", "here it is loss.beta"),
    ("micro_batch_size: 2", "1: micro_batch_size", "here it is train.pairs_per_step"),
    ("chat_template: llama3", "1: chat_template", "here it is data.template"),
    # one word of a key, or of several
    ("train: {rate: 5}", "1: train.rate", "unknown key; did you mean train.learning_rate?"),
    ("train: {steps: 5}", "1: train.steps", "unknown key; did you mean train.max_steps or train.bad_steps?"),
    ("steps: 5", "1: steps", "unknown key; did you mean train.max_steps or train.bad_steps?"),
    # only one or two letters are a typo
    ("loss: {coldness: 1}", "1: loss.coldness", "unknown key; `pe-dpo recipes schema` lists what there is"),
    ("train: {learning_rte: 1}", "1: train.learning_rte", "did you mean train.learning_rate?"),
    # wrong types: nothing is converted in silence
    ("loss: {beta: '0.1'}", "1: loss.beta", "found '0.1'; input should be a valid number"),
    ("loss: {beta: true}", "1: loss.beta", "found True; input should be a valid number"),
    ("loss: {gamma: true}", "1: loss.gamma", "found True; input should be a valid number"),
    ("loss: {gamma: null}", "1: loss.gamma", "found None; input should be a valid number"),
    ("train: {seed: true}", "1: train.seed", "found True; input should be a valid integer"),
    ("train: {pairs_per_step: 8.0}", "1: train.pairs_per_step", "found 8.0; input should be a valid integer"),
    ("train: {gradient_checkpointing: yes}", "1: train.gradient_checkpointing", "should be 'auto', or a valid boolean"),
    ("train: {packing: off}", "1: train.packing", "found 'off'; input should be 'auto', or a valid boolean"),
    ("train: {report_to: 5}", "1: train.report_to", "found 5; input should be a valid list"),
    ("model: {base: 7}", "1: model.base", "found 7; input should be a valid string"),
    ("adapter: {targets: q_proj}", "1: adapter.targets", "should be 'all-linear', 'attention' or 'mlp', or a valid list"),
    ("data: {train: d, eval: true}", "1: data.eval", "found True; a share, a path, an object such as"),
    ("data: {train: 5}", "1: data.train", "found 5; a path, an object such as {path: pairs.jsonl, weight: 0.5}, or a list of"),
    ("data: {train: [a, 5]}", "1: data.train.1", "found 5; a path, or an object such as {path: pairs.jsonl, weight: 0.5}"),
    ("data:\n  train:\n    - a\n    - {path: b, weight: x}", "4: data.train.1.weight", "found 'x'; input should be a"),
    ("data: {train: {path: b, weight: 0}}", "1: data.train.weight", "found 0; input should be greater than 0"),
    ("data: {train: []}", "1: data.train", "found []; list should have at least 1 item"),
    ("data: {train: {weight: 2}}", "1: data.train.path", "is missing; write it"),
    ("data: {train: {path: a, name: b}}", "1: data.train.name", "unknown key; a place has path, weight, split, subset"),
    ("data: {train: [{path: a, columns: {best: b}}]}", "1: data.train.0.columns.best", "found 'best'; input should be"),
    ("data: {train: d, eval: [0.1]}", "1: data.eval.0", "found 0.1; a path, or an object such as"),
    ("data: {train: d, eval: {path: e, weight: 2}}", "1: data.eval", "e has weight 2, which acts on training alone"),
    ("data: {train: d, columns: {chosen: 3}}", "1: data.columns.chosen", "found 3; input should be a valid string"),
    ("data: {train: d, columns: {better: x}}", "1: data.columns.better", "input should be 'prompt', 'chosen', 'rejected'"),
    ("loss: [hinge]", "1: loss", "found ['hinge']; input should be a valid dictionary"),
    ("model: some/base", "1: model", "found 'some/base'; input should be a valid dictionary"),
    # out of range
    ("loss: {beta: 0}", "1: loss.beta", "found 0; input should be greater than 0"),
    ("loss: {beta: .inf}", "1: loss.beta", "found inf; input should be a finite number"),
    ("loss: {beta: 1e400}", "1: loss.beta", "found inf; input should be a finite number"),
    ("loss: {margin: .nan}", "1: loss.margin", "found nan; input should be a finite number"),
    ("loss: {gamma: -0.1}", "1: loss.gamma", "gamma is -0.1: it must be finite and >= 0"),
    ("loss: {gamma: -1x}", "1: loss.gamma", "write a number >= 0, or a multiple of beta such as '0.5x'"),
    ("loss: {label_smoothing: 0.5}", "1: loss.label_smoothing", "found 0.5; input should be less than 0.5"),
    ("loss: {sft_weight: -1}", "1: loss.sft_weight", "found -1; input should be greater than or equal to 0"),
    ("adapter: {rank: 0}", "1: adapter.rank", "found 0; input should be greater than or equal to 1"),
    ("adapter: {dropout: 1}", "1: adapter.dropout", "found 1; input should be less than 1"),
    ("train: {max_steps: 0}", "1: train.max_steps", "found 0; input should be greater than or equal to 1"),
    ("train: {learning_rate: 0}", "1: train.learning_rate", "found 0; input should be greater than 0"),
    ("train: {seed: 4294967296}", "1: train.seed", "input should be less than 4294967296"),
    ("data: {train: d, eval: 1}", "1: data.eval", "found 1; input should be less than 1"),
    ("data: {train: ''}", "1: data.train", "found ''; string should have at least 1 character"),
    ("loss: {beta: 1e300}", "1: loss.beta", "found 1e+300; input should be less than or equal to 1000000000"),
    ("loss: {margin: -1e300}", "1: loss.margin", "found -1e+300; input should be greater than or equal to -1000000000"),
    ("adapter: {alpha: 1e300}", "1: adapter.alpha", "found 1e+300; input should be less than or equal to 1000000000"),
    ("adapter: {rank: 100000000}", "1: adapter.rank", "found 100000000; input should be less than or equal to 16384"),
    ("train: {epochs: 1.0e+300}", "1: train.epochs", "found 1e+300; input should be less than or equal to 10000"),
    ("train: {learning_rate: 1.0e+38}", "1: train.learning_rate", "found 1e+38; input should be less than or equal to 100"),
    ('output: "a\\0b"', "1", r"'\x00' within a text, which neither files nor their names take"),
    # not one of the words
    ("loss: {link: exponential}", "1: loss.link", "input should be 'logistic', 'hinge' or 'squared'"),
    ("model: {base: b, quantize: nf5}", "1: model.quantize", "'nf4', 'nf4-single', 'fp4', 'fp4-single', 'int8' or 'none'"),
    ("model: {base: b, dtype: float16}", "1: model.dtype", "input should be 'auto', 'float32' or 'bfloat16'"),
    ("data: {train: d, overlong: cut}", "1: data.overlong", "input should be 'drop', 'truncate_prompt' or 'error'"),
    ("train: {optimizer: adam}", "1: train.optimizer", "found 'adam'; input should be 'adamw_torch'"),
    # what would move the reference
    ("adapter: {init: pissa}", "1: adapter.init", "use init: default"),
    ("adapter: {init: pissa_niter_4}", "1: adapter.init", "with adapters off the reference would be what is left of the base"),
    ("adapter: {init: olora}", "1: adapter.init", "olora changes the base weights"),
    ("adapter: {init: loftq}", "1: adapter.init", "loftq changes the base weights"),
    ("adapter: {init: ones}", "1: adapter.init", "use default or gaussian"),
    ("adapter: {bias: all}", "1: adapter.bias", "the reference would drift with training; use bias: none"),
    ("adapter: {bias: lora_only}", "1: adapter.bias", "with bias: lora_only the trained biases stay on"),
    ("adapter: {start: a, reference: frozen}", "1: adapter.reference", "input should be 'base' or 'adapter'"),
    # what is to be calibrated, but not said how
    ("loss: {gamma: balance}", "1: loss.gamma", "gamma is 'balance': write auto, balance:S"),
    ("loss: {gamma: 'scale:x'}", "1: loss.gamma", "or scale:G with G the spread of γ·Δ0 (scale:1)"),
    ("loss: {gamma: 'auto:2'}", "1: loss.gamma", "write auto, balance:S"),
    ("loss: {gamma: 'balance:1'}", "1: loss.gamma", "the share must lie between 0 and 1, as in balance:0.5"),
    ("loss: {gamma: 'balance:0'}", "1: loss.gamma", "the share must lie between 0 and 1, as in balance:0.5"),
    ("loss: {gamma: 'scale:0'}", "1: loss.gamma", "the spread must be finite and > 0, as in scale:1"),
    ("loss: {gamma: 'scale:1e400'}", "1: loss.gamma", "the spread must be finite and > 0, as in scale:1"),
    ("loss: {link: squared, margin: 1, gamma: 'balance:0.5'}", "1: loss.gamma", "do not grow with gamma under link squared"),
    ("mixout: {p: -0.1}", "1: mixout.p", "found -0.1; input should be greater than or equal to 0"),
    ("mixout: {p: 0.5}\nadapter:\n  dropout: 0.1", "3: adapter.dropout", "would mask the input that"),
    ("mixout:\n  p: 1", "2: mixout.p", "found 1; input should be less than 1"),
    # what is missing
    ("model:", "1: model.base", "is missing; a recipe needs at least model.base and data.train"),
    ("data: {limit: 3}", "1: data.train", "is missing; a recipe needs at least model.base and data.train"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "place", "remedy"), MALFORMED, ids=[place[3:] + "-" + text for text, place, _ in MALFORMED])
def test_a_malformed_recipe_is_refused_with_line_key_and_remedy(text: str, place: str, remedy: str) -> None:
    (message,) = faults_of(text)
    assert message.startswith(f"bad.yaml:{place}: ")
    assert remedy in message


@pytest.mark.parametrize(("text", "place", "remedy"), [
    ("loss:\n  beta: 1\n  preset: simp", "3: loss.preset", "did you mean simpo?"),
    ("loss:\n  gamma: 0\n  reference_floor: 0", "3: loss.reference_floor", "drop it, or set gamma > 0"),
    ("adapter:\n  dropout: 0.1\n  start: sft", "1: adapter.reference", "reference: base takes the raw base"),
    ("adapter:\n  dropout: 0.1\n  reference: adapter", "3: adapter.reference", "needs start: the folder of that adapter"),
    ("loss: {gamma: 1e400x}", "1: loss.gamma", "above"),
    ("loss: {beta: 1e8, gamma: 1e8x}", "1: loss.gamma", "above"),
    ("loss: {preset: [dpo]}", "1: loss.preset", "input should be a valid string"),
    ("trainn: {epochs: 2}", "1: trainn", "did you mean train?"),
    ("adapter: {targets: []}", "1: adapter.targets", "all-linear"),
])  # fmt: skip
def test_a_contradiction_is_laid_at_the_key_to_turn(text: str, place: str, remedy: str) -> None:
    (message,) = faults_of(text)
    assert message.startswith(f"bad.yaml:{place}: ")
    assert remedy in message


def test_all_faults_of_a_file_are_told_at_once() -> None:
    text = "loss:\n  beta: 0\n  betta: 1\n  gamma: -1\nadapter:\n  rank: 0\nmixout: {p: 1}\nlr: 1"
    places = {message.split(": ")[0] + " " + message.split(": ")[1] for message in faults_of(text)}
    assert places == {
        "bad.yaml:2 loss.beta", "bad.yaml:3 loss.betta", "bad.yaml:4 loss.gamma", "bad.yaml:6 adapter.rank",
        "bad.yaml:7 mixout.p", "bad.yaml:8 lr",
    }  # fmt: skip


@pytest.mark.parametrize("key", ["rank: 8", "alpha: 8", "targets: [q_proj]", "init: gaussian"])
def test_what_a_start_adapter_settles_is_not_asked_for_again(key: str) -> None:
    (message,) = faults_of(f"adapter: {{start: sft, reference: base, {key}}}")
    assert message.startswith("bad.yaml:1: adapter")
    assert f"{key.split(':')[0]}: set by the adapter that the run starts from; leave out" in message


def test_an_unknown_preset_hides_no_other_fault() -> None:
    assert len(faults_of("loss: {preset: foo, betta: 1, beta: 0}")) == 3


def test_a_recipe_without_its_needed_sections_names_each() -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_from_yaml("train: {seed: 1}", "bad.yaml")
    keys = {message.split(": ")[1] for message in str(caught.value).splitlines()}
    assert keys == {"model", "data", "output"}


DEAD = "loss: {link: LINK}"
ALIVE = {
    "a margin": "loss: {link: LINK, margin: 0.5}",
    "a negative margin": "loss: {link: LINK, margin: -0.5}",
    "a margin column": "loss: {link: LINK, margin_scale: 1}",
    "a length penalty": "loss: {link: LINK, length_penalty: 0.01}",
    "a floor": "loss: {link: LINK, reference_floor: 0}",
    "an SFT term": "loss: {link: LINK, sft_weight: 0.1}",
    "gamma below beta": "loss: {link: LINK, gamma: 0.9x}",
    "no reference": "loss: {link: LINK, gamma: 0}",
    "an adapter against the raw base": "loss: {link: LINK}\nadapter: {start: sft, reference: base}",
}


@pytest.mark.parametrize("link", ["hinge", "squared"])
@pytest.mark.parametrize("text", [
    DEAD,
    "loss: {link: LINK, beta: 0.3, gamma: 0.3}",
    "loss: {link: LINK, gamma: 1.0x}",
    "loss: {link: LINK, reduce: mean}",
    "loss: {link: LINK, label_smoothing: 0.1}",
    "loss: {link: LINK}\nadapter: {start: sft, reference: adapter}",
    "loss: {preset: simpo, link: LINK, gamma: 1x, margin: 0}",
])  # fmt: skip
def test_a_loss_whose_every_gradient_is_zero_at_the_start_is_refused(text: str, link: str) -> None:
    """π = π0 makes z = (β−γ)·Δ0 − margin = 0 for all pairs: the kink of the hinge, the bottom of the square."""
    (message,) = faults_of(text.replace("LINK", link))
    assert message.startswith("bad.yaml:1: loss.gamma: ")
    assert f"with link {link}, gamma = beta and margin 0 every pair starts with zero gradient" in message
    assert message.endswith("set margin > 0, or gamma different from beta")


def test_a_dead_start_is_laid_at_the_line_of_gamma() -> None:
    (message,) = faults_of("loss:\n  link: hinge\n  gamma: 0.1")
    assert message.startswith("bad.yaml:3: loss.gamma: ")


@pytest.mark.parametrize("link", ["hinge", "squared"])
@pytest.mark.parametrize("text", ALIVE.values(), ids=ALIVE)
def test_what_moves_some_pair_at_the_start_is_not_refused(text: str, link: str) -> None:
    assert read(text.replace("LINK", link)).loss.link == link


def test_the_logistic_loss_has_no_dead_start() -> None:
    assert read("loss: {link: logistic, gamma: 1x, margin: 0}").loss.gamma_value == 0.1


@pytest.mark.parametrize("name", ["model_name_or_path", "dataset_name", "lora_r", "lr", "torch_dtype", "save_steps", "optim"])
def test_the_name_that_is_given_for_a_foreign_key_exists(name: str) -> None:
    """What the message proposes is a key of the schema, so following it helps."""
    (message,) = faults_of(f"{name}: 1")
    section, key = message.removeprefix(f"bad.yaml:1: {name}: unknown key; here it is ").split()[0].split(".")
    assert key in Recipe.model_json_schema()["$defs"][f"{section.capitalize()}Section"]["properties"]
