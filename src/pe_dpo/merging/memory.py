"""Where the models of a merge are measured and what that takes, counted from configuration and headers of files.

What it takes is counted in `estimate.merging`; on a CPU kept distributions come to it.

The first of these that fits: whole on the GPU, layer by layer on the GPU, whole on the CPU, layer by layer on the CPU.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from pe_dpo.data import EncodedPair
from pe_dpo.estimate.merging import measuring_ways
from pe_dpo.merging.behaviour import DISTRIBUTION_BYTES
from pe_dpo.merging.plan import Plan
from pe_dpo.model.base import BaseInfo, empty_model
from pe_dpo.model.layers_on_disk import decoder_layers
from pe_dpo.model.road import files_here, loaded_size

logger = logging.getLogger(__name__)

MARGIN = 1.1
"""Times what was counted that must be free: allocators keep more than they hand out."""
INSTEAD = "`pairs` 0 verifies the tensors alone, and loads no model"


class Placement(NamedTuple):
    """Where a model is measured."""

    device: torch.device
    is_layerwise: bool
    """Its decoder layers stay on disk until they compute."""
    bytes: int
    """Of its weights at the worst moment, and of what is computed with them."""
    whole: int
    """What it would take with all of its weights in memory."""
    fits: bool

    def describe(self, purpose: str) -> str:
        """Return it in words.

        Args:
            purpose: such as "to verify".
        """
        how = " (layer by layer)" if self.is_layerwise else ""
        return f"{_size(self.bytes)} {'in RAM' if self.device.type == 'cpu' else 'on the GPU'} {purpose}{how}"


def place_model(facts: BaseInfo, pairs: Sequence[EncodedPair]) -> Placement:
    """Return where a model is measured on pairs in float32; the first place that fits.

    Args:
        facts: of the model, quantized or not.
        pairs: a few.
    """
    model = empty_model(facts.base, facts.config)
    sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in decoder_layers(model).values()]
    text = facts.config.get_text_config()
    answers = [ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    tokens = [len(pair.prompt_ids) + len(ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    counts = measuring_ways(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=sizes,
        vocabulary=text.vocab_size,
        hidden=text.hidden_size,
        longest=max(map(len, answers), default=0),
        tokens=sum(tokens),
        longest_row=max(tokens, default=0),
        codes=None if facts.quantize == "none" else loaded_size(facts._replace(dtype=torch.float32), files_here(facts)).bytes,
    )
    ways = list(zip(counts, (False, True), strict=False))
    kept = 4 * min(DISTRIBUTION_BYTES, 4 * text.vocab_size * sum(tokens))
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.insert(0, torch.device("cuda"))
    for device in devices:
        free = free_bytes(device)
        for size, is_layerwise in ways:
            size += kept if device.type == "cpu" else 0
            place = Placement(
                device, is_layerwise, size, ways[0][0] + (kept if device.type == "cpu" else 0), MARGIN * size < free
            )
            if place.fits:
                return place
    return place


def free_bytes(device: torch.device) -> int:
    """Return what can still be allocated on a device; of RAM also within the limits of a container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = int((group / "memory.max").read_text()), int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no container, or none with a limit
        return free
    return min(free, limit - used + int(stat.get("inactive_file", 0)))


def say_memory(plan: Plan) -> None:
    """Say what a merge is going to take, and what it does where that is not there; nothing is loaded.

    Args:
        plan: of the merge.
    """
    disk = f"{_size(sum(tensor.facts.bytes for tensor in plan.tensors))} on disk"
    source = plan.source
    if not source.pairs:
        logger.info(f"takes {disk}; no model is loaded, and the largest tensor is what memory has to hold")
        return
    places = {"as trained": place_model(source.facts, source.pairs)}
    if plan.onto == "original" and source.facts.quantize != "none":
        plain = source.original or source.facts._replace(quantize="none")
        places["on the original weights"] = place_model(plain, source.pairs)
    merged = source.facts._replace(quantize="none", dtype=torch.float32)
    places["to verify what was merged"] = place_model(merged, source.pairs)
    logger.info("takes " + ", ".join([*(place.describe(what) for what, place in places.items()), disk]))
    for what, place in places.items():
        free, where = _size(free_bytes(place.device)), "RAM" if place.device.type == "cpu" else "memory of the GPU"
        if place.is_layerwise:
            logger.info(f"{what} layer by layer, as {free} of {where} are free: whole it takes {_size(place.whole)}")
        if not place.fits:
            logger.warning(f"{what}: {_size(place.bytes)}, and {free} of {where} are free; the system may stop it; {INSTEAD}")
        elif place.device.type == "cpu" and torch.cuda.is_available():
            on_gpu = _size(free_bytes(torch.device("cuda")))
            logger.warning(f"{what}: on the CPU, hours for a large model, as {on_gpu} of the GPU are free; {INSTEAD}")


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
