"""Which layers a fresh adapter is put on: the words of a recipe, and names that must be there."""

from collections.abc import Sequence

from pe_dpo.errors import ModelError

BLOCKS = {"attention": ("attn", "attention"), "mlp": ("mlp", "feed_forward", "ffn", "moe", "expert")}
"""What the names of blocks have in them, by the word of a recipe."""


def in_blocks(kind: str, there: Sequence[str]) -> list[str]:
    """Return names of the linear layers in blocks of one kind: their own where no other layer has it, else with their block's.

    Raises:
        ModelError: there are none.
    """
    blocks = {path: path.lower().split(".")[:-1] for path in there}
    inside = [path for path, names in blocks.items() if any(word in name for word in BLOCKS[kind] for name in names)]
    if not inside:
        raise ModelError(
            f"adapter.targets: {kind}: no block of the base has a name with {' or '.join(BLOCKS[kind])}; name the layers, "
            f"such as {', '.join(sorted({path.rpartition('.')[2] for path in there}))}"
        )
    outside = {path.rsplit(".", 1)[-1] for path in there if path not in inside}
    parts = [path.split(".") for path in inside]
    return list(dict.fromkeys(own[-1] if own[-1] not in outside else ".".join(own[-2:]) for own in parts))


def check_targets(targets: Sequence[str], matched: Sequence[str], there: Sequence[str]) -> None:
    """Check that each target is the name of a matched module, or the end of its path.

    Raises:
        ModelError: naming those that are not, and the layers that are there.
    """
    unknown = [target for target in targets if not any(f".{path}".endswith(f".{target}") for path in matched)]
    if unknown:
        names = ", ".join(sorted({path.rpartition(".")[2] for path in there}))
        raise ModelError(f"adapter.targets: no linear layer of the base is called {', '.join(unknown)}; there are {names}")
