"""Cards are found by their names and by no part of them; a size stands for the usual card of it."""

import pytest

from pe_dpo.errors import UsageError
from pe_dpo.estimate.cards import CARDS, find_card


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_a_card_is_found_by_the_names_that_it_has(card):
    names = [card.name, card.name.lower(), f"NVIDIA {card.name}", card.name.replace(" ", ""), card.name.removeprefix("RTX ")]
    assert {find_card(name).name for name in names} == {card.name}


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"), ("NVIDIA A100-PCIE-40GB", "A100 40GB"), ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("a100", "A100 40GB"), ("24GB", "RTX 4090"), ("24", "RTX 4090"),
        ("24 GiB", "RTX 4090"), ("3090", "RTX 3090"), ("20GB", "a card of 20 GB, as fast as an RTX 4080"),
    ],
)  # fmt: skip
def test_a_name_of_the_driver_and_a_size_are_found(name, card):
    assert find_card(name).name == card


@pytest.mark.parametrize(
    "name",
    ["A10", "RTX 3060 Ti", "RTX 4090 Laptop", "RTX 4070 Ti Super", "GB200", "L400", "x2 H100", "H2000", "rtx", "a", "g", "",
     "0GB", "-5GB", "1GB", "1TB", "abacus", "5000"],
)  # fmt: skip
def test_another_card_is_not_taken_for_one_of_the_table(name):
    with pytest.raises(UsageError, match=r"^`gpu`: .* is not in the table; name one of RTX 3060, .* or a size such as 24GB$"):
        find_card(name)
