"""What determines a run besides its recipe, as it is here and now; `runs.origins` keeps it and says what differs."""

import hashlib
import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from pe_dpo.data import data_hash
from pe_dpo.data.encoded import column
from pe_dpo.data.pairs import EncodedPair
from pe_dpo.errors import RunFolderError
from pe_dpo.inference.inputs import Inputs
from pe_dpo.model.base import answer_end_tokens
from pe_dpo.model.fingerprint import arithmetic_config, parameter_fingerprints
from pe_dpo.model.provenance import ASIDE, adapter_fingerprints, adapter_inputs
from pe_dpo.recipe import Recipe
from pe_dpo.runs.origins import (
    SHOWN,
    Row,
    differences,
    machine_differences,
    recorded_inputs,
    row_differences,
    save_origins,
    saved_rows,
    tensor_differences,
)
from pe_dpo.runs.overrides import MACHINE, allows_rows, entries
from pe_dpo.runs.records import read_base
from pe_dpo.runs.run import Run
from pe_dpo.runs.writing import RunWriter, different_settings, draws_by_forward, versions

logger = logging.getLogger(__name__)

LISTED = 200_000
"""Pairs up to which each is written down, so that one that changed can be named: 3 s and 6 MB. Of more the hash is compared."""
FAR = 0.01
"""Relative difference of mean log-probs at step 0 above which it is another model and not rounding; as in `check_diagonal`."""


class Origins:
    """What determines a run, here and now, and how it differs from what a run that goes on began with.

    Args:
        recipe: The recipe of the run.
        prepared: What `prepare_run` returned for it.
        override: Keys that may differ, see `runs.overrides`.
    """

    def __init__(self, recipe: Recipe, prepared: Inputs, override: Collection[str] = ()) -> None:
        self.recipe, self.prepared, self.override = recipe, prepared, override
        data = prepared.data
        self.hashes = {"data": data_hash(data.train), "held_out": data_hash(data.held_out), **adapter_inputs(recipe.adapter)}
        self.remarks: list[str] = []
        """What differs and only moves the last digits."""
        self.words: dict[str, str] = {}
        """What differs between the pairs, where that was asked for: under "data" and "held_out"."""

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """What determines the run; looked at by the process that writes alone."""
        return describe_inputs(self.recipe, self.prepared)

    @property
    def rows(self) -> Iterator[Row] | None:
        """The pairs, as they are written down; None where they are more than `LISTED`."""
        data = self.prepared.data
        return describe_rows(data.train, data.held_out) if len(data.train) + len(data.held_out) <= LISTED else None

    def check(self, run: Run) -> None:
        """Check all that is known before the base is loaded.

        Raises:
            RunFolderError: something differs that has to be the same, or that nobody asked to change; all of it, in words.
        """
        recorded, then = run.info.hashes.inputs, recorded_inputs(run.folder)
        then.setdefault("versions", (run.info.model_extra or {}).get("versions", {}))
        changed = [name for name, value in self.hashes.items() if recorded.get(name, value) != value]
        details = differences(then, self.inputs)
        if {*changed} & {"data", "held_out"}:
            rows, now = saved_rows(run.folder), self.rows
            details |= {} if rows is None or now is None else row_differences(rows, [*now])
        for name in changed:
            details.setdefault(name, f"{recorded[name][:12]} → {self.hashes[name][:12]} (sha256)")
        self.words = {name: details[name] for name in changed if allows_rows(self.override, name)}
        lines = [f"{name}: {details[name]}" for name in changed if name not in self.words]
        lines += [f"{name}: {words}" for name, words in details.items() if name not in changed]
        trained_on = self._trained_on(run) if self.words else []
        if trained_on:
            lines.append(
                f"held_out: {', '.join(trained_on[:SHOWN])} would be held out now, and the run has trained on that prompt"
            )
        self.remarks = machine_differences(then, self.inputs)
        drawn = [line for line in self.remarks if line.startswith(("processes", "device"))]
        if drawn and draws_by_forward(self.recipe) and MACHINE not in self.override:
            lines += [
                f"{line}, and what dropout or mixout draws depends on it (`override` {MACHINE} goes on)" for line in drawn
            ]
        _refuse(run, lines)

    def _trained_on(self, run: Run) -> list[str]:
        """Return the rows held out now whose prompt the run has trained on: pairs may be split anew."""
        rows, now = saved_rows(run.folder), self.rows
        if rows is None or now is None:
            then = set((run.data_report or {}).get("held_out_rows") or ())
            return [name for name in column(self.prepared.data.held_out, "where") if then and name not in then]
        prompts = {row[2] for row in rows if row[0] == "train"}
        return [row[1] for row in now if row[0] == "held_out" and row[2] in prompts]

    def check_base(self, run: Run, model: Any, fingerprint: str) -> None:
        """Check the loaded base, and note its hash.

        Args:
            run: The run that goes on.
            model: The base with its adapters.
            fingerprint: Of the base; see `base_fingerprint`.

        Raises:
            RunFolderError: it is another one, or loaded otherwise.
        """
        self.hashes["base"] = fingerprint
        recorded, info = run.info.hashes.base, self.prepared.base
        if recorded is None or recorded == fingerprint:
            return
        then, dtype = read_base(run.folder), str(info.dtype).removeprefix("torch.")
        loaded = {"quantize": info.quantize, "dtype": dtype, "device": next(model.parameters()).device.type}
        words = ", ".join(f"{key} {then[key]} → {now}" for key, now in loaded.items() if then.get(key, now) != now)
        if "tensors" not in then:
            words = words or f"{recorded[:12]} → {fingerprint[:12]} (sha256)"
        _refuse(run, [f"base: {words or tensor_differences(then['tensors'], parameter_fingerprints(model))}"])

    def go_on(self, run: Run, writer: RunWriter, step: int, recipe: Recipe) -> bool:
        """Say and record what is otherwise in a run that goes on; return whether a person asked for some of it.

        Args:
            run: The run.
            writer: Its writer.
            step: The step of the checkpoint that it goes on from.
            recipe: The recipe from now on.
        """
        if self.remarks:
            logger.warning(
                f"otherwise than when the run began: {'; '.join(self.remarks)}; the last digits may differ from here on"
            )
            writer.update(resumed=[*run.info.resumed, {"step": step, "changed": self.remarks}])
        if not recorded_inputs(run.folder):  # a run from before they were written down: from now on there is more to compare
            save_origins(run.folder, self.inputs, self.rows)
        changed = different_settings(run, recipe)
        changed |= {name: (run.info.hashes.inputs[name], self.hashes[name]) for name in self.words}
        if not changed:
            return False
        report = None
        if self.words:
            save_origins(run.folder, self.inputs, self.rows)
            report = self.prepared.data.report.to_dict()
        pairs = {"train": len(self.prepared.data.train), "held_out": len(self.prepared.data.held_out)}
        writer.override(recipe, entries(step, changed, self.words), hashes=self.hashes, pairs=pairs, data_report=report)
        return True


def _refuse(run: Run, lines: Sequence[str]) -> None:
    """Stop where there is something to refuse."""
    if lines:
        listed = "\n  ".join(lines)
        names = {"data": "data.train", "held_out": "data.eval"}
        free = [names[name] for name in names if any(line.startswith(f"{name}:") for line in lines)]
        meant = f", name what you mean to change with `override` ({', '.join(free)})" if free else ""
        raise RunFolderError(
            f"{run.folder}: the run started with other inputs:\n  {listed}\nrestore them{meant}, or start anew with another "
            "`output`"
        )


def describe_inputs(recipe: Recipe, prepared: Inputs) -> dict[str, Any]:
    """Return what determines the run, JSON-ready; no weights of the base are read.

    Args:
        recipe: The recipe of the run.
        prepared: What `prepare_run` returned for it.
    """
    info, tokenizer = prepared.base, prepared.tokenizer
    state, on_gpu = PartialState(), torch.cuda.is_available()
    machine: dict[str, Any] = {"processes": state.num_processes, "device": "cuda" if on_gpu else "cpu"}
    if on_gpu:
        machine |= {"card": torch.cuda.get_device_name(), "float32 products": torch.get_float32_matmul_precision()}
    else:
        machine |= {"threads": torch.get_num_threads(), "processor": torch.backends.cpu.get_cpu_capability()}
    template = tokenizer.chat_template
    found = {
        "machine": machine,
        "versions": dict(versions()),
        "config": arithmetic_config(info.config),
        "end_tokens": sorted(answer_end_tokens(tokenizer, info.base, revision=info.revision)),
        "template": template if template is None or isinstance(template, str) else json.dumps(template, indent=1),
        "tokenizer": _describe_tokenizer(tokenizer),
    }
    for key, folder in (("start", recipe.adapter.start), ("over", recipe.adapter.over)):
        if folder is not None:
            config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
            weights = adapter_fingerprints(Path(folder)).get("adapter_model.safetensors", "")
            says = {name: value for name, value in config.items() if name not in ASIDE}
            found[key] = {**says, "weights (sha256)": weights[:12]}
    return found


def _describe_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """Return what a tokenizer does to text, its parts by hash, so that what differs can be named."""

    def digest(value: Any) -> str:
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]

    if getattr(tokenizer, "is_fast", False):
        parts: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
        for momentary in ("padding", "truncation", "added_tokens"):
            parts.pop(momentary, None)
    else:
        parts = {"vocabulary": tokenizer.get_vocab()}
    added = {token.content: str(index) for index, token in tokenizer.added_tokens_decoder.items()}
    special = {f"{name}_token": getattr(tokenizer, f"{name}_token") for name in ("bos", "eos", "pad", "unk")}
    return {"tokens": len(tokenizer), "added tokens": added, **special, **{name: digest(part) for name, part in parts.items()}}


def describe_rows(train: Sequence[EncodedPair], held_out: Sequence[EncodedPair]) -> Iterator[Row]:
    """Yield what tells the pairs of a run apart, in their order."""

    def number(value: float | None) -> str:
        return "" if value is None else repr(float(value))

    for side, pairs in (("train", train), ("held_out", held_out)):
        for pair in pairs:
            ids = (pair.prompt_ids.astype("<i4").tobytes(), *(answer.key for answer in pair.answers))
            prompt, chosen, rejected = (hashlib.blake2b(part, digest_size=6).hexdigest() for part in ids)
            yield side, pair.where, prompt, chosen, rejected, number(pair.margin), number(pair.beta), number(pair.weight)


def compare_step_zero(then: Mapping[str, Any], now: Mapping[str, float]) -> str | None:
    """Return by how much the monitored pairs at step 0 are computed otherwise than when the run began; None for not at all.

    Args:
        then: The line of step 0, with the prefix of held-out or watched pairs.
        now: The same as they are scored now.

    Raises:
        RunFolderError: by so much that it is another model.
    """
    ends = ("logps/chosen", "logps/rejected")
    names = [name for name in now if name.endswith(ends) and then.get(name) is not None]
    moved = {name: abs(now[name] - then[name]) / (1 + abs(then[name])) for name in names}
    worst = max(moved, key=moved.__getitem__, default=None)
    if worst is None or moved[worst] == 0:
        return None
    words = f"{worst} of the pairs that are measured along the way was {then[worst]:.6g} at step 0 and is {now[worst]:.6g}"
    if moved[worst] > FAR:
        raise RunFolderError(
            f"{words} from the same weights and token ids: something computes otherwise than when the run began, such as "
            "another version of transformers; restore that, or start anew with another `output`"
        )
    return words
