"""Monitors a run while it trains: what looks off for a while is said once, with what to turn, and written into metrics.jsonl.

    {"step": 40, "remark": "both_fell", "words": "both answers became less likely …"}

The monitored pairs are those held out; a run that holds none out monitors some of its training pairs (metrics `probe_…`).
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
from pe_dpo.training.diagnostics import diagnose_pairs, diagnose_window, gravest_first

logger = logging.getLogger(__name__)

PATIENCE = {"windows": 10, "evaluations": 2}
"""How many lines in a row have to show something before it is said."""

LARGEST_PROBE, SMALLEST_PROBE = 256, 32
"""Training pairs that are monitored where none are held out: one in fifty between these bounds, so that it costs little."""


def train_probe(pairs: Sequence[EncodedPair]) -> list[EncodedPair]:
    """Return the training pairs to monitor: those of the smallest hashes of their token ids, the same ones in every rerun."""

    def digest(pair: EncodedPair) -> bytes:
        ids = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
        return hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part.astype("<i4").tobytes() for part in ids)).digest()

    return sorted(pairs, key=digest)[: min(LARGEST_PROBE, max(SMALLEST_PROBE, len(pairs) // 50))]


class Monitor(TrainerCallback):
    """Diagnoses every line of metrics; in the main process only.

    Args:
        writer: The writer of the run.
        loss: The loss section of the recipe.
        before: The metrics of the monitored pairs at step 0; empty where none are monitored.
    """

    def __init__(self, writer: RunWriter, loss: LossSection, before: Mapping[str, float]) -> None:
        self.writer, self.loss, self.before = writer, loss, before
        self.last: dict[str, float] = {}
        """Metrics of the monitored pairs when they were last measured."""
        self.said: dict[str, tuple[int, str]] = {}
        """Step and text of each remark, by its name."""
        self._in_a_row: dict[str, Counter[str]] = {kind: Counter() for kind in PATIENCE}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Catch up with what a resumed run has seen and said."""
        if state.is_world_process_zero and state.global_step:
            for _, line in Run(self.writer.folder).metric_lines():
                self.look(line["step"], line)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Say and write down what was seen often enough with this line."""
        if not state.is_world_process_zero:
            return
        for name, text in self.look(state.global_step, logs or {}).items():
            if state.global_step < state.max_steps:  # at the end all remarks are told together
                logger.warning(f"step {state.global_step}: {text}")
            self.writer.log({"step": state.global_step, "remark": name, "words": text})

    def look(self, step: int, line: Mapping[str, Any]) -> dict[str, str]:
        """Return the remarks that a line of metrics makes, by name; each comes once.

        Args:
            step: The step of the line.
            line: The metrics of a training window, of an evaluation, or anything else, which is passed over; None, which a
                resumed run reads for what was not finite, is not there.
        """
        prefix = next((prefix for prefix in ("eval_", "probe_") if f"{prefix}loss" in line), None)
        line = {key: value for key, value in line.items() if isinstance(value, int | float)}
        if prefix and step:
            self.last = {key.removeprefix(prefix): value for key, value in line.items() if key.startswith(prefix)}
            kind, found = "evaluations", diagnose_pairs(self.last, self.before, self.loss)
        elif "loss" in line:
            kind, found = "windows", diagnose_window(line, self.loss)
        else:
            return {}
        seen = self._in_a_row[kind]
        self._in_a_row[kind] = Counter({name: seen[name] + 1 for name in found})
        often = [name for name, times in self._in_a_row[kind].items() if times >= PATIENCE[kind]]
        new = {name: found[name] for name in often if name not in self.said}
        self.said |= {name: (step, text) for name, text in new.items()}
        return new

    def conclude(self, after: Mapping[str, float], *, has_moved: bool) -> list[str]:
        """Return all remarks on a run that has ended: what is so at its end, the gravest first, then what was said on the way.

        Args:
            after: The metrics of the monitored pairs now; empty: those of the last evaluation.
            has_moved: Whether any B of the adapter is not 0.
        """
        final = diagnose_pairs(after or self.last, self.before, self.loss)
        if not has_moved:
            final["frozen"] = (
                "nothing moved, the adapter is still zero: no pair had a gradient; look at active and weight/mean in "
                "metrics.jsonl"
            )
        earlier = [f"step {step}: {text}" for name, (step, text) in self.said.items() if name not in final]
        return [*gravest_first(final), *earlier]
