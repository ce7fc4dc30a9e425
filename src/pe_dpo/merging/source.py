"""What is to be merged: the adapter, the base it belongs to, how that was loaded in training, and pairs to measure on.

Which adapter is served: the one that was trained, fused with the one under it, or scaled toward the reference.

    as trained     W0 + ΔW                          its own files
    over, sft      W0 + ΔW_sft + ΔW                 two adapters in one; a run over another adapter has their sum in its folder
    scale a        W_ref + a·(W − W_ref)            0 < a < 1: between the reference and what was trained

        W0 + a·ΔW                                   π0 is the base
        W0 + (1 − a)·ΔW_ref + a·ΔW                  π0 has a frozen copy of the adapter that training started from
        W0 + ΔW_sft + a·ΔW                          π0 has the adapter that is named by sft, or that training was over

A fused or scaled adapter is a folder of plain PEFT files that goes away when the source is closed, and everything goes on from
it as from any other adapter. What it is held against is not made of it: PEFT with the adapters of training, their scalings
times the weights.

Wortsman et al. 2022 (WiSE-FT, arXiv 2109.01903): interpolated weights. It is the free alternative to mixout.
"""

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from pe_dpo.data import EncodedPair, data_hash, prepare_pairs
from pe_dpo.errors import ModelError, UsageError
from pe_dpo.inference.policy import SavedPolicy
from pe_dpo.model.adapter_config import REFERENCE, expected_tensors, trained_folder
from pe_dpo.model.adapter_files import AdapterFiles, save_fused_adapter, save_scaled_adapter
from pe_dpo.model.base import BaseInfo, empty_model, end_token_ids, inspect_base
from pe_dpo.model.layout import Layout
from pe_dpo.model.provenance import adapter_fingerprints, base_folder, changed, template_fingerprint, tokenizer_fingerprint
from pe_dpo.model.weight_files import weight_files
from pe_dpo.quantizations import Quantization
from pe_dpo.recipe.data_section import DataSection
from pe_dpo.runs.run import Run

logger = logging.getLogger(__name__)

_WHOLE = (".weight", ".base_layer.weight", ".token_adapter.base_layer.weight", ".token_adapter.trainable_tokens_delta")
"""Ends of what PEFT saves of an embedding, or a head that is tied to one, besides what it was asked to train."""


class BaseRecord(BaseModel):
    """What base.json says that the base was in training; written by `model.provenance.base_record`."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    id: str
    revision: str | None = None
    quantize: Quantization
    prequantized: bool = False
    dtype: Literal["float32", "bfloat16"]
    device: str | None = None
    parameters: int | None = None
    quantized_layers: tuple[str, ...]
    config: str
    files: dict[str, str]
    tensors: dict[str, str]
    tokenizer: str | None = None
    chat_template: str | None = None
    scale: float = 1.0
    """Of an adapter that was packaged scaled."""


class Source:
    """A finished adapter with all that its merge needs; no weights of the base are read.

    Args:
        target: a finished run, or any LoRA adapter.
        data: pairs to verify on; by default those that the run held out.
        pairs: how many of them; 0 for none.
        base: where the base lies now, if not where it was.
        quantize: of an adapter that was not trained here, how its base was loaded in training.
        allow_base_mismatch: go on where the base is not bit for bit the one of training.
        best: of a run, the adapter of its best evaluation.

    Raises:
        UsageError: the target is a whole model or no model, or something that only the user knows is missing.
        ModelError: base or adapter cannot be used, or are not whole, or not those of training.
        DataError: the pairs cannot be read.
    """

    def __init__(
        self,
        target: Path,
        *,
        data: str | None,
        pairs: int,
        base: str | None,
        quantize: str | None,
        allow_base_mismatch: bool,
        best: bool = False,
    ) -> None:
        from transformers.pytorch_utils import Conv1D

        self.folder, self.allow_base_mismatch = target, allow_base_mismatch
        self.is_base_named = base is not None
        found = SavedPolicy(target, base=base, quantize=quantize, best=best)
        if found.adapter is None:
            raise UsageError(f"{target}: is a whole model; name the run or the adapter to merge")
        self.record: BaseRecord | None = None
        """What the base was in training; None for an adapter that was not trained here."""
        path = target / "base.json"
        if path.is_file():
            try:
                self.record = BaseRecord.model_validate_json(path.read_bytes())
            except (OSError, ValidationError) as error:
                parts = error.errors()[:3] if isinstance(error, ValidationError) else []
                why = "; ".join(f"{'.'.join(map(str, part['loc']))}: {part['msg']}" for part in parts)
                raise ModelError(
                    f"{path}: cannot be used ({why or error}), and without it the base cannot be checked; take another copy of "
                    "the run"
                ) from error
        self.trained = trained_folder(found.adapter)
        """The adapter that was trained."""
        self.adapter = AdapterFiles(found.adapter)
        """The one that is served; it may be made of the trained one."""
        self.is_over = self.trained != found.adapter
        """Whether it was trained over the frozen adapter of π0, and is served with it."""
        how = found.section.model_dump()
        if self.record is not None:
            revision = self.record.revision if base is None else None
            how |= {"quantize": self.record.quantize, "dtype": self.record.dtype, "revision": revision}
        self.original = self._original(base)
        """The base whose weights the codes of training were made of, where training had codes from files and it is named."""
        if self.original is not None and self.record is not None:
            how |= {"base": self.record.id, "revision": self.record.revision}
        self.facts = inspect_base(**how)
        self._check_quantize(quantize)
        if self.record is not None:
            self.facts = self.facts.as_recorded(self.record.quantized_layers)
        else:
            self.facts = self.facts._replace(quantize_bypassed=True)
            self._tell_what_nothing_shows()
        _check_tensors({found.adapter, self.trained}, self.facts)
        self.recipe = found.recipe
        self.run = found.run
        """run.json; empty for an adapter that was not trained here."""
        recorded = {} if best else self.run.hashes.adapter  # the best one was compared when it was found
        others = changed(recorded, adapter_fingerprints(target)) if recorded else []
        if others:
            raise ModelError(f"{target / others[0]}: is not what training wrote (sha256); take another copy of the run")
        self.tokenizer = found.tokenizer()
        if self.record is not None and self.record.chat_template != template_fingerprint(self.tokenizer):
            raise ModelError(f"{target}: its chat template is not the one of training (sha256); restore the files of the run")
        if self.record is not None and self.record.tokenizer != tokenizer_fingerprint(self.tokenizer):
            raise ModelError(f"{target}: its tokenizer is not the one of training (sha256); restore the files of the run")
        self.pairs = self._held_out_pairs(found, data, pairs) if pairs else []
        """To verify on; empty if none were asked for."""
        frozen = found.adapter / REFERENCE
        self.reference = frozen if (frozen / "adapter_config.json").is_file() else None
        """The adapter that π0 has; None where π0 is the bare base."""
        self.weights = (float(self.is_over), 1.0)
        """Of the adapters in `reference` and `trained`: what their sum is, `adapter` is."""
        self.scale = self.record.scale if self.record else 1.0
        """How far what is served is from the reference; 1 is what was trained."""
        onto = self.original or self.facts
        self.base_folder = base_folder(onto.base, onto.revision)
        self.files = weight_files(self.base_folder)
        """The base's weights that are merged onto."""
        self.modules = empty_model(self.facts.base, self.facts.config)
        """The base without weights."""
        self.transposed = {f"{name}.weight" for name, module in self.modules.named_modules() if isinstance(module, Conv1D)}
        """Weights that lie (in, out) in their files; quantized, they lie (out, in) in the modules."""
        self.layout = Layout(self.modules, self.files.file_of)
        """What these are in the modules."""

    @property
    def resized_to(self) -> int | None:
        """How many rows the adapter's own embedding has, where it was trained on more tokens than the base has; else None."""
        embedding = self.modules.get_input_embeddings()
        path = next(path for path, module in self.modules.named_modules() if module is embedding)
        for info in self.adapter.tensors:
            is_whole = info.name.startswith(f"base_model.model.{path}.") and info.name.endswith(".weight")
            if is_whole and "lora_" not in info.name and info.shape[0] != embedding.weight.shape[0]:
                return info.shape[0]
        return None

    def _check_quantize(self, quantize: str | None) -> None:
        """Check that one of training's record and the caller says how the base was loaded, and not each something else."""
        if self.record is None and quantize is None and not self.facts.is_prequantized:
            raise UsageError(
                f"{self.folder}: nothing there says how its base was loaded in training, and that decides what is served; "
                "say it with `quantize` nf4, nf4-single (without double quantization), int8 or none"
            )
        if self.record is not None and quantize not in (None, self.record.quantize):
            raise UsageError(f"{self.folder}: was trained on {self.record.quantize}, as base.json says; leave `quantize` out")

    def _tell_what_nothing_shows(self) -> None:
        """Warn that an adapter without a record says little of the base that it was trained on."""
        dtype, named = str(self.facts.dtype).removeprefix("torch."), self.adapter.config.base_model_name_or_path
        line = (
            f"no base.json beside the adapter: nothing can show that {self.facts.base} is the base it was trained on, or that "
            f"it was loaded there in {dtype}, quantize {self.facts.quantize}"
        )
        if named and named.rstrip("/") != self.facts.base.rstrip("/"):
            codes = ", whose codes may stand for other weights" if "bnb-4bit" in named else ""
            line += f"; its adapter_config.json names {named}{codes}"
        logger.warning(line)

    def _original(self, base: str | None) -> BaseInfo | None:
        """The base that is named, where training had codes that came in files and these are not they."""
        if base is None or self.record is None or not self.record.prequantized:
            return None
        named = inspect_base(base, quantize="auto", dtype=self.record.dtype)
        return None if named.is_prequantized else named._replace(quantize="none")

    def _held_out_pairs(self, found: SavedPolicy, data: str | None, count: int) -> list[EncodedPair]:
        """`count` pairs, evenly spread over those held out, or over `data`."""
        if data is None and self.recipe is None:
            raise UsageError(
                "an adapter has no held-out pairs of its own to be verified on; name some with `data`, or `pairs` 0"
            )
        prepared = prepare_pairs(
            self.recipe.data if self.recipe else DataSection(train=str(data)),
            tokenizer=self.tokenizer,
            context_length=self.facts.context_length,
            end_token_ids=end_token_ids(found.section.base, revision=found.section.revision),
            only=data,
            recorded=None if data else Run(self.folder).data_report,
            seed=self.recipe.train.seeds.data if self.recipe else None,
        )
        pairs = prepared.train if data else prepared.held_out
        recorded = None if data else self.run.hashes.held_out
        if recorded is not None and recorded != data_hash(pairs):
            logger.warning("the data are not those of the run any more; what is held out now may have been trained on")
        if not pairs:
            raise UsageError("the run held no pairs out to verify the merge on; name some with `data`, or `pairs` 0")
        logger.info(f"to be measured on {min(count, len(pairs))} of {len(pairs)} held-out pairs")
        return [pairs[index * len(pairs) // count] for index in range(count)] if len(pairs) > count else list(pairs)


@contextmanager
def open_source(
    target: str | Path,
    *,
    data: str | None = None,
    pairs: int = 32,
    base: str | None = None,
    quantize: str | None = None,
    sft: str | Path | None = None,
    scale: float = 1.0,
    allow_base_mismatch: bool = False,
    best: bool = False,
) -> Iterator[Source]:
    """Yield what is to be merged, the adapter as it is to be served.

    Args:
        target: as for `Source`, and so are the others.
        sft: an adapter that was active under its own in training; π0 has it.
        scale: a; see above.

    Raises:
        UsageError: the scale is not above 0, or the adapter has the other one in it already, or is scaled already. Otherwise as
            `Source`.
        ModelError: an adapter is not of a kind that can be scaled or be fused with another. Otherwise as `Source`.
    """
    if not math.isfinite(scale) or scale < 0:
        raise UsageError(f"`scale` {scale}: write a number above 0; 1 is what was trained, 0.5 half the way there")
    if scale == 0:
        raise UsageError("`scale` 0: is the reference itself, with nothing of what was trained; write a number above 0")
    source = Source(
        Path(target), data=data, pairs=pairs, base=base, quantize=quantize, allow_base_mismatch=allow_base_mismatch, best=best
    )  # fmt: skip
    if sft is None and scale == 1:
        yield source
        return
    if sft is not None and (source.recipe is not None or source.reference is not None):
        raise UsageError(
            f"{target}: a run has the adapter that it starts from or is over, so that is in it already; leave `sft` out"
        )
    if scale != 1:
        if source.scale != 1:
            already = describe_scale(source.scale)
            raise UsageError(f"{target}: is {already} already (base.json); scale the run it was made from")
        words = f"what is served is not what was trained, but a = {scale} times as far from the reference"
        logger.info(f"{describe_scale(scale)}: {words}")
        if scale > 1:
            logger.warning(f"a = {scale} goes beyond what was trained (extrapolation)")
    source.reference = Path(sft) if sft is not None else source.reference
    weight = 1.0 if sft is not None or source.is_over else 1 - scale if source.reference else 0.0
    with TemporaryDirectory() as scratch:
        if source.reference is not None and weight:
            save_fused_adapter((AdapterFiles(source.reference), AdapterFiles(source.trained)), (weight, scale), Path(scratch))
        else:
            save_scaled_adapter(source.adapter, scale, Path(scratch))
        source.adapter, source.weights, source.scale = AdapterFiles(scratch), (weight, scale), scale * source.scale
        yield source


def describe_scale(scale: float) -> str:
    """Return how far an adapter that is not served as it was trained is from its reference, in words."""
    return f"scaled {'toward' if scale < 1 else 'away from'} the reference by a = {scale}"


def _check_tensors(folders: Iterable[Path], facts: BaseInfo) -> None:
    """Check that saved adapters have the tensors that their configurations ask for: PEFT fills in or drops others.

    Whole embeddings may be there besides, where the vocabulary was resized.
    """
    for adapter in map(AdapterFiles, folders):
        model = empty_model(facts.base, facts.config)
        embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
        resized = [name for name, module in model.named_modules() if module in embeddings]
        expected = expected_tensors(model, adapter.config)
        whole = {f"base_model.model.{name}{ending}" for name in resized for ending in _WHOLE}
        over = sorted(adapter.keys - expected - whole)
        if over:
            raise ModelError(
                f"{adapter.folder}: its configuration asks for no {over[0]} (and {len(over) - 1} more); PEFT would drop them; "
                "take another copy of the adapter"
            )
        missing = sorted(expected - {tensor.name for tensor in adapter.tensors})
        if missing:
            raise ModelError(
                f"{adapter.folder}: {len(missing)} tensors of the adapter are missing from its file ({missing[0]}, …); take "
                "another copy of it"
            )
