"""Graphics cards: their memory, and how fast they multiply and read.

Speeds are the makers' figures for dense bfloat16 products that are summed in float32, and for memory. What a run reaches of
them is `Card.reached`: on Hopper and newer, and on other cards of data centres, about two thirds of the products' peak, on
cards for desks, whose peak is lower and more easily fed, about five sixths. These two shares are assumptions, stated wherever
hours are; what is moved through memory is counted at nine tenths of the maker's figure.
"""

import re
from typing import NamedTuple

from pe_dpo.errors import UsageError

CONTEXT_BYTES = 550_000_000
"""What CUDA, cuBLAS and the kernels take of a card before anything is put on it: 0.45 to 0.6 GB."""
DATA_CENTRE, DESK = 0.64, 0.83


class Card(NamedTuple):
    """A graphics card."""

    name: str
    memory: float
    """GiB, as torch reports it (`torch.cuda.get_device_properties(0).total_memory`): less than the number on the box."""
    tflops: float
    """Dense bfloat16 products with float32 sums, 10¹² operations a second."""
    bandwidth: float
    """10⁹ bytes a second."""
    reached: float
    """Share of `tflops` that large products reach."""
    source: str
    box: int
    """GB on the box."""

    @property
    def bytes(self) -> int:
        """Its memory."""
        return round(self.memory * 2**30)

    @property
    def usable(self) -> int:
        """What is left of it for tensors."""
        return self.bytes - CONTEXT_BYTES


_ADA = "NVIDIA Ada GPU architecture whitepaper, appendix A"
_AMPERE = "NVIDIA Ampere GA102 GPU architecture whitepaper, table 3"
_BLACKWELL = "NVIDIA RTX Blackwell GPU architecture whitepaper, appendix A"
CARDS: tuple[Card, ...] = (
    Card("RTX 3060", 11.6, 25.4, 360, DESK, _AMPERE, 12),
    Card("RTX 3090", 23.6, 71.0, 936, DESK, _AMPERE, 24),
    Card("RTX 4060", 7.6, 30.2, 272, DESK, _ADA, 8),
    Card("RTX 4070", 11.6, 58.3, 504, DESK, _ADA, 12),
    Card("RTX 4080", 15.6, 97.5, 717, DESK, _ADA, 16),
    Card("RTX 4090", 23.5, 165.2, 1008, DESK, _ADA, 24),
    Card("RTX 5090", 31.4, 209.5, 1792, DESK, _BLACKWELL, 32),
    Card("L4", 22.0, 121.0, 300, DATA_CENTRE, "NVIDIA L4 datasheet", 24),
    Card("A10G", 22.0, 70.0, 600, DATA_CENTRE, "NVIDIA A10 datasheet", 24),
    Card("RTX A6000", 47.4, 154.8, 768, DATA_CENTRE, "NVIDIA RTX A6000 datasheet", 48),
    Card("L40S", 44.4, 362.0, 864, DATA_CENTRE, "NVIDIA L40S datasheet", 48),
    Card("A100 40GB", 39.4, 312.0, 1555, DATA_CENTRE, "NVIDIA A100 datasheet", 40),
    Card("A100 80GB", 79.2, 312.0, 2039, DATA_CENTRE, "NVIDIA A100 datasheet", 80),
    Card("H100", 79.1, 989.4, 3350, DATA_CENTRE, "NVIDIA H100 datasheet (SXM)", 80),
    Card("H200", 139.8, 989.4, 4800, DATA_CENTRE, "NVIDIA H200 datasheet", 141),
    Card("B200", 178.4, 2250.0, 8000, DATA_CENTRE, "NVIDIA Blackwell datasheet (HGX B200)", 180),
)  # fmt: skip
USUAL = {8: "RTX 4060", 12: "RTX 4070", 16: "RTX 4080", 24: "RTX 4090", 32: "RTX 5090", 40: "A100 40GB", 48: "L40S", 80: "H100"}
"""The card that stands for a size."""
SMALLEST, LARGEST = 2, 1000
"""GB of a card that only its size is said of."""
DEFAULT = "RTX 4090"
"""Where no card is asked for and none is here: 24 GB."""


def find_card(name: str) -> Card:
    """Return a card by its name ("RTX 4090", "4090", "h200"), or the usual one of a size ("24GB"), with that size where none
    has it.

    Raises:
        UsageError: it is not in the table; names those that are.
    """
    words = _key(name)
    found = [card for card in CARDS if words in _names(card)]
    if found:
        return found[0]
    size = re.fullmatch(r"(\d+(?:\.\d+)?)(gi?b)?", name.strip().lower().replace(" ", ""))
    if size and SMALLEST <= float(size[1]) <= LARGEST:
        gigabytes = float(size[1])
        if gigabytes in USUAL:
            return find_card(USUAL[int(gigabytes)])
        near = find_card(USUAL[min(USUAL, key=lambda box: abs(box - gigabytes))])
        memory = gigabytes * 1e9 / 2**30 * 0.98
        return near._replace(name=f"a card of {gigabytes:g} GB, as fast as an {near.name}", memory=memory, box=round(gigabytes))
    known = ", ".join(card.name for card in CARDS)
    raise UsageError(f"`gpu`: {name or 'nothing'} is not in the table; name one of {known}, or a size such as 24GB")


def local_card() -> Card | None:
    """Return the card in this machine, with the memory it has; of one that is not in the table the nearest's speed. None
    without."""
    import torch

    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    memory = found.total_memory / 2**30
    try:
        return find_card(found.name)._replace(memory=memory)
    except UsageError:
        near = min(CARDS, key=lambda card: abs(card.memory - memory))
        return near._replace(name=f"{found.name} (taken to be as fast as an {near.name})", memory=memory, box=round(memory))


def _key(name: str) -> str:
    """The name of a card without its maker, its socket and its spaces: "NVIDIA A100-SXM4-80GB" is a10080gb."""
    return re.sub(r"nvidia|geforce|sxm\d?|pcie|hbm\w*|(?<=\w)[\s_-]+(?=\w)|\s", "", name.lower())


def _names(card: Card) -> set[str]:
    """What a card is called: with and without "RTX", and with its size behind it or not."""
    whole = _key(card.name)
    bare = whole.removesuffix(f"{card.box}gb")
    return {name for one in (whole, bare, f"{bare}{card.box}gb") for name in (one, one.removeprefix("rtx"))}
