"""What mixout costs over plain LoRA in one layer: forward and backward, its memory, and a new draw.

Every arm computes with the same base weight, A, B, input and incoming gradient; a new draw of the masks is inside the timed
step. Before anything is timed, value and gradients of every arm are compared with W0 + s·B·A written out in float64, times the
factors that mixout says it has.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.agreement import Disagreement
from benchmarks.memory import RETURN_BLOCKS, peak_mib
from benchmarks.rounds import Spread, ratio, run_rounds, spread, timed
from pe_dpo.model.lora import compute_in_base_dtype
from pe_dpo.model.mixout import Mixout, attach_mixout
from pe_dpo.model.mixout.masks import Layer

P = 0.5
"""Of mixout and of `lora_dropout`; what they cost does not depend on it."""
PLAIN, AGAIN, COLUMN, ELEMENT = "plain", "plain, again", "column", "element"
DROPOUT, PEFT = "lora_dropout", "PEFT's plain"
ARMS = (PLAIN, AGAIN, COLUMN, ELEMENT, DROPOUT, PEFT)
"""Plain LoRA as it is computed here; the same again, so that the noise is seen; mixout's forms; PEFT's dropout before our plain
LoRA; PEFT's own plain LoRA."""
MOST = 1.03
"""Times plain LoRA that the column form may cost."""
KEPT_SHARE = 0.01
"""Of a matrix (d_out, d_in) in float32, that the element form may keep for the backward beyond what plain LoRA keeps."""
TOLERANCES = {"fp32": 1e-5, "bf16": 2e-2}
CHECKED_TOKENS = 64


class Case(NamedTuple):
    """One layer and its input.

    Args:
        width: d_in = d_out.
        rank: r.
        tokens: rows of the input.
        rounds: how many.
        repeats: forwards and backwards that are timed as one.
        dtype: of base and input; A and B are in float32.
    """

    width: int
    rank: int
    tokens: int
    rounds: int = 1
    repeats: int = 1
    dtype: Literal["fp32", "bf16"] = "fp32"

    @property
    def title(self) -> str:
        """In a word."""
        return f"d {self.width}, r {self.rank}, {self.tokens} tokens" + ", bf16" * (self.dtype == "bf16")


ROUNDS = {
    (1024, 512): (21, 8),
    (1024, 2048): (15, 3),
    (2048, 512): (15, 3),
    (2048, 2048): (13, 1),
    (4096, 512): (13, 1),
    (4096, 2048): (7, 1),
}
"""Rounds and repeats of a width and a number of tokens; a timed piece takes a quarter of a second or more."""
CASES = (
    *(Case(width, rank, tokens, *ROUNDS[width, tokens]) for width, tokens in ROUNDS for rank in (8, 64)),
    Case(2048, 64, 2048, 11, 2, "bf16"),
)
WEIGHED = (Case(1024, 8, 512), Case(1024, 64, 2048), Case(2048, 64, 2048), Case(4096, 8, 512), Case(4096, 64, 2048))
"""Whose memory is measured."""


# -------------------------------------------------------------------------------------------------------------------- layers


class LayerArm:
    """One LoRA layer in training mode; called, it runs forward and backward under a new draw.

    Args:
        module: PEFT's layer.
        mixout: its mixout, or None.
        x: (tokens, d_in).
        pull: (tokens, d_out), the gradient that comes in.
        repeats: forwards and backwards of one call.
    """

    def __init__(self, module: Any, mixout: Mixout | None, x: Tensor, pull: Tensor, repeats: int) -> None:
        self.module, self.mixout, self.x, self.pull, self.repeats = module, mixout, x, pull, repeats
        self._draws = itertools.count(1)

    @property
    def trained(self) -> tuple[Tensor, Tensor]:
        """A and B."""
        return self.module.lora_A["default"].weight, self.module.lora_B["default"].weight

    def __call__(self) -> float:
        """Run the repeats and return a number of the last output."""
        for _ in range(self.repeats):
            if self.mixout is not None:
                self.mixout.draw = next(self._draws)
            self.forget()
            out = self.module(self.x)
            out.backward(self.pull)
        return float(out.detach()[0, 0])

    def forget(self) -> None:
        """Free the gradients."""
        for part in (self.x, *self.trained):
            part.grad = None

    def factors(self) -> Tensor:
        """Return the factors of ΔW's elements."""
        (layer,) = self.mixout.layers if self.mixout else [""]
        return factors_of(self.mixout, layer, *self.trained)


def factors_of(mixout: Mixout | None, layer: str, a: Tensor, b: Tensor) -> Tensor:
    """Return the factors 0 or 1/(1−p) of the elements of a layer's ΔW: (d_in,), (d_out, d_in), or a one without mixout."""
    if mixout is None:
        return torch.ones(())
    if mixout.form == "column":
        return mixout.factors(layer, a).clone()
    return mixout.mask_key(layer, a).factors(0, (len(b), a.shape[1]))


def make_arms(case: Case) -> dict[str, LayerArm]:
    """Return the arms by name, around one frozen linear layer and one input; |ΔW| is about |W0|."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if case.dtype == "bf16" else torch.float32
    base = nn.Linear(case.width, case.width, bias=False).to(dtype)
    x, pull = (torch.randn(case.tokens, case.width).to(dtype) for _ in range(2))
    b = torch.randn(case.width, case.rank) / (2 * case.rank**0.5)
    arms = {name: _make_arm(name, case, base, x.requires_grad_(), pull) for name in ARMS}
    a = arms[PLAIN].trained[0]
    for arm in arms.values():
        arm.trained[0].data.copy_(a.data)
        arm.trained[1].data.copy_(b)
    return arms


def _make_arm(name: str, case: Case, base: nn.Linear, x: Tensor, pull: Tensor) -> LayerArm:
    from peft import LoraConfig, get_peft_model

    dropout = P if name == DROPOUT else 0.0
    config = LoraConfig(r=case.rank, lora_alpha=2 * case.rank, lora_dropout=dropout, target_modules=["0"])
    model: Any = get_peft_model(nn.Sequential(base), config).train()
    if name != PEFT:
        compute_in_base_dtype(model)
    return LayerArm(model.base_model.model[0], attach(name, model), x, pull, case.repeats)


def attach(name: str, model: Any) -> Mixout | None:
    """Attach an arm's form of mixout to a model; None for arms without."""
    if name not in (COLUMN, ELEMENT):
        return None
    return attach_mixout(model, P, seed=0, form="column" if name == COLUMN else "element")


def check(name: str, arm: LayerArm, case: Case) -> dict[str, float]:
    """Return relative differences of the output and the gradients of x, A and B from the written-out weight in float64.

    Raises:
        Disagreement: one is larger than the tolerance, or the masks are not masks of share p that change with the draw.
    """
    _check_masks(name, arm)
    x, pull = arm.x.detach()[:CHECKED_TOKENS].clone().requires_grad_(), arm.pull[:CHECKED_TOKENS]
    torch.manual_seed(1)
    out = arm.module(x)
    found = (out, *torch.autograd.grad(out, (x, *arm.trained), pull))
    torch.manual_seed(1)
    dropped = F.dropout(torch.ones_like(x), P if name == DROPOUT else 0.0)
    wanted = _dense(arm, x, pull, dropped)
    differences = {
        part: float((ours.detach().double() - dense.detach()).norm() / dense.detach().norm())
        for part, ours, dense in zip(("value", "x", "a", "b"), found, wanted, strict=True)
    }
    if not max(differences.values()) <= TOLERANCES[case.dtype]:
        raise Disagreement(f"{case.title}, {name}: {differences}; at most {TOLERANCES[case.dtype]:.0e} is allowed")
    return differences


def _dense(arm: LayerArm, x: Tensor, pull: Tensor, dropped: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients of x, A and B, through a weight that is written out; float64."""
    inputs, a, b = (part.detach().double().requires_grad_() for part in (x, *arm.trained))
    update = arm.module.scaling["default"] * (b @ a) * arm.factors().double()
    base = arm.module.base_layer.weight.double()
    out = inputs @ base.T + (inputs * dropped.double()) @ update.T
    return (out, *torch.autograd.grad(out, (inputs, a, b), pull.double()))


def _check_masks(name: str, arm: LayerArm) -> None:
    if arm.mixout is None:
        return
    arm.mixout.draw = -1
    before = arm.factors()
    arm.mixout.draw = 0
    factors = arm.factors()
    deviation = (P / (1 - P) / factors.numel()) ** 0.5
    is_of_share = abs(float(factors.mean()) - 1) < 6 * deviation and set(factors.unique().tolist()) == {0, 1 / (1 - P)}
    if not is_of_share or torch.equal(before, factors):
        raise Disagreement(f"{name}: its factors have mean {float(factors.mean()):.3f}, or are the same in two draws")


def time_layer(case: Case, rounds: int) -> dict[str, Any]:
    """Return the agreement, the CPU seconds of each round and the ratios over plain LoRA.

    Args:
        case: which layer.
        rounds: instead of the case's own, if not 0.
    """
    arms = make_arms(case)
    agreement = {name: check(name, arm, case) for name, arm in arms.items()}
    for arm in arms.values():
        arm()
    print(f"{case.title}: {rounds or case.rounds} rounds", flush=True)
    seconds = run_rounds(arms, rounds or case.rounds, is_quiet=True)
    return {"title": case.title, **case._asdict(), "agreement": agreement, **costs(seconds, per=case.repeats)}


def costs(seconds: Mapping[str, list[float]], *, per: int = 1) -> dict[str, Any]:
    """Return the rounds with the ratios over plain LoRA: median, smallest, largest.

    Args:
        seconds: of each arm, by round.
        per: forwards and backwards that were timed as one.
    """
    return {
        "round_seconds": {name: [value / per for value in values] for name, values in seconds.items()},
        "over_plain": {name: list(ratio(seconds, PLAIN, name)) for name in seconds if name != PLAIN},
    }


def cost_lines(rows: list[dict[str, Any]]) -> str:
    """Return CPU seconds of plain LoRA, and the others over it within rounds, as markdown."""
    head = ("", "plain, CPU s", *ARMS[1:])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [f"{spread(row['round_seconds'][PLAIN]).median:.3f}"]
        cells += [str(Spread(*row["over_plain"][name])) if name in row["over_plain"] else "" for name in ARMS[1:]]
        lines.append(f"| {row['title']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------------------- memory


def weigh(case: Case) -> dict[str, Any]:
    """Return what each arm keeps for the backward beyond x, W0, A and B, and its peak, MiB; from a fresh process.

    Raises:
        Disagreement: the element form keeps more than a hundredth of a matrix beyond what plain LoRA keeps.
    """
    arms = measured_apart("mixout_cost", *map(str, case[:3]))
    matrix = case.width**2 * 4 / 2**20
    extra = arms[ELEMENT]["kept_mib"] - arms[PLAIN]["kept_mib"]
    if not extra < KEPT_SHARE * matrix:
        raise Disagreement(f"{case.title}: the element form keeps {extra:.2f} MiB for the backward beyond plain LoRA's")
    shape = {"width": case.width, "rank": case.rank, "tokens": case.tokens}
    return {"title": case.title, **shape, "matrix_mib": matrix, "arms": arms}


def measured_apart(module: str, *arguments: str) -> Any:
    """Return what one of these modules prints as JSON in a fresh process whose heap gives everything back."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    done = subprocess.run(command, env=os.environ | RETURN_BLOCKS, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{module} {' '.join(arguments)}: the process failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def kept_mib(arm: LayerArm) -> float:
    """Return what autograd saves in a forward: storages other than those of x, W0, A and B, each counted once."""
    owned = {part.untyped_storage().data_ptr() for part in (arm.x, arm.module.base_layer.weight, *arm.trained)}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = arm.module(arm.x)
    kept = sum(size for place, size in found.items() if place not in owned)
    del out  # until here, so that no place is used twice
    return kept / 2**20


def _weigh_here(case: Case) -> dict[str, dict[str, float]]:
    """Of each arm, after a step that leaves what libraries keep for themselves; Linux only."""
    weights = {}
    for name, arm in make_arms(case).items():
        arm()
        arm.forget()
        weights[name] = {"kept_mib": kept_mib(arm), "peak_mib": peak_mib(arm)}
        arm.forget()
    return weights


def memory_lines(rows: list[dict[str, Any]]) -> str:
    """Return what is kept, and the peak, beyond those of plain LoRA, MiB, as markdown."""
    names = (COLUMN, ELEMENT, DROPOUT, PEFT)
    head = ("kept for the backward / peak, MiB", "one d × d", PLAIN, *names)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        plain = row["arms"][PLAIN]
        cells = [f"{row['matrix_mib']:.0f}", f"{plain['kept_mib']:.2f} / {plain['peak_mib']:.0f}"]
        for name in names:
            kept, peak = (row["arms"][name][key] - plain[key] for key in ("kept_mib", "peak_mib"))
            cells.append(f"{kept:+.2f} / {round(peak):+d}")
        lines.append(f"| {row['title']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------------- draws


def time_draws() -> dict[str, dict[str, float]]:
    """Return the CPU seconds of one new draw of column masks for all layers of a model, by the model's shape."""
    small = [512] * 24 + [1216] * 4
    large = ([4096] * 6 + [14336]) * 32
    found = {}
    for name, widths in (("4 layers of 512", small), ("32 layers of 4096 (8 B parameters)", large)):
        mixout = Mixout(P, 0, "column", {f"{number}": Layer(width, (torch.zeros(()),)) for number, width in enumerate(widths)})

        def redraw(mixout: Mixout = mixout) -> None:
            for number in range(1, 11):
                mixout.draw = number
            mixout.draw = 0

        redraw()
        seconds = spread([timed(redraw)[0] / 11 for _ in range(5)])
        found[name] = {"masks": len(widths), "units": sum(widths), "seconds": seconds.median}
        print(f"a draw for {name}: {1000 * seconds.median:.1f} ms", flush=True)
    return found


def _main() -> None:
    """One process of `weigh`."""
    parser = argparse.ArgumentParser()
    for name in ("width", "rank", "tokens"):
        parser.add_argument(name, type=int)
    torch.set_num_threads(1)
    print(json.dumps(_weigh_here(Case(**vars(parser.parse_args())))))


if __name__ == "__main__":
    _main()
