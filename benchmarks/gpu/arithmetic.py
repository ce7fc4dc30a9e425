"""What the card computes, against float64: attention over packed rows, the head, and the choice of a way through the model."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.device import Device, random_pairs, random_policy
from benchmarks.gpu.found import Found
from benchmarks.results import machine
from pe_dpo.inference.scorer import choose_scorer
from pe_dpo.model.attention import Packing, packed_attention
from pe_dpo.objective.head import head_logprobs

TREE = [
    (0, 40, -1), (40, 60, 0), (60, 70, 1), (70, 85, 1), (85, 95, 0),
    (95, 130, -1), (130, 131, 5), (131, 160, 5), (160, 200, 5), (200, 257, -1),
]  # fmt: skip
"""A prompt with an answer that forks beside another, one with three answers of which one is a token, and a text without a
branch: 257 tokens, an odd number."""
TOKENS = 257
ATTENTION_TOLERANCE = 1.2e-2
"""‖out − ref‖ / ‖ref‖ of bfloat16 operands; 1e-3 to 1e-2 is usual."""
NATS_PER_TOKEN = 5e-3
"""Standard deviation of a log-prob that float32 logits leave; logits rounded to bfloat16 give about ten times that."""
HEAD_GRADIENT = 2e-2


def versions(device: Device) -> Found:
    """The libraries, and the card's two ceilings: a large matrix product and a large copy."""
    facts: dict[str, Any] = dict(machine()["versions"])
    if device.is_rehearsal:
        return Found(None, facts)
    matrix = torch.randn(8192, 8192, device=device.torch, dtype=torch.bfloat16)
    copied = torch.randn(2**30, device=device.torch, dtype=torch.bfloat16)
    facts["card"] = torch.cuda.get_device_name()
    facts["tflops"] = round(2 * 8192**3 / device.seconds(lambda: matrix @ matrix) / 1e12)
    facts["copy_tb_s"] = round(2 * copied.nbytes / device.seconds(copied.clone) / 1e12, 2)
    return Found(None, facts)


def attention(device: Device) -> Found:
    """Forward and backward of every way over packed rows, with grouped queries, windows and three branches."""
    worst, facts = 0.0, {}
    kinds = ("segments", "dense") if device.is_rehearsal else ("varlen", "segments", "dense")
    for size, window in ((64, None), (128, None), (128, 24), (256, None)):
        torch.manual_seed(size)
        tensors = [torch.randn(1, heads, TOKENS, size, device=device.torch, dtype=torch.bfloat16) for heads in (8, 2, 2)]
        slope = torch.randn(1, TOKENS, 8, size, device=device.torch, dtype=torch.bfloat16)
        exact = _attend("dense", [tensor.double() for tensor in tensors], slope.double(), window)
        for kind in kinds:
            found = _attend(kind, tensors, slope, window)
            off = max(float((one.double() - true).norm() / true.norm()) for one, true in zip(found, exact, strict=True))
            facts[f"{kind}, heads of {size}, window {window}"] = round(off, 5)
            worst = max(worst, off)
    return Found(worst < ATTENTION_TOLERANCE, facts)


def _attend(kind: Any, tensors: list[Tensor], slope: Tensor, window: int | None) -> list[Tensor]:
    """Output and the three gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    groups = torch.nn.Module()
    groups.num_key_value_groups = leaves[0].shape[1] // leaves[1].shape[1]
    out, _ = packed_attention(groups, *leaves, None, packing=Packing(TREE, kind), sliding_window=window)
    out.backward(slope)
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def head(device: Device) -> Found:
    """Log-probs of a bfloat16 head with logits as peaked as a trained model's, and their gradient."""
    vocabulary, width, tokens = (4000, 128, 40) if device.is_rehearsal else (32000, 1024, 300)
    torch.manual_seed(0)
    linear = torch.nn.Linear(width, vocabulary, bias=False, device=device.torch, dtype=torch.bfloat16).requires_grad_(False)
    linear.weight.data.normal_(0, 5 / width**0.5)
    hidden = torch.randn(tokens, width, device=device.torch, dtype=torch.bfloat16).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), device=device.torch)
    found = head_logprobs(hidden, targets, linear)
    found.sum().backward()
    exact = hidden.detach().double().requires_grad_()
    true = (exact @ linear.weight.double().T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    true.sum().backward()
    assert hidden.grad is not None and exact.grad is not None
    deviation = float((found.double() - true).detach().std())
    gradient = float((hidden.grad.double() - exact.grad).norm() / exact.grad.norm())
    facts = {"nats_per_token": deviation, "gradient": gradient}
    return Found(deviation < NATS_PER_TOKEN and gradient < HEAD_GRADIENT, facts)


def self_check(device: Device) -> Found:
    """The way that is chosen for bf16, nf4 and int8, with logits as a random and as a trained model has them."""
    wanted = "segments" if device.is_rehearsal else "varlen"
    facts: dict[str, Any] = {}
    pairs = random_pairs(12 if device.is_rehearsal else 40, "hh")
    for quantize in ("none", "nf4") if device.is_rehearsal else ("none", "nf4", "int8"):
        model = random_policy(device, device.size("layers-4"), quantize)  # type: ignore[arg-type]
        for factor in (1, 8):
            if factor > 1:
                model.get_base_model().lm_head.weight.data.mul_(factor)
            scorer = choose_scorer(model, pairs)
            facts[f"{quantize}, head × {factor}"] = {"path": scorer.path, "batch_dependent": scorer.is_batch_dependent}
    right = all(found["path"] == wanted and not found["batch_dependent"] for name, found in facts.items() if "int8" not in name)
    return Found(right, facts)
