"""Whether the check at the start of a run takes packed rows where they are right and refuses others, in bfloat16.

    python -m benchmarks.packing_check [NAME …]

30 models, their heads once, twice and three times as large; each as it is, and with every fault.

Two layers and random weights of 28 families, and the two small trained models of the `shared` folder. A larger head makes
larger logits, and every rounding error before it counts as much more.
"""

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import transformers as hf
from torch import Tensor, nn

from benchmarks.architectures.models import ARCHITECTURES, VOCABULARY
from pe_dpo.data.batches import PackedRow, pack
from pe_dpo.data.pairs import EncodedPair
from pe_dpo.inference import scorer
from pe_dpo.inference.rounding import OUTLYING, Rounding
from pe_dpo.inference.scorer import NOT_PACKED
from pe_dpo.model import attention
from pe_dpo.model.adapter import attach_adapter
from pe_dpo.model.attention import Packing
from pe_dpo.model.base import inspect_base, load_base

HEADS = (1, 2, 3)
FAMILIES = (
    "llama", "llama3", "mistral", "ministral", "qwen2", "qwen2.5", "qwen3", "gemma", "gemma2", "gemma3", "gemma4", "phi",
    "phi3", "phi4", "smollm3", "granite", "gpt2", "gpt-neox", "starcoder2", "opt", "olmo2", "olmo3", "cohere", "cohere2",
    "glm4", "exaone4", "mixtral", "qwen3-moe",
)  # fmt: skip
TRAINED = ("hh-dialogue-4m", "stories260k")
NEVER = ("mamba", "mamba2", "falcon-h1", "zamba2", "bamba", "jamba", "granite4", "recurrent-gemma", "lfm2", "qwen3.5")
"""State spaces, convolutions and linear attention: they carry along what lies before in the row."""


def _unharmed(*args: Any) -> None:
    """What most faults do to most things."""


class Fault(NamedTuple):
    """What is done to packed rows."""

    harm_layout: Callable[[Packing], None] = _unharmed
    harm_mask: Callable[[Tensor, int, int], None] | None = None
    """Of a mask (queries, keys), 0 or −inf, in place; how many are real."""
    harm_positions: Callable[[Tensor, Any, int], None] = _unharmed
    """Of a span of the tree, by its number, in place."""
    harm_window: Callable[[int], int | None] = int


def _pair_before(packing: Packing) -> None:
    packing.sources = [[sources[0] - 1, *sources] if sources[0] else sources for sources in packing.sources]


def _is_branch(sources: Sequence[int]) -> bool:
    """Of an answer that does not stand right behind what it goes on from."""
    return len(sources) > 1 and sources[-1] > sources[-2] + 1


def _lost_prompt(packing: Packing) -> None:
    packing.sources = [sources[-1:] if _is_branch(sources) else sources for sources in packing.sources]


def _answer_beside(packing: Packing) -> None:
    packing.sources = [
        [*sources[:-1], sources[-1] - 1, sources[-1]] if _is_branch(sources) else sources for sources in packing.sources
    ]


def _lost_ancestor(packing: Packing) -> None:
    packing.sources = [
        [sources[0], *sources[2:]] if _is_branch(sources) and len(sources) > 2 else sources for sources in packing.sources
    ]


def _cousin(packing: Packing) -> None:
    """The one that goes on from the same beginning, but not where this one does."""
    parents = {sources[-1]: sources[-2] for sources in packing.sources if len(sources) > 1}
    packing.sources = [
        [*sources[:-1], min(others), sources[-1]]
        if _is_branch(sources) and len(sources) > 2 and (others := [one for one, of in parents.items() if of == sources[0]])
        else sources
        for sources in packing.sources
    ]


def _next_token(mask: Tensor, queries: int, keys: int) -> None:
    seen = torch.arange(queries - 1)
    mask[seen, seen + keys - queries + 1] = 0


def _newest_hidden(mask: Tensor, queries: int, keys: int) -> None:
    seen = torch.arange(1 if queries == keys else 0, queries)
    mask[seen, seen + keys - queries - 1] = -torch.inf


def _end_of_prompt(mask: Tensor, queries: int, keys: int) -> None:
    if keys > queries:
        mask[:queries, keys - queries - 1] = -torch.inf


def _going_on(positions: Tensor, tree: Any, number: int) -> None:
    start, end, parent = tree[number]
    if parent >= 0:
        positions[start:end] = positions[start - 1] + 1 + torch.arange(end - start)


def _one_further(positions: Tensor, tree: Any, number: int) -> None:
    start, end, parent = tree[number]
    if parent not in (-1, number - 1):
        positions[start:end] += 1


FAULTS = {
    "the pair before it is seen": Fault(harm_layout=_pair_before),
    "the second answer loses its prompt": Fault(harm_layout=_lost_prompt),
    "the answer beside it is seen": Fault(harm_layout=_answer_beside),
    "the answer loses what lies between it and its prompt": Fault(harm_layout=_lost_ancestor),
    "a cousin is seen": Fault(harm_layout=_cousin),
    "the next token is seen": Fault(harm_mask=_next_token),
    "the token before is hidden": Fault(harm_mask=_newest_hidden),
    "the prompt's end is hidden": Fault(harm_mask=_end_of_prompt),
    "positions go on": Fault(harm_positions=_going_on),
    "positions are one further": Fault(harm_positions=_one_further),
}
WINDOW_FAULTS = {
    "the window is one wider": Fault(harm_window=lambda window: window + 1),
    "the window is one narrower": Fault(harm_window=lambda window: window - 1),
    "there is no window": Fault(harm_window=lambda window: None),
}


@contextmanager
def harmed(fault: Fault) -> Iterator[None]:
    """Within the block every packed row has the fault."""
    made, mask, packed = Packing.__init__, Packing.mask, attention._packed

    def make(self: Packing, *args: Any) -> None:
        made(self, *args)
        fault.harm_layout(self)

    def masked(self: Packing, queries: int, keys: int, window: int | None, like: Tensor) -> Tensor:
        whole = mask(self, queries, keys, window, like).clone()
        (fault.harm_mask or _unharmed)(whole, queries, keys)
        return whole

    def attend(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: Any, window: Any, softcap: Any) -> Tensor:
        if window is not None:
            window = fault.harm_window(window)
        elif fault.harm_mask:  # whole prompts too go through a mask, as wide as the row
            window = query.shape[2]
        return packed(query, key, value, packing, scaling, window, softcap)

    def row(pairs: Sequence[EncodedPair]) -> PackedRow:
        whole = pack(pairs)
        for number in range(len(whole.tree)):
            fault.harm_positions(whole.position_ids[0], whole.tree, number)
        return whole

    with (
        patch.object(Packing, "__init__", make),
        patch.object(Packing, "mask", masked),
        patch.object(attention, "_packed", attend),
        patch.object(scorer, "pack", row),
    ):
        yield


def random_pairs(sizes: Sequence[tuple[int, int, int]], *, vocabulary: int = VOCABULARY, seed: int = 0) -> list[EncodedPair]:
    """Return pairs of random tokens with prompts, chosen and rejected answers of these lengths."""
    random = np.random.default_rng(seed)
    return [
        EncodedPair(*(random.integers(6, vocabulary, size).astype(np.int32) for size in lengths), 0.0, f"row {n}", str(n))
        for n, lengths in enumerate(sizes)
    ]


PAIRS = random_pairs([(14, 21, 30), (18, 40, 33), (26, 62, 50), (60, 80, 91)], vocabulary=500)
"""With prompts so short that a window of 32 does not hide all faults in them from the answers."""


def small_policy(name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Return a random base of a family, or a trained one, with a random adapter on its attention, in eval mode."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of GPT-2's transposed layers
        if name in TRAINED:
            folder = Path(os.environ.get("PE_DPO_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "models" / name
            base = load_base(inspect_base(str(folder), dtype=str(dtype).removeprefix("torch.")))
        else:
            base = hf.AutoModelForCausalLM.from_config(ARCHITECTURES[name].config(), dtype=dtype).eval().requires_grad_(False)
            for parameter in base.parameters():
                if not parameter.any():
                    parameter.data.normal_(0, 0.1)
        model = attach_adapter(base, rank=4, alpha=8, targets="attention" if name in FAMILIES else "all-linear")
    generator = torch.Generator().manual_seed(1)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            parameter.data.normal_(0, 0.1, generator=generator)
    return model.eval()


def with_head(model: Any, times: float) -> Any:
    """Return the model with so much larger logits; tied embeddings stay what they are."""
    head = model.get_base_model().get_output_embeddings()
    head.weight = nn.Parameter(head.weight.data * times, requires_grad=False)
    return model


def choice(model: Any, pairs: Sequence[EncodedPair] = PAIRS) -> dict[str, Any]:
    """Return what the check of a run chooses, and how far packed rows were from padded ones in units of the noise."""
    found: dict[str, Any] = {}
    refutation = Rounding.refutation

    def watched(self: Rounding, differences: Sequence[Tensor]) -> str | None:
        if "median" not in found:  # the first that is asked: packed against padded
            every = torch.cat(list(differences)).abs() / self.noise
            answers = [float(difference.abs().median()) / self.noise for difference in differences]
            found.update(
                noise=round(self.noise, 5),
                median=round(float(every.median()), 3),
                worst_answer=round(max(answers), 3),
                outlying=round(float((every > OUTLYING).double().mean()), 4),
            )
        return refutation(self, differences)

    before = model.get_base_model().config._attn_implementation
    with patch.object(Rounding, "refutation", watched):
        chosen = scorer.choose_scorer(model, pairs)
    model.get_base_model().set_attn_implementation(before)
    return {"path": chosen.path, "is_batch_dependent": chosen.is_batch_dependent, **found}


def run_packing(out: Path, *, names: Sequence[str] = ()) -> Path:
    """Write what the check says of every model as it is and with every fault; return the file."""
    torch.set_num_threads(1)
    began = time.process_time()
    rows: dict[str, Any] = {}
    for name in names or (*FAMILIES, *TRAINED, *NEVER):
        rows[name] = {}
        for times in HEADS:
            model = with_head(small_policy(name), times)
            found = {"as it is": choice(model)}
            windows = getattr(model.get_base_model().config.get_text_config(), "sliding_window", None)
            for fault, harm in () if name in NEVER else {**FAULTS, **(WINDOW_FAULTS if windows else {})}.items():
                with harmed(harm):
                    found[fault] = choice(model)
            rows[name][f"head × {times}"] = found
            wrong = [
                fault
                for fault, one in found.items()
                if (one["path"] in NOT_PACKED) == (fault == "as it is" and name not in NEVER)
            ]
            print(f"{name:16s} head × {times}: noise {found['as it is'].get('noise', 0):.4f}", *wrong, sep="; ", flush=True)
    path = out / "packing-check.json"
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(found)}" for name, found in rows.items())
    path.write_text(f'{{"seconds": {time.process_time() - began:.0f}, "models": {{\n{lines}\n}}}}\n', encoding="utf-8")
    return path


if __name__ == "__main__":
    print(run_packing(Path(__file__).parent / "results", names=sys.argv[1:]))
