"""A whole DPO run of TRL as its user would write it: `python trl_run.py SETTINGS.json`. Imports nothing of ours.

The settings give data, base, output folder, the arguments of `DPOConfig`, and a file with the adapter's A matrices, so that
two programs that draw random numbers in different orders start from the same adapter.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from safetensors.torch import load_file
from torch.utils.data import Sampler
from trl import DPOConfig, DPOTrainer


class _EpochByEpoch(Sampler):
    """The pairs of each epoch in a given order, so that both sides put the same pairs into a step."""

    def __init__(self, orders: Iterator[list[int]], length: int) -> None:
        self.orders, self.length = orders, length

    def __iter__(self) -> Iterator[int]:
        return iter(next(self.orders))

    def __len__(self) -> int:
        return self.length


def main() -> None:
    """Train, evaluating and saving along the way, and save the adapter."""
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    files = {"train": asked["train"], "test": asked["test"]}
    data = load_dataset("json", data_files=files)
    args = DPOConfig(
        output_dir=asked["output"],
        use_cpu=True,
        bf16=False,
        model_init_kwargs={"dtype": torch.float32},
        report_to="none",
        **asked["arguments"],
    )
    trainer = DPOTrainer(
        model=asked["base"],
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        peft_config=LoraConfig(**asked["adapter"]),
    )
    weights = load_file(asked["weights"])
    parameters = {
        name.replace(".default.", "."): weight for name, weight in trainer.model.named_parameters() if "lora_" in name
    }
    if parameters.keys() != weights.keys():
        raise SystemExit(f"other adapter matrices: {sorted(parameters.keys() ^ weights.keys())[:4]}")
    for name, weight in parameters.items():
        weight.data.copy_(weights[name])
    orders = iter(asked["order"])
    trainer._get_train_sampler = lambda *_: _EpochByEpoch(orders, len(asked["order"][0]))
    trainer.train()
    trainer.save_model(asked["output"])
    trainer.save_state()


if __name__ == "__main__":
    main()
