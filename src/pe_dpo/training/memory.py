"""How many tokens a row may have, and which rows recompute their activations: measured on the device, not guessed.

Two rows are run forward and backward; a line through their peaks gives the bytes of a token. Running out of memory later is no
disaster: the trainer halves the budget, in the end recomputes more, and begins the step again.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from pe_dpo.data.encoded import lengths
from pe_dpo.data.pairs import EncodedPair
from pe_dpo.estimate.rows import FEWEST_TOKENS, SHARE_OF_FREE, Keeping, cpu_rows, plan_rows
from pe_dpo.inference.scorer import Scorer
from pe_dpo.model.adapter import adapter_parameters
from pe_dpo.model.base import checkpoint_activations
from pe_dpo.model.out_of_memory import host_memory, is_out_of_memory

OPTIMIZER_BYTES = 12
"""Per trained parameter: gradient and Adam's two averages in float32, which are not there yet."""


class Recomputation:
    """Which rows recompute their activations in the backward instead of keeping them.

    Only the forward asks: what it kept is what the backward has.

    Args:
        model: of transformers, without PEFT around it.
        above: rows of more tokens than this recompute; 0 for all rows, None for none.
        may_grow: whether memory that runs out may make more rows recompute.
    """

    def __init__(self, model: Any, above: int | None = None, *, may_grow: bool = False) -> None:
        self.model, self.above, self.may_grow = model, above, may_grow
        self.is_offloaded = False
        self._layers: list[Any] | None = None

    def of(self, tokens: int) -> bool:
        """Make the model ready for a row, and return whether it recomputes.

        Raises:
            ModelError: it has to, and its class in transformers cannot.
        """
        is_on = self.above is not None and tokens > self.above
        if is_on and self._layers is None:
            self._switch_on()
        for layer in self._layers or ():
            layer.gradient_checkpointing = is_on
        return is_on

    def grow(self) -> str | None:
        """Recompute more than before, where that is left to this; return what changes, None where nothing is left."""
        if not self.may_grow:
            return None
        if self.above != 0:
            self.above = 0
            return "activations are recomputed in every row"
        return "what layers begin with waits in the host's memory" if self.offload() else None

    def offload(self) -> bool:
        """Let what the layers begin with wait in the host's memory; return whether that is new, and possible."""
        if self.is_offloaded or self.model.device.type != "cuda":
            return False
        self.is_offloaded = True
        self._switch_on()
        return True

    def describe(self) -> str:
        """Return what is recomputed, to be put behind the tokens of a row; empty where nothing is."""
        if self.above is None:
            return ""
        which = f" of rows with more than {self.above}" if self.above else ""
        return f", activations{which} recomputed in the backward{', and kept on the host' if self.is_offloaded else ''}"

    def _switch_on(self) -> None:
        checkpoint_activations(self.model, offload=self.is_offloaded)
        self._layers = [module for module in self.model.modules() if getattr(module, "gradient_checkpointing", False)]


def plan_memory(
    model: Any,
    pairs: Sequence[EncodedPair],
    scorer: Scorer,
    *,
    tokens: int | Literal["auto"],
    checkpointing: bool | Literal["auto"],
) -> tuple[int, Recomputation]:
    """Return the most tokens of one row, and which rows recompute their activations.

    Where a few pairs are too long to be kept, they recompute and the others do not. On a CPU the scorer also learns how long a
    row may be that spares reading something twice.

    Args:
        model: A PEFT model ready to train, its activations not recomputed.
        pairs: The pairs that will be trained on.
        scorer: As in training.
        tokens: A number is taken as it is.
        checkpointing: "auto" for only if memory asks for it.

    Raises:
        ModelError: activations are to be recomputed, and the model's class in transformers cannot.
    """
    recomputation = Recomputation(
        model.get_base_model(), 0 if checkpointing is True else None, may_grow=checkpointing == "auto"
    )
    recomputation.of(1)
    scorer.tree_budget = 0
    if scorer.device.type != "cuda":
        if tokens == "auto":
            config = model.get_base_model().config.get_text_config()
            longest = scorer.tokens([pairs[int(lengths(pairs).sum(axis=1).argmax())]])
            tokens, scorer.tree_budget = cpu_rows(
                longest, host_memory(), hidden=config.hidden_size, layers=config.num_hidden_layers
            )
        return tokens, recomputation
    if tokens != "auto" and checkpointing != "auto":
        return tokens, recomputation
    # Two rows of about 512 and 1024 tokens, or of one and two pairs where these are longer.
    rows: list[Sequence[EncodedPair]] = []
    for fewest in (FEWEST_TOKENS // 4, FEWEST_TOKENS // 2):
        size = len(rows[-1]) + 1 if rows else 1
        while size < len(pairs) and scorer.tokens(pairs[:size]) < fewest:
            size += 1
        rows.append(pairs[:size])

    trained = sum(parameter.numel() for parameter in adapter_parameters(model))
    free = free_bytes(scorer.device) - OPTIMIZER_BYTES * trained
    longest = max(scorer.tokens([pair]) for pair in pairs)

    def fitting(keeping: Keeping) -> int:
        if keeping == "recomputed":
            recomputation.above = 0
        if keeping == "offloaded":
            recomputation.offload()
        recomputation.of(sys.maxsize)  # measured as the longest rows go
        return fitting_tokens(lambda row: peak_bytes(model, row, scorer), rows, scorer.tokens, free)

    plan = plan_rows(tokens, checkpointing, longest, fitting)
    if plan.above is not None:
        recomputation.above = plan.above
    return plan.tokens, recomputation


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
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        few = 0
    if not few:
        torch.cuda.empty_cache()  # here, where no frame of what failed holds its tensors
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
