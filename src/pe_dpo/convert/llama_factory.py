"""LLaMA-Factory's YAML, with dataset_info.json beside it: its own DPO trainer over the losses of TRL 0.x."""

from pe_dpo.convert import places, settings
from pe_dpo.convert.draft import Draft
from pe_dpo.convert.losses import TheirLoss, listed, write_loss, write_nearest
from pe_dpo.recipe.presets import NOT_HERE

CUT = "prompt and answers are cut to it there, the answers' ends too; here a longer pair is dropped (data.overlong)"


def convert(draft: Draft) -> TheirLoss | None:
    """Write what LLaMA-Factory's settings say, and return their loss."""
    settings.write_model(draft, draft.said("model_name_or_path"), draft.said("model_revision"), draft.said("pure_bf16"))
    bits = draft.said("quantization_bit")
    settings.write_quantization(
        draft,
        int(draft.real(bits)) if bits.value else None,
        bits,
        is_double=bool(draft.said("double_quantization").value),
        kind=draft.said("quantization_type"),
    )
    rate, kind = draft.said("learning_rate"), draft.said("finetuning_type")
    if kind.value == "lora":
        _write_adapter(draft)
    else:
        settings.write_full_fine_tuning(draft, kind, rate)
        draft.read.update(key for key in draft.source.values if key.startswith("lora_"))
    _write_data(draft)
    settings.write_batch(draft, draft.said("per_device_train_batch_size"), draft.said("gradient_accumulation_steps"))
    settings.write_trainer(draft, rate)
    draft.read.update(("bf16", "run_name", "save_strategy", "eval_strategy", "evaluation_strategy"))
    return _write_loss(draft)


def _write_adapter(draft: Draft) -> None:
    start, is_new = draft.said("adapter_name_or_path"), draft.said("create_new_adapter")
    names = [str(name) for name in listed(start.value)] if start.value else []
    if len(names) > 1:
        draft.drop(
            start, "several are merged into the base there; merge all but the last (pe-dpo merge), name that base", breaks=True
        )
    if names and not is_new.value:
        draft.put("adapter.start", names[-1], start)
        draft.put("adapter.reference", "base", start, "with adapters off the raw base is run there")
        words = "the reference is the raw base there and here; reference: adapter keeps a copy of the adapter, as after SFT"
        draft.differs(start, words)
        draft.read.update(key for key in draft.source.values if key.startswith("lora_"))
        return
    if names:
        draft.put("adapter.over", names[-1], start, is_new)
    settings.write_adapter(
        draft,
        draft.said("lora_rank"),
        draft.said("lora_alpha"),
        draft.said("lora_dropout"),
        draft.said("lora_target"),
        is_dropout_off=True,
        all_words=("all",),
    )


def _write_data(draft: Draft) -> None:
    info, folder = places.dataset_info(draft, draft.said("dataset_dir"))
    for here, key in (("data.train", "dataset"), ("data.eval", "eval_dataset")):
        said = draft.said(key)
        if said.value:
            named = [places.described_place(draft, str(name), info, folder) for name in listed(said.value)]
            places.write_places(draft, here, named, said)
    if "data.eval" not in draft.lines:
        places.write_share(draft, draft.said("val_size"))
    places.write_length(draft, draft.said("cutoff_len"), CUT)
    limit = draft.said("max_samples")
    if limit.value:
        draft.number(limit, "data.limit", int)
        if len(listed(draft.source.values.get("dataset"))) > 1:
            draft.differs(limit, "of each data set there, of all together here")
    template = draft.said("template")
    if template.value:
        draft.differs(template, "LLaMA-Factory's own template of that name there; the tokenizer's here (data.template)")
    thinks = draft.said("enable_thinking")
    if thinks.is_written and thinks.value is not None:
        draft.put("data.template_args", {"enable_thinking": bool(thinks.value)}, thinks)
    mix = draft.said("mix_strategy")
    if mix.value != "concat":
        draft.differs(mix, "places are put together here, each with its weight; which row comes when is shuffled")


def _write_loss(draft: Draft) -> TheirLoss | None:
    stage, name, beta = draft.said("stage"), draft.said("pref_loss"), draft.said("pref_beta")
    if stage.value not in (None, "dpo"):
        write_nearest(draft, str(stage.value), stage, beta)
        return None
    smoothing, gamma, likelihood = draft.said("dpo_label_smoothing"), draft.said("simpo_gamma"), draft.said("pref_ftx")
    loss = TheirLoss(
        [str(name.value)], beta, name, smoothing=smoothing, is_smoothed=("sigmoid",), likelihood=likelihood, per_token=False
    )
    if name.value == "simpo":
        loss.has_reference, loss.gamma, loss.margin_from = False, draft.real(gamma), (gamma,)
    write_loss(draft, loss)
    mixed = draft.said("pref_bco_weight")
    if mixed.value and draft.real(mixed) > 1e-6:
        draft.drop(mixed, NOT_HERE["bco_pair"], breaks=True)
        loss.has_counterpart = False
    return loss
