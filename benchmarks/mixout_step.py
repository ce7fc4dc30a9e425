"""What mixout costs in a whole preference step: HH pairs in packed rows, the reference stored, forward and backward."""

import argparse
import itertools
import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from benchmarks import agreement
from benchmarks.memory import peak_mib
from benchmarks.mixout_cost import AGAIN, COLUMN, DROPOUT, ELEMENT, PLAIN, P, attach, costs, factors_of, measured_apart
from benchmarks.models import Dtype, ModelName
from benchmarks.ours import FULL_STACK, OurStep, ladder
from benchmarks.pairs import draw, facts, population
from benchmarks.rounds import run_rounds
from pe_dpo.data.pairs import EncodedPair

ARMS = (PLAIN, AGAIN, COLUMN, ELEMENT, DROPOUT)
MODEL: ModelName = "m8k"
ROUNDS = 11


class StepArm:
    """One arm's step over one optimizer batch, under a new draw.

    Args:
        name: of the arm.
        pairs: of the batch.
        dtype: of the base.
    """

    def __init__(self, name: str, pairs: Sequence[EncodedPair], dtype: Dtype) -> None:
        (rung,) = [rung for rung in ladder() if rung.name == FULL_STACK]
        self.step = OurStep(rung, pairs, MODEL, dtype)
        self.mixout = attach(name, self.step.model)
        self._draws = itertools.count(1)
        if name == DROPOUT:
            for _, module in self.layers():
                module.lora_dropout["default"] = nn.Dropout(P)

    def __call__(self) -> float:
        """Run one step and return its loss."""
        if self.mixout is not None:
            self.mixout.draw = next(self._draws)
        return self.step()

    def layers(self) -> list[tuple[str, Any]]:
        """Return the LoRA layers and their names."""
        return [(name, module) for name, module in self.step.model.named_modules() if hasattr(module, "lora_variant")]


class _Dense(LoraVariant):
    """ΔW ⊙ factors written out and multiplied, with autograd's own gradients."""

    def __init__(self, factors: Tensor) -> None:
        self.factors = factors

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        a, b = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        update = module.scaling[active_adapter] * (b @ a) * self.factors
        return result + F.linear(module.lora_dropout[active_adapter](x), update.to(x.dtype))


def check(name: str, arm: StepArm, dtype: Dtype) -> dict[str, float]:
    """Return relative differences of loss and adapter gradients from the same step with every ΔW written out.

    Raises:
        Disagreement: they are larger than those that `step` allows against TRL.
    """
    found = _outcome(arm)
    own = {name: module.lora_variant["default"] for name, module in arm.layers()}
    for layer, module in arm.layers():
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        module.lora_variant["default"] = _Dense(factors_of(arm.mixout, f"{layer}.default", a, b))
    dense = _outcome(arm)
    for layer, module in arm.layers():
        module.lora_variant["default"] = own[layer]
    return agreement.compare(f"{name}, {dtype}", found, {"dense": dense}, dtype)["dense"]


def _outcome(arm: StepArm) -> agreement.Outcome:
    torch.manual_seed(0)
    return agreement.outcome(arm.step.model, arm.step())


def time_steps(dtype: Dtype, rounds: int) -> dict[str, Any]:
    """Return the agreement, the CPU seconds of each round and the ratios over plain LoRA.

    Args:
        dtype: of the base.
        rounds: instead of our own number, if not 0.
    """
    pairs = draw(population("hh"), "hh")
    arms = {name: StepArm(name, pairs, dtype) for name in ARMS}
    differences = {name: check(name, arm, dtype) for name, arm in arms.items()}
    for arm in arms.values():
        arm()
    title = f"a step, {len(pairs)} HH pairs, {MODEL}, {dtype}"
    print(f"{title}: {rounds or ROUNDS} rounds", flush=True)
    seconds = run_rounds(arms, rounds or ROUNDS, is_quiet=True)
    tokens = facts(pairs).shared
    return {"title": title, "dtype": dtype, "tokens": tokens, "agreement": differences, **costs(seconds)}


def weigh_steps() -> dict[str, float]:
    """Return the peak of each arm's first step in float32, MiB above what was resident before it, each in a fresh process."""
    return {name: measured_apart("mixout_step", name) for name in ARMS}


def _main() -> None:
    """One process of `weigh_steps`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=ARMS)
    torch.set_num_threads(1)
    print(json.dumps(peak_mib(StepArm(parser.parse_args().name, draw(population("hh"), "hh"), "fp32"))))


if __name__ == "__main__":
    _main()
