"""The ways to hold a base's weights, named once: recipe, command line, loading and merging take the names from here.

nf4          codes of 4 bits in blocks of 64, the blocks' scales in 8 bits (double quantization)
nf4-single   the same with the scales in float32
fp4, fp4-single   other codes, coarser for weights; some bases come so
int8         codes of 8 bits with a scale per row
none         as they are computed with

A new way is a name here and what bitsandbytes is to do for it, in `model/quantization.py`; a type checker names both places.
"""

from typing import Literal, TypeGuard, assert_never, get_args

FourBit = Literal["nf4", "nf4-single", "fp4", "fp4-single"]
Quantization = Literal[FourBit, "int8", "none"]

STATE_SPACE_NAMES = {"x_proj", "dt_proj", "out_proj"}
ALTUP_NAMES = {"prediction_coefs", "correction_coefs"}
BYPASSED_NAMES = STATE_SPACE_NAMES | ALTUP_NAMES
"""Names that layers have whose bare weight is read, of which no codes are made; others have them, too."""

QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)
QUANTIZATIONS_IN_WORDS = f"{', '.join(QUANTIZATIONS[:-1])} or {QUANTIZATIONS[-1]}"


def four_bit_kind(quantize: FourBit) -> tuple[str, bool]:
    """Return bitsandbytes' name of the codes, and whether the blocks' scales are quantized too."""
    return quantize.removesuffix("-single"), not quantize.endswith("-single")


def bytes_per_weight(quantize: Quantization) -> float:
    """Return what a weight takes as a code, with its share of the scales (bitsandbytes' blocks of 64, and of 256 scales)."""
    match quantize:
        case "nf4" | "fp4":
            return 0.5 + 1 / 64 + 4 / (64 * 256)
        case "nf4-single" | "fp4-single":
            return 0.5 + 4 / 64
        case "int8":
            return 1.0
        case "none":
            return 0.0
        case _:
            assert_never(quantize)


def is_four_bit(quantize: Quantization) -> TypeGuard[FourBit]:
    """Return whether the weights are codes of 4 bits, whose values can be read back and merged into."""
    match quantize:
        case "nf4" | "nf4-single" | "fp4" | "fp4-single":
            return True
        case "int8" | "none":
            return False
        case _:
            assert_never(quantize)
