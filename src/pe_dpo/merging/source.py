"""What is to be merged: the adapter, the base it belongs to, how that was loaded in training, and pairs to measure on."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pe_dpo.data import EncodedPair, data_hash
from pe_dpo.data.encoding import Progress
from pe_dpo.data.settings import prepare_from_settings
from pe_dpo.errors import ModelError, UsageError
from pe_dpo.inference.target import Target, find_target, load_target_tokenizer, read_record
from pe_dpo.merging.updates import AdapterFiles
from pe_dpo.model.adapter import REFERENCE
from pe_dpo.model.adapter_config import expected_tensors
from pe_dpo.model.base import BaseFacts, empty_model, end_token_ids, inspect_base
from pe_dpo.model.provenance import adapter_fingerprints, base_folder, template_fingerprint, tokenizer_fingerprint
from pe_dpo.model.tensor_files import TensorFiles
from pe_dpo.quantizations import QUANTIZATIONS, is_four_bit
from pe_dpo.recipe import Recipe
from pe_dpo.recipe.schema import DataSection

_RECORD = {"quantize": str, "dtype": str, "tensors": dict, "files": dict, "quantized_layers": list, "config": str}
"""What is needed of base.json."""


class Source(NamedTuple):
    """A finished adapter with all that its merge needs."""

    folder: Path
    adapter: AdapterFiles
    """The one that is served."""
    trained: Path
    """The adapter that was trained; `adapter` may be made of it (`served.as_served`)."""
    reference: Path | None
    """The adapter that π0 has; None where π0 is the bare base."""
    facts: BaseFacts
    record: Mapping[str, Any] | None
    """base.json, what the base was in training; None for an adapter that was not trained here."""
    run: Mapping[str, Any]
    """run.json; empty for an adapter that was not trained here."""
    recipe: Recipe | None
    base_folder: Path
    files: TensorFiles
    tokenizer: Any
    pairs: list[EncodedPair]
    """To verify on; empty if none were asked for."""
    weights: tuple[float, float] = (0.0, 1.0)
    """Of the adapters in `reference` and `trained`: what their sum is, `adapter` is."""
    scale: float = 1.0
    """How far what is served is from the reference; 1 is what was trained."""


def open_source(
    target: Path,
    *,
    data: str | None = None,
    pairs: int = 32,
    base: str | None = None,
    quantize: str | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda what, done, total: None,
) -> Source:
    """Return what is to be merged; no weights are read.

    Args:
        target: a finished run, or any LoRA adapter.
        data: pairs to verify on; by default those that the run held out.
        pairs: how many of them; 0 for none.
        base: where the base lies now, if not where it was.
        quantize: of an adapter that was not trained here, how its base was loaded in training.
        say: gets lines of facts.
        progress: called with what is done, pairs done, and pairs in all.

    Raises:
        UsageError: the target is a whole model or no model, or something that only the user knows is missing.
        ModelError: base or adapter cannot be used, or are not whole.
        DataError: the pairs cannot be read.
    """
    found = find_target(target, base=base, quantize=quantize)
    if found.adapter is None:
        raise UsageError(f"{target}: is a whole model; name the run or the adapter to merge")
    record = _read_base_record(target)
    if record is None and quantize is None:
        raise UsageError(
            f"{target}: nothing there says how its base was loaded in training, and that decides what is served; say it with "
            "--quantize nf4, nf4-single (without double quantization), int8 or none"
        )
    if record is not None and quantize not in (None, record["quantize"]):
        raise UsageError(f"{target}: was trained on {record['quantize']}, as base.json says; leave --quantize out")
    adapter = AdapterFiles(found.adapter)
    facts = _facts(found, record, base)
    _check_whole(adapter, facts)
    run = read_record(target) if found.recipe else {}
    _check_adapter_file(target, run)
    tokenizer = load_target_tokenizer(found)
    _check_tokenizer(target, tokenizer, record)
    chosen = _pairs(found, facts, tokenizer, data, pairs, run, say, progress) if pairs else []
    frozen = found.adapter / REFERENCE
    folder = base_folder(facts)
    return Source(
        folder=target,
        adapter=adapter,
        trained=found.adapter,
        reference=frozen if (frozen / "adapter_config.json").is_file() else None,
        facts=facts,
        record=record,
        run=run,
        recipe=found.recipe,
        base_folder=folder,
        files=TensorFiles(folder),
        tokenizer=tokenizer,
        pairs=chosen,
        scale=record.get("scale", 1.0) if record else 1.0,
    )


def _read_base_record(target: Path) -> dict[str, Any] | None:
    path = target / "base.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        missing = {name for name, kind in _RECORD.items() if not isinstance(record.get(name), kind)}
        if not isinstance(record.get("scale", 1.0), float):  # of an adapter that was packaged scaled
            missing.add("scale")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{path}: cannot be read: {error}; without it the base cannot be checked") from error
    if missing:
        raise ModelError(f"{path}: says nothing that can be used of {', '.join(sorted(missing))}; take another copy of the run")
    if record["dtype"] not in ("float32", "bfloat16") or record["quantize"] not in QUANTIZATIONS:
        raise ModelError(f"{path}: {record['quantize']} in {record['dtype']} is nothing that training does; take another copy")
    return dict(record)


def _facts(found: Target, record: Mapping[str, Any] | None, base: str | None) -> BaseFacts:
    """Facts of the base, loaded as in training wherever that is known."""
    if record is None:
        return inspect_base(**found.model.model_dump())
    revision = record["revision"] if base is None else None
    return inspect_base(found.model.base, revision=revision, quantize=record["quantize"], dtype=record["dtype"])


def _check_whole(adapter: AdapterFiles, facts: BaseFacts) -> None:
    """Check that a saved adapter has the tensors that its configuration asks for: PEFT fills in missing ones, and drops others.

    Whole embeddings may be there besides, where the vocabulary was resized.
    """
    model = empty_model(facts.base, facts.config)
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    resized = {f"{name}.weight" for name, module in model.named_modules() if module in embeddings}
    wanted = expected_tensors(model, adapter.config)
    whole = {change.replacement for name, change in adapter.changes.items() if name in resized}
    over = sorted({key for change in adapter.changes.values() for key in change.keys} - wanted - whole)
    if over:
        raise ModelError(
            f"{adapter.folder}: its configuration asks for no {over[0]} (and {len(over) - 1} more); PEFT would drop them; "
            "take another copy of the adapter"
        )
    missing = sorted(wanted - {tensor.name for tensor in adapter.tensors})
    if missing:
        raise ModelError(
            f"{adapter.folder}: {len(missing)} tensors of the adapter are missing from its file ({missing[0]}, …); take "
            "another copy of it"
        )


def _check_adapter_file(target: Path, run: Mapping[str, Any]) -> None:
    recorded = run.get("hashes", {}).get("adapter", {})
    found = adapter_fingerprints(target) if recorded else {}
    changed = sorted(name for name in {*recorded, *found} if recorded.get(name) != found.get(name))
    if changed:
        raise ModelError(f"{target / changed[0]}: is not what training wrote (sha256); take another copy of the run")


def _check_tokenizer(target: Path, tokenizer: Any, record: Mapping[str, Any] | None) -> None:
    if record is None:
        return
    for what, then, now in (
        ("chat template", record.get("chat_template"), template_fingerprint(tokenizer)),
        ("tokenizer", record.get("tokenizer"), tokenizer_fingerprint(tokenizer)),
    ):
        if then != now:
            raise ModelError(f"{target}: its {what} is not the one of training (sha256); restore the files of the run")


def _pairs(
    found: Target,
    facts: BaseFacts,
    tokenizer: Any,
    data: str | None,
    count: int,
    run: Mapping[str, Any],
    say: Callable[[str], None],
    progress: Progress,
) -> list[EncodedPair]:
    """`count` pairs, evenly spread over those held out, or over `data`."""
    if data is None and found.recipe is None:
        raise UsageError("an adapter has no held-out pairs of its own to be verified on; name some with --data, or --pairs 0")
    settings = found.recipe.data if found.recipe else DataSection(train=str(data))
    prepared = prepare_from_settings(
        settings,
        tokenizer=tokenizer,
        context_length=facts.context_length,
        end_token_ids=end_token_ids(found.model.base, revision=found.model.revision),
        only=data,
    )
    pairs = prepared.train if data else prepared.held_out
    recorded = None if data else run.get("hashes", {}).get("held_out")
    if recorded is not None and recorded != data_hash(pairs):
        say("look: the data are not those of the run any more; what is held out now may have been trained on")
    if not pairs:
        raise UsageError("the run held no pairs out to verify the merge on; name some with --data, or --pairs 0")
    say(f"verified on {min(count, len(pairs))} of {len(pairs)} held-out pairs")
    return [pairs[index * len(pairs) // count] for index in range(count)] if len(pairs) > count else list(pairs)


def device_for(facts: BaseFacts, dtype: torch.dtype | None = None) -> torch.device:
    """Return the GPU if there is one whose free memory holds a model, else the CPU.

    Args:
        facts: of the model.
        dtype: of its weights; None for how its base is loaded.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    size = facts.parameters * (dtype.itemsize if dtype else 0.6 if is_four_bit(facts.quantize) else facts.dtype.itemsize)
    free, _ = torch.cuda.mem_get_info()
    return torch.device("cuda" if 1.2 * size < free else "cpu")
