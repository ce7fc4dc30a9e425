"""Random bits that are a function of their key and index: the same on every device, with no state to keep or to disturb.

Source: SplitMix64, Steele, Lea & Flood, "Fast Splittable Pseudorandom Number Generators" (2014).
"""

from torch import Tensor

GOLDEN = -0x61C8864680B583EB
"""By which the generator's state grows, as a signed number."""
_INVERSE = -0xE217C1E66C88CC3
"""Of GOLDEN, modulo 2⁶⁴."""
_FIRST, _SECOND = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def random_bits(keys: Tensor, index: Tensor) -> Tensor:
    """Return 53 random bits for each key and index: the index-th number of the SplitMix64 generator that starts at the key.

    Args:
        keys: int64.
        index: int64 ≥ 0, of a shape that goes with theirs.

    Returns:
        int64 in [0, 2⁵³); integer arithmetic alone, so the same on every device.
    """
    # This is keys + (index + 1) · GOLDEN. Written so, the C++ of torch.compile (2.13) multiplies its loop's counter by GOLDEN:
    # that overflows, which C++ leaves undefined, and gcc then writes past the end of the result.
    return _shifted(mixed((keys * _INVERSE + (index + 1)) * GOLDEN), 11)


def mixed(bits: Tensor) -> Tensor:
    """Return SplitMix64's mixing of int64, which wraps around: 64 random bits of a state."""
    bits = (bits ^ _shifted(bits, 30)) * _FIRST
    bits = (bits ^ _shifted(bits, 27)) * _SECOND
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Shift to the right and fill with zeros; torch's own shift of int64 fills with the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)
