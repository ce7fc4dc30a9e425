"""ms-swift's `swift rlhf`: its arguments in a script, a YAML or the args.json of a run."""

import math

from pe_dpo.convert import places, settings
from pe_dpo.convert.draft import Draft, Said
from pe_dpo.convert.losses import TheirLoss, listed, read_weights, write_loss, write_nearest


def convert(draft: Draft) -> TheirLoss | None:
    """Write what ms-swift's settings say, and return their loss."""
    base, tuner = draft.said("model"), draft.said("tuner_type", "train_type")
    settings.write_model(draft, base, draft.said("model_revision"), draft.said("torch_dtype"))
    bits = draft.said("quant_bits")
    settings.write_quantization(
        draft,
        int(bits.value) if str(bits.value).isdigit() else None,
        bits,
        is_double=bool(draft.said("bnb_4bit_use_double_quant").value),
        kind=draft.said("bnb_4bit_quant_type"),
    )
    is_lora = tuner.value == "lora"
    rate = draft.said("learning_rate")
    rate = rate if rate.value is not None else Said("learning_rate", 1e-4 if is_lora else 1e-5, False)
    start, reference = draft.said("adapters"), draft.said("ref_adapters")
    if not is_lora:
        settings.write_full_fine_tuning(draft, tuner, rate)
        draft.read.update(key for key in draft.source.values if key.startswith("lora_"))
    elif start.value:
        draft.put("adapter.start", str(listed(start.value)[0]), start)
        draft.put("adapter.reference", "adapter" if reference.value else "base", reference if reference.value else start)
        draft.read.update(key for key in draft.source.values if key.startswith(("lora_", "target_modules")))
    else:
        settings.write_adapter(
            draft,
            draft.said("lora_rank"),
            draft.said("lora_alpha"),
            draft.said("lora_dropout"),
            draft.said("target_modules") if draft.said("target_regex").value is None else draft.said("target_regex"),
            is_dropout_off=True,
        )
    _write_data(draft)
    batch, accumulation = draft.said("per_device_train_batch_size"), draft.said("gradient_accumulation_steps")
    if accumulation.value is None and str(batch.value).isdigit():
        derived = max(1, math.ceil(16 / int(batch.value) / draft.cards))
        accumulation = Said(accumulation.key, derived, False)
    settings.write_batch(draft, batch, accumulation)
    settings.write_trainer(draft, rate)
    drawn = draft.said("data_seed")
    if drawn.is_written and draft.number(drawn, "train.seeds.data", int) is not None:
        draft.number(drawn, "train.seeds.order", int)
        draft.differs(drawn, "rows are held out by their prompts here, and other ones than there, whatever the seed")
    draft.read.update(("bf16", "run_name", "save_strategy", "eval_strategy", "logging_dir"))
    draft.differs("adam_beta2: 0.95 by default there", "0.999 here, transformers' default")
    return _write_loss(draft)


def _write_data(draft: Draft) -> None:
    is_hf = draft.said("use_hf").value
    for here, key in (("data.train", "dataset"), ("data.eval", "val_dataset")):
        said = draft.said(key)
        if said.value:
            names = [str(name) for name in listed(said.value)]
            places.write_places(draft, here, [places.swift_place(draft, name) for name in names], said)
            if not is_hf and not all("::" in name or name.endswith((".json", ".jsonl", ".csv", ".parquet")) for name in names):
                draft.differs(said, "a name of ModelScope there, of the Hugging Face hub here")
    if "data.eval" not in draft.lines:
        places.write_share(draft, draft.said("split_dataset_ratio"))
    columns = draft.said("columns")
    if isinstance(columns.value, dict):
        draft.put("data.columns", {ours: theirs for theirs, ours in columns.value.items()}, columns, "turned round")
    length, how = draft.said("max_length"), draft.said("truncation_strategy")
    draft.number(length, "data.max_length", int)
    if how.value != "delete":
        draft.differs(how, "pairs are cut there; here they are dropped, or their prompt is cut (data.overlong)")
    template = draft.said("template")
    if template.value:
        draft.differs(template, "ms-swift's own template of that name there; the tokenizer's here (data.template)")
    thinks = draft.said("enable_thinking")
    if thinks.value is not None:
        draft.put("data.template_args", {"enable_thinking": bool(thinks.value)}, thinks)
    scale = draft.said("loss_scale")
    if scale.value not in ("last_round", None):
        draft.differs(scale, "what of an answer of several turns is scored: data.score")


def _write_loss(draft: Draft) -> TheirLoss | None:
    method, names, beta = draft.said("rlhf_type"), draft.said("loss_type"), draft.said("beta")
    if beta.value is None:
        beta = Said("beta", 2.0 if method.value == "simpo" else 0.1, False)
    if method.value not in ("dpo", "cpo", "simpo"):
        write_nearest(draft, str(method.value), method, beta)
        return None
    if names.value is None:
        names = Said("rlhf_type", "simpo" if method.value == "simpo" else "sigmoid", method.is_written)
    loss = TheirLoss([str(name) for name in listed(names.value)], beta, names, smoothing=draft.said("label_smoothing"))
    if names.key == "rlhf_type":
        loss.says = method
    weights = draft.said("loss_weights")
    loss.weights = read_weights(draft, weights)
    gamma, alpha, likelihood = draft.said("simpo_gamma"), draft.said("cpo_alpha"), draft.said("rpo_alpha")
    if method.value == "dpo":
        loss.likelihood, loss.is_smoothed = likelihood, ("sigmoid",)
        if "ipo" in loss.names and len(loss.names) > 1:
            draft.differs(names, "beside ipo every loss of the list is made of log-probs per token there")
    else:
        loss.has_reference, loss.likelihood, loss.is_smoothed = False, alpha, ("sigmoid", "simpo")
        if loss.names == ["simpo"]:
            loss.gamma, loss.margin_from = draft.real(gamma), (gamma,)
    write_loss(draft, loss)
    if draft.said("reference_free").value:
        draft.put("loss.gamma", 0.0, draft.said("reference_free"))
    return loss
