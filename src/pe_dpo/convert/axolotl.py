"""Axolotl's YAML, which its builder turns into arguments of TRL's DPO and CPO trainers."""

from typing import Any

from pe_dpo.convert import places, settings
from pe_dpo.convert.draft import Draft, Said
from pe_dpo.convert.losses import TheirLoss, read_weights, write_loss, write_nearest
from pe_dpo.recipe.presets import NOT_HERE

_OVERLONG = {"drop": "drop", "raise": "error"}
_FIELDS = {"field_prompt": "prompt", "field_system": "system", "field_messages": "messages",
           "field_chosen": "chosen", "field_rejected": "rejected"}  # fmt: skip
_KNOWN = {*_FIELDS, "path", "type", "split", "name", "data_files", "revision", "ds_type", "roles", "message_property_mappings",
          "trust_remote_code", "chat_template"}  # fmt: skip
"""Keys of a data set that are read, or that say how messages are spelt, which is found here."""
_READ_ANYWAY = {"conversation", "conversations", "messages", "prompt", "question", "system"}
"""Columns of a prompt that are read without a map."""


def convert(draft: Draft) -> TheirLoss | None:
    """Write what Axolotl's settings say, and return their loss."""
    settings.write_model(draft, draft.said("base_model"), draft.said("revision_of_model"), draft.said("bf16"))
    adapter = draft.said("adapter")
    four, eight = draft.said("load_in_4bit"), draft.said("load_in_8bit")
    bits = 4 if four.value or adapter.value == "qlora" else 8 if eight.value else None
    said = eight if bits == 8 else four if four.is_written else adapter if bits else four
    settings.write_quantization(draft, bits, said, is_double=True)
    rate = draft.said("learning_rate")
    start = draft.said("lora_model_dir")
    if adapter.value not in ("lora", "qlora"):
        settings.write_full_fine_tuning(draft, adapter, rate)
        draft.read.update(key for key in draft.source.values if key.startswith("lora_"))
    elif start.value:
        draft.put("adapter.start", start.value, start)
        draft.put("adapter.reference", "adapter", start, "a frozen copy of it is the reference")
        draft.read.update(key for key in draft.source.values if key.startswith("lora_"))
    else:
        linear = draft.said("lora_target_linear")
        targets = draft.said("lora_target_modules")
        settings.write_adapter(
            draft,
            draft.said("lora_r"),
            draft.said("lora_alpha"),
            draft.said("lora_dropout"),
            Said(linear.key, "all-linear", True) if linear.value else targets,
            is_dropout_off=True,
        )
    _write_data(draft)
    settings.write_batch(draft, draft.said("micro_batch_size"), draft.said("gradient_accumulation_steps"))
    settings.write_steps(draft, draft.said("num_epochs"), draft.said("max_steps"), rate)
    settings.write_optimizer(draft, draft.said("optimizer"))
    lowest, schedule = draft.said("cosine_min_lr_ratio"), draft.said("lr_scheduler")
    arguments = draft.said("lr_scheduler_kwargs")
    if lowest.value and schedule.value == "cosine":
        schedule = Said("lr_scheduler", "cosine_with_min_lr", True)
        arguments = Said(lowest.key, {"min_lr_rate": draft.real(lowest)}, True)
    settings.write_schedule(draft, schedule, arguments, (draft.said("warmup_steps"), draft.said("warmup_ratio")))
    project = draft.said("wandb_project")
    if project.value:
        draft.put("train.report_to", ["wandb"], project)
    for key in ("weight_decay", "max_grad_norm"):
        draft.number(draft.said(key), f"train.{key}")
    draft.number(draft.said("seed"), "train.seed", int)
    tokens = draft.said("special_tokens")
    if isinstance(tokens.value, dict) and {"eos_token", "bos_token"} & tokens.value.keys():
        draft.differs(tokens, "begin and end are the tokenizer's own here; save a tokenizer with these beside the base")
    return _write_loss(draft)


def _write_data(draft: Draft) -> None:
    for here, key in (("data.train", "datasets"), ("data.eval", "test_datasets")):
        said = draft.said(key)
        if isinstance(said.value, list):
            places.write_places(
                draft,
                here,
                [place for one in said.value for place in _places(draft, one)],
                Said(key, [one.get("path") if isinstance(one, dict) else one for one in said.value], True),
            )
    share = draft.said("val_set_size")
    if "data.eval" not in draft.lines:
        places.write_share(draft, share)
    longest, what = draft.said("sequence_len"), draft.said("excess_length_strategy")
    draft.number(longest, "data.max_length", int)
    overlong = _OVERLONG.get(str(what.value))
    if overlong is None:
        draft.differs(what, "answers are cut there; here the pair is dropped, or its prompt cut (data.overlong)")
    else:
        draft.put("data.overlong", overlong, what)
    draft.differs(longest, "a template's special tokens are counted here, and pairs of just that length may be dropped")
    template = draft.said("chat_template")
    if template.value not in (None, "tokenizer_default"):
        draft.differs(template, "a template of Axolotl's own there; the tokenizer's here, or a file under data.template")


def _places(draft: Draft, about: Any) -> list[places.Place]:
    """Return the files of one of Axolotl's data sets, with a column map where its fields need one."""
    about = about if isinstance(about, dict) else {"path": about}
    kind = about.get("type")
    places.note_unknown(draft, "datasets", about, _KNOWN)
    fields = {**about, **kind} if isinstance(kind, dict) else about
    named = {ours: fields[theirs] for theirs, ours in _FIELDS.items() if fields.get(theirs)}
    if isinstance(kind, str) and kind.partition(".")[0] in ("chatml", "llama3", "zephyr"):
        draft.differs(f"type: {kind}", "writes its own template, whatever the tokenizer's; here the tokenizer's is written")
    if any(fields.get(key) for key in ("prompt_format", "chosen_format", "rejected_format")):
        draft.differs(
            f"type of {about.get('path')}", "texts are put into formats there; write them so, with data.template: plain"
        )
    is_usual = named.get("chosen", "chosen") == "chosen" and named.get("rejected", "rejected") == "rejected"
    is_usual = is_usual and {*named.values()} <= {"chosen", "rejected", *_READ_ANYWAY}
    return [
        places.place(
            path,
            split=about.get("split"),
            subset=about.get("name"),
            revision=about.get("revision"),
            columns={} if is_usual else {"chosen": "chosen", "rejected": "rejected", **named},
        )
        for path in places.paths_of(about, "path")
    ]


def _write_loss(draft: Draft) -> TheirLoss | None:
    method = draft.said("rl")
    beta = draft.said("trl.beta", "rl_beta", "dpo_beta")
    beta = beta if beta.is_written else draft.said("rl_beta")
    name = str(method.value)
    smoothing = draft.said("dpo_label_smoothing")
    if name not in ("dpo", "ipo", "simpo"):
        words = f"GRPO's cousin with several rewards, {NOT_HERE['grpo']}; the preset gdpo here is generalized DPO"
        write_nearest(draft, name, method, beta, words if name == "gdpo" else "")
        return None
    kinds, weights = draft.said("dpo_loss_type"), draft.said("dpo_loss_weights")
    if name == "simpo":
        gamma = draft.said("simpo_gamma")
        loss = TheirLoss(["simpo"], beta, method, has_reference=False, gamma=draft.real(gamma), margin_from=(gamma,))
        loss.likelihood = draft.said("cpo_alpha")
    elif name == "ipo":
        loss = TheirLoss(["ipo"], beta, method)
    else:
        loss = TheirLoss(
            list(kinds.value) if isinstance(kinds.value, list) else [str(kinds.value)], beta, kinds, smoothing=smoothing
        )
        loss.weights = read_weights(draft, weights)
    draft.read.update(("simpo_gamma", "cpo_alpha"))
    write_loss(draft, loss)
    return loss
