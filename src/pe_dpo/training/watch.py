"""Watches a run while it trains: what looks off for a while is said once, with what to turn, and written into metrics.jsonl.

    {"step": 40, "remark": "both_fell", "words": "both answers became less likely …"}

The watched pairs are those held out; a run that holds none out watches some of its training pairs (metrics `probe_…`).
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback

from pe_dpo.data.pairs import EncodedPair
from pe_dpo.recipe.loss_section import LossSection
from pe_dpo.runs.run import Run
from pe_dpo.runs.writing import RunWriter
from pe_dpo.training.remarks import batch_remarks, set_remarks, stillness_remark

logger = logging.getLogger(__name__)

PATIENCE = {"windows": 10, "evaluations": 2}
"""How many lines in a row have to show something before it is said."""
PREFIXES = ("eval_", "probe_")

LARGEST_PROBE, SMALLEST_PROBE = 256, 32
"""Training pairs that are watched where none are held out: one in fifty between these bounds, so that looking costs little."""


def probe_pairs(pairs: Sequence[EncodedPair]) -> list[EncodedPair]:
    """Return the training pairs to watch: those of the smallest hashes of their token ids, so that a rerun watches the same."""
    count = min(LARGEST_PROBE, max(SMALLEST_PROBE, len(pairs) // 50))
    return sorted(pairs, key=_hash)[:count]


class Watch(TrainerCallback):
    """Looks at every line of metrics; in the main process only.

    Args:
        writer: of the run.
        loss: of the recipe.
        before: metrics of the watched pairs at step 0; empty where none are watched.
    """

    def __init__(self, writer: RunWriter, loss: LossSection, before: Mapping[str, float]) -> None:
        self.writer, self.loss, self.before = writer, loss, before
        self.last: dict[str, float] = {}
        """Metrics of the watched pairs when they were last looked at."""
        self.said: dict[str, tuple[int, str]] = {}
        """Step and words of each remark, by its name."""
        self._in_a_row: dict[str, Counter[str]] = {kind: Counter() for kind in PATIENCE}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Catch up with what a resumed run has seen and said."""
        if state.is_world_process_zero and state.global_step:
            for line in Run(self.writer.folder).metrics:
                self.look(line["step"], line)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Say and write down what was seen often enough with this line."""
        if not state.is_world_process_zero:
            return
        for name, words in self.look(state.global_step, logs or {}).items():
            if state.global_step < state.max_steps:  # at the end all remarks are told together
                logger.warning(f"step {state.global_step}: {words}")
            self.writer.log({"step": state.global_step, "remark": name, "words": words})

    def look(self, step: int, line: Mapping[str, Any]) -> dict[str, str]:
        """Return the remarks that become due with a line of metrics, by name; each comes once.

        Args:
            step: of the line.
            line: of a training window, of an evaluation, or anything else, which is passed over.
        """
        watched = _watched(line)
        if watched and step:
            self.last = watched
            return self._due(step, "evaluations", set_remarks(watched, self.before, self.loss))
        if "loss" in line:
            return self._due(step, "windows", batch_remarks(line, self.loss))
        return {}

    def conclude(self, after: Mapping[str, float], *, has_moved: bool) -> list[str]:
        """Return all remarks on a run that has ended: what is so at its end, and what was said on the way.

        Args:
            after: metrics of the watched pairs now; empty: those of the last evaluation.
            has_moved: whether any B of the adapter is not 0.
        """
        final = set_remarks(after or self.last, self.before, self.loss) | stillness_remark(has_moved=has_moved)
        earlier = [f"step {step}: {words}" for name, (step, words) in self.said.items() if name not in final]
        return [*earlier, *final.values()]

    def _due(self, step: int, kind: str, found: Mapping[str, str]) -> dict[str, str]:
        seen = self._in_a_row[kind]
        self._in_a_row[kind] = Counter({name: seen[name] + 1 for name in found})
        often = [name for name, times in self._in_a_row[kind].items() if times >= PATIENCE[kind]]
        due = {name: found[name] for name in often if name not in self.said}
        self.said |= {name: (step, words) for name, words in due.items()}
        return due


def _watched(line: Mapping[str, Any]) -> dict[str, float]:
    """Metrics of the watched pairs in a line, without their prefix; empty where the line has none."""
    for prefix in PREFIXES:
        if f"{prefix}loss" in line:
            return {key.removeprefix(prefix): value for key, value in line.items() if key.startswith(prefix)}
    return {}


def _hash(pair: EncodedPair) -> bytes:
    ids = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
    return hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part.astype("<i4").tobytes() for part in ids)).digest()
