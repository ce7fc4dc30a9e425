"""What a run will take, counted from configurations and headers of files: memory, hours, disk."""

from pe_dpo.estimate.cards import CARDS, Card, find_card, local_card
from pe_dpo.estimate.estimate import Estimate, estimate_run
from pe_dpo.estimate.knobs import Knob, knobs

__all__ = ["CARDS", "Card", "Estimate", "Knob", "estimate_run", "find_card", "knobs", "local_card"]
