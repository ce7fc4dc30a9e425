"""`merge --onto adapter`: nothing merged; the adapter as servers load it, with the recipe of the base that it belongs to.

As it was trained its weights are copied, bit for bit. Two adapters in one, or a scaled one, are held against those of training.
Where the base is a folder here, no file names it: others do not have it.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from pe_dpo.disk import write_json
from pe_dpo.errors import MergeRefused, ModelError
from pe_dpo.hub import is_local, public_name
from pe_dpo.merging.behaviour import Agreement
from pe_dpo.merging.card import adapter_card
from pe_dpo.merging.servers import Serving, serving_commands, shell_lines
from pe_dpo.merging.source import Source
from pe_dpo.merging.unmerged import Unmerged, measure_served
from pe_dpo.model.adapter_config import check_base_was_kept
from pe_dpo.model.base import auto_class
from pe_dpo.model.provenance import changed_files
from pe_dpo.model.tokenizer_files import save_tokenizer
from pe_dpo.runs.staging import staged

logger = logging.getLogger(__name__)

FILES = ("adapter_model.safetensors", "adapter_config.json")


def package_adapter(source: Source, output: str | Path) -> tuple[list[Serving], Agreement | None]:
    """Write an adapter, its tokenizer and the recipe of its base.

    Args:
        source: as opened; with an adapter that was fused or scaled, and pairs, that is verified.
        output: a folder that must not exist, or be empty.

    Returns:
        How servers load it; and how near a fused or scaled one comes to those of training, None where nothing was measured.

    Raises:
        UsageError: `output` is taken.
        ModelError: the base is not the one of training, or the adapter changed it; or the disk is full.
        MergeRefused: the fused or scaled adapter does not do what it should; nothing was written.
    """
    output, facts, record = Path(output), source.facts, source.record
    check_base_was_kept(source.adapter.folder, source.adapter.config)
    if record is not None and source.is_base_named and not source.allow_base_mismatch:
        # A base that is named anew must have the files of training; else the adapter would be sent out with a stranger.
        changed = changed_files(record.model_dump(), source.base_folder)
        if changed:
            raise ModelError(
                f"{source.base_folder / changed[0]}: is not the file of training (sha256); name the base of training, or leave "
                "`base` out; `allow_base_mismatch` goes on all the same"
            )
    if record is not None and facts.quantize_experts:
        raise ModelError(
            f"{source.folder}: was trained on experts in 4 bits, which no server and no other library loads so, and on another "
            "base it is another model; merge it (`onto` dequantized), or train with model.quantize_experts: false"
        )
    servings = serving_commands(source.adapter, facts, source.modules, output)
    refusals = [serving.remark for serving in servings if serving.command is None]
    if refusals:
        logger.warning(f"{'; '.join(refusals)}. Packaged for PEFT: its README.md has the lines that load it")
    base: dict[str, Any] = {} if record is None else record.model_dump(exclude_unset=True)
    base |= {"id": facts.base, "revision": facts.revision, "quantize": facts.quantize}
    base["dtype"] = str(facts.dtype).removeprefix("torch.")
    base["model_class"] = auto_class(facts.config).__name__
    base |= {"prequantized": True} if facts.is_prequantized else {}
    base |= {"rows": source.resized_to} if source.resized_to else {}
    base |= {"scale": source.scale} if source.scale != 1 else {}
    named = facts.base
    if record is not None and source.is_base_named and not is_local(record.id) and not source.allow_base_mismatch:
        named, base["revision"] = record.id, record.revision  # its files are those of training, and others find them there
    public = {**base, "id": public_name(named), **({"is_local": True} if is_local(named) else {})}
    with staged(output) as folder:
        for name in FILES:
            shutil.copyfile(source.adapter.folder / name, folder / name)
        config = json.loads((folder / FILES[1]).read_text(encoding="utf-8"))
        if is_local(config["base_model_name_or_path"] or ""):
            write_json(folder / FILES[1], config | {"base_model_name_or_path": None if is_local(named) else named})
        held_out = None
        if source.pairs and source.weights != (0.0, 1.0):
            trained = Unmerged(source, facts, dtype=facts.dtype)
            held_out = trained.agreement(measure_served(source))
            failures = trained.failures(held_out)
            if failures:
                what = "one adapter does not do what the two did" if source.weights[0] else "adapter does not do what it should"
                raise MergeRefused("\n  ".join([f"{output}: was not written: the {what}:", *failures]))
        save_tokenizer(source.tokenizer, folder, [source.base_folder, source.folder])
        known = facts._replace(base=public["id"], revision=public["revision"])
        elsewhere = serving_commands(source.adapter, known, source.modules, "FOLDER")
        write_json(folder / "base.json", public | {"serving": [serving._asdict() for serving in elsewhere]})
        (folder / "README.md").write_text(adapter_card(source, public, shell_lines(elsewhere)), encoding="utf-8")
    return servings, held_out
