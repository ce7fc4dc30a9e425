"""TRL's DPOTrainer at one point of a grid, fed with our token ids.

Only the tokenization is left out: `_prepare_dataset` hands the ids on. Loading, adapter, precomputed reference, collation,
checkpointing, autocast, loss and metrics are TRL's own, as `DPOTrainer.train` sets them up.
"""

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig, PrinterCallback
from trl import DPOConfig, DPOTrainer

from benchmarks.models import ALPHA, BETA, LEARNING_RATE, RANK, Dtype, fill_adapter, pad_only_tokenizer
from benchmarks.pairs import PAIRS_PER_STEP, ShapeName
from benchmarks.results import temporary_folder
from pe_dpo.data.pairs import EncodedPair, row_length
from pe_dpo.model.quantization import keep_weights_unpacked

Precision = Literal["fp32", "fp32 autocast", "bf16", "bf16 autocast", "nf4/fp32 autocast", "nf4/bf16", "nf4/bf16 autocast"]
PRECISIONS: dict[str, tuple[Precision, ...]] = {
    "fp32": ("fp32",),
    "bf16": ("fp32 autocast", "bf16", "bf16 autocast"),
    "nf4": ("nf4/fp32 autocast", "nf4/bf16", "nf4/bf16 autocast"),
}
"""By section: the weights' dtype (for nf4 that of the layers that stay unquantized), and whether `bf16=True` puts autocast
around the forward. The first of each is TRL's default; in the fp32 section autocast is off for both sides."""


class GridPoint(NamedTuple):
    """Settings of TRL that a careful user can choose."""

    pairs_per_microbatch: int
    """`per_device_train_batch_size`; gradients are accumulated up to the optimizer batch."""
    checkpointing: bool
    """`gradient_checkpointing`."""
    stores_reference: bool
    """`precompute_ref_log_probs`."""
    sorts: bool
    """Micro-batches of like length within the optimizer batch: kinder than TRL's length grouping, which also changes what an
    optimizer batch holds."""
    precision: Precision

    @property
    def name(self) -> str:
        """Name for tables and for `parse_point`."""
        words = [
            f"bs {self.pairs_per_microbatch}",
            "gc" if self.checkpointing else "no gc",
            "ref stored" if self.stores_reference else "ref in step",
            "sorted" if self.sorts else "unsorted",
            self.precision,
        ]
        return "TRL " + ", ".join(words)


def parse_point(name: str) -> GridPoint:
    """Return the grid point of a name."""
    size, checkpointing, reference, order, precision = name.removeprefix("TRL ").split(", ")
    return GridPoint(
        int(size.removeprefix("bs ")),
        checkpointing == "gc",
        reference == "ref stored",
        order == "sorted",
        precision,  # type: ignore[arg-type]
    )


def default_point(shape: ShapeName, dtype: Dtype) -> GridPoint:
    """Return TRL's defaults: checkpointing on, reference in every step, the whole optimizer batch at once."""
    return GridPoint(PAIRS_PER_STEP[shape], True, False, False, PRECISIONS[dtype][0])


def smallest_point(dtype: Dtype) -> GridPoint:
    """Return one pair at a time without checkpointing: no padding but that within a pair."""
    return GridPoint(1, False, True, False, PRECISIONS[dtype][0 if dtype == "fp32" else 1])


def grid(shape: ShapeName, dtype: Dtype, *, quick: bool = False) -> list[GridPoint]:
    """Return every grid point, the default first.

    Sorting means something only where there are several micro-batches of several pairs. `quick` keeps two points.
    """
    whole = PAIRS_PER_STEP[shape]
    if quick:
        return [default_point(shape, dtype), smallest_point(dtype)]
    points = [
        GridPoint(size, checkpointing, stored, sorts, precision)
        for precision in PRECISIONS[dtype]
        for size in sorted({size for size in (1, 2, 4, 8, whole) if whole % size == 0}, reverse=True)
        for checkpointing in (True, False)
        for stored in (False, True)
        for sorts in ((False, True) if 1 < size < whole else (False,))
    ]
    return sorted(points, key=lambda point: point != default_point(shape, dtype))


class IdsTrainer(DPOTrainer):
    """DPOTrainer over pairs that are token ids already."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, *arguments: Any) -> Any:
        keep_weights_unpacked(self.model)  # it runs in eval mode, in which bitsandbytes repacks 4-bit weights on some CPUs
        return super()._precompute_ref_logps(*arguments)


def make_trainer(
    point: GridPoint,
    pairs: Sequence[EncodedPair],
    base: Path,
    *,
    pairs_per_step: int,
    device: Literal["cpu", "cuda"] = "cpu",
) -> IdsTrainer:
    """Return a trainer over the pairs in their order, with the same adapter weights as ours.

    If the point stores the reference, this runs TRL's precomputation.

    Args:
        point: the settings.
        pairs: all pairs, optimizer batch after optimizer batch.
        base: folder of a base.
        pairs_per_step: of one optimizer batch.
        device: where it trains.
    """
    args = DPOConfig(
        output_dir=str(temporary_folder()),
        use_cpu=device == "cpu",
        bf16="autocast" in point.precision,
        per_device_train_batch_size=point.pairs_per_microbatch,
        gradient_accumulation_steps=pairs_per_step // point.pairs_per_microbatch,
        gradient_checkpointing=point.checkpointing,
        precompute_ref_log_probs=point.stores_reference,
        beta=BETA,
        max_length=None,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        logging_steps=1,
        train_sampling_strategy="sequential",
        model_init_kwargs={"dtype": torch.float32 if "fp32" in point.precision else torch.bfloat16},
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = IdsTrainer(
        model=str(base),
        args=args,
        train_dataset=_dataset(_ordered(pairs, pairs_per_step) if point.sorts else pairs),
        processing_class=pad_only_tokenizer(),
        quantization_config=_four_bit() if point.precision.startswith("nf4") else None,
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.remove_callback(PrinterCallback)
    keep_weights_unpacked(trainer.model)
    fill_adapter(trainer.model)
    return trainer


class PeerStep:
    """TRL's own training step over one optimizer batch: forward, backward, metrics; no optimizer, collated beforehand."""

    def __init__(
        self, point: GridPoint, pairs: Sequence[EncodedPair], base: Path, device: Literal["cpu", "cuda"] = "cpu"
    ) -> None:
        self.name = point.name
        self.trainer = make_trainer(point, pairs, base, pairs_per_step=len(pairs), device=device)
        if point.checkpointing:
            self.trainer.model.activation_checkpointing_enable(self.trainer.args.activation_checkpointing_kwargs)
        # What Trainer.train does before its first step: autocast is put around the model's forward here.
        self.model = self.trainer.accelerator.prepare_model(self.trainer.model)
        self.trainer.current_gradient_accumulation_steps = self.trainer.args.gradient_accumulation_steps
        columns = ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps")
        rows = [{name: row[name] for name in columns if name in row} for row in self.trainer.train_dataset]
        size = point.pairs_per_microbatch
        self.batches = [self.trainer.data_collator(rows[start : start + size]) for start in range(0, len(rows), size)]

    def __call__(self) -> float:
        """Run one step and return its loss; gradients are left in the model."""
        self.model.zero_grad(set_to_none=True)
        return sum(float(self.trainer.training_step(self.model, dict(batch))) for batch in self.batches)


def _ordered(pairs: Sequence[EncodedPair], pairs_per_step: int) -> list[EncodedPair]:
    """The same optimizer batches, each sorted by length."""
    steps = (pairs[start : start + pairs_per_step] for start in range(0, len(pairs), pairs_per_step))
    return [pair for step in steps for pair in sorted(step, key=row_length)]


def _dataset(pairs: Sequence[EncodedPair]) -> Dataset:
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    dataset = Dataset.from_dict({name: [getattr(pair, name).tolist() for pair in pairs] for name in names})
    # A fingerprint of its own for each run, as in a process of its own: TRL caches the references of a dataset in memory in
    # the temporary folder of the process.
    dataset._fingerprint = uuid.uuid4().hex[:16]
    return dataset


def _four_bit() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
