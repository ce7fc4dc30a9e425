"""Attention over a packed row, which is a tree: every span sees itself and those that it goes on from, and nothing else.

    row      system  prompt a  chosen  rejected  prompt b  …   a query in rejected attends to [system | prompt a | rejected]
    parents  —       system    prompt  prompt    system

A span with its first child, and that one's first child, is one stretch of queries: there is one for every answer.

Registered under one name with `transformers.AttentionInterface`; the layout of the row comes as the keyword `packing` of the
model's forward. Without that keyword the function is ordinary attention, so that generation and padded batches go on working.
It stays switched on between forward and backward, since gradient checkpointing calls it again there.

Giving a model the row and its `position_ids` alone is silently wrong: transformers takes every jump in the positions for a new
document, and the second suffix loses its prompt.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pe_dpo.errors import ModelError

NAME = "pe_dpo_packed"

Kind = Literal["segments", "varlen", "dense"]
"""segments: one call of scaled_dot_product_attention per suffix (CPU: of one row of 16 pairs at 8B they make 39,557 kernels);
varlen: one kernel for all of them (CUDA, half precision; 7,109); dense: one call with a T×T mask, anywhere (7,784)."""

Tree = Sequence[tuple[int, int, int]]
"""Spans as [start, end) in the row and the number of the span that each goes on from, −1 where a text begins; parents come
before their children, a first child right behind its parent, and spans follow each other without gaps."""


BLOCK = 256
"""Queries of an answer that attend together: later ones see more keys, which a mask hides from the others at the full cost of
computing them. Measured at 1,000 tokens (float32, 4 × 512): 0.96 of a step's time; at 64 and 128 queries 0.98."""


class Stretch(NamedTuple):
    """Queries that lie together, and what they see."""

    spans: list[tuple[int, int]]
    """Of keys in the row, [start, end), those without a gap as one; the queries' own are the last."""
    whole: tuple[int, int, int]
    """The first query's place in the row, the number of queries, and of the keys that the last one sees."""
    blocks: list[tuple[int, int, int]]
    """The same of each block of queries."""


class Packing:
    """The layout of one row, and what attention derives from it once for all layers.

    Args:
        tree: where prompts and answers lie.
        kind: how attention is computed.
    """

    def __init__(self, tree: Tree, kind: Kind) -> None:
        self.kind = kind
        self.calls = 0
        """Layers that asked: a model in which some layer did not must not be packed."""
        self.queries: list[int] = []
        """Lengths of the stretches whose queries attend together."""
        self.keys: list[int] = []
        """Lengths of the spans, which keys are gathered from."""
        self.sources: list[list[int]] = []
        """For each stretch of queries the spans whose keys it sees, its own last."""
        self._masks: dict[tuple[Any, ...], Tensor] = {}
        self._apart: dict[tuple[Any, ...], int] = {}
        self._blocks: list[Stretch] | None = None
        self._tree = tree
        self._on_device: list[Tensor] | None = None
        paths: list[list[int]] = []
        for number, (start, end, parent) in enumerate(tree):
            paths.append([*(paths[parent] if parent >= 0 else ()), number])
            self.keys.append(end - start)
            if number and parent == number - 1:
                self.queries[-1] += end - start
                self.sources[-1] = paths[-1]
            else:
                self.queries.append(end - start)
                self.sources.append(paths[-1])

    def stretches(self) -> Iterator[tuple[int, int]]:
        """Yield the number of queries and of keys of each stretch; the queries are the last of the keys."""
        for queries, sources in zip(self.queries, self.sources, strict=True):
            yield queries, sum(self.keys[source] for source in sources)

    def mask(self, queries: int, keys: int, window: int | None, like: Tensor) -> Tensor:
        """Return the mask of queries that are the last of the keys, 0 where attention goes and −inf elsewhere.

        It is larger than (queries, keys) by what these are filled up with: hidden keys, and queries that nobody reads. All
        masks of a row are parts of one, in which the queries stand apart from the first key by the most that any do.
        """
        name = ("band", window, like.dtype, queries > BLOCK)
        if name not in self._masks:
            shapes = list(self.stretches())
            if queries <= BLOCK:
                shapes = [(count, seen) for stretch in self.layout_in_blocks() for _, count, seen in stretch.blocks]
            apart = max(seen - count for count, seen in shapes)
            height = max(even_queries(count) for count, _ in shapes)
            width = max(apart - seen + count + even_keys(seen) for count, seen in shapes)
            hidden = torch.ones(height, width, dtype=torch.bool, device=like.device).triu(apart + 1)
            if window is not None:
                hidden |= torch.ones_like(hidden).tril(apart - window)
            self._masks[name] = _additive(hidden, like.dtype)
            self._apart[name] = apart
        first = self._apart[name] - (keys - queries)
        return self._masks[name][: even_queries(queries), first : first + even_keys(keys)]

    def gathers_much(self) -> bool:
        """Return whether answers are long, or gather more than twice the row's keys: else autograd's own way is 2 % faster."""
        return max(self.queries) > BLOCK or sum(seen for _, seen in self.stretches()) > 2 * sum(self.keys)

    def layout_in_blocks(self) -> list["Stretch"]:
        """Return the stretches of queries, the keys that they see, and the blocks that they are divided into."""
        if self._blocks is None:
            self._blocks = []
            first = 0
            for (queries, seen), sources in zip(self.stretches(), self.sources, strict=True):
                spans: list[tuple[int, int]] = []
                for start, end, _ in (self._tree[source] for source in sources):
                    spans = [*spans[:-1], (spans[-1][0], end)] if spans and spans[-1][1] == start else [*spans, (start, end)]
                ends = [*range(BLOCK, queries, BLOCK), queries]
                blocks = [(first + start, end - start, seen - queries + end) for start, end in pairwise([0, *ends])]
                self._blocks.append(Stretch(spans, (first, queries, seen), blocks))
                first += queries
        return self._blocks

    def dense_mask(self, window: int | None, like: Tensor) -> Tensor:
        """Return the (T, T) mask of the whole row, 0 where attention goes and −inf elsewhere."""
        name = ("dense", window, like.dtype)
        if name not in self._masks:
            last, position = self.layout_on(like.device)
            place = torch.arange(len(last), device=last.device)
            back = position[:, None] - position
            seen = (place <= place[:, None]) & (place[:, None] < last)
            if window is not None:
                seen &= back < window
            self._masks[name] = _additive(~seen, like.dtype)
        return self._masks[name]

    def layout(self) -> list[Tensor]:
        """Return what attention reads of the layout, int64 on the CPU, so that it goes to a GPU with the row.

        varlen: cumulative numbers of queries and of keys, (S + 1,), and the row index of every gathered key. dense: for each
        token where in the row those end that go on from it, and how many come before it in its answer.
        """
        if self.kind == "varlen":
            starts = [0, *torch.tensor(self.keys).cumsum(0).tolist()]
            gathered = [torch.arange(starts[s], starts[s + 1]) for sources in self.sources for s in sources]
            counts = torch.tensor([(0, 0), *self.stretches()]).cumsum(0)
            return [counts[:, 0], counts[:, 1], torch.cat(gathered)]
        if self.kind == "segments":
            return []
        starts, ends, parents = (list(column) for column in zip(*self._tree, strict=True))
        before = [0] * len(parents)
        for number, parent in enumerate(parents):
            if parent >= 0:
                before[number] = before[parent] + self.keys[parent]
        for number, parent in reversed(list(enumerate(parents))):
            if parent >= 0:
                ends[parent] = max(ends[parent], ends[number])
        sizes, offsets = torch.tensor(self.keys), torch.tensor(before) - torch.tensor(starts)
        last, offset = (one.repeat_interleave(sizes) for one in (torch.tensor(ends), offsets))
        return [last, torch.arange(sum(self.keys)) + offset]

    def put(self, layout: Sequence[Tensor]) -> None:
        """Take what `layout` returned from where attention is computed."""
        on_device = list(layout)
        if self.kind == "varlen":  # as the kernel wants them
            on_device[:2] = (counts.to(torch.int32) for counts in on_device[:2])
        self._on_device = on_device

    def layout_on(self, device: torch.device) -> list[Tensor]:
        """Return what `layout` returned, on the device; the numbers of queries and keys are int32."""
        if self._on_device is None:
            self.put([one.to(device) for one in self.layout()])
        assert self._on_device is not None
        return self._on_device


_IS_WIDE: ContextVar[bool] = ContextVar("_IS_WIDE", default=False)


@contextmanager
def ordinary_in_float32() -> Iterator[None]:
    """Within the block attention without a packed row is computed in float32, whatever the model's dtype."""
    before = _IS_WIDE.set(True)
    try:
        yield
    finally:
        _IS_WIDE.reset(before)


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return attention's output as transformers' models expect it of an attention function.

    Args:
        module: the attention layer.
        query: (1, heads, T, size).
        key: (1, key heads, T, size).
        value: as `key`.
        attention_mask: ignored with `packing`.
        packing: the row's layout; None for ordinary attention.
        scaling: of the scores.
        softcap: of the scores, as in Gemma 2.
        **others: `sliding_window`, the tokens that a query sees, itself included, counted along its own answer; `dropout` and
            the attention sinks `s_aux`, which a packed row cannot have; the rest is not needed.

    Returns:
        (1, T, heads, size), and None for the attention weights.

    Raises:
        ModelError: attention sinks or dropout in a packed row.
    """
    if others.pop("s_aux", None) is not None:
        raise ModelError("attention sinks")
    dtype = value.dtype
    if packing is None:
        if _IS_WIDE.get() and dtype in (torch.bfloat16, torch.float16):
            query, key, value = query.float(), key.float(), value.float()
            if attention_mask is not None and attention_mask.is_floating_point():
                attention_mask = attention_mask.float()
        output, _ = _ordinary(module, query, key, value, attention_mask, scaling=scaling, softcap=softcap, **others)
        return output.to(dtype), None
    if others.get("dropout"):
        raise ModelError("attention dropout")
    packing.calls += 1
    # In float32 torch 2.13's attention on a CPU is twice as fast as in bfloat16, backward included, and closer to the truth.
    inner = torch.float32 if value.device.type == "cpu" and dtype == torch.bfloat16 else dtype
    query, key, value = query.to(inner), key.to(inner), value.to(inner)
    return _packed(query, key, value, packing, scaling, others.get("sliding_window"), softcap).to(dtype), None


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Return (1, T, heads, size)."""
    groups = query.shape[1] // key.shape[1]
    if packing.kind == "varlen":
        if softcap is not None:
            raise ModelError("the variable-length kernel caps no scores")
        return _varlen(query, key, value, packing, scaling, window)
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if packing.kind != "segments":
        return _attend(query, key, value, packing.dense_mask(window, query), scaling, softcap).transpose(1, 2).contiguous()
    if packing.gathers_much() and softcap is None and query.device.type == "cpu" and query.shape[3] == value.shape[3]:
        found: Tensor = _Segments.apply(query, key, value, packing, scaling, window)
        return found
    # split, not slices: one node in the backward instead of a row of zeros per slice.
    keys, values = key.split(packing.keys, dim=2), value.split(packing.keys, dim=2)
    outputs = []
    for stretch, sources in zip(query.split(packing.queries, dim=2), packing.sources, strict=True):
        queries, seen = stretch.shape[2], sum(packing.keys[source] for source in sources)
        q = _gather([stretch], even_queries(queries))
        k, v = (_gather([parts[source] for source in sources], even_keys(seen)) for parts in (keys, values))
        is_causal = queries == seen and softcap is None and (window is None or window >= seen)
        mask = None if is_causal else packing.mask(queries, seen, window, query)
        outputs.append(_attend(q, k, v, mask, scaling, softcap).transpose(1, 2)[:, :queries])
    return torch.cat(outputs, dim=1)


class _Segments(torch.autograd.Function):
    """Attention of all stretches by torch's kernel for CPUs, which `scaled_dot_product_attention` calls.

    Autograd would keep the keys that each stretch gathers, a long common beginning once for every answer. Here the row's own
    are kept, and gathered again in the backward.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None, window: int | None
    ) -> Tensor:
        output = value.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
        kept: list[Tensor] = []
        for stretch in packing.layout_in_blocks():
            is_causal, blocks = _calls(stretch, window)
            k, v = (_taken(tensor, stretch.spans, even_keys(stretch.whole[2])) for tensor in (key, value))
            for first, count, seen in blocks:
                keys, q = even_keys(seen), _taken(query, [(first, first + count)], even_queries(count))
                mask = None if is_causal else packing.mask(count, seen, window, query)
                found, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    q, k[:, :, :keys], v[:, :, :keys], 0.0, is_causal, attn_mask=mask, scale=scaling
                )
                output[:, first : first + count] = found.transpose(1, 2)[:, :count]
                kept += [found, sums]
        ctx.save_for_backward(query, key, value, *kept)
        ctx.layout = packing, scaling, window
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        query, key, value, *saved = ctx.saved_tensors
        packing, scaling, window = ctx.layout
        kept, pull = iter(saved), gradient.transpose(1, 2)
        for_query, for_key, for_value = (torch.empty_like(tensor) for tensor in (query, key, value))
        for stretch in packing.layout_in_blocks():
            is_causal, blocks = _calls(stretch, window)
            own, queries, most = stretch.whole
            k, v = (_taken(tensor, stretch.spans, even_keys(most)) for tensor in (key, value))
            if len(blocks) > 1:
                for target in (for_key, for_value):
                    target[:, :, own : own + queries] = 0
            for first, count, seen in blocks:
                keys, q = even_keys(seen), _taken(query, [(first, first + count)], even_queries(count))
                mask = None if is_causal else packing.mask(count, seen, window, query)
                parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    _taken(pull, [(first, first + count)], even_queries(count)),
                    *(q, k[:, :, :keys], v[:, :, :keys], next(kept), next(kept), 0.0, is_causal),
                    attn_mask=mask,
                    scale=scaling,
                )
                for_query[:, :, first : first + count] = parts[0][:, :, :count]
                before = most - queries
                for target, part in ((for_key, parts[1]), (for_value, parts[2])):
                    mine = target[:, :, own : own + seen - before]
                    if len(blocks) > 1:
                        mine += part[:, :, before:seen]
                    else:
                        mine.copy_(part[:, :, before:seen])
                    done = 0
                    for start, end in stretch.spans if before else ():
                        end = min(end, start + before - done)
                        target[:, :, start:end] += part[:, :, done : done + end - start]
                        done += end - start
        return for_query, for_key, for_value, None, None, None


def _calls(stretch: Stretch, window: int | None) -> tuple[bool, list[tuple[int, int, int]]]:
    """Return whether a stretch is causal from its first key on, and the blocks of queries to compute."""
    _, queries, seen = stretch.whole
    is_causal = queries == seen and (window is None or window >= seen)
    return is_causal, [stretch.whole] if is_causal else stretch.blocks


def _taken(tensor: Tensor, spans: Sequence[tuple[int, int]], length: int) -> Tensor:
    """Return (1, heads, length, size): spans of a row one after another, filled up with zeros; a single span is a view."""
    parts = [tensor[:, :, start:end] for start, end in spans]
    if len(parts) == 1 and parts[0].shape[2] > length:
        parts = [parts[0][:, :, :length]]
    return _gather(parts, length)


def even_queries(queries: int) -> int:
    """Return the queries to compute with: blocks of one to three rows are summed in another order than larger ones."""
    return queries + -queries % 4


def even_keys(keys: int) -> int:
    """Return the keys to compute with, so that a token's result does not depend on how many keys are hidden behind it.

    torch 2.13 on the CPU takes keys in blocks of 512, and MKL splits a product over some of them in parts that depend on their
    number: 257 to 511 on an Intel Xeon, 193 to 383 on an AMD EPYC. The tests of exactness show it when a later version, or
    another processor, sums in another order.
    """
    blocks, rest = divmod(keys + -keys % 16, 512)
    if _is_intel():
        return 512 * blocks + (512 if rest > 256 else rest)
    return 512 * blocks + (384 if 192 < rest < 384 else rest)


@cache
def _is_intel() -> bool:
    known = Path("/proc/cpuinfo")
    return known.is_file() and "GenuineIntel" in known.read_text(encoding="utf-8")


def switch_on(model: Any) -> str:
    """Let the model's attention layers understand `packing`; return the name of the attention they had.

    Raises:
        ModelError: transformers does not let this model have another attention.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before: str = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        model.set_attn_implementation(before)
        raise ModelError("its attention cannot be exchanged")
    return before


def keep_soft_cap(model: Any) -> None:
    """Let a model whose scores are capped (Gemma-2) cap them: its default until transformers 5.20, sdpa, leaves the cap out."""
    is_capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    if is_capped and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")


def _gather(parts: Sequence[Tensor], length: int) -> Tensor:
    """Return (1, heads, length, size): the parts one after another, filled up with zeros."""
    missing = length - sum(part.shape[2] for part in parts)
    if missing:
        shape = (1, parts[0].shape[1], missing, parts[0].shape[3])
        parts = [*parts, parts[0].new_zeros(shape)]
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=2)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, softcap: float | None
) -> Tensor:
    """Return (1, heads, queries, size); causal without a mask."""
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling)
    assert mask is not None, "capped scores come with their mask"
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / softcap) * softcap + mask
    return scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype) @ value


def _varlen(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None, window: int | None) -> Tensor:
    """Return (1, T, heads, size) from one call of torch's variable-length kernel.

    Its causal mask is aligned bottom-right: the queries of a stretch are the last of its keys.
    """
    from torch.nn.attention.varlen import varlen_attn

    queries, keys, gathered = packing.layout_on(query.device)
    longest_query, longest_key = (max(sizes) for sizes in zip(*packing.stretches(), strict=True))
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    options: dict[str, Any] = {"scale": scaling, "window_size": (-1, 0) if window is None else (window - 1, 0)}
    known = inspect.signature(varlen_attn).parameters
    if "num_splits" in known:
        options["num_splits"] = 1  # a sequence's result must not depend on the others in the row
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
    k, v = k.index_select(0, gathered), v.index_select(0, gathered)
    output: Any = varlen_attn(q.contiguous(), k, v, queries, keys, longest_query, longest_key, **options)
    return output.unsqueeze(0)


def _ordinary(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scaling: float | None,
    softcap: float | None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers would do it without us: a padded batch, or generation."""
    from transformers import AttentionInterface

    if softcap is None:
        return AttentionInterface()["sdpa"](module, query, key, value, mask, scaling=scaling, **others)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if mask is None:
        offset = key.shape[2] - query.shape[2]
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril(offset)
    if mask.dtype == torch.bool:  # the lowest number, not −inf: a query that is padding may see no key at all
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(~mask, torch.finfo(query.dtype).min)
    return _attend(query, key, value, mask, scaling, softcap).transpose(1, 2).contiguous(), None


def _additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
