"""What all tools have under other names: the base and its bits, the adapter, the optimizer's side."""

import json
import math
import re
from pathlib import Path
from typing import Any, get_args

from pe_dpo.convert.draft import Draft, Said
from pe_dpo.convert.losses import listed
from pe_dpo.recipe.schema import Optimizer, Schedule

_OPTIMIZERS = {
    "adamw_hf": "adamw_torch", "adamw": "adamw_torch", "adamw_torch_npu_fused": "adamw_torch", "adamw_torch_xla": "adamw_torch",
    "paged_adamw": "paged_adamw_32bit", "paged_lion": "paged_lion_32bit", "lion": "lion_32bit",
    "torch.optim.AdamW": "adamw_torch", "torch.optim.SGD": "sgd", "torch.optim.Adagrad": "adagrad",
    "bitsandbytes.optim.PagedAdamW8bit": "paged_adamw_8bit", "bitsandbytes.optim.PagedAdamW": "paged_adamw_32bit",
    "bitsandbytes.optim.AdamW8bit": "adamw_bnb_8bit", "torchao.optim.AdamW8bit": "adamw_torch_8bit",
    "torchao.prototype.low_bit_optim.AdamW8bit": "adamw_torch_8bit", "torchao.optim.AdamW4bit": "adamw_torch_4bit",
    "ao_adamw_4bit": "adamw_torch_4bit", "ao_adamw_8bit": "adamw_torch_8bit",
}  # fmt: skip
"""Optimizers by other names, or by an older one of transformers."""
_FULL = "LoRA is the only way of training here, and all weights are trained there"
_FULL_RATE = "a rate for full fine-tuning; a LoRA takes about ten times that"


def write_model(draft: Draft, base: Said, revision: Said, dtype: Said) -> None:
    """Write base, revision and dtype; a half precision that is not here becomes auto."""
    about = Path(str(base.value)) / "adapter_config.json"
    if about.is_file():
        below = json.loads(about.read_text(encoding="utf-8")).get("base_model_name_or_path")
        draft.put("model.base", below, f"base_model_name_or_path of {base.value}")
        draft.put("adapter.over", str(base.value), base, "an adapter, which stays frozen under the new one")
    else:
        draft.put("model.base", base.value, base)
        if "lora" in str(base.value).rpartition("/")[2].lower():
            draft.differs(base, "if that is an adapter: name its base here, and its folder under adapter.over")
    if revision.value not in (None, "main", "master"):
        draft.put("model.revision", str(revision.value), revision)
    name = str(dtype.value).removeprefix("torch.")
    if name in ("bfloat16", "bf16"):
        draft.put("model.dtype", "bfloat16", dtype)
    elif name in ("float16", "fp16", "half"):
        draft.differs(dtype, "no float16 here: bfloat16 where the card has it, else float32")
    elif dtype.is_written and name in ("float32", "fp32"):
        draft.put("model.dtype", "float32", dtype)


def write_quantization(draft: Draft, bits: int | None, said: Said, *, is_double: bool, kind: Said | None = None) -> None:
    """Write how the base is held; without a word about it not quantized, which is not what auto does."""
    codes = "fp4" if kind and str(kind.value).lower() == "fp4" else "nf4"
    quantize = {4: codes if is_double else f"{codes}-single", 8: "int8"}.get(bits or 0, "none")
    if bits not in (None, 4, 8):
        draft.drop(said, "4 and 8 bits are here; the base is not quantized")
    words = {codes: "scales quantized too", f"{codes}-single": "scales not quantized", "none": "not quantized there"}
    base = str(draft.lines["model.base"][0]) if "model.base" in draft.lines else ""
    if "bnb-4bit" in base:
        draft.put("model.quantize", "auto", said, "the base comes in codes, and is trained on these")
        return
    if bits == 4 and re.search(r"moe|mixtral|\dx\d+b|-a\d+b", base, re.IGNORECASE):
        draft.put("model.quantize_experts", False, said, "experts stay in 16 bits there")
    origins: list[Said | str] = [
        said,
        *([kind] if kind and codes == "fp4" else []),
        *([words[quantize]] if quantize in words else []),
    ]
    draft.put("model.quantize", quantize, *origins)


def write_adapter(
    draft: Draft,
    rank: Said,
    alpha: Said,
    dropout: Said,
    targets: Said,
    *,
    is_dropout_off: bool,
    all_words: tuple[str, ...] = (),
) -> None:
    """Write rank, alpha, dropout and targets.

    Args:
        draft: The recipe.
        rank: As said there.
        alpha: As said there; with no value twice the rank, as here.
        dropout: As said there.
        targets: As said there.
        is_dropout_off: Whether the trainer there sets every dropout to 0.
        all_words: Words for all linear layers.
    """
    size = draft.number(rank, "adapter.rank", int)
    scale = draft.number(alpha, "adapter.alpha")
    if size and scale is not None and scale != 2 * size:
        draft.differs(alpha, f"α / rank = {scale / size:g}; without a word alpha is 2 · rank = {2 * size} here")
    if is_dropout_off:
        if dropout.value:
            draft.put("adapter.dropout", 0.0, dropout, "set to 0 by the trainer there")
            draft.differs(
                dropout, "the trainer there sets it to 0, whatever is written; so it is 0 here. Here it is done as asked"
            )
    else:
        draft.number(dropout, "adapter.dropout")
    names = [str(name) for name in listed(targets.value)] if targets.value else []
    if names and (names[0] in all_words or names[0] in ("all-linear", "all_linear")):
        draft.put("adapter.targets", "all-linear", targets)
    elif names:
        draft.put("adapter.targets", names, targets)


def write_full_fine_tuning(draft: Draft, said: Said, rate: Said) -> None:
    """Note that all weights are trained there."""
    draft.drop(said, _FULL, breaks=True)
    if rate.value is not None:
        draft.differs(rate, _FULL_RATE)


def write_batch(draft: Draft, batch: Said, accumulation: Said) -> None:
    """Write pairs per step: batch × accumulation × cards."""
    try:
        sizes = [int(batch.value), int(accumulation.value)]
    except (TypeError, ValueError):
        draft.drop(f"{batch}; {accumulation}", "no numbers; set train.pairs_per_step")
        return
    product = " × ".join(str(size) for size in (*sizes, draft.cards))
    default = "" if batch.is_written and accumulation.is_written else ", in part by default there"
    words = f"{batch.key} × {accumulation.key} × cards: {product}{default}"
    draft.put("train.pairs_per_step", math.prod(sizes) * draft.cards, words)
    if not draft.are_cards_known:
        words = "one card is assumed, since nothing says how many; on N cards a step has N times the pairs: give their number"
        draft.differs(batch, words)


def write_trainer(draft: Draft, rate: Said) -> None:
    """Write steps, optimizer, schedule, trackers and seed of a tool whose keys are those of transformers' TrainingArguments.

    Args:
        draft: of the recipe.
        rate: the learning rate.
    """
    write_steps(draft, draft.said("num_train_epochs"), draft.said("max_steps"), rate)
    write_optimizer(draft, draft.said("optim"))
    warmup = (draft.said("warmup_steps"), draft.said("warmup_ratio"))
    write_schedule(draft, draft.said("lr_scheduler_type"), draft.said("lr_scheduler_kwargs"), warmup)
    write_reports(draft, draft.said("report_to"))
    for key in ("weight_decay", "max_grad_norm"):
        draft.number(draft.said(key), f"train.{key}")
    draft.number(draft.said("seed"), "train.seed", int)


def write_steps(draft: Draft, epochs: Said, steps: Said, rate: Said) -> None:
    """Write epochs, steps and learning rate."""
    draft.number(epochs, "train.epochs")
    draft.number(rate, "train.learning_rate")
    if steps.value not in (None, -1):
        draft.number(steps, "train.max_steps", int)


def write_optimizer(draft: Draft, optimizer: Said) -> None:
    """Write the optimizer by transformers' name."""
    name = str(optimizer.value).removeprefix("OptimizerNames.").lower()
    name = _OPTIMIZERS.get(str(optimizer.value), _OPTIMIZERS.get(name, name))
    if name in get_args(Optimizer):
        draft.put("train.optimizer", name, optimizer)
    else:
        draft.drop(optimizer, "no optimizer of that name is here; adamw_torch takes its place")


def write_schedule(draft: Draft, schedule: Said, arguments: Said | None, warmup: tuple[Said, ...]) -> None:
    """Write schedule and warm-up.

    Args:
        draft: The recipe.
        schedule: As said there.
        arguments: Of the schedule.
        warmup: Shares and numbers of steps as they are said there, the one that wins first.
    """
    name = str(schedule.value).removeprefix("SchedulerType.").lower()
    if name not in get_args(Schedule):
        draft.drop(schedule, "no schedule of that name is here; linear takes its place")
    else:
        draft.put("train.schedule", name, schedule)
    if arguments and isinstance(arguments.value, dict) and arguments.value:
        draft.put("train.schedule_args", arguments.value, arguments)
    rise: Any = next((one for one in warmup if one.value and one.is_written), None) or next(
        (one for one in warmup if one.value is not None), None
    )
    if rise is None:
        return
    if draft.number(rise, "train.warmup") and name == "constant":
        draft.differs(rise, "a constant rate has no warm-up, neither there nor here; constant_with_warmup has")


def write_reports(draft: Draft, reports: Said) -> None:
    """Write the trackers that are named."""
    names = [str(name) for name in listed(reports.value)] if reports.value else []
    names = [name for name in names if name not in ("none", "all")]
    if names and reports.is_written:
        draft.put("train.report_to", names, reports)
