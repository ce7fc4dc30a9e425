"""What is known of one key of another tool, and the keys that several tools share."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Key(NamedTuple):
    """A key of another tool: what it is here, or why it is nothing here."""

    here: str = ""
    """Our dotted key, with a value where only one fits ("model.quantize: nf4"); empty where there is none."""
    differs: str = ""
    """What is different here, or why there is no such key."""
    default: Any = None
    """What holds there where the key is not written; None where nothing does, or where it makes no difference."""
    breaks: bool = False
    """Whether leaving the key out is another objective (or another model that is trained), where it is not off."""

    @property
    def name_here(self) -> str:
        """The dotted key alone."""
        return self.here.partition(":")[0]

    def in_words(self) -> str:
        """Return what to write instead, or why nothing."""
        if not self.here:
            return self.differs
        return f"here it is {self.here} ({self.differs})" if self.differs else f"here it is {self.here}"


class Tool(NamedTuple):
    """A tool whose settings are known."""

    title: str
    has: str
    """What its files have that no other tool's have, in words."""
    telling: frozenset[str]
    """Keys that only its files have."""
    keys: Mapping[str, Key]
    nests: tuple[str, ...] = ()
    """Keys whose mappings are parts of the settings, as `trl.beta`; "*" for all of them."""


def without(reason: str, *names: str, breaks: bool = False) -> dict[str, Key]:
    """Return keys that are nothing here, all for one reason."""
    return {name: Key("", reason, breaks=breaks) for name in names}


PAIRS = "pairs per optimizer step: batch × accumulation × cards; micro-batches are found by themselves"
PER_TOKEN = "per pair here, per token of the batch there"
MARGIN = "that is the margin; gamma here is the weight of the reference"
ONE_CARD = "one card, or torchrun with the model whole on each"
_CHOSEN_BY_PROGRAM = "speed and memory, arranged by the program; drop the key"
_SCREEN = "what is logged or shown has its own ways here; drop the key"
_HUB = "not in training: pe-dpo export --push, or pe-dpo merge and huggingface-cli upload"
_BETAS = "the optimizer's own settings are transformers' defaults; drop the key"

TRAINER: dict[str, Key] = {
    "learning_rate": Key("train.learning_rate", default=5e-5),
    "num_train_epochs": Key("train.epochs", default=3.0),
    "max_steps": Key("train.max_steps"),
    "per_device_train_batch_size": Key(
        "train.pairs_per_step", PAIRS, 8
    ),
    "gradient_accumulation_steps": Key("train.pairs_per_step", "accumulation is derived from it", 1),
    "lr_scheduler_type": Key("train.schedule", default="linear"),
    "lr_scheduler_kwargs": Key("train.schedule_args"),
    "warmup_ratio": Key("train.warmup"),
    "warmup_steps": Key("train.warmup", "1 or more are steps", 0),
    "optim": Key("train.optimizer", default="adamw_torch_fused"),
    "weight_decay": Key("train.weight_decay", default=0.0),
    "max_grad_norm": Key("train.max_grad_norm", default=1.0),
    "seed": Key("train.seed", default=42),
    "data_seed": Key("train.seeds.order"),
    "logging_steps": Key("train.log_every"),
    "eval_steps": Key("train.eval_every"),
    "save_steps": Key("train.save_every"),
    "save_total_limit": Key("train.keep_checkpoints"),
    "report_to": Key("train.report_to"),
    "output_dir": Key("output"),
    "run_name": Key("output", "its folder's name is the run's"),
    "gradient_checkpointing": Key("train.gradient_checkpointing"),
    "padding_free": Key("train.packing", "auto: rows without padding, where a check shows that they compute the same"),
    "bf16": Key("model.dtype: bfloat16", "auto takes it where the card has it; the base is held in it, the adapter in float32"),
    "fp16": Key("model.dtype: bfloat16", "or float32 on a card without it; float16 training is not here"),
    "neftune_noise_alpha": Key("", "noise on the embeddings is not here", breaks=True),
    **dict.fromkeys(
        ("eval_strategy", "evaluation_strategy"),
        Key("train.eval_every", "steps between evaluations; what is held out is data.eval", "no"),
    ),
    "save_strategy": Key("train.save_every", "steps between checkpoints"),
    **without(_BETAS, "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "optim_target_modules"),
    **without(
        "write train.keep_best (its metric; the best adapter is kept beside the last) and train.patience (in evaluations)",
        "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "early_stopping_patience",
        "early_stopping_steps",
    ),
    **without(
        _HUB, "push_to_hub", "hub_model_id", "hub_model_revision", "hub_strategy", "hub_private_repo", "hub_always_push",
        "hub_revision", "hub_token", "push_dataset_to_hub",
    ),
    **without(
        _SCREEN, "log_level", "log_level_replica", "logging_strategy", "logging_first_step", "logging_dir",
        "logging_nan_inf_filter", "disable_tqdm", "project", "plot_loss", "include_num_input_tokens_seen",
        "skip_memory_metrics",
        "include_for_metrics", "prediction_loss_only", "eval_on_start", "eval_delay", "generate_during_eval",
    ),
    **without("compilation is not used; drop the key", "torch_compile", "torch_compile_backend", "torch_compile_mode"),
    **without(
        "log-probs are made without a matrix of logits already; drop the key", "use_liger_kernel", "liger_kernel",
        "enable_liger_kernel", "liger_kernel_config", "use_liger_loss", "use_logits_to_keep",
    ),
    **without(f"{ONE_CARD}; ZeRO is not here", "deepspeed"),
    **without(f"{ONE_CARD}; FSDP is not here", "fsdp", "fsdp_config", "accelerator_config", "parallelism_config"),
    **without(
        _CHOSEN_BY_PROGRAM, "gradient_checkpointing_kwargs", "activation_checkpointing", "activation_checkpointing_kwargs",
        "activation_offloading", "tf32", "bf16_full_eval", "fp16_full_eval", "auto_find_batch_size", "torch_empty_cache_steps",
        "use_cpu", "use_cache", "ddp_timeout", "ddp_backend", "ddp_find_unused_parameters", "ddp_bucket_cap_mb",
        "ddp_broadcast_buffers", "ddp_static_graph", "local_rank", "debug", "average_tokens_across_devices", "group_by_length",
        "train_sampling_strategy", "length_column_name", "remove_unused_columns", "label_names",
        "full_determinism", "ignore_data_skip", "save_on_each_node", "save_only_model", "save_safetensors",
        "enable_jit_checkpoint", "overwrite_output_dir", "restore_callback_states_from_checkpoint", "pad_to_multiple_of",
    ),
    **without(
        "reading needs no processes here; drop the key", "dataloader_num_workers", "dataloader_pin_memory",
        "dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_in_order",
        "dataloader_multiprocessing_context", "dataset_num_proc", "preprocessing_num_workers", "preprocessing_batch_size",
    ),
    **without("the last step of an epoch has the pairs that are left", "dataloader_drop_last"),
    **without(
        "evaluation is batched by itself; drop the key", "per_device_eval_batch_size", "eval_accumulation_steps",
        "eval_batch_size", "batch_eval_metrics", "eval_do_concat_batches", "eval_use_gather_object",
    ),
    **without("pe-dpo train FILE --resume goes on with a run", "resume_from_checkpoint"),
    **without("pe-dpo train trains; drop the key", "do_train", "do_eval", "do_predict", "predict_with_generate"),
    **without("the preference loss of no tool reads it", "label_smoothing_factor"),
}  # fmt: skip
"""transformers' TrainingArguments, as TRL, LLaMA-Factory and ms-swift take them; defaults of transformers 5."""
