"""Which adapter is served: the one that was trained, made one with the one under it, or scaled toward the reference.

    as trained     W0 + ΔW                          its own files
    --sft          W0 + ΔW_sft + ΔW                 two adapters in one
    --scale a      W_ref + a·(W − W_ref)            0 < a < 1: between the reference and what was trained

        W0 + a·ΔW                                   π0 is the base
        W0 + (1 − a)·ΔW_ref + a·ΔW                  π0 has a frozen copy of the adapter that training started from
        W0 + ΔW_sft + a·ΔW                          π0 has the adapter named by --sft

What is made here are plain PEFT files in a folder that goes away, and everything after it goes on from them as from any other
adapter's. What they are held against is not made of them: PEFT with the adapters of training, their scalings times the weights.

Wortsman et al. 2022 (WiSE-FT, arXiv 2109.01903): interpolated weights. It is the free alternative to mixout.
"""

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import save_file

from pe_dpo.errors import UsageError
from pe_dpo.merging.source import Source
from pe_dpo.merging.updates import AdapterFiles, fused_adapter, scaled_updates
from pe_dpo.model.adapter import REFERENCE
from pe_dpo.model.adapter_config import write_adapter_config
from pe_dpo.runs.staging import check_free


def check_scale(scale: float) -> None:
    """Check that an adapter can be scaled by a factor.

    Raises:
        UsageError: it cannot.
    """
    if not math.isfinite(scale) or scale < 0:
        raise UsageError(f"--scale {scale}: write a number above 0; 1 is what was trained, 0.5 half the way there")
    if scale == 0:
        raise UsageError("--scale 0: is the reference itself, with nothing of what was trained; write a number above 0")


def scaled_adapter(folder: str | Path, scale: float, output: str | Path) -> Path:
    """Write a finished adapter scaled toward its reference as plain PEFT files, and return their folder.

    Args:
        folder: a finished run, or any LoRA adapter; a subfolder `reference` is the adapter that its reference has.
        scale: a of W_ref + a·(W − W_ref); 1 is what was trained, more goes beyond it.
        output: a folder that must not exist, or be empty.

    Returns:
        `output`.

    Raises:
        UsageError: the scale is not above 0, or not finite, or `output` is taken.
        ModelError: no LoRA adapter there, or one whose weights are no W0 + ΔW (DoRA, whole modules, trained biases).
    """
    check_scale(scale)
    check_free(Path(output))
    frozen = Path(folder) / REFERENCE
    below = frozen if (frozen / "adapter_config.json").is_file() else None
    _save(AdapterFiles(folder), scale, below, 1 - scale, Path(output))
    return Path(output)


@contextmanager
def as_served(
    source: Source, *, sft: str | Path | None = None, scale: float = 1.0, say: Callable[[str], None] = lambda line: None
) -> Iterator[Source]:
    """Yield a source whose adapter is the one to serve.

    Args:
        source: as opened.
        sft: an adapter that was active under its own in training; π0 has it.
        scale: a; see above.
        say: gets a line of what that makes of it.

    Raises:
        UsageError: the adapter has the other one in it already, or is scaled already.
        ModelError: an adapter is not of a kind that can be scaled or be made one with another.
    """
    if sft is None and scale == 1:
        yield source
        return
    if sft is not None and (source.recipe is not None or source.reference is not None):
        raise UsageError(
            f"{source.folder}: a run goes on with the adapter that it starts from, so that is in it already; leave --sft out"
        )
    if scale != 1:
        _announce(source, scale, say)
    reference = source.reference if sft is None else Path(sft)
    weight = 1.0 if sft is not None else 1 - scale if reference else 0.0
    with TemporaryDirectory() as folder:
        _save(source.adapter, scale, reference, weight, Path(folder))
        yield source._replace(
            adapter=AdapterFiles(folder), reference=reference, weights=(weight, scale), scale=scale * source.scale
        )


def scale_words(scale: float) -> str:
    """Return how far an adapter that is not served as it was trained is from its reference, in words."""
    return f"scaled {'toward' if scale < 1 else 'away from'} the reference by a = {scale}"


def _announce(source: Source, scale: float, say: Callable[[str], None]) -> None:
    if source.scale != 1:
        raise UsageError(f"{source.folder}: is {scale_words(source.scale)} already (base.json); scale the run it was made from")
    say(f"{scale_words(scale)}: what is served is not what was trained, but a = {scale} times as far from the reference")
    if scale > 1:
        say(f"look: a = {scale} goes beyond what was trained (extrapolation)")


def _save(adapter: AdapterFiles, scale: float, below: Path | None, weight: float, folder: Path) -> None:
    """Write scale · `adapter` + weight · `below` as PEFT saves an adapter; where the weight is 0, `below` is not in it."""
    if below is not None and weight:
        tensors, settings = fused_adapter(AdapterFiles(below), adapter, weights=(weight, scale))
        folder.mkdir(exist_ok=True)
        write_adapter_config(folder, base=adapter.config.base_model_name_or_path, **settings)
    else:
        tensors = scaled_updates(adapter, scale)
        folder.mkdir(exist_ok=True)
        shutil.copyfile(adapter.folder / "adapter_config.json", folder / "adapter_config.json")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
