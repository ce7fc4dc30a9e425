"""The base model: found, loaded once, quantized if asked."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, NamedTuple, cast

import torch
from safetensors import SafetensorError
from torch import nn

from pe_dpo import startup
from pe_dpo.errors import ModelError
from pe_dpo.hub import hub_is_reachable, is_hub_name
from pe_dpo.model.attention import keep_soft_cap
from pe_dpo.model.quantization import (
    four_bit_experts,
    four_bit_layers,
    keep_weights_unpacked,
    quantization_config,
    stored_quantization,
)
from pe_dpo.printable import one_line
from pe_dpo.quantizations import BYPASSED_NAMES, Quantization, is_four_bit

Quantize = Quantization | Literal["auto"]

NEEDS_CODE = (
    "needs Python code from its own repository (auto_map), which is never run; convert it to a class of transformers, or take "
    "another"
)
"""Of a model or tokenizer; transformers would ask whether to run it, and run it on a y from wherever it came."""
NO_TENSORS = (
    "its .bin files hold more than tensors, or are damaged, and were not read (nothing in them was run); take the base as "
    "safetensors"
)
_NOISES = ("jitter_noise", "input_jitter_noise", "moe_jitter_eps")
"""Of routers in train mode, by the names of their attributes."""
LARGE_BASE = 1_000_000_000
"""Parameters from which `quantize: auto` means nf4: below, 16-bit weights take under 2 GB anyway."""


class BaseInfo(NamedTuple):
    """What is known of a base before its weights are read."""

    base: str
    revision: str | None
    config: Any
    parameters: int
    context_length: int | None
    quantize: Quantization
    dtype: torch.dtype
    is_prequantized: bool = False
    """Whether its files hold the codes already, as bitsandbytes makes them."""
    quantize_experts: bool = True
    """Whether 4-bit codes are made of the experts of a mixture, too."""
    quantize_bypassed: bool = False
    """Whether 4-bit codes are made of layers whose bare weight is read, too, as other tools do and runs of before did."""

    def as_recorded(self, quantized_layers: Sequence[str]) -> "BaseInfo":
        """Return it with 4-bit codes as they were made in a run, from the names of what was quantized there."""
        return self._replace(
            quantize_experts=any(".experts." in name for name in quantized_layers),
            quantize_bypassed=any(name.rpartition(".")[2] in BYPASSED_NAMES for name in quantized_layers),
        )


def inspect_base(
    base: str,
    *,
    revision: str | None = None,
    quantize: Quantize = "auto",
    quantize_experts: bool = True,
    dtype: str = "auto",
) -> BaseInfo:
    """Return what the configuration of a base says, without loading its weights.

    Args:
        base: path or hub id.
        revision: branch, tag or commit of a hub id.
        quantize: "auto" means nf4 from LARGE_BASE parameters on.
        quantize_experts: whether 4 bits reach the experts of a mixture.
        dtype: "auto" means bfloat16 on a GPU that has it, else float32: bfloat16 that is emulated, as on a T4, is slower than
            that, and in float16, with float32 adapters and no loss scaling, small gradients vanish.

    Raises:
        ModelError: nothing there, not a causal language model, or quantized by another library.
    """
    config = read_config(base, revision=revision)
    settings = getattr(config, "quantization_config", None)
    if settings:
        quantize = as_it_comes(base, settings, quantize)
    parameters = sum(p.numel() for p in empty_model(base, config).parameters())
    if dtype == "auto":
        dtype = "bfloat16" if torch.cuda.is_available() and not lacks_bfloat16() else "float32"
    return BaseInfo(
        base=base,
        revision=revision,
        config=config,
        parameters=parameters,
        context_length=getattr(config.get_text_config(), "max_position_embeddings", None),
        quantize=quantize if quantize != "auto" else "nf4" if parameters >= LARGE_BASE else "none",
        dtype={"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype],
        is_prequantized=bool(settings),
        quantize_experts=quantize_experts,
    )


def read_config(base: str, *, revision: str | None = None) -> Any:
    """Return transformers' configuration of a base.

    Args:
        base: path or hub id.
        revision: branch, tag or commit of a hub id.

    Raises:
        ModelError: nothing there, or not a causal language model.
    """
    from transformers import AutoConfig

    if Path(base).is_dir() and (Path(base) / "adapter_config.json").is_file():
        raise ModelError(
            f"{base}: is an adapter, not a base; name its base in model.base, and the adapter in adapter.start or adapter.over"
        )
    if not Path(base).exists() and (base.startswith((".", "/", "~")) or not is_hub_name(base)):
        raise ModelError(f"{base}: no such folder; model.base is a folder with config.json, or a hub id")
    try:
        config = AutoConfig.from_pretrained(base, revision=revision, local_files_only=_is_local(base), trust_remote_code=False)
    except Exception as error:  # whatever a library stumbles over in files that came from elsewhere
        nowhere = "" if Path(base).exists() else "there is no such folder here, and as a name on the hub: "
        raise _unusable(base, f"no model found there: {nowhere}", error) from error
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    named = (getattr(part, f"_{what}_implementation", None) for part in parts for what in ("attn", "experts"))
    if any("/" in str(name) for name in named):
        raise ModelError(
            f"{base}: its config.json names a kernel of the hub as its attention's, which is a program and is never fetched; "
            "leave attn_implementation out there"
        )
    if auto_class(config) is None:
        raise ModelError(f"{base}: {config.model_type} is not a causal language model of this transformers version")
    return config


def lacks_bfloat16() -> bool:
    """Return whether there is a GPU that only emulates bfloat16, as those before Ampere do; torch by default says it has it."""
    return torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)


def noise_of(config: Any) -> dict[str, float]:
    """Return which noise a configuration switches on besides dropout, by name; `load_base` switches it off."""
    parts = [part.to_dict() if hasattr(part, "to_dict") else part for part in (config, getattr(config, "ffn_config", {}))]
    return {name: value for part in parts for name, value in part.items() if "jitter" in name and value}


def _way_out(base: str, settings: Mapping[str, Any]) -> str:
    """What can be done with a base whose codes another library made, in a sentence."""
    if settings.get("quant_method") in ("fp8", "mxfp4"):  # some have no other weights
        return (
            f"Write them out in 16 bits with `{shlex.join(['pe-dpo', 'export', base, '--plain', '-o', 'BASE'])}` and name BASE "
            "in model.base; model.quantize then makes nf4 of it, and `pe-dpo audit --four-bit-noise` measures what that changes"
        )
    return "Name the model that they were made of, or one quantized by bitsandbytes (…-bnb-4bit), which is trained on as it is"


def as_it_comes(base: str, settings: Mapping[str, Any], quantize: Quantize) -> Quantization:
    """Return how a base was quantized that lies so on disk.

    Raises:
        ModelError: not by bitsandbytes, or otherwise than is asked for.
    """
    stored = stored_quantization(settings)
    if stored is None:
        raise ModelError(
            f"{base}: comes as {settings.get('quant_method')} codes, which cannot be trained on. {_way_out(base, settings)}"
        )
    if quantize not in ("auto", stored):
        raise ModelError(
            f"{base}: comes quantized ({stored}), and is trained on these very codes: write model.quantize: {stored}, or leave "
            f"it out; for {quantize} name the base that it was made from"
        )
    return stored


def auto_class(config: Any) -> Any:
    """Return the class of transformers that makes a language model of a configuration; None where there is none.

    Some multimodal models (Qwen2.5-VL, Mistral Small 3.1) are there as a whole only; of text they are language models too.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kinds = (AutoModelForCausalLM, AutoModelForImageTextToText)
    return next((kind for kind in kinds if type(config) in kind._model_mapping and not config.is_encoder_decoder), None)


def empty_model(base: str, config: Any) -> Any:
    """Return the model that a configuration describes, without weights.

    Raises:
        ModelError: it describes none, or one that needs a package that is not installed.
    """
    try:
        with torch.device("meta"):
            return auto_class(config).from_config(config, trust_remote_code=False)
    except ImportError as error:
        why = _first_line(error).partition(". ")[0]
        raise ModelError(f"{base}: needs a package that is not installed: {why}") from error
    except Exception as error:
        raise ModelError(f"{base}: its config.json describes no model that can be built: {_first_line(error)}") from error


def load_base(
    info: BaseInfo,
    *,
    device: torch.device | str = "cpu",
    places: Mapping[str, str] | None = None,
    offload_folder: str | None = None,
) -> nn.Module:
    """Return the base with frozen weights, in train mode, without dropout or other noise of its own.

    It would make policy and reference differ at step 0. What the recipe asks of the adapter's dropout is another matter and is
    done.

    Args:
        info: of the base.
        device: for all of it.
        places: where each module goes instead; "disk" leaves it in the files.
        offload_folder: for weights on disk that the files have in another form.

    Raises:
        ModelError: the weights cannot be read, do not fit the configuration, or are not finite.
    """
    startup.is_over()
    how = {} if info.is_prequantized else {"quantization_config": quantization_config(info.quantize, info.dtype)}
    makes_codes = is_four_bit(info.quantize) and not info.is_prequantized
    if makes_codes:
        from pe_dpo.model.experts import METHOD, loading_method

        method = loading_method(with_experts=info.quantize_experts, with_bypassed=info.quantize_bypassed)
        how["quantization_config"].quant_method = method
    try:
        model, loading = auto_class(info.config).from_pretrained(
            info.base,
            revision=info.revision,
            local_files_only=_is_local(info.base),
            dtype=info.dtype,
            device_map={"": device} if places is None else dict(places),
            offload_folder=offload_folder,
            output_loading_info=True,
            trust_remote_code=False,
            **how,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _unusable(info.base, "cannot be loaded: ", error) from error
    except UnpicklingError as error:  # torch's own message says how to run what is in there
        raise ModelError(f"{info.base}: {NO_TENSORS}") from error
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ModelError(
            f"{info.base}: {len(missing)} tensors of the model are missing from its files ({missing[0]}, …) and would be "
            "random; fetch the model again"
        )
    if info.is_prequantized:  # transformers leaves all as it lies in the files
        compute_in(model, info.dtype, keep_float32=True)
    keep_soft_cap(model)
    keep_weights_unpacked(model)
    if makes_codes and any(True for _ in four_bit_experts(model)):
        model.set_experts_implementation(METHOD)
    _silence(model)
    tensor = first_not_finite(model)  # also one that no pair reaches: a merge could not write it
    if tensor is not None:
        raise ModelError(
            f"{info.base}: {tensor} has values that are not finite (NaN, infinite); fetch the model again, or make it again"
        )
    return model.requires_grad_(False).train()


def _silence(model: nn.Module) -> None:
    """Switch off the base's own dropout, the noise of its routers, and what changes its weights."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and (isinstance(module, nn.Dropout) or "drop" in name or name in _NOISES):
                setattr(module, name, 0.0)
        if hasattr(module, "layers_are_rescaled"):  # RWKV divides its weights, in place, for float16 in eval mode
            cast(Any, module).config.rescale_every = 0
        if hasattr(module, "router_jitter_noise"):  # Phi-3.5-MoE's router draws experts while it is in train mode
            router: Any = module.eval()
            router.train = lambda mode=True, router=router: router


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block a model is in eval mode and makes no gradients; afterwards it is as it was."""
    was_training = model.training
    set_training(model, False)
    try:
        with torch.no_grad():
            yield
    finally:
        set_training(model, was_training)


def set_training(model: nn.Module, mode: bool) -> None:
    """Do what `model.train(mode)` does, in 1.1 of its 7 ms for 2,600 modules; a class with a way of its own keeps it."""
    from transformers import PreTrainedModel

    waiting = [model]
    while waiting:
        module = waiting.pop()
        own, train = vars(module), type(module).train
        is_usual = train is nn.Module.train or (train is PreTrainedModel.train and not getattr(module, "use_kernels", False))
        if "train" in own or not is_usual:
            module.train(mode)
        else:
            own["training"] = mode
            waiting += [child for child in own["_modules"].values() if child is not None]


def compute_in(model: nn.Module, dtype: torch.dtype, *, keep_float32: bool = False) -> None:
    """Let a loaded base, with or without adapters, compute in another dtype; 4-bit codes and adapters stay what they are.

    In place, and not to be undone: weights that were rounded to 16 bits stay rounded.

    Args:
        model: that was loaded.
        dtype: to compute in.
        keep_float32: leave weights that are in float32, such as the correction of a router, as they are.
    """
    for _, layer in four_bit_layers(model):
        layer.compute_dtype = layer.weight.quant_state.dtype = dtype
    for _, experts, name in four_bit_experts(model):
        getattr(experts, name).quant_state.dtype = dtype
    for name, parameter in model.named_parameters():
        is_kept = keep_float32 and parameter.dtype == torch.float32
        if parameter.is_floating_point() and "lora_" not in name and not is_kept:
            parameter.data = parameter.data.to(dtype)


def first_not_finite(model: nn.Module) -> str | None:
    """Return the name of the first parameter with a value, or a scale of its codes, that is not finite; None without.

    One pass over the weights that are loaded, at 5 to 10 GB/s on one core.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            continue  # in the files
        state = getattr(parameter, "quant_state", None)
        # Of double quantization the scales are codes again; a single NaN is in their mean.
        scales = [] if state is None else [state.absmax, state.offset, getattr(state.state2, "absmax", None)]
        values = [one for one in (parameter.data, *scales) if one is not None and one.is_floating_point() and one.numel()]
        if not all(bool(torch.stack(one.aminmax()).isfinite().all()) for one in values):
            return name
    return None


def checkpoint_activations(model: Any, *, offload: bool = False) -> None:
    """Recompute activations in the backward instead of keeping them: a forward more, for a fraction of the memory.

    Non-reentrant, so that the inputs need no gradient.

    Args:
        model: of transformers, without PEFT around it.
        offload: whether what a layer begins with waits in the host's memory; on a GPU alone.

    Raises:
        ModelError: its class in transformers cannot do that.
    """
    settings: dict[str, Any] = {"use_reentrant": False}
    levers = {"offload": True} if offload else {}
    if not getattr(model, "supports_gradient_checkpointing", True):
        raise ModelError(
            f"train.gradient_checkpointing: {type(model).__name__} of transformers cannot recompute activations; set it to "
            "false, and a smaller data.max_length or train.tokens_per_microbatch where memory does not do"
        )
    if hasattr(model, "activation_checkpointing_enable"):  # its name from transformers 5.23 on
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings, **levers)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings, **levers)


def load_tokenizer(base: str, *, revision: str | None = None) -> Any:
    """Return the tokenizer that lies beside a base or an adapter.

    Raises:
        ModelError: none there.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(base, revision=revision, local_files_only=_is_local(base), trust_remote_code=False)
    except Exception as error:  # what the tokenizers package raises is a bare one
        raise _unusable(base, "no tokenizer found there: ", error) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of its Rust, which is no Exception, and would end the process
            raise
        raise ModelError(f"{base}: its tokenizer cannot be read: {one_line(error)}") from None


def end_token_ids(base: str, *, revision: str | None = None) -> list[int]:
    """Return the tokens at which the base stops generating, as its generation config says; empty if it says nothing."""
    from transformers import GenerationConfig

    try:
        generation = GenerationConfig.from_pretrained(
            base, revision=revision, local_files_only=_is_local(base), trust_remote_code=False
        )
    except OSError:  # many bases have no generation config
        return []
    except Exception as error:
        raise _unusable(base, "its generation_config.json cannot be read: ", error) from error
    ends = generation.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if not all(isinstance(end, int) for end in ends):
        raise ModelError(f"{base}: its generation_config.json names {one_line(ends)} as ends of an answer; ids are expected")
    return ends


def answer_end_tokens(tokenizer: Any, base: str, *, revision: str | None = None) -> set[int]:
    """Return all tokens that end an answer: the tokenizer's own, and those of the base's generation config."""
    own = tokenizer.eos_token_id
    return {*end_token_ids(base, revision=revision), *([] if own is None else [own])}


def _is_local(base: str) -> bool:
    """Whether only files on this machine count: a folder, or a hub name while the hub cannot be reached."""
    return Path(base).exists() or not hub_is_reachable()


def _unusable(base: str, problem: str, error: Exception) -> ModelError:
    return ModelError(f"{base}: {NEEDS_CODE if needs_code(error) else problem + _first_line(error)}")


def needs_code(error: Exception) -> bool:
    """Return whether transformers refused to run code from a model's repository."""
    return "trust_remote_code" in str(error)


def _first_line(error: Exception) -> str:
    told = one_line(error) if type(error).__name__ == "StrictDataclassFieldValidationError" else ""
    return told or next(iter(str(error).strip().splitlines()), "")[:300] or type(error).__name__
