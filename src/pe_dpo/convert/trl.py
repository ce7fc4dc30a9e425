"""TRL's scripts, alignment-handbook's configurations, and SimPO's, whose trainer is a relative of TRL's CPO."""

from pe_dpo.convert import places, settings
from pe_dpo.convert.draft import Draft, Said
from pe_dpo.convert.losses import TheirLoss, listed, read_weights, write_loss, write_nearest
from pe_dpo.errors import UsageError
from pe_dpo.recipe.elsewhere.trl import CUT

_BEFORE_029 = {"rpo_alpha", "max_prompt_length", "max_completion_length", "reference_free", "ref_adapter_name"}
"""Keys that TRL's DPO has had up to 0.28, when it smoothed labels with sigmoid, too."""
_OTHER_TRAINERS = ("orpo", "kto", "grpo", "ppo", "bco", "sft")


def convert(draft: Draft) -> TheirLoss | None:
    """Write what TRL's settings say, and return their loss."""
    source = draft.source
    trainer, why = _trainer(draft)
    settings.write_model(
        draft, draft.said("model_name_or_path"), draft.said("model_revision"), draft.said("dtype", "torch_dtype")
    )
    bits = draft.said("load_in_8bit" if source.values.get("load_in_8bit") else "load_in_4bit")
    settings.write_quantization(
        draft,
        (8 if bits.key == "load_in_8bit" else 4) if bits.value else None,
        bits,
        is_double=bool(draft.said("use_bnb_nested_quant").value),
        kind=draft.said("bnb_4bit_quant_type"),
    )
    rate = draft.said("learning_rate")
    lora = draft.said("use_peft")
    if lora.value:
        settings.write_adapter(
            draft,
            draft.said("lora_r"),
            draft.said("lora_alpha"),
            draft.said("lora_dropout"),
            draft.said("lora_target_modules"),
            is_dropout_off=bool(draft.said("disable_dropout").value),
        )
    else:
        draft.read.update(key for key in source.values if key.startswith("lora_"))
        settings.write_full_fine_tuning(draft, lora, rate)
    _write_data(draft)
    settings.write_batch(draft, draft.said("per_device_train_batch_size"), draft.said("gradient_accumulation_steps"))
    settings.write_trainer(draft, rate)
    draft.read.update(("bf16", "save_strategy", "logging_strategy", "run_name"))
    return _write_loss(draft, trainer, why)


def _trainer(draft: Draft) -> tuple[str, str]:
    """Return the trainer that reads the settings (dpo, cpo, simpo, or one that is not here), and how that is known."""
    source = draft.source
    values = source.values
    if source.name == "simpo":
        return "simpo", "SimPO's trainer"
    if source.program:
        name = next((one for one in (*_OTHER_TRAINERS, "cpo", "dpo") if one in source.program), "dpo")
        return name, source.program
    if {"desirable_weight", "undesirable_weight"} & values.keys():
        return "kto", "desirable_weight"
    if {"cpo_alpha", "simpo_gamma"} & values.keys() or values.get("loss_type") in ("simpo", "alphapo"):
        return "cpo", "cpo_alpha, simpo_gamma or loss_type: simpo, which the CPO trainer has"
    name = "dpo" if "dpo" in source.words else next((one for one in (*_OTHER_TRAINERS, "cpo") if one in source.words), "dpo")
    return name, f"no key says which trainer reads the file; its names say {name}" if name != "dpo" else "the DPO trainer"


def _write_data(draft: Draft) -> None:
    mixer, mixture, several = draft.said("dataset_mixer"), draft.said("dataset_mixture"), draft.said("datasets")
    strategy, size = draft.said("eval_strategy", "evaluation_strategy"), draft.said("test_split_size")
    name, subset = draft.said("dataset_name"), draft.said("dataset_config")
    split, test = draft.said("dataset_train_split"), draft.said("dataset_test_split")
    is_evaluated = strategy.value not in (None, "no", False) or bool(draft.said("do_eval").value)
    held_out: list[places.Place] = []
    if isinstance(mixer.value, dict):
        held_out = _write_mixer(draft, mixer)
        test = draft.said("dataset_splits")
    elif isinstance(mixture.value, dict):
        places.write_places(draft, "data.train", places.read_mixture(draft, mixture.value.get("datasets") or []), mixture)
        if "test_split_size" in mixture.value:
            size = Said("dataset_mixture.test_split_size", mixture.value["test_split_size"], True)
    elif isinstance(several.value, list):
        places.write_places(draft, "data.train", places.read_mixture(draft, several.value), several)
    elif name.value:
        part = str(split.value) if split.value != "train" else None
        places.write_places(draft, "data.train", [places.place(name.value, subset=subset.value, split=part)], name)
        held_out = [places.place(name.value, subset=subset.value, split=test.value)]
    if size.value is not None:
        places.write_share(draft, size)
    elif not is_evaluated:
        draft.put("data.eval", 0.0, strategy, "nothing is held out")
    elif held_out:
        places.write_places(draft, "data.eval", held_out, test)
    _write_lengths(draft)


def _write_mixer(draft: Draft, mixer: Said) -> list[places.Place]:
    """Write the places of a dataset_mixer, and return those that are held out."""
    splits, configs = draft.said("dataset_splits"), draft.said("dataset_configs")
    words = [str(word) for word in listed(splits.value)] if splits.value else ["train", "test"]
    subsets = listed(configs.value) if configs.value else [None] * len(mixer.value)
    if len(subsets) != len(mixer.value):
        found = f"{configs} has {len(subsets)} entries for {len(mixer.value)} data sets; one of each is expected"
        raise UsageError(f"{draft.source.path}: {found}")
    train = [
        places.place(path, split=word if word != "train" else None, subset=part, weight=draft.real(mixer, weight))
        for (path, weight), part in zip(mixer.value.items(), subsets, strict=True)
        for word in words
        if "train" in word
    ]
    places.write_places(draft, "data.train", train, mixer, *([splits] if splits.is_written else []))
    if any(draft.real(mixer, weight) != 1 for weight in mixer.value.values()):
        draft.differs(mixer, "a fraction takes the first rows there, and those of a share of the prompts here")
    return [places.place(path, split=word) for path in mixer.value for word in words if "test" in word]


def _write_lengths(draft: Draft) -> None:
    if draft.source.name == "simpo":
        draft.differs("chosen, rejected", "an answer begins with the assistant's header there; here the prompt ends with it")
    else:
        words = "as they are there, in the tokenizer's chat template here where it has one: data.template: plain leaves them"
        draft.differs("rows of text, not of messages", words)
    places.write_length(draft, draft.said("max_length"), CUT)
    for key in ("max_prompt_length", "max_completion_length"):
        said = draft.said(key)
        if said.value is not None:
            draft.drop(
                said, "no length of its own: data.max_length is of both, data.overlong: truncate_prompt keeps answers whole"
            )
    mode = draft.said("truncation_mode")
    if mode.is_written:
        draft.drop(mode, "which end is cut: nothing is, see data.overlong")
    template = draft.said("chat_template")
    if template.value:
        draft.differs(template, "the tokenizer's own template here; save this one to a file, and name it under data.template")


def _write_loss(draft: Draft, trainer: str, why: str) -> TheirLoss | None:
    names, weights = draft.said("loss_type"), draft.said("loss_weights")
    beta, smoothing = draft.said("beta"), draft.said("label_smoothing")
    loss = TheirLoss([str(name) for name in listed(names.value)], beta, names, smoothing=smoothing)
    loss.weights = read_weights(draft, weights)
    if trainer == "simpo":
        ratio = draft.said("gamma_beta_ratio")
        loss.names = ["simpo_hinge" if loss.names == ["hinge"] else "simpo"]
        loss.has_reference, loss.gamma = False, draft.real(ratio) * draft.real(beta)
        loss.margin_from = (ratio, f"{draft.real(ratio):g} · β")
        loss.likelihood, loss.is_smoothed = draft.said("sft_weight"), ("simpo",)
    elif trainer == "cpo":
        loss.has_reference, loss.is_smoothed = False, ("sigmoid", "simpo")
        loss.likelihood = draft.said("cpo_alpha")
        if loss.names == ["simpo"]:
            gamma = draft.said("simpo_gamma")
            loss.gamma, loss.margin_from = draft.real(gamma), (gamma,)
    elif trainer != "dpo":
        write_nearest(draft, trainer, f"{trainer.upper()} ({why})", beta)
        return None
    else:
        loss.likelihood = draft.said("rpo_alpha")
        if _BEFORE_029 & draft.source.values.keys():
            loss.is_smoothed = ("sigmoid",)
        draft.read.update(("cpo_alpha", "simpo_gamma"))
    write_loss(draft, loss)
    if draft.said("reference_free").value:
        draft.put("loss.gamma", 0.0, draft.said("reference_free"))
    return loss
