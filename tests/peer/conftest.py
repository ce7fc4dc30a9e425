"""One tiny world in two hands: the same base, adapter and pairs for pe-dpo's trainer and for TRL's."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch


class Step(NamedTuple):
    """What one training step left."""

    loss: float
    gradients: dict[str, torch.Tensor]

    @property
    def gradient(self) -> torch.Tensor:
        """All gradients in one vector, in the order of their names."""
        return torch.cat([self.gradients[name].flatten() for name in sorted(self.gradients)])


ROWS = [
    {"prompt": "Is ice cold?", "chosen": " Yes, it is.", "rejected": " No"},
    {"prompt": "Say hi", "chosen": " Hi!", "rejected": " Why should I say that to you?"},
    {"prompt": "2+2?", "chosen": " 4", "rejected": " 5, or 6"},
    {"prompt": "Name a long river, please.", "chosen": " The Nile is long.", "rejected": " River"},
    {"prompt": "Red or blue?", "chosen": " Blue: the sky.", "rejected": " Red: my car, my hat."},
    {"prompt": "Is it late?", "chosen": " It is", "rejected": " Ask your clock, not me."},
]
"""Six pairs; in half of them the chosen answer is the longer one."""


LLAMA = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 256,
    "eos_token_id": 257,
}


@pytest.fixture
def rows() -> list[dict[str, str]]:
    """Six rows of prompt, chosen, rejected."""
    return [dict(row) for row in ROWS]


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[[Sequence[dict[str, Any]]], Path]:
    """Write rows as JSON lines and return the file."""

    def write(rows: Sequence[dict[str, Any]]) -> Path:
        path = tmp_path / "train.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def make_tokenizer() -> Callable[..., Any]:
    """Build a tokenizer of one token a byte that puts `<s>` before a text; `</s>` ends an answer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    def make(*, template: str | None = None, bos: str | None = "<s>") -> Any:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        bytewise = Tokenizer(models.BPE({symbol: number for number, symbol in enumerate(alphabet)}, []))
        bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        bytewise.decoder = decoders.ByteLevel()
        bytewise.add_special_tokens([token for token in (bos, "</s>", "<pad>") if token])
        if bos:
            bytewise.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, bytewise.token_to_id(bos))]
            )
        begin = {"bos_token": bos} if bos else {}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="</s>", pad_token="<pad>", **begin)
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture
def tokenizer(make_tokenizer: Callable[..., Any]) -> Any:
    """One token a byte, BOS, no chat template."""
    return make_tokenizer()


@pytest.fixture
def make_base() -> Callable[..., Any]:
    """Build a random Llama of 2 layers, 64 wide, float32, in train mode; every call returns equal weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(**changes: Any) -> Any:
        config = LlamaConfig(**(LLAMA | changes))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = LlamaForCausalLM(config)
            for name, bias in model.named_parameters():
                if name.endswith(".bias"):
                    torch.nn.init.normal_(bias, 0, 0.1)
        return model.train()

    return make


@pytest.fixture
def saved_for_four_bits(make_base: Callable[..., Any], tmp_path: Path) -> str:
    """A saved base whose layers all have 64 inputs and outputs or a multiple."""
    make_base(num_key_value_heads=4).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def attach() -> Callable[..., Any]:
    """Put pe-dpo's adapter on a base; `noise` gives B ≠ 0, the same numbers whoever made the adapter."""
    from pe_dpo.model.adapter import attach_adapter

    def attach(base: Any, *, noise: bool = True, dropout: float = 0.0) -> Any:
        model = attach_adapter(base.requires_grad_(False), rank=4, alpha=8, dropout=dropout)
        return add_noise(model) if noise else model

    return attach


@pytest.fixture
def renew_noise() -> Callable[[Any], Any]:
    """Fill the trained adapter with other numbers than `attach` and `peer_trainer` do."""
    return lambda model: add_noise(model, seed=2)


@pytest.fixture
def encode(write_lines: Callable[..., Path], tokenizer: Any) -> Callable[..., list[Any]]:
    """Read rows as pe-dpo reads them from a file, all of them to train on."""
    from paths_to_pairs import prepare_pairs

    def encode(rows: Sequence[dict[str, Any]], **options: Any) -> list[Any]:
        given = {"tokenizer": tokenizer, "max_length": 200, "eval": 0.0} | options
        return prepare_pairs(write_lines(rows), **given).train

    return encode


@pytest.fixture
def pair_trainer(tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    """Build pe-dpo's trainer over encoded pairs; `loss` are keys of a recipe's loss section."""
    from transformers import TrainingArguments

    from pe_dpo.data import PreparedData
    from pe_dpo.data.report import DataReport
    from pe_dpo.inference.policy import Policy
    from pe_dpo.inference.reference import Reference
    from pe_dpo.inference.scorer import choose_scorer
    from pe_dpo.objective import Loss
    from pe_dpo.recipe.loss_section import LossSection
    from pe_dpo.training.trainer import PairTrainer

    def make(model: Any, pairs: Sequence[Any], loss: dict[str, Any], *, token_budget: int = 4096, **options: Any) -> Any:
        args = TrainingArguments(output_dir=str(tmp_path / "ours"), remove_unused_columns=False, **(SETTINGS | options))
        scorer = choose_scorer(model, pairs, packing=True, token_budget=token_budget)
        reference = Reference(Policy(model, tokenizer, None, ()), scorer)
        data = PreparedData(list(pairs), [], DataReport())
        return PairTrainer(reference, Loss(**LossSection.model_validate(loss).coefficients()), data, args)

    return make


@pytest.fixture
def peer_trainer(tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    """Build TRL's DPOTrainer, or its CPOTrainer for `kind="cpo"`, over rows of text; `noise` as for `attach`.

    `lora` are arguments of PEFT's LoraConfig, `data` those of the trainer, the rest goes into TRL's config.
    """
    from datasets import Dataset
    from peft import LoraConfig

    def make(
        model: Any,
        rows: Sequence[dict[str, Any]],
        *,
        kind: str = "dpo",
        noise: bool = True,
        lora: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        if kind == "cpo":
            from trl.experimental.cpo import CPOConfig as Config
            from trl.experimental.cpo import CPOTrainer as Trainer
        else:
            from trl import DPOConfig as Config
            from trl import DPOTrainer as Trainer
        settings = {"activation_checkpointing": False, "bf16": False, "train_sampling_strategy": "sequential"}
        args = Config(output_dir=str(tmp_path / "peer"), **(SETTINGS | settings | options))
        adapter = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **(lora or {}))
        given = {"train_dataset": Dataset.from_list(list(rows)), "processing_class": tokenizer, "peft_config": adapter}
        trainer = Trainer(model=model, args=args, **(given | (data or {})))
        if noise:
            add_noise(trainer.model)
        return trainer

    return make


@pytest.fixture
def peer_batch() -> Callable[[Any], dict[str, Any]]:
    """All rows of a TRL trainer as one batch of its own collator."""

    def batch(trainer: Any) -> dict[str, Any]:
        return trainer.data_collator(list(trainer.train_dataset))

    return batch


@pytest.fixture
def peer_step(peer_batch: Callable[[Any], dict[str, Any]]) -> Callable[[Any], Step]:
    """Run TRL's own training step over all rows of its trainer."""

    def step(trainer: Any) -> Step:
        trainer.model.zero_grad()
        trainer.current_gradient_accumulation_steps = 1  # Trainer.train sets it from the loader
        loss = trainer.training_step(trainer.model, peer_batch(trainer))
        return Step(float(loss), gradients(trainer.model))

    return step


@pytest.fixture
def our_step() -> Callable[[Any], Step]:
    """Run pe-dpo's training step over all pairs of its trainer."""

    def step(trainer: Any) -> Step:
        trainer.model.zero_grad()
        loss = trainer.training_step(trainer.model, trainer.train_dataset)
        return Step(float(loss), gradients(trainer.model))

    return step


@pytest.fixture
def summed_logprobs() -> Callable[..., torch.Tensor]:
    """Score a padded batch by the textbook: log-softmax of all logits in float64, summed over the answers' tokens."""

    def score(model: Any, batch: dict[str, Any]) -> torch.Tensor:
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        everything = logits[:, :-1].double().log_softmax(-1)
        per_token = everything.gather(2, batch["input_ids"][:, 1:, None]).squeeze(2)
        return (per_token * batch["completion_mask"][:, 1:]).sum(1)

    return score


SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "per_device_train_batch_size": 6,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
"""What both trainers are told."""


def add_noise(model: Any, seed: int = 1) -> Any:
    """Fill the trained adapter with numbers that depend on the seed and the order of its parameters' names alone."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(lora_parameters(model).items()):
        parameter.data.copy_(torch.empty(parameter.shape).normal_(0, 0.1, generator=generator))
    return model


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Copies of the adapter's gradients."""
    return {name: parameter.grad.float().clone() for name, parameter in lora_parameters(model).items()}


def lora_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """The trained adapter's parameters, A and B of every layer."""
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name and ".default." in name}
