"""What becomes of a base and an adapter on the whole way to a merged model, from configuration and headers of files alone.

How much of the weights is really 4-bit, and whether each layer that an adapter is trained on has a tensor in the files that its
update can be merged into. No weight is read.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from pe_dpo.errors import ModelError
from pe_dpo.model.adapter_targets import Targets, bypassed_layers
from pe_dpo.model.base import BaseInfo, empty_model
from pe_dpo.model.layout import Layout
from pe_dpo.model.provenance import base_folder
from pe_dpo.model.quantization import EXPERT_WEIGHTS, is_expert_weight
from pe_dpo.model.tensor_files import TensorFiles
from pe_dpo.model.weight_files import FourBitFiles, weight_files
from pe_dpo.quantizations import bytes_per_weight, is_four_bit


class LoadedSize(NamedTuple):
    """What the weights of a base take once they are loaded."""

    parameters: int
    coded: int
    """Of these, how many are codes of 4 or 8 bits."""
    left: int
    """How many are in matrices that quantization does not reach, embeddings and head not counted."""
    experts: int
    """How many are codes of experts, which other libraries do not make."""
    bytes: int
    """Of all weights with the scales of codes; buffers of the loading not counted."""

    def describe(self, info: BaseInfo) -> str:
        """Return it as a line for a person."""
        kind = "16 bits" if info.dtype.itemsize == 2 else "32 bits"
        share = f"{self.coded / self.parameters:.0%} of them {info.quantize}, the others in" if self.coded else "in"
        size = f"{self.bytes / 1e9:,.2f} GB" if self.bytes >= 1e8 else f"{self.bytes / 1e6:.1f} MB"
        said = f"base: {self.parameters / 1e6:,.1f} M parameters, {share} {kind}: {size}"
        return f"{said}; context {info.context_length}" if info.context_length else said


def loaded_size(info: BaseInfo, files: TensorFiles | None = None, empty: Any = None) -> LoadedSize:
    """Return what a base takes once it is loaded, by what transformers and bitsandbytes would do with each parameter.

    Args:
        info: of the base.
        files: its weights, where they are here; of a base that comes as codes their headers say which are.
        empty: the base without weights, where it was made already.
    """
    model = empty_model(info.base, info.config) if empty is None else empty
    head = model.get_output_embeddings()
    ends = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding) or part is head}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    aside = {name for name, parameter in model.named_parameters() if id(parameter) in ends or parameter.dim() < 2}
    coded: set[str] = set()
    if files is not None and (stored := stored_codes(files)):
        module_of = Layout(model, files.file_of).module_of
        coded = {module_of[name] for name in stored if name in module_of}
    elif info.quantize != "none":
        coded = made_codes(model, info)
    count, total = sum(sizes[name] for name in coded), sum(sizes.values())
    return LoadedSize(
        parameters=total,
        coded=count,
        left=total - count - sum(sizes[name] for name in aside - coded) if info.quantize != "none" else 0,
        experts=sum(sizes[name] for name in coded if name.endswith(EXPERT_WEIGHTS)),
        bytes=round(count * bytes_per_weight(info.quantize) + (total - count) * info.dtype.itemsize),
    )


def stored_codes(files: TensorFiles) -> set[str]:
    """Return the names of the tensors that lie in the files as bitsandbytes' codes: of 4 bits, or of 8 with a scale per row."""
    if isinstance(files, FourBitFiles):
        return {*files.parts}
    return {name for name in files.file_of if name.endswith(".weight") and f"{name.removesuffix('weight')}SCB" in files}


def made_codes(model: Any, info: BaseInfo) -> set[str]:
    """Return the names of the parameters that are codes once loaded: by transformers' rules, bitsandbytes not imported."""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    makes_four_bit = is_four_bit(info.quantize) and not info.is_prequantized
    settings = getattr(info.config, "quantization_config", None) or {}
    named = settings.get("llm_int8_skip_modules") if info.is_prequantized else None
    left_out = HfQuantizer.get_modules_to_not_convert(model, named, model._keep_in_fp32_modules)
    left_out += bypassed_layers(model) if makes_four_bit and not info.quantize_bypassed else []
    coded = {
        f"{path}.weight"
        for path, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(path, left_out)
    }
    if makes_four_bit and info.quantize_experts:
        coded |= {name for name, _ in model.named_parameters() if is_expert_weight(model, name)}
    return coded & {name for name, _ in model.named_parameters()}  # a tied head is an embedding


def files_here(info: BaseInfo) -> TensorFiles | None:
    """Return the weights of a base where they lie on this machine; None for those on a hub that nobody fetched.

    Raises:
        ModelError: they are here, and cannot be read.
    """
    try:
        folder = base_folder(info.base, info.revision, is_loaded=True)
    except ModelError:
        return None
    has_weights = any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
    return weight_files(folder) if has_weights else None


def check_can_be_merged(info: BaseInfo, model: Any, targets: Targets, files: TensorFiles | None) -> None:
    """Check before training that the update of each adapted layer will have its place in a merged model.

    Args:
        info: of the base.
        model: it, without weights and without adapters.
        targets: the layers that get an adapter.
        files: its weights; None where they are not here, and only what needs none of them is checked.

    Raises:
        ModelError: one has none; says what to leave out.
    """
    bare = [name for name in targets.names if not any(f".{path}".endswith(f".{name}") for path in targets.layers)]
    if bare:
        raise ModelError(
            f"adapter.targets: {', '.join(bare)}: of {info.base} these are experts or routers, on which PEFT trains updates of "
            "bare parameters that cannot be merged; leave them out (all-linear does)"
        )
    check_has_place(model, [f"{path}.weight" for path in targets.layers], files)


def check_has_place(model: Any, names: Iterable[str], files: TensorFiles | None) -> None:
    """Check that each of these tensors of a model is one of its files, so that its update can be merged.

    Args:
        model: without weights and without adapters.
        names: of tensors that an adapter changes.
        files: as above.

    Raises:
        ModelError: one is not.
    """
    if files is None:
        return
    renamed = [name for name in names if name not in files]
    if not renamed:  # asking transformers for its rules takes a second
        return
    layout = Layout(model, files.file_of)
    there = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in renamed:
        stored, leaf = layout.files_of(name), name.rpartition(".")[0].rpartition(".")[2]
        if name not in there:
            raise ModelError(
                f"{files.folder}: the model has no {name}, which the adapter would move: that could be trained, not merged; "
                "name the adapter's own base, or another adapter (without lora_bias)"
            )
        if not stored:
            raise ModelError(
                f"{files.folder}: does not have {name}, or not under a name that this transformers knows, so that it "
                "could not be merged; fetch the base again, or take another transformers"
            )
        if len(stored) > 1 or layout.is_assembled(name):
            raise ModelError(
                f"{files.folder}: {name} is made of several tensors there ({stored[0]}, …): an update could be trained, not "
                f"merged; leave it out with adapter.exclude: [{leaf}]"
            )
