"""TRL's DPO and CPO scripts, alignment-handbook's and SimPO's: their keys, read in TRL 1.16, alignment-handbook and SimPO."""

from pe_dpo.recipe.elsewhere.key import MARGIN, PER_TOKEN, TRAINER, Key, Tool, without

DROPOUT = "TRL's DPO sets it to 0, whatever the config says"
FROZEN = "the reference stays what it was (TR-DPO's moving one is not here)"
REFERENCE = "the reference is the base with adapters off (adapter.reference)"
PRECOMPUTED = "the reference pass is arranged by the program; drop the key"
ATTENTION = "attention is chosen by the program, see train.packing; drop the key"
WEIGHTING = "WPO's weights, which move with the policy, are not here; fixed ones are data.columns: {weight: NAME}"
HEAD = "fully trained modules are not supported; LoRA only"
REMOTE = "code from a model repository is never run; convert the model to a class of transformers"
CUT = "of prompt and answer together; longer ones are cut there, and dropped here (data.overlong)"

_SHARED: dict[str, Key] = {
    **TRAINER,
    # the loss
    "loss_type": Key("loss.preset", "sigmoid is dpo, sigmoid_norm is dpo-norm; ipo is β² times the loss there", "sigmoid"),
    "beta": Key("loss.beta", default=0.1),
    "label_smoothing": Key(
        "loss.label_smoothing", "since 0.29 TRL's DPO reads it for robust alone; its CPO for sigmoid and simpo", 0.0
    ),
    "reference_free": Key("loss.gamma: 0"),
    # the model
    "model_name_or_path": Key("model.base"),
    "model_revision": Key("model.revision", default="main"),
    **dict.fromkeys(
        ("torch_dtype", "dtype"), Key("model.dtype", "auto: bfloat16 where the card has it; the adapter stays in float32")
    ),
    "load_in_4bit": Key("model.quantize: nf4", "nf4-single without use_bnb_nested_quant"),
    "load_in_8bit": Key("model.quantize: int8"),
    "use_bnb_nested_quant": Key("model.quantize: nf4", "without it nf4-single", default=False),
    "bnb_4bit_quant_type": Key("model.quantize", "fp4: fp4 or fp4-single", default="nf4"),
    "bnb_4bit_quant_storage": Key("", "how codes are stored makes no difference; drop the key"),
    **without(ATTENTION, "attn_implementation"),
    **without(REMOTE, "trust_remote_code"),
    # the adapter
    "use_peft": Key("", "LoRA is the only way of training here", default=False, breaks=True),
    "lora_r": Key("adapter.rank", default=16),
    "lora_alpha": Key("adapter.alpha", default=32),
    "lora_dropout": Key("adapter.dropout", DROPOUT, 0.05),
    "lora_target_modules": Key("adapter.targets", "PEFT's own by default: of Llama, Mistral, Qwen, Gemma", "q_proj, v_proj"),
    "use_rslora": Key("adapter.rslora", default=False),
    "use_dora": Key("", "DoRA is not supported", breaks=True),
    **without(HEAD, "lora_modules_to_save", breaks=True),
    **without("LoRA on bare parameters (experts) is not here", "lora_target_parameters", breaks=True),
    "lora_task_type": Key("", "causal language models alone"),
    "disable_dropout": Key("adapter.dropout", "dropout is done as asked", default=True),
    **without(REFERENCE, "ref_model", "ref_model_name_or_path", "ref_model_init_kwargs", breaks=True),
    **without("adapters have no names here", "model_adapter_name", "ref_adapter_name"),
    # the data
    "dataset_name": Key("data.train"),
    "dataset_config": Key("data.train", "its {subset: …}"),
    "dataset_train_split": Key("data.train", "its {split: …}", default="train"),
    "dataset_test_split": Key("data.eval", "its {split: …}", default="test"),
    "max_length": Key("data.max_length", CUT, 1024),
    "max_prompt_length": Key("data.max_length", "of prompt and answer together; see data.overlong for longer pairs"),
    "max_completion_length": Key("data.max_length", "of prompt and answer together; answers are never cut"),
    "truncation_mode": Key("data.overlong", "drop, truncate_prompt or error"),
    "chat_template": Key("data.template", "auto, chat, plain, or a file"),
    **without("a tokenizer's padding and end are its own", "pad_token", "padding_value", "label_pad_token_id"),
    "dataset_streaming": Key("", "the pairs are read whole"),
    "max_target_length": Key("", "encoders and decoders of their own are not here"),
    "is_encoder_decoder": Key("", "causal language models alone"),
    **without("the program's own affair; drop the key", "ignore_bias_buffers", "model_init_kwargs", "env"),
}  # fmt: skip

TRL = Tool(
    "TRL, alignment-handbook",
    "model_name_or_path with dataset_name, dataset_mixer or dataset_mixture, or a line with dpo.py or trl dpo",
    frozenset({
        "dataset_mixer", "dataset_mixture", "dataset_name", "dataset_train_split", "dataset_test_split", "dataset_splits",
        "use_peft", "f_divergence_type", "precompute_ref_log_probs", "max_prompt_length", "use_bnb_nested_quant",
    }),
    {
        **_SHARED,
        "learning_rate": Key("train.learning_rate", "1e-6 by default is for full fine-tuning", 1e-6),
        "gradient_checkpointing": Key("train.gradient_checkpointing"),
        "rpo_alpha": Key("loss.sft_weight", PER_TOKEN),
        "loss_weights": Key("loss.sft_weight", "the weight of sft over that of the preference loss"),
        "cpo_alpha": Key("loss.sft_weight", PER_TOKEN, 1.0),
        "simpo_gamma": Key("loss.margin", MARGIN, 0.5),
        "ld_alpha": Key("", "LD-DPO is not here; loss.length_penalty or loss.reduce: mean act on length", breaks=True),
        "f_divergence_type": Key("", "f-DPO is not here; the reverse KL is what the loss has", "reverse_kl", breaks=True),
        "f_alpha_divergence_coef": Key("", "f-DPO is not here"),
        "use_weighting": Key("", WEIGHTING, breaks=True),
        "discopop_tau": Key("", "DiscoPOP is not here"),
        "alpha": Key("", "AlphaPO's shape of the reward is not here", 0.0, breaks=True),
        "router_aux_loss_coef": Key("", "the balance of experts is no term of the loss here", breaks=True),
        **without(FROZEN, "sync_ref_model", breaks=True),
        **without(FROZEN, "ref_model_mixup_alpha", "ref_model_sync_steps"),
        **without(PRECOMPUTED, "precompute_ref_log_probs", "precompute_ref_batch_size"),
        **without(
            "for single answers with a label, as KTO's", "desirable_weight", "undesirable_weight", "kto_label", breaks=True
        ),
        "datasets": Key("data.train", "a list of {path: …, subset: …, split: …}"),
        "test_split_size": Key("data.eval", "a share; a number of rows is no share"),
        "dataset_mixer": Key("data.train", "a list of {path: …, weight: …}"),
        "dataset_mixture": Key("data.train", "a list of {path: …, weight: …}"),
        "dataset_splits": Key("data.train", "its {split: …}, and that of data.eval"),
        "dataset_configs": Key("data.train", "its {subset: …}"),
        "streaming": Key("", "the pairs are read whole"),
        "auto_insert_empty_system_msg": Key("data.template", "a template alone adds a system turn here"),
    },
)  # fmt: skip

SIMPO = Tool(
    "SimPO",
    "gamma_beta_ratio, or a line with run_simpo.py",
    frozenset({"gamma_beta_ratio"}),
    {
        **_SHARED,
        "num_train_epochs": Key("train.epochs", default=3.0),
        "optim": Key("train.optimizer", default="adamw_torch"),
        "beta": Key("loss.beta", default=2.0),
        "gamma_beta_ratio": Key("loss.margin", f"times beta; {MARGIN}", 0.25),
        "sft_weight": Key("loss.sft_weight", PER_TOKEN, 0.0),
        "loss_type": Key("loss.preset", "sigmoid is simpo; hinge is repo with margin 1 + β·ratio", "sigmoid"),
        "label_smoothing": Key("loss.label_smoothing", "the margin keeps its sign here, and turns it there", 0.0),
        "max_length": Key("data.max_length", CUT, 512),
        "load_in_4bit": Key("model.quantize: nf4", "nf4-single without use_bnb_nested_quant"),
        **{
            name: TRL.keys[name]
            for name in ("dataset_mixer", "dataset_splits", "dataset_configs", "auto_insert_empty_system_msg")
        },
    },
)
