"""What a person may ask for: the recipe, its defaults, and the combinations that cannot work.

Every default stands here (of the loss in `loss_section`, of the data in `data_section`) and nowhere else, with its source or
reason. Messages of validators say what was found and what to do; `load` adds the file and the line.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from pe_dpo.links import link_named
from pe_dpo.quantizations import Quantization
from pe_dpo.recipe.data_section import DataSection
from pe_dpo.recipe.loss_section import LossSection
from pe_dpo.recipe.section import Count, Fraction, Location, NonNegative, Positive, Section, Seed

MOVING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings, in small letters, of initialisations that change the base weights, so that the reference is not the base."""

Optimizer = Literal[
    "adamw_torch", "adamw_torch_fused", "adafactor", "adamw_anyprecision", "adamw_torch_4bit", "adamw_torch_8bit", "ademamix",
    "sgd", "adagrad", "adamw_bnb_8bit", "adamw_8bit", "ademamix_8bit", "lion_8bit", "lion_32bit", "paged_adamw_32bit",
    "paged_adamw_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit", "paged_lion_32bit", "paged_lion_8bit", "rmsprop",
    "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit", "grokadamw", "stable_adamw",
]  # fmt: skip
"""The optimizers of transformers that need nothing but parameters and a learning rate."""
Schedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay",
]  # fmt: skip
"""The schedules of transformers that look at the step alone."""


SelectingMetric = Literal[
    "loss", "accuracy/policy", "accuracy/policy_per_token", "accuracy/shift", "accuracy/shift_per_token", "accuracy/implicit",
    "rewards/accuracies", "rewards/margins", "nll/chosen_per_token",
]  # fmt: skip
"""The metrics of held-out pairs that the best evaluation can be picked by, `metrics.catalogue.SELECTING`."""
_ELSEWHERE = {
    "accuracy": "accuracy/policy", "accuracies": "rewards/accuracies", "rewards/accuracy": "rewards/accuracies",
    "reward_accuracy": "rewards/accuracies", "reward accuracy": "rewards/accuracies", "margins": "rewards/margins",
}  # fmt: skip
"""What people call some of them."""


class ModelSection(Section):
    """The base model, loaded once: policy and reference share it."""

    base: Location = Field(description="Path or hub id of a causal language model.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")
    quantize: Literal["auto", Quantization] = Field(
        "auto",
        description="nf4 is double quantized, nf4-single is not. auto: nf4 from a billion parameters on, else none.",
    )
    quantize_experts: bool = Field(
        True, description="4-bit codes of the experts of a mixture too; false leaves them in 16 bits, as other tools do."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Compute dtype. auto: bfloat16 on a GPU that has it, else float32. Adapters stay in float32."
    )


class AdapterSection(Section):
    """The trained part: LoRA in float32. Defaults r = 16, alpha = 2r, no dropout: as QLoRA and Zephyr's DPO recipes."""

    rank: Annotated[int, Field(ge=1, le=16384)] = Field(16, description="r, the rank of the update.")
    alpha: Positive = Field(32.0, description="The update is scaled by alpha / rank; default: 2 * rank.")
    rslora: bool = Field(False, description="Scale by alpha / √rank instead (rank-stabilized LoRA, arXiv 2312.03732).")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Share of the adapter's inputs that is left out, drawn for each token; done as asked."
    )
    targets: Literal["all-linear", "attention", "mlp"] | Annotated[list[str], Field(min_length=1)] = Field(
        "all-linear",
        description="all-linear (every linear layer of the language model but head, routers and experts), attention or mlp "
        "(those in blocks of that name), or a list of names of modules, or of regular expressions for whole paths.",
    )
    exclude: list[str] = Field(
        default_factory=list,
        description="Modules that get no adapter, nor anything in them: names, or regular expressions for whole paths.",
    )
    init: str = Field("default", description="default (B = 0) or gaussian (B = 0); others move the reference and are refused.")
    bias: str = Field("none", description="none; trainable biases would stay on in the reference and are refused.")
    start: Location | None = Field(None, description="Folder of a finished LoRA adapter (say, from SFT) to start from.")
    reference: Literal["base", "adapter"] | None = Field(
        None, description="Needed with start: is π0 the base alone, or the base with a frozen copy of that adapter?"
    )
    over: Location | None = Field(
        None, description="Folder of a finished LoRA adapter (say, from SFT) that stays frozen under the new one; π0 has it."
    )

    @model_validator(mode="before")
    @classmethod
    def _alpha_is_twice_the_rank(cls, values: Any) -> Any:
        rank = values.get("rank") if isinstance(values, dict) and "alpha" not in values else None
        return values | {"alpha": 2.0 * rank} if isinstance(rank, int) and rank > 0 else values

    @field_validator("init")
    @classmethod
    def _init_keeps_the_reference(cls, init: str) -> str:
        if init in ("default", "gaussian"):
            return init
        if init.lower().startswith(MOVING_INITS):
            raise ValueError(
                f"{init} changes the base weights, so that with adapters off the reference would be what is left of the base, "
                "not the base; use init: default"
            )
        raise ValueError(f"{init} is not supported; use default or gaussian")

    @field_validator("bias")
    @classmethod
    def _bias_keeps_the_reference(cls, bias: str) -> str:
        if bias == "none":
            return bias
        raise ValueError(
            f"with bias: {bias} the trained biases stay on when adapters are switched off, so the reference would drift with "
            "training; use bias: none"
        )

    @model_validator(mode="after")
    def _start_names_its_reference(self) -> "AdapterSection":
        if self.start and self.reference is None:
            raise ValueError(
                f"reference: the run starts from the adapter {self.start}: say which model is the reference. "
                "reference: adapter keeps a frozen copy of it (usual after SFT), reference: base takes the raw base"
            )
        if self.over and self.start:
            raise ValueError(
                f"over: {self.over} stays frozen under a new adapter, start goes on with {self.start} itself; keep one of them"
            )
        if self.over and self.reference:
            raise ValueError("reference: over says it already: the base with that frozen adapter; leave reference out")
        if self.reference == "adapter" and not self.start:
            raise ValueError("reference: adapter as the reference needs start: the folder of that adapter")
        if self.start:
            defaults = {key: field.get_default(call_default_factory=True) for key, field in type(self).model_fields.items()}
            defaults["alpha"] = 2.0 * self.rank
            own = ("rank", "alpha", "rslora", "targets", "exclude", "init")
            if fixed := [key for key in own if getattr(self, key) != defaults[key]]:
                raise ValueError(f"{', '.join(fixed)}: set by the adapter that the run starts from; leave out")
        return self

    @property
    def of_reference(self) -> str | None:
        """The folder of the adapter that π0 has; None where π0 is the base alone."""
        return self.over or (self.start if self.reference == "adapter" else None)

    def describe_reference(self) -> str:
        """Return in words which model π0 is."""
        if self.over:
            return f"the base with the adapter {self.over}"
        return f"a frozen copy of {self.start}" if self.of_reference else "the base, adapters off"


class MixoutSection(Section):
    """Mixout: the explicit pull toward the reference. Training runs on W0 + mask·ΔW/(1−p), evaluation on W0 + ΔW."""

    p: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Share of the units taken from π0; 0: off.")
    form: Literal["column", "element"] = Field(
        "column",
        description="column: a unit is an input unit of a layer (the original); element: a single weight, at two to four times "
        "the work of each layer.",
    )
    draws: Literal["step", "microbatch"] = Field(
        "step",
        description="step: one sampled model per optimizer step, so that no gradient depends on how the step is split; "
        "microbatch: one for each forward, which averages over models and depends on tokens_per_microbatch.",
    )
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Share of the steps in which p rises from 0 to p.")


class GenerationSection(Section):
    """Answers sampled from the policy to held-out prompts at the end of a run, for KL(π‖π0), entropy and length."""

    prompts: Annotated[int, Field(ge=0)] = Field(0, description="How many held-out prompts; 0: nothing is sampled.")
    samples: Count = Field(1, description="Answers to each prompt.")
    max_new_tokens: Count = Field(128, description="Where an answer that does not end is cut.")
    snapshots: Annotated[int, Field(ge=0)] = Field(
        0, description="How often along the run held-out pairs and answers are measured and kept: early stopping."
    )
    scales: list[Fraction] = Field(
        default_factory=list,
        json_schema_extra={"uniqueItems": True},
        description="Fractions a of the finished adapter, as [0.5, 0.75]: at the end of the run W0 + a·ΔW is measured and kept "
        "too, scaled toward the reference without training.",
    )

    @field_validator("scales")
    @classmethod
    def _scales_are_fractions(cls, scales: list[float]) -> list[float]:
        check_scales(scales)
        return scales


class SeedsSection(Section):
    """What is drawn by another seed than train.seed, so that one source of chance can be turned while the others stay."""

    data: Seed | None = Field(
        None,
        description="Which prompts a held-out share and a weight below 1 take; default: by the hashes of the prompts alone, "
        "whatever train.seed.",
    )
    order: Seed | None = Field(None, description="The order of the pairs; default: train.seed.")
    adapter: Seed | None = Field(None, description="The adapter that training starts from; default: train.seed.")
    masks: Seed | None = Field(None, description="What mixout or dropout leaves out; default: train.seed.")


class TrainSection(Section):
    """The optimizer's side. Micro-batches are found from a token budget; accumulation is derived, never typed."""

    epochs: Annotated[float, Field(gt=0, le=10_000)] = Field(1.0, description="Passes over the pairs.")
    max_steps: Count | None = Field(None, description="Stop after this many optimizer steps, whatever the epochs.")
    learning_rate: Annotated[float, Field(gt=0, le=100)] = Field(
        2.0e-5, description="Ten times what full fine-tuning takes, as usual for LoRA."
    )
    pairs_per_step: Count = Field(64, description="Pairs per optimizer step (the batch size), whatever the split.")
    prompts_together: bool = Field(
        False,
        description="Shuffle prompts, not pairs: pairs of a prompt share a step (or two, where one is full), and each answer "
        "is scored once. Four answers with six pairs: a third of the work.",
    )
    tokens_per_microbatch: Literal["auto"] | Count = Field(
        "auto", description="Most tokens in one forward; a longer pair goes alone. auto: what fits in memory, 1024 on a CPU."
    )
    packing: Literal["auto"] | bool = Field(
        "auto",
        description="Rows without padding in which prompts stand once. auto: where a check at the start shows that the model "
        "computes the same; true: stop if it does not; false: padded.",
    )
    optimizer: Optimizer = Field("adamw_torch", description="By transformers' names; some need a package of their own.")
    schedule: Schedule = Field("linear", description="Of the learning rate, by transformers' names.")
    schedule_args: dict[str, bool | int | float | str] = Field(
        default_factory=dict, description="Arguments of the schedule, such as {min_lr_rate: 0.1} for cosine_with_min_lr."
    )
    warmup: NonNegative = Field(0.1, description="Share of the steps (as Zephyr's DPO recipe), or steps where it is 1 or more.")
    weight_decay: NonNegative = Field(0.0, description="Of AdamW and its kin, on the adapter's weights.")
    max_grad_norm: NonNegative = Field(1.0, description="0 for no clipping.")
    gradient_checkpointing: Literal["auto"] | bool = Field("auto", description="auto: only if memory asks for it.")
    seed: Seed = Field(0, description="Of adapter, order of the pairs and masks, where `seeds` says no other.")
    seeds: SeedsSection = SeedsSection()
    eval_every: Count | None = Field(None, description="Steps between evaluations; default: a tenth of the run.")
    save_every: Count | None = Field(None, description="Steps between checkpoints; default: a tenth of the run.")
    save_minutes: NonNegative = Field(
        15.0, description="Most minutes between checkpoints, besides those by steps: what a kill can cost; 0: by steps alone."
    )
    keep_checkpoints: Count = Field(
        2,
        description="Newest checkpoints kept; the newest whole one before the last stays in any case, should that be damaged.",
    )
    bad_steps: Count = Field(
        5,
        description="Steps in a row, skipped since loss or gradient is not finite, that stop the run; 1: the first one does.",
    )
    keep_best: SelectingMetric | None = Field(
        None,
        description="Metric of the held-out pairs, such as accuracy/policy, rewards/accuracies or loss: the adapter of its "
        "best evaluation is kept in best/, and eval, merge and chat can take it.",
    )
    patience: Count | None = Field(None, description="Evaluations without a better keep_best after which the run ends.")
    log_every: Count = Field(1, description="Steps between lines of metrics.jsonl.")
    report_to: list[str] = Field(
        default_factory=list,
        description="Trackers of transformers, one or a list: tensorboard, wandb, mlflow, trackio, … None of them stops a run.",
    )
    project: str | None = Field(None, description="Where trackers put the run; default: theirs, or what their variables say.")
    run_name: str | None = Field(
        None, description="What trackers call the run; default: its folder. In a sweep its point and seed are added."
    )

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_tracker_is_a_list(cls, report_to: Any) -> Any:
        names = [report_to] if isinstance(report_to, str) else report_to
        return [] if names == ["none"] else names

    @field_validator("keep_best", mode="before")
    @classmethod
    def _as_others_call_it(cls, keep_best: Any) -> Any:
        name = keep_best.removeprefix("eval_") if isinstance(keep_best, str) else keep_best
        return _ELSEWHERE.get(name, name) if isinstance(name, str) else name

    @model_validator(mode="after")
    def _patience_waits_for_something(self) -> "TrainSection":
        if self.patience is not None and self.keep_best is None:
            raise ValueError("patience: counts evaluations without a better keep_best; name its metric, as keep_best: loss")
        return self

    @field_validator("warmup")
    @classmethod
    def _warmup_is_a_share_or_steps(cls, warmup: float) -> float:
        if warmup >= 1 and warmup != int(warmup):
            raise ValueError(f"{warmup:g} is neither a share of the steps (below 1) nor a number of steps")
        return warmup

    def seed_of(self, what: Literal["order", "adapter", "masks"]) -> int:
        """Return the seed of one source of chance: its own, else the run's."""
        own: int | None = getattr(self.seeds, what)
        return self.seed if own is None else own


class ReferenceSection(Section):
    """Where π0's log-probs come from. What is stored is keyed by what determines it: weights, configuration, way, token ids."""

    policy: Literal["auto", "store", "step", "skip"] = Field(
        "auto",
        description="auto: looked up, computed where missing, remembered; store: all computed before training; step: computed "
        "in every step; skip: none, for gamma 0 alone. With gamma 0 only held-out pairs have a reference.",
    )
    store: Location | None = Field(
        None,
        description="The store's file; default: reference.sqlite in $PE_DPO_CACHE, else in the user's cache folder.",
    )


class Recipe(Section):
    """A complete, checked request for one training run."""

    # A file may leave `output` out: the loader names it after the file.
    model_config = ConfigDict(json_schema_extra=lambda schema: schema["required"].remove("output"))

    model: ModelSection
    adapter: AdapterSection = AdapterSection()
    data: DataSection
    loss: LossSection = LossSection()
    mixout: MixoutSection = MixoutSection()
    generation: GenerationSection = GenerationSection()
    reference: ReferenceSection = ReferenceSection()
    train: TrainSection = TrainSection()
    output: Location = Field(description="Folder of the run.")

    @property
    def policy_starts_as_reference(self) -> bool:
        """Whether π = π0 before the first step: always, but for a start from an adapter against the raw base."""
        return self.adapter.start is None or self.adapter.reference == "adapter"

    @model_validator(mode="after")
    def _reference_is_there(self) -> "Recipe":
        if self.reference.policy == "skip" and self.loss.uses_reference:
            gamma = self.loss.gamma if self.loss.is_calibrated else f"{self.loss.gamma_value:g}"
            raise ValueError(
                f"reference.policy: skip needs loss.gamma 0, and it is {gamma}: the loss is made of the reference's log-probs; "
                "set reference.policy: auto"
            )
        return self

    @model_validator(mode="after")
    def _calibrated_gamma_has_one_beta(self) -> "Recipe":
        if self.loss.is_calibrated and "beta" in self.data.pair_columns:
            raise ValueError(
                f"loss.gamma: {self.loss.gamma} finds one number, and with data.columns.beta each pair has a γ in a fixed "
                "ratio to its own β; write a multiple of beta such as 1x"
            )
        return self

    @model_validator(mode="after")
    def _one_mask_for_an_input(self) -> "Recipe":
        if self.mixout.p and self.adapter.dropout:
            raise ValueError(
                f"adapter.dropout: {self.adapter.dropout:g} would mask the input that mixout.p {self.mixout.p:g} masks "
                "already, with another mask for every token; set one of them to 0"
            )
        return self

    @model_validator(mode="after")
    def _training_can_start(self) -> "Recipe":
        """Some pair must be able to move the run from its first step.

        With π = π0 the score is (β−γ)·Δ0 − margin; with γ = β and margin 0 it is exactly 0 for every pair, the kink of the
        hinge, where the subgradient is 0.
        """
        loss = self.loss
        score_is_zero = (
            not loss.is_calibrated
            and loss.gamma_value == loss.beta
            and loss.margin == 0
            and loss.margin_scale == 0
            and loss.length_penalty == 0
            and (loss.reference_floor is None or loss.reference_floor == -math.inf)
        )
        if link_named(loss.link).rests_at_zero and self.policy_starts_as_reference and score_is_zero and loss.sft_weight == 0:
            raise ValueError(
                f"loss.gamma: with link {loss.link}, gamma = beta and margin 0 every pair starts with zero gradient "
                "(policy = reference), so nothing would ever be learned; set margin > 0, or gamma different from beta"
            )
        return self


def warnings(recipe: Recipe) -> list[str]:
    """Return what is allowed but probably not meant, in words."""
    loss = recipe.loss
    found: list[str] = []
    if loss.is_calibrated:
        return found
    if loss.preset in ("simpo", "cpo", "slic", "repo") and loss.gamma_value != 0:
        found.append(
            f"loss.gamma: {loss.gamma} weighs the reference, which {loss.preset} does without; in the paper's letters γ is "
            "loss.margin"
        )
    if link_named(loss.link).has_kink and loss.gamma_value == 0 and loss.margin <= 0 and loss.margin_scale == 0:
        found.append(f"loss: {loss.link} with gamma 0 and margin 0 is content with the uniform policy; set margin > 0")
    if loss.gamma_value == 0 and loss.reduce == "sum" and loss.margin == 0 and loss.sft_weight == 0:
        found.append("loss: with gamma 0 and summed log-probs shorter answers win; consider reduce: mean with a margin (simpo)")
    return found


def check_scales(scales: Sequence[float]) -> None:
    """Check that fractions of an adapter lie between reference and adapter, each named once.

    Raises:
        ValueError: they do not.
    """
    outside = [scale for scale in scales if not 0 < scale < 1]
    if outside:
        raise ValueError(
            f"{outside[0]:g} does not lie between 0, which is the reference, and 1, which is the adapter as it is; write "
            "fractions such as 0.5 and 0.75"
        )
    twice = [scale for at, scale in enumerate(scales) if scale in scales[:at]]
    if twice:
        raise ValueError(f"{twice[0]:g} is there twice; name each fraction once")
