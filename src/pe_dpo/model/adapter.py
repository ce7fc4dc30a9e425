"""Policy and reference from one base: adapters on is π, adapters off (or a frozen adapter) is π0.

fresh, or start with reference: base        π = W0 + ΔW           π0 = W0
start with reference: adapter               π = W0 + ΔW           π0 = W0 + ΔW_ref      a frozen copy of the start
over                                        π = W0 + ΔW_ref + ΔW  π0 = W0 + ΔW_ref      the frozen adapter acts under π
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from torch import nn

from pe_dpo.disk import follow_umask
from pe_dpo.errors import ModelError
from pe_dpo.model.adapter_config import REFERENCE, TRAINED, check_adapter, merge_first, trained_folder, without_advice
from pe_dpo.model.adapter_files import AdapterFiles, check_can_be_trained_on, check_is_plain, save_fused_adapter
from pe_dpo.model.adapter_targets import find_targets

POLICY = "default"
"""Name of the trained adapter; PEFT's own default, so that what is saved loads in plain PEFT."""


def attach_adapter(
    base: Any,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: str | list[str] = "all-linear",
    exclude: Sequence[str] = (),
    init: Literal["default", "gaussian"] = "default",
    rslora: bool = False,
    seed: int = 0,
) -> Any:
    """Return the base with a fresh LoRA adapter in float32, as a PEFT model; B = 0, so that π = π0.

    Args:
        base: a loaded base.
        rank: r.
        alpha: LoRA's alpha; the update is scaled by alpha / rank.
        dropout: on the adapter's input, per token.
        targets: "all-linear", "attention", "mlp", or names and patterns of modules; see `adapter_targets`.
        exclude: names and patterns of modules that get none.
        init: "default" or "gaussian", both with B = 0.
        rslora: whether the update is scaled by alpha / √rank instead (Kalajdzievski 2023, arXiv 2312.03732).
        seed: of A.

    Raises:
        ModelError: another init; or as `find_targets`.
    """
    from peft import LoraConfig, get_peft_model

    if init not in ("default", "gaussian"):
        raise ModelError(f"init is {init!r}: only default and gaussian start with B = 0 on an unchanged base")
    found = find_targets(base, targets, exclude)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        use_rslora=rslora,
        lora_dropout=dropout,
        target_modules=found.names,
        exclude_modules=found.exclude,
        init_lora_weights="gaussian" if init == "gaussian" else True,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            model = get_peft_model(base, config, adapter_name=POLICY)
        except ValueError as error:
            raise ModelError(f"adapter.targets: {str(error).splitlines()[0]}") from error
    odd = sorted(set(found.layers) ^ set(model.base_model.targeted_module_names))
    if odd:
        raise ModelError(f"adapter.targets: PEFT did not do with {odd[0]} what it was asked to; name the layers otherwise")
    return _in_float32(model).train()


def start_from_adapter(
    base: nn.Module, folder: str | Path, *, reference: Literal["base", "adapter"], dropout: float = 0.0
) -> Any:
    """Return the base with a finished adapter to train on, and a frozen copy of it if that is the reference.

    Args:
        base: a loaded base, the one that the adapter was trained on.
        folder: the adapter, as PEFT saves it.
        reference: "base" for the raw base, "adapter" for the base with the frozen copy.
        dropout: on the trained adapter's input, instead of what it was made with; the frozen copy has none.

    Raises:
        ModelError: no LoRA adapter there, one with trained biases or full modules (which stay on when adapters are off), one
            that changed its base when it was made, one that could not be merged, or one that does not fit the base.
    """
    check_can_be_trained_on(folder)
    model = _with_adapter(base, folder, POLICY, is_trainable=True)
    if reference == "adapter":
        _with_adapter(model, folder, REFERENCE)
    _check_complete(model, Path(folder), POLICY)
    for module in model.modules():
        for name in list(getattr(module, "lora_dropout", {})):
            rate = dropout if name == POLICY else 0.0
            module.lora_dropout[name] = nn.Dropout(rate) if rate else nn.Identity()
    return _in_float32(model).train()


def lay_under(model: Any, folder: str | Path) -> Any:
    """Return a model whose fresh adapter trains over a finished, frozen one: π has both, π0 the finished one alone.

    Args:
        model: from `attach_adapter`.
        folder: the finished adapter, as PEFT saves it, on the same base.

    Raises:
        ModelError: as `start_from_adapter`; or one of the two is not plain LoRA, so that their sum is no LoRA adapter.
    """
    adapter = check_can_be_trained_on(folder)
    try:
        check_is_plain(adapter)
    except ModelError as error:
        raise ModelError(
            f"{str(error).partition(';')[0]}; only that can lie under a new adapter: {merge_first(folder)}"
        ) from error
    bare = sorted(model.peft_config[POLICY].target_parameters or ())
    if bare:
        raise ModelError(
            f"adapter.over: the new adapter would be on {', '.join(bare)} too, experts or routers that PEFT trains as bare "
            "parameters, and the sum with those cannot be saved as one adapter; name adapter.targets (q_proj, v_proj, …)"
        )
    _check_complete(_with_adapter(model, folder, REFERENCE), Path(folder), REFERENCE)
    for module in model.modules():
        if REFERENCE in getattr(module, "lora_dropout", {}):
            module.lora_dropout[REFERENCE] = nn.Identity()
    _act_together(model)
    return _in_float32(model).train()


def load_adapter_for_evaluation(base: nn.Module, folder: str | Path) -> Any:
    """Return the base with a finished adapter, nothing trainable, in eval mode; as in training where that was over another.

    Raises:
        ModelError: as `start_from_adapter`.
    """
    check_adapter(folder)
    own, frozen = trained_folder(folder), Path(folder) / REFERENCE
    model = _with_adapter(base, own, POLICY)
    _check_complete(model, own, POLICY)
    if frozen.is_dir():
        _check_complete(_with_adapter(model, frozen, REFERENCE), frozen, REFERENCE)
    if own != Path(folder):
        _act_together(model)
    return _in_float32(model).eval()


def is_trained_over(model: Any) -> bool:
    """Return whether the frozen adapter of a PEFT model acts under the policy; to be asked while the policy is active."""
    return REFERENCE in model.base_model.active_adapters


def _act_together(model: Any) -> None:
    with _trainable_as_before(model):
        model.base_model.set_adapter([REFERENCE, POLICY], inference_mode=True)


def add_finished_adapter(model: Any, folder: str | Path, name: str = POLICY) -> Any:
    """Return a base, or a PEFT model, with any finished LoRA adapter that PEFT can load, active and in eval mode.

    Unlike `load_adapter_for_evaluation` it takes adapters that adapters-off does not undo (trained biases, whole modules): what
    a base does must be measured before.

    Args:
        model: a loaded base, or a PEFT model around it.
        folder: as PEFT saves it.
        name: of the adapter in the model.

    Raises:
        ModelError: it does not fit the base.
    """
    with without_advice():
        model = _with_adapter(model, folder, name)
    model.set_adapter(name, inference_mode=True)
    return _in_float32(model).eval()


@contextmanager
def borrowed_base(base: Any) -> Iterator[None]:
    """Within the block a loaded base may get adapters, another attention and recomputed activations; afterwards it has none."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    attention = base.config._attn_implementation
    try:
        yield
    finally:
        wrapped = [name for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)]
        for name in reversed(wrapped):  # the innermost first: experts are wrapped once for each of their parameters
            base.set_submodule(name, base.get_submodule(name).get_base_layer())
        vars(base).pop("peft_config", None)
        if hasattr(base, "activation_checkpointing_disable"):  # see `checkpoint_activations`
            base.activation_checkpointing_disable()
        else:
            base.gradient_checkpointing_disable()
        base.disable_input_require_grads()  # else every later backward goes down to the embeddings
        base.set_attn_implementation(attention)
        base.zero_grad()


@contextmanager
def as_reference(model: Any) -> Iterator[Any]:
    """Within the block, without gradients, `model` is the reference π0; afterwards it is the policy again, trainable as before.

    π0 is the base with the frozen adapter where there is one, else the base alone, also within `scaled`.
    """
    with torch.no_grad():
        if REFERENCE in model.peft_config:
            with acting(model, {REFERENCE: 1.0}):
                yield model
            return
        # PEFT's `disable_adapter` sets these flags too, and looks through all modules five times for it: 42 ms at 32 layers.
        switches = [model, *_adapted(model)]
        names = ["_adapters_disabled", *["_disable_adapters"] * (len(switches) - 1)]
        before = [vars(switch).get(name, False) for switch, name in zip(switches, names, strict=True)]
        try:
            for switch, name in zip(switches, names, strict=True):
                vars(switch)[name] = True
            yield model
        finally:
            for switch, name, was in zip(switches, names, before, strict=True):
                vars(switch)[name] = was


@contextmanager
def scaled(model: Any, scale: float) -> Iterator[Any]:
    """Within the block the policy is scaled toward the reference, W0 + (1−a)·ΔW0 + a·ΔW; afterwards it is as it was.

    ΔW0 is the frozen copy's update where that is the reference, else 0. Over a frozen adapter it is W0 + ΔW0 + a·ΔW. With a = 1
    nothing is touched. The reference, what is trainable and training or eval mode stay as they are; what is saved has no scale.

    Args:
        model: a PEFT model of this module with the policy active.
        scale: a, from 0 (the reference) to 1 (the policy).

    Raises:
        ModelError: a is not in [0, 1].

    Source:
        Wortsman et al. 2022, "Robust fine-tuning of zero-shot models" (WiSE-FT, arXiv 2109.01903).
    """
    if not 0 <= scale <= 1:
        raise ModelError(f"scale is {scale:g}: it must lie between 0, which is the reference, and 1, which is the policy")
    if scale == 1:
        yield model
        return
    frozen = {}
    if REFERENCE in model.peft_config:
        frozen = {REFERENCE: 1.0 if is_trained_over(model) else 1 - scale}
    with acting(model, {**frozen, POLICY: scale}):
        yield model


@contextmanager
def acting(model: Any, shares: Mapping[str, float]) -> Iterator[None]:
    """Within the block the named adapters act, each with a share of its scaling, and no others; afterwards all is as before.

    Args:
        model: a PEFT model.
        shares: of each adapter's own scaling, by its name.
    """
    from peft.tuners.lora import LoraLayer

    adapted = _adapted(model)
    layers = [module for module in adapted if isinstance(module, LoraLayer)]
    before, active = [dict(layer.scaling) for layer in layers], model.base_model.active_adapter
    # Flags do where PEFT would do no more; it takes merged weights apart, and has rules of its own for modules trained whole.
    by_flags = len(layers) == len(adapted) and not any(layer.merged for layer in layers)
    flags = [vars(layer)["_active_adapter"] for layer in layers] if by_flags else []
    with nullcontext() if by_flags else _trainable_as_before(model) as restore:
        try:
            if restore is None:
                model.base_model.active_adapter = list(shares)
                for layer in layers:
                    vars(layer)["_active_adapter"] = list(shares)
            else:
                model.base_model.set_adapter(list(shares), inference_mode=True)
                restore()
            for layer in layers:
                for name, share in shares.items():
                    layer.set_scale(name, share)
            yield
        finally:
            for layer, scaling in zip(layers, before, strict=True):
                layer.scaling.update(scaling)
            if restore is None:
                model.base_model.active_adapter = active
                for layer, flag in zip(layers, flags, strict=True):
                    vars(layer)["_active_adapter"] = flag
            else:
                model.base_model.set_adapter(active, inference_mode=True)


_ADAPTED: WeakKeyDictionary[nn.Module, tuple[Any, list[Any]]] = WeakKeyDictionary()


def _adapted(model: Any) -> list[Any]:
    """Return the modules of a PEFT model that have adapters, or a trained copy; looked for once per set of adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    tuner = model.base_model
    targeted = [len(getattr(tuner, name, ())) for name in ("targeted_module_names", "targeted_parameter_names")]
    adapters = tuple(model.peft_config), *targeted
    known = _ADAPTED.get(model)
    if known is None or known[0] != adapters:
        found = [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
        known = _ADAPTED[model] = adapters, [module for module in found if module is not tuner]
    return known[1]


@contextmanager
def _trainable_as_before(model: Any) -> Iterator[Callable[[], None]]:
    """After the block, and whenever what it gives is called, the same parameters are trainable; PEFT's switches change that."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore() -> None:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)

    try:
        yield restore
    finally:
        restore()


def save_adapter(model: Any, folder: str | Path) -> None:
    """Write the policy's adapter as plain PEFT files, and the frozen one into a subfolder where there is one.

    Over a frozen adapter the policy's is the sum of both, so that plain PEFT loads the policy; the trained one alone, which is
    another model on the bare base, goes into a subfolder of its own.

    Embedding layers are never saved: they are the base's. PEFT's own README.md is not written: a run has a card of ours, and
    compiling a template for it at each checkpoint took 12 % of a tiny training.
    """
    is_over, folder = is_trained_over(model), Path(folder)
    places = {POLICY: folder / TRAINED if is_over else folder} | ({REFERENCE: folder} if REFERENCE in model.peft_config else {})
    model.create_or_update_model_card = lambda _: None  # peft 0.21 has no argument for it
    try:
        for name, place in places.items():
            model.save_pretrained(str(place), selected_adapters=[name], save_embedding_layers=False)
    finally:
        del model.create_or_update_model_card
    if is_over:
        save_fused_adapter((AdapterFiles(folder / REFERENCE), AdapterFiles(folder / TRAINED)), (1.0, 1.0), folder)
    for weights in (folder / place / "adapter_model.safetensors" for place in (".", REFERENCE, TRAINED)):
        if weights.is_file():
            follow_umask(weights)


def restore_adapter(model: Any, folder: str | Path) -> None:
    """Load the weights of a saved adapter into the trained one, exactly, and those of the frozen one saved with it into that.

    Raises:
        ModelError: a tensor is missing, left over, or of another shape.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    places, frozen = {POLICY: trained_folder(folder)}, Path(folder) / REFERENCE
    if REFERENCE in model.peft_config and frozen.is_dir():
        places[REFERENCE] = frozen
    for adapter, place in places.items():
        wanted = _check_complete(model, place, adapter)
        weights = load_file(place / "adapter_model.safetensors")
        for name, tensor in weights.items():
            if tensor.shape != wanted[name].shape:
                raise ModelError(f"{place}: {name} has shape {tuple(tensor.shape)}, the run has {tuple(wanted[name].shape)}")
        set_peft_model_state_dict(model, weights, adapter_name=adapter)


def _with_adapter(model: Any, folder: str | Path, name: str, *, is_trainable: bool = False) -> Any:
    """Return a base, or a PEFT model, with a saved adapter; in a PEFT model that had others, it is not active.

    Raises:
        ModelError: it does not fit the base.
    """
    from peft import PeftModel

    if not (Path(folder) / "adapter_model.safetensors").is_file():  # PEFT would look for a pickle
        raise ModelError(f"{folder}: no adapter_model.safetensors there; only safetensors are read")
    try:
        with without_advice():
            if not isinstance(model, PeftModel):
                return PeftModel.from_pretrained(model, str(folder), adapter_name=name, is_trainable=is_trainable)
            model.load_adapter(str(folder), adapter_name=name, is_trainable=is_trainable)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ModelError(f"{folder}: does not load onto this base: {str(error).splitlines()[0]}") from error
    return model


def _check_complete(model: Any, folder: Path, adapter: str) -> dict[str, torch.Tensor]:
    """Check that a saved adapter has exactly the tensors of one in the model, and return those of the model.

    PEFT leaves a missing tensor as it was initialised, with no more than a warning.

    Raises:
        ModelError: a tensor is missing or left over, or there are no safetensors.
    """
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise ModelError(f"{folder}: no adapter_model.safetensors there; save the adapter as safetensors")
    with safe_open(path, framework="pt") as file:
        saved = set(file.keys())
    wanted: dict[str, torch.Tensor] = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    if saved != wanted.keys():
        missing, over = len(wanted.keys() - saved), len(saved - wanted.keys())
        raise ModelError(
            f"{folder}: {missing} tensors of the adapter are missing and {over} are left over; differing tensors: "
            f"{', '.join(sorted(saved ^ wanted.keys())[:3])}, …; take another copy of the adapter"
        )
    return wanted


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the trained parameters."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _in_float32(model: Any) -> Any:
    """Adapters in float32 whatever they were saved in: in bfloat16 most of Adam's small steps round to nothing."""
    from pe_dpo.model.lora import compute_in_base_dtype

    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    compute_in_base_dtype(model)
    return model
