"""`merge --onto adapter`: nothing merged; the adapter as servers load it, with the recipe of the base that it belongs to.

As it was trained it is copied, bit for bit. Two adapters in one, or a scaled one, are held against those of training.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pe_dpo.data.encoding import Progress
from pe_dpo.errors import MergeRefused, ModelError
from pe_dpo.merging.card import card_metadata, scale_lines
from pe_dpo.merging.carry import base_licence, carry_tokenizer
from pe_dpo.merging.served import as_served, check_scale
from pe_dpo.merging.serving import adapter_commands, adapter_in_python
from pe_dpo.merging.source import Source, open_source
from pe_dpo.merging.trained import measure_adapter, measure_trained
from pe_dpo.merging.verify import Agreement, agreement, doubts
from pe_dpo.model.provenance import changed_files
from pe_dpo.runs.staging import check_free, staged

FILES = ("adapter_model.safetensors", "adapter_config.json")


class PackagedAdapter(NamedTuple):
    """An adapter that was written."""

    folder: Path
    held_out: Agreement | None
    """Of two adapters in one, or a scaled one: against those of training. None where the adapter was copied, bit for bit."""
    commands: list[str]
    scale: float = 1.0
    """Toward the reference; 1 is what was trained."""


def package_adapter(
    target: str | Path,
    output: str | Path,
    *,
    sft: str | Path | None = None,
    scale: float = 1.0,
    data: str | None = None,
    pairs: int = 32,
    base: str | None = None,
    quantize: str | None = None,
    allow_base_mismatch: bool = False,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda what, done, total: None,
) -> PackagedAdapter:
    """Write an adapter, its tokenizer and the recipe of its base; with `sft`, two adapters as one; with `scale`, a scaled one.

    Args and errors as `merge.merge`.
    """
    output = Path(output)
    check_free(output)
    check_scale(scale)
    wanted = pairs if sft or scale != 1 else 0
    source = open_source(Path(target), data=data, pairs=wanted, base=base, quantize=quantize, say=say, progress=progress)
    _check_base(source, base, allow_base_mismatch)
    with as_served(source, sft=sft, scale=scale, say=say) as source, staged(output) as folder:
        for name in FILES:
            shutil.copyfile(source.adapter.folder / name, folder / name)
        held_out = _verify(source, output, allow_base_mismatch, say) if source.pairs else None
        carry_tokenizer(source.tokenizer, folder)
        facts = _base(source)
        (folder / "base.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
        rank = max(source.adapter.ranks(), default=1)
        commands = adapter_commands(str(output), facts, rank)
        (folder / "README.md").write_text(_card(source, facts, commands), encoding="utf-8")
    return PackagedAdapter(output, held_out, commands, source.scale)


def _check_base(source: Source, base: str | None, allow_mismatch: bool) -> None:
    """A base that is named anew must have the files of training; else the adapter would be sent out with a stranger."""
    if base is None or source.record is None or allow_mismatch:
        return
    changed = changed_files(source.record, source.base_folder)
    if changed:
        raise ModelError(
            f"{source.base_folder / changed[0]}: is not the file of training (sha256); name the base of training, or leave "
            "--base out; --allow-base-mismatch goes on all the same"
        )


def _verify(source: Source, output: Path, allow_base_mismatch: bool, say: Callable[[str], None]) -> Agreement:
    """The adapter that was made against those it was made of, on the pairs."""
    dtype = source.facts.dtype
    found = measure_trained(source, source.facts, dtype=dtype, allow_base_mismatch=allow_base_mismatch, say=say)
    held_out = agreement(measure_adapter(source, found.computed_in), found.trained, found.reference)
    floor = agreement(found.floor, found.trained, found.reference) if found.floor else None
    wrong = doubts(held_out, floor, in_float32=found.computed_in == torch.float32, scale=source.scale)
    if wrong:
        what = "the one adapter does not do what the two did" if source.weights[0] else "the adapter does not do what it should"
        raise MergeRefused("\n  ".join([f"{output}: was not written: {what}:", *wrong]))
    return held_out


def _base(source: Source) -> dict[str, Any]:
    facts = source.facts
    scaled = {} if source.scale == 1 else {"scale": source.scale}
    if source.record is not None:
        return {**source.record, "id": facts.base, "revision": facts.revision, **scaled}
    return {
        "id": facts.base,
        "revision": facts.revision,
        "quantize": facts.quantize,
        "dtype": str(facts.dtype).removeprefix("torch."),
        **scaled,
    }


def _card(source: Source, base: dict[str, Any], commands: list[str]) -> str:
    return "\n".join(
        [
            *card_metadata(source.facts.base, library="peft", relation="adapter", licence=base_licence(source.base_folder)),
            "# A LoRA adapter tuned on preference pairs",
            "",
            f"Belongs to `{source.facts.base}`, loaded as in training: {base['quantize']}, {base['dtype']}. On another",
            "quantization, or the original weights, it is another model.",
            "",
            *scale_lines(source.scale),
            "```",
            *commands,
            "```",
            "",
            "```python",
            adapter_in_python(".", base),
            "```",
            "",
        ]
    )
