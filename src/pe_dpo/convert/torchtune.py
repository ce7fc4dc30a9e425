"""torchtune's YAML for its LoRA DPO recipes: builders with arguments in the place of names."""

from typing import Any

from pe_dpo.convert import places, settings
from pe_dpo.convert.draft import Draft, Said
from pe_dpo.convert.losses import TheirLoss, write_loss

_LAYERS = {"output_proj": "o_proj", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_MLP = ["gate_proj", "down_proj", "up_proj"]
_STACK_EXCHANGE = {"prompt": "question", "chosen": "response_j", "rejected": "response_k"}
_BUILDERS: dict[str, dict[str, Any]] = {
    "stack_exchange_paired_dataset": {"path": "lvwerra/stack-exchange-paired", "subset": "data/rl", "columns": _STACK_EXCHANGE},
    "hh_rlhf_helpful_dataset": {"path": "RLHFlow/HH-RLHF-Helpful-standard"},
}
"""What the builders of data sets stand for."""


def convert(draft: Draft) -> TheirLoss | None:
    """Write what torchtune's settings say, and return their loss."""
    builder = draft.said("model._component_")
    name = str(builder.value).rpartition(".")[2]
    folder = draft.said("checkpointer.checkpoint_dir")
    settings.write_model(draft, folder, Said("", None, False), draft.said("dtype"))
    quantized = draft.said("model.quantize_base")
    is_quantized = bool(quantized.value) or name.startswith("qlora")
    settings.write_quantization(
        draft, 4 if is_quantized else None, builder if name.startswith("qlora") else quantized, is_double=True
    )
    rate = draft.said("optimizer.lr")
    if name.startswith(("lora", "qlora")):
        layers = draft.said("model.lora_attn_modules")
        names = [_LAYERS.get(str(layer), str(layer)) for layer in layers.value or ["q_proj", "v_proj"]]
        mlp = draft.said("model.apply_lora_to_mlp")
        targets = Said(f"{layers}; {mlp}", names + (_MLP if mlp.value else []), True)
        settings.write_adapter(
            draft,
            draft.said("model.lora_rank"),
            draft.said("model.lora_alpha"),
            draft.said("model.lora_dropout"),
            targets,
            is_dropout_off=False,
        )
        draft.put("adapter.targets", targets.value, layers, mlp)
    else:
        settings.write_full_fine_tuning(draft, builder, rate)
    _write_data(draft)
    settings.write_batch(draft, draft.said("batch_size"), draft.said("gradient_accumulation_steps"))
    epochs, steps = draft.said("epochs"), draft.said("max_steps_per_epoch")
    settings.write_steps(draft, epochs, Said("max_steps", None, False), rate)
    if steps.value:
        draft.put("train.max_steps", int(draft.real(steps) * (draft.real(epochs) if epochs.value else 1)), steps, epochs)
        draft.differs(steps, "an end of each epoch there, of the run here; where the data have fewer steps, leave it out")
    optimizer, fused = draft.said("optimizer._component_"), draft.said("optimizer.fused")
    settings.write_optimizer(draft, optimizer)
    if fused.value and draft.lines["train.optimizer"][0] == "adamw_torch":
        draft.put("train.optimizer", "adamw_torch_fused", optimizer, fused)
    draft.number(draft.said("optimizer.weight_decay"), "train.weight_decay")
    schedule, warmup = draft.said("lr_scheduler._component_"), draft.said("lr_scheduler.num_warmup_steps")
    named = str(schedule.value).rpartition(".")[2].removeprefix("get_").removesuffix("_schedule_with_warmup")
    named = "constant" if schedule.value is None else named
    settings.write_schedule(draft, Said(schedule.key, named, schedule.is_written), None, (warmup,))
    clip = draft.said("clip_grad_norm")
    draft.put(
        "train.max_grad_norm",
        draft.real(clip) if clip.value else 0.0,
        clip if clip.value else "clip_grad_norm: nothing is clipped there",
    )
    seed = draft.said("seed")
    if seed.value is not None:
        draft.number(seed, "train.seed", int)
    logger = draft.said("metric_logger._component_")
    trackers = {"WandBLogger": "wandb", "TensorBoardLogger": "tensorboard", "CometLogger": "comet_ml"}
    tracker = trackers.get(str(logger.value).rpartition(".")[2])
    if tracker:
        draft.put("train.report_to", [tracker], logger)
    draft.read.update(("checkpointer.output_dir", "model.lora_dropout"))
    draft.read.update(key for key in draft.source.values if key.startswith(("checkpointer.", "tokenizer.path")))
    return _write_loss(draft)


def _write_data(draft: Draft) -> None:
    builder, source, files = draft.said("dataset._component_"), draft.said("dataset.source"), draft.said("dataset.data_files")
    columns, split = draft.said("dataset.column_map"), draft.said("dataset.split")
    known = _BUILDERS.get(str(builder.value).rpartition(".")[2], {})
    path = files.value if files.value else source.value or known.get("path")
    if path is None:
        draft.drop(builder, "a builder of data that is not known; name the file under data.train")
        path = str(builder.value)
    part = str(split.value) if split.value != "train" else None
    if part and "[" in part:
        draft.drop(split, "a slice of a split; data.limit takes the first rows")
        part = None
    named = columns.value or known.get("columns") or {}
    if named == {"chosen": "chosen", "rejected": "rejected"}:
        named = {}
    one = places.place(
        path, subset=draft.said("dataset.name", "dataset.data_dir").value or known.get("subset"), split=part, columns=named
    )
    if known.get("subset"):
        one.pop("subset", None)
        draft.differs(builder, f"its folder {known['subset']} alone is read there; name its files under data.train")
    places.write_places(draft, "data.train", [one], builder, *(said for said in (source, files) if said.is_written))
    draft.put("data.eval", 0.0, "dataset: nothing is held out there")
    length = draft.said("tokenizer.max_seq_len")
    if length.value:
        places.write_length(
            draft, length, "longer answers are cut there, with an end token all the same; here a pair is dropped"
        )


def _write_loss(draft: Draft) -> TheirLoss | None:
    which = draft.said("loss._component_")
    name = str(which.value).rpartition(".")[2]
    beta, gamma, smoothing = draft.said("loss.beta"), draft.said("loss.gamma"), draft.said("loss.label_smoothing")
    if name == "RSOLoss":
        if gamma.is_written:
            draft.differs(gamma, "RSO's γ is β: loss.beta; gamma here is the weight of the reference")
        loss = TheirLoss(["hinge"], gamma, which)
    elif name == "DPOLoss":
        loss = TheirLoss(["sigmoid"], beta, which, smoothing=smoothing, is_smoothed=("sigmoid",))
    elif name == "SimPOLoss":
        margin = Said("loss.gamma", gamma.value if gamma.is_written else 0.5, gamma.is_written)
        loss = TheirLoss(["simpo"], beta, which, has_reference=False, gamma=draft.real(margin), margin_from=(margin,))
    else:
        draft.drop(which, "no loss of that name is known", breaks=True)
        return None
    write_loss(draft, loss)
    return loss
