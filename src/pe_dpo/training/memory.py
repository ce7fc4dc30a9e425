"""How many tokens a forward may have, and whether activations must be recomputed: measured on the device, not guessed.

Two rows are run forward and backward; a line through their peaks gives the bytes of a token. Running out of memory later is no
disaster: the trainer halves the budget and begins the step again.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from pe_dpo.data.pairs import EncodedPair
from pe_dpo.inference.scorer import Scorer
from pe_dpo.model.adapter import adapter_parameters
from pe_dpo.model.base import checkpoint_activations

CPU_TOKENS = 1024
"""On a CPU longer rows gain little, and memory grows with them: eight HH pairs in two rows took half the memory of
one row, and 0.95 (float32) or 1.09 (bfloat16) of its time (benchmarks/results)."""
MOST_TOKENS = 16384
"""On a GPU neither: at 8192 tokens the dequantization of an 8B base is 2 % of a step."""
FEWEST_TOKENS = 2048
"""Rows that hold less than this are slow enough that recomputing activations is the better deal."""
SHARE_OF_FREE = 0.85
"""The rest is for fragmentation."""
OPTIMIZER_BYTES = 12
"""Per trained parameter: gradient and Adam's two averages in float32, which are not there yet."""


def plan_memory(
    model: Any,
    pairs: Sequence[EncodedPair],
    scorer: Scorer,
    *,
    tokens: int | Literal["auto"],
    checkpointing: bool | Literal["auto"],
) -> tuple[int, bool]:
    """Return the most tokens of one forward, and whether activations are recomputed in the backward.

    If they are, that is switched on in the model.

    Args:
        model: A PEFT model ready to train, its activations not recomputed.
        pairs: The pairs that will be trained on.
        scorer: As in training.
        tokens: A number is taken as it is.
        checkpointing: "auto" for only if memory asks for it.
    """
    base = model.get_base_model()
    if checkpointing is True:
        checkpoint_activations(base)
    if scorer.device.type != "cuda":
        return CPU_TOKENS if tokens == "auto" else tokens, checkpointing is True
    if tokens != "auto" and checkpointing != "auto":
        return tokens, checkpointing
    # Two rows of about 512 and 1024 tokens, or of one and two pairs where these are longer.
    rows: list[Sequence[EncodedPair]] = []
    for fewest in (FEWEST_TOKENS // 4, FEWEST_TOKENS // 2):
        size = len(rows[-1]) + 1 if rows else 1
        while size < len(pairs) and scorer.tokens(pairs[:size]) < fewest:
            size += 1
        rows.append(pairs[:size])

    trained = sum(parameter.numel() for parameter in adapter_parameters(model))
    free = free_bytes(scorer.device) - OPTIMIZER_BYTES * trained
    needed = max(tokens if tokens != "auto" else FEWEST_TOKENS, max(scorer.tokens([pair]) for pair in pairs))
    is_recomputing = checkpointing is True
    fitting = fitting_tokens(lambda row: peak_bytes(model, row, scorer), rows, scorer.tokens, free)
    if checkpointing == "auto" and fitting < needed:
        checkpoint_activations(base)
        is_recomputing = True
        fitting = fitting_tokens(lambda row: peak_bytes(model, row, scorer), rows, scorer.tokens, free)
    return max(1, min(fitting, MOST_TOKENS)) if tokens == "auto" else tokens, is_recomputing


def fitting_tokens(
    peak: Callable[[Sequence[EncodedPair]], int],
    rows: Sequence[Sequence[EncodedPair]],
    count: Callable[[Sequence[EncodedPair]], int],
    free: int,
) -> int:
    """Return the tokens of a row that fits into `free` bytes, from a line through the peaks of two rows.

    Args:
        peak: Returns the bytes that a row needs at its worst moment; may run out of memory.
        rows: A small and a larger row.
        count: Returns the tokens of a row.
        free: The bytes that the row may take.
    """
    try:
        (few, low), (many, high) = ((count(row), peak(row)) for row in rows)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return 0
    slope = (high - low) / (many - few) if many > few else high / many
    fixed = max(0.0, low - slope * few)
    return int((SHARE_OF_FREE * free - fixed) / max(slope, 1.0))


def peak_bytes(model: Any, row: Sequence[EncodedPair], scorer: Scorer) -> int:
    """Return what forward and backward of one row need at their worst moment, above what lies in memory before; CUDA only."""
    device = scorer.device
    was_training = model.training
    model.train()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        with torch.random.fork_rng(devices=[device]):
            scored = scorer.logprobs(model, row)
            (scored.chosen - scored.rejected).sum().backward()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    finally:
        model.zero_grad()
        model.train(was_training)


def free_bytes(device: torch.device) -> int:
    """Return what can still be allocated on a GPU, the allocator's own reserve included."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
