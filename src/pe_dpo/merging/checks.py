"""What can be checked before a merge begins: the base's files, their names, the room on the disk."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pe_dpo.errors import ModelError, UsageError
from pe_dpo.merging.plan import Plan
from pe_dpo.merging.source import Source
from pe_dpo.model.fingerprint import config_fingerprint
from pe_dpo.model.provenance import changed_files

Onto = Literal["dequantized", "original"]


def check_place(output: Path, target: Path) -> None:
    """Check that the merged model does not go into the run that it is made of.

    Raises:
        UsageError: it would.
    """
    if output.absolute().resolve().is_relative_to(target.resolve()):
        raise UsageError(f"{output}: lies in {target}, which is to be merged; choose another -o")


def check_base_files(source: Source, onto: Onto, allow_mismatch: bool, say: Callable[[str], None]) -> None:
    """Check what can be checked of the base without reading it into a model.

    Raises:
        ModelError: the base was trained on in a way that no merged weights can repeat, or its files are not those of training
            where only their bytes can tell.
    """
    if source.facts.quantize == "int8" and onto == "dequantized":
        raise ModelError(
            "int8 also rounds what flows through a layer, so that no merged weights compute what was trained; merge --onto "
            "original, or serve with --onto adapter"
        )
    if onto == "original" and source.facts.quantize != "none":
        say("look: onto the original weights: their quantization error was part of training, and is not of what is served")
    if source.record is None:
        return
    if source.record["config"] != config_fingerprint(source.facts.config):
        what = f"{source.base_folder / 'config.json'}: says another arithmetic (norms, rotary, scales, …) than in training"
        if not allow_mismatch:
            raise ModelError(f"{what}; restore it; --allow-base-mismatch merges all the same")
        say(f"look: {what}")
    if onto == "dequantized":
        return  # tensor by tensor as loaded, later
    changed = changed_files(source.record, source.base_folder)
    if changed and allow_mismatch:
        say(f"look: {changed[0]} of the base is not the file of training")
    elif changed:
        raise ModelError(
            f"{source.base_folder / changed[0]}: is not the file of training (sha256); restore the base, or name it with "
            "--base; --allow-base-mismatch merges all the same"
        )


def check_every_tensor(source: Source, plan: Plan, allow_mismatch: bool) -> None:
    """Where no model will be loaded, check by name that the files have what the model has and what training had.

    Raises:
        ModelError: they do not.
    """
    if source.pairs or allow_mismatch:
        return
    found = {output.recorded_as for output in plan.outputs}
    has_hashes = source.record is not None and source.facts.quantize != "int8"
    wanted = set(source.record["tensors"]) if source.record and has_hashes else plan.parameters
    if wanted - found:
        raise ModelError(
            f"{source.base_folder}: its files do not have {min(wanted - found)}, or under another name, and without pairs that "
            "cannot be told: leave --pairs 0 out"
        )
    unknown = (found - wanted) & plan.parameters if has_hashes else set()
    if unknown:
        raise ModelError(f"{source.folder / 'base.json'}: says nothing of {min(unknown)}; take another copy of the run")


def check_space(output: Path, plan: Plan) -> None:
    """Check that the disk has room for the merged weights.

    Raises:
        ModelError: it has not.
    """
    wanted = sum(tensor.facts.bytes for tensor in plan.outputs)
    free = shutil.disk_usage(output.absolute().parent).free
    if wanted > free:
        raise ModelError(f"{output}: the merged model has {wanted / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there")
