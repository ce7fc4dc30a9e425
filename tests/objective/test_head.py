"""Log-probs from hidden states: the values and gradients of log-softmax over all logits, without all logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pe_dpo.objective.head import CHUNKS, LogitTransform, head_logprobs, is_frozen_linear

TOKENS, ENTRIES = CHUNKS["cpu"]
TRANSFORMS = {
    "plain": LogitTransform(),
    "scale": LogitTransform(scale=0.25),
    "softcap": LogitTransform(softcap=3.0),
    "both": LogitTransform(scale=2.5, softcap=2.0),
}


def case(tokens: int, vocabulary: int, *, width: int = 12, bias: bool = False, dtype: torch.dtype = torch.float64) -> Any:
    """Hidden states, targets and a frozen head whose logits have a standard deviation of about 2."""
    generator = torch.Generator().manual_seed(tokens * 7919 + vocabulary)
    head = nn.Linear(width, vocabulary, bias=bias).to(dtype).requires_grad_(False)
    head.weight.copy_(torch.randn(vocabulary, width, generator=generator, dtype=torch.float64) * 2 / width**0.5)
    if bias:
        head.bias.copy_(torch.randn(vocabulary, generator=generator, dtype=torch.float64))
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, torch.randint(vocabulary, (tokens,), generator=generator), head


def textbook(hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, scale: float, cap: float | None) -> Tensor:
    logits = hidden @ weight.T * scale if bias is None else (hidden @ weight.T + bias) * scale
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return torch.log_softmax(logits, dim=-1)[torch.arange(len(targets)), targets]


def exact(hidden: Tensor, targets: Tensor, head: nn.Linear, transform: LogitTransform) -> tuple[Tensor, Tensor]:
    """Values and gradients in float64; the gradient is of Σ_t (t + 1) · log p_t, so that each token pulls differently."""
    wide = hidden.detach().double().requires_grad_()
    bias = None if head.bias is None else head.bias.double()
    values = textbook(wide, targets, head.weight.double(), bias, transform.scale, transform.softcap)
    return values.detach(), torch.autograd.grad(values @ pulls(values), wide)[0]


def found(hidden: Tensor, targets: Tensor, head: nn.Module, transform: LogitTransform) -> tuple[Tensor, Tensor]:
    values = head_logprobs(hidden, targets, head, transform)
    return values.detach(), torch.autograd.grad(values @ pulls(values), hidden)[0]


def pulls(values: Tensor) -> Tensor:
    return torch.arange(1, len(values) + 1, dtype=values.dtype) / len(values)


# ---------------------------------------------------------------- log-softmax and its gradient


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)], ids=["f64", "f32", "bf16"]
)
def test_values_and_gradients_are_those_of_log_softmax(dtype, tolerance, transform, bias):
    """Two and a half tiles of the vocabulary; the exact value is in float64 of the same rounded weights."""
    given = case(37, 2 * ENTRIES + 999, bias=bias, dtype=dtype)
    for ours, theirs in zip(found(*given, transform), exact(*given, transform), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("vocabulary", [1, 7, ENTRIES - 1, ENTRIES, ENTRIES + 1])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5])
def test_any_few_tokens_and_any_vocabulary_will_do(tokens, vocabulary):
    given = case(tokens, vocabulary)
    for ours, theirs in zip(found(*given, TRANSFORMS["both"]), exact(*given, TRANSFORMS["both"]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [TOKENS - 1, TOKENS, TOKENS + 1, TOKENS + 3, 2 * TOKENS + 4])
def test_tokens_beyond_one_tile_are_like_the_others(tokens):
    given = case(tokens, 50)
    for ours, theirs in zip(found(*given, TRANSFORMS["both"]), exact(*given, TRANSFORMS["both"]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_no_tokens_have_no_logprobs():
    hidden, targets, head = case(0, 7)
    assert head_logprobs(hidden, targets, head).shape == (0,)


def test_targets_at_the_borders_of_chunks_are_found():
    hidden, _, head = case(6, 2 * ENTRIES + 1)
    targets = torch.tensor([0, ENTRIES - 1, ENTRIES, 2 * ENTRIES - 1, 2 * ENTRIES, 1])
    for ours, theirs in zip(
        found(hidden, targets, head, TRANSFORMS["plain"]), exact(hidden, targets, head, TRANSFORMS["plain"]), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("first", [1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_ten_thousand_stay_finite(dtype, first):
    """Logits ±1e4 in the first chunk and ∓1e4 once in the second: log-probs 0 for the largest and −2e4 for the others."""
    head = nn.Linear(1, ENTRIES + 2, bias=False).to(dtype).requires_grad_(False)
    head.weight.zero_()
    head.weight[0], head.weight[ENTRIES] = first, -first
    hidden = torch.ones(2, 1, dtype=dtype, requires_grad=True)
    largest, smallest = (0, ENTRIES) if first > 0 else (ENTRIES, 0)
    scale = float(head.weight[0].abs())  # 1e4 as bfloat16 has it
    values, gradient = found(hidden, torch.tensor([largest, smallest]), head, TRANSFORMS["plain"])
    assert values.tolist() == [0.0, -2 * scale]
    assert gradient.squeeze(1).tolist() == pytest.approx([0.0, -2 * scale], rel=1e-2)


def test_half_precision_has_float32_values_and_gradients_of_its_own_kind():
    hidden, targets, head = case(5, 40, dtype=torch.bfloat16)
    values, gradient = found(hidden, targets, head, TRANSFORMS["plain"])
    assert (values.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)


def test_a_token_of_uniform_logits_has_the_chance_of_one_in_all():
    hidden, targets, head = case(3, 3000)
    head.weight.zero_()
    assert head_logprobs(hidden, targets, head).tolist() == pytest.approx([-8.006367567650246] * 3, rel=1e-14)


# ---------------------------------------------------------------- the number of a token is its own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_a_token_has_the_same_bits_in_any_company(dtype):
    """Alone, in pairs, in threes, in fours, at the end of a second tile, and backwards; the value and the gradient."""
    assert_same_bits(dtype, (1, 2, 3, 4, 5, 7, 50, 129))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "sizes"), [
    (torch.bfloat16, (1, 2, 3, 4, 5, 7, 50)),
    (torch.float32, (12, 50)),
    (torch.float32, (5, 6, 7, 9, 10, 11)),
])  # fmt: skip
def test_a_token_has_the_same_bits_on_two_threads(dtype, sizes):
    torch.set_num_threads(2)
    try:
        assert_same_bits(dtype, sizes)
    finally:
        torch.set_num_threads(1)


def assert_same_bits(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    hidden, targets, head = case(TOKENS + 130, ENTRIES + 500, width=96, dtype=dtype)
    values, gradients = ungrouped(hidden, targets, head)
    backwards = [part.flip(0) for part in ungrouped(hidden.detach().flip(0).requires_grad_(), targets.flip(0), head)]
    assert torch.equal(values, backwards[0]) and torch.equal(gradients, backwards[1])
    for size in sizes:
        for start in (0, 500, TOKENS - 1):
            part = slice(start, start + size)
            some = ungrouped(hidden.detach()[part].clone().requires_grad_(), targets[part], head)
            assert torch.equal(values[part], some[0]), (start, size)
            assert torch.equal(gradients[part], some[1]), (start, size)


def ungrouped(hidden: Tensor, targets: Tensor, head: nn.Module) -> tuple[Tensor, Tensor]:
    values = head_logprobs(hidden, targets, head, TRANSFORMS["softcap"])
    return values.detach(), torch.autograd.grad(values.sum(), hidden)[0]


def test_values_have_the_same_bits_with_and_without_a_gradient():
    hidden, targets, head = case(40, 3000, dtype=torch.float32)
    assert torch.equal(head_logprobs(hidden.detach(), targets, head), head_logprobs(hidden, targets, head).detach())


# ---------------------------------------------------------------- which head


def test_a_trained_head_gets_its_own_gradient():
    hidden, targets, head = case(TOKENS + 5, 60, bias=True)
    head.requires_grad_(True)
    inputs = (hidden, head.weight, head.bias)
    transform = TRANSFORMS["both"]
    values = head_logprobs(hidden, targets, head, transform)
    expected = textbook(hidden, targets, head.weight, head.bias, transform.scale, transform.softcap)
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(values @ pulls(values), inputs)
    for own, theirs in zip(ours, torch.autograd.grad(expected @ pulls(expected), inputs), strict=True):
        assert bool(theirs.any())
        torch.testing.assert_close(own, theirs, rtol=1e-10, atol=1e-12)


def lora_head(vocabulary: int) -> tuple[Tensor, Tensor, nn.Module]:
    from peft import LoraConfig, inject_adapter_in_model

    hidden, targets, head = case(30, vocabulary)
    torch.manual_seed(0)
    adapted = inject_adapter_in_model(LoraConfig(r=2, lora_alpha=6, target_modules=["0"]), nn.Sequential(head))[0].double()
    nn.init.normal_(adapted.lora_B["default"].weight)
    return hidden, targets, adapted


def test_an_adapted_head_gives_gradients_to_its_adapter():
    """The head is W + 3·B·A, 3 = alpha / rank."""
    hidden, targets, head = lora_head(80)
    a, b = head.lora_A["default"].weight, head.lora_B["default"].weight
    values = head_logprobs(hidden, targets, head)
    expected = textbook(hidden, targets, head.base_layer.weight + 3 * b @ a, None, 1.0, None)
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(values @ pulls(values), (hidden, a, b))
    for own, theirs in zip(ours, torch.autograd.grad(expected @ pulls(expected), (hidden, a, b)), strict=True):
        assert bool(theirs.any())
        torch.testing.assert_close(own, theirs, rtol=1e-10, atol=1e-12)


def test_a_hook_on_the_head_is_not_passed_by():
    """A hook that halves the logits: log-probs of half the logits."""
    hidden, targets, head = case(9, 40)
    head.register_forward_hook(lambda module, inputs, output: output / 2)
    expected = textbook(hidden, targets, head.weight, None, 0.5, None)
    torch.testing.assert_close(head_logprobs(hidden, targets, head), expected, rtol=1e-12, atol=1e-12)


def test_only_a_plain_frozen_linear_head_is_fused():
    plain, trained, hooked = (case(1, 9)[2] for _ in range(3))
    trained.weight.requires_grad_(True)
    hooked.register_forward_pre_hook(lambda module, inputs: None)
    assert [is_frozen_linear(head) for head in (plain, trained, hooked, lora_head(9)[2])] == [True, False, False, False]


# ---------------------------------------------------------------- memory


class Largest(TorchDispatchMode):
    """Remembers the most numbers in any tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(t.numel() for t in tree_leaves(result) if isinstance(t, Tensor))])
        return result


@contextmanager
def largest() -> Iterator[Largest]:
    with Largest() as watch:
        yield watch


def test_a_frozen_head_makes_no_tensor_larger_than_a_tile():
    """1,500 tokens × 5,000 entries would be 7.5 million logits; a tile has 2.1 million."""
    hidden, targets, head = case(1500, 5000, dtype=torch.float32)
    with largest() as watch:
        head_logprobs(hidden, targets, head).sum().backward()
    assert watch.numbers == TOKENS * ENTRIES
    with largest() as watch:
        textbook(hidden, targets, head.weight, None, 1.0, None).sum().backward()
    assert watch.numbers == 1500 * 5000


def test_a_trained_head_keeps_no_logits_of_more_than_one_tile_of_tokens():
    hidden, targets, head = case(1500, 300, dtype=torch.float32)
    head.requires_grad_(True)
    with largest() as watch:
        head_logprobs(hidden, targets, head).sum().backward()
    assert watch.numbers == TOKENS * 300
