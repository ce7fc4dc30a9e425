"""Which tensors a merge writes, made of what; everything that cannot be merged is refused here, before a weight is read.

Tied embeddings: one tensor of the files serves as embedding and head. An update of only one of them, which is what PEFT trains,
unties them: the other keeps the base's values, and the merged model has two tensors.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from pe_dpo.errors import ModelError
from pe_dpo.merging.updates import AdapterFiles, Change
from pe_dpo.model.base import BaseFacts, empty_model
from pe_dpo.model.tensor_files import TensorFacts, TensorFiles


class Output(NamedTuple):
    """One tensor to write."""

    facts: TensorFacts
    source: str
    """Name of the base's tensor in its files."""
    module_name: str
    """Name of the same tensor in the loaded model."""
    change: Change | None
    recorded_as: str
    """Its name among fingerprints, which have tied tensors once."""


class Plan(NamedTuple):
    """All tensors of the merged model, in the order they are written, and what its configuration must say of them."""

    outputs: list[Output]
    config_changes: dict[str, Any]
    parameters: set[str]
    """Names under which the loaded model has its parameters; tied ones once."""


class _Names(NamedTuple):
    """How the modules of a model are called, and how its files call them."""

    parameters: set[str]
    """And buffers."""
    trained: set[str]
    """Without buffers."""
    embedding: str
    head: str | None
    prefix: str
    is_tied: bool
    transposed: set[str]
    """Weights that lie (in, out) in their files."""


def plan_merge(files: TensorFiles, adapter: AdapterFiles, facts: BaseFacts, *, dtype: torch.dtype) -> Plan:
    """Return what is to be written.

    Args:
        files: weights of the base.
        adapter: whose every tensor is used exactly once.
        facts: of the base.
        dtype: of the merged weights; integers stay what they are.

    Raises:
        ModelError: a tensor of the adapter has no place in the base, or the base's files call their tensors otherwise than its
            modules.
    """
    names = _names(facts, files)
    changes = {name: _oriented(name, change, names) for name, change in adapter.changes.items()}
    head = _untie(changes, adapter, names) if names.is_tied else None
    where = {_locate(name, files, names): name for name in changes}
    _check_all_have_a_place(adapter, where, changes, files)
    own, outputs = own_dtype(facts.config), []
    for tensor in files:
        if names.is_tied and tensor.name == names.head:
            continue  # transformers ignores it
        module_name = where.get(tensor.name) or _module_name(tensor.name, names)
        outputs.append(_output(tensor, tensor.name, module_name, changes.get(module_name), adapter, dtype, own))
    config_changes: dict[str, Any] = {} if names.is_tied else {"tie_word_embeddings": False}
    if head is not None and names.head is not None:
        source = _locate(names.embedding, files, names)
        outputs.append(_output(files.facts(source), names.head, names.embedding, head, adapter, dtype, own, source))
        config_changes["tie_word_embeddings"] = False
    _check_all_used(adapter, outputs)
    once = min(names.embedding, names.head or names.embedding) if names.is_tied else ""
    tied = {names.embedding, names.head} if names.is_tied else set()
    outputs = [output._replace(recorded_as=once if output.module_name in tied else output.module_name) for output in outputs]
    rows = {output.facts.shape[0] for output in outputs if output.module_name in (names.embedding, names.head)}
    if len(rows) > 1:
        raise ModelError(f"{adapter.folder}: embedding and head would have {' and '.join(map(str, sorted(rows)))} rows")
    if rows and rows != {facts.config.get_text_config().vocab_size}:
        config_changes["vocab_size"] = rows.pop()
    return Plan(outputs, config_changes, {once if name in tied else name for name in names.trained})


def own_dtype(config: Any) -> torch.dtype | None:
    """Return the dtype that a base comes in, as its configuration says."""
    found: torch.dtype | None = config.get_text_config().dtype or config.dtype
    return found


def _names(facts: BaseFacts, files: TensorFiles) -> _Names:
    from transformers.pytorch_utils import Conv1D

    model = empty_model(facts.base, facts.config)
    transposed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    if transposed and facts.quantize != "none":
        raise ModelError(
            f"{facts.base}: has transposed layers (Conv1D), which are quantized in another order than they lie in the files; "
            "that cannot be merged, use --onto adapter"
        )
    by_module = {id(module): name for name, module in model.named_modules()}
    head = model.get_output_embeddings()
    embedding = f"{by_module[id(model.get_input_embeddings())]}.weight"
    head_name = None if head is None else f"{by_module[id(head)]}.weight"
    return _Names(
        parameters={name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())},
        trained={name for name, _ in model.named_parameters()},
        embedding=embedding,
        head=head_name,
        prefix=model.base_model_prefix,
        is_tied=bool(facts.config.get_text_config().tie_word_embeddings) and _are_equal(files, embedding, head_name),
        transposed=transposed,
    )


def _are_equal(files: TensorFiles, embedding: str, head: str | None) -> bool:
    """Whether files have one tensor for embedding and head; transformers does not tie two that differ, whatever it was told."""
    if head is None or head not in files or embedding not in files:
        return True
    return torch.equal(files.read(embedding), files.read(head))


def _oriented(name: str, change: Change, names: _Names) -> Change:
    return change._replace(is_transposed=change.is_transposed or name in names.transposed)


def _untie(changes: dict[str, Change], adapter: AdapterFiles, names: _Names) -> Change | None:
    """Take the head's change out of those of a tied base, and return it if it is not the embedding's.

    A whole tensor that was saved because the vocabulary was resized is both; one in modules_to_save is its own module's only.
    """
    if names.head is None or not {names.embedding, names.head} & changes.keys():
        return None
    embedding, head = changes.pop(names.embedding, Change()), changes.pop(names.head, Change())
    if adapter.config.ensure_weight_tying:
        if embedding.a or head.a:
            raise ModelError(
                f"{adapter.folder}: LoRA on embedding or head with ensure_weight_tying cannot be merged; use --onto adapter"
            )
        changes[names.embedding] = embedding if embedding.replacement else head
        return None
    both = next((c.replacement for c, name in ((embedding, names.embedding), (head, names.head))
                 if c.replacement and not _is_trained_whole(name, adapter)), None)  # fmt: skip
    embedding = embedding._replace(replacement=embedding.replacement or both)
    head = head._replace(replacement=head.replacement or both)
    if embedding.keys:
        changes[names.embedding] = embedding
    return None if _same(adapter, embedding, head) else head


def _is_trained_whole(name: str, adapter: AdapterFiles) -> bool:
    module = name.removesuffix(".weight")
    return any(module == saved or module.endswith(f".{saved}") for saved in adapter.config.modules_to_save or ())


def _same(adapter: AdapterFiles, first: Change, second: Change) -> bool:
    """Whether two changes give one tensor, the saved values compared."""
    if first == second:
        return True
    if first.a or second.a or not (first.replacement and second.replacement):
        return False
    return torch.equal(adapter.tensors.read(first.replacement), adapter.tensors.read(second.replacement))


def _locate(name: str, files: TensorFiles, names: _Names) -> str:
    """The files' name of a tensor: its module's, or that with or without the prefix of the bare model."""
    short = name.removeprefix(f"{names.prefix}.")
    return next((known for known in (name, short, f"{names.prefix}.{name}") if known in files), name)


def _module_name(name: str, names: _Names) -> str:
    long = f"{names.prefix}.{name}"
    return long if name not in names.parameters and long in names.parameters else name


def _check_all_have_a_place(
    adapter: AdapterFiles, where: dict[str, str], changes: dict[str, Change], files: TensorFiles
) -> None:
    for source, name in where.items():
        if source not in files:
            raise ModelError(
                f"{adapter.folder}: {changes[name].keys[0]} is for {name}, which {files.folder} does not have: it is not the "
                "adapter's base, or its files name their tensors otherwise than its modules; use --onto adapter"
            )


def _output(
    tensor: TensorFacts,
    name: str,
    module_name: str,
    change: Change | None,
    adapter: AdapterFiles,
    dtype: torch.dtype,
    own_dtype: torch.dtype | None,
    source: str | None = None,
) -> Output:
    shape = tensor.shape if change is None else adapter.shape(change) or tensor.shape
    is_changed = change is not None and bool(change.keys)
    # A base of 16 bits that keeps a tensor in float32 has its reasons: the correction of a router, say.
    is_wide = tensor.dtype == torch.float32 and own_dtype in (torch.bfloat16, torch.float16) and not is_changed
    kept = dtype if tensor.dtype.is_floating_point and not is_wide else tensor.dtype
    return Output(TensorFacts(name, shape, kept), source or tensor.name, module_name, change if is_changed else None, "")


def _check_all_used(adapter: AdapterFiles, outputs: Iterable[Output]) -> None:
    """Every update once; a whole tensor may serve embedding and head, or be there twice with equal values."""
    used = [key for output in outputs if output.change for key in output.change.keys]
    for name, change in adapter.changes.items():
        for key in change.keys:
            if used.count(key) != 1 and key != change.replacement:
                raise ModelError(f"{adapter.folder}: {key} would be used {used.count(key)} times ({name}); use --onto adapter")
