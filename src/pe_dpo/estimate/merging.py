"""What measuring the models of a merge takes in float32, counted.

quantized      codes as they were trained on, all else in float32; one decoder layer in float32, for the noise of rounding
not quantized  all in float32; or embeddings, head, norms and the largest decoder layer, the others on disk meanwhile
beside it      the logits of the longest answer, the states of all answers between two layers
"""

from collections.abc import Sequence

TOKENS_TOGETHER = 2**16
"""Most tokens whose states are kept between layers that are loaded one at a time, unless one answer has more: 1 GB at 8B."""
DISK_DTYPE_BYTES = 2
"""Of a number of a merged model, as bases are published."""


def measuring_ways(
    *,
    parameters: int,
    layers: Sequence[int],
    vocabulary: int,
    hidden: int,
    longest: int,
    tokens: int,
    codes: int | None = None,
    longest_row: int = 0,
) -> list[int]:
    """Return the bytes of measuring a model whole and, where it can be, layer by layer; of a quantized one there is one way.

    Args:
        parameters: of the model.
        layers: parameters of each decoder layer.
        vocabulary: entries of the head.
        hidden: size of the hidden states.
        longest: tokens of the longest answer.
        tokens: of all prompts with their answers.
        codes: bytes of a quantized model with all else in float32; None of a plain one.
        longest_row: tokens of the longest prompt with its answer.
    """
    largest = max(layers, default=0)
    logits = 3 * 4 * longest * vocabulary
    states = 2 * 4 * min(tokens, max(TOKENS_TOGETHER, longest_row)) * hidden
    if codes is not None:
        return [codes + 4 * largest + logits + states]
    ways = [4 * parameters + logits]
    return [*ways, 4 * (parameters - sum(layers) + largest) + logits + states] if layers else ways
