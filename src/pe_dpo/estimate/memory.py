"""What a run keeps in memory at its worst moment, counted tensor by tensor.

    fixed      weights (codes, their scales, what stays in 16 bits), adapters and their gradients in float32, the optimizer's
               averages
    kept       what the backward of a row needs of its forward, by layer; with recomputation each layer's input, and one layer's
               whole
    passing    the largest of what comes and goes: a tile of logits; gradients inside one layer; a matrix that codes were turned
               into

Several moments compete: the head's tile, when everything is kept; the first layer of the backward, the last of the model; and,
before training, the check that scores a few pairs the plain way, with all their logits. What PyTorch keeps was read off its
formulas for derivatives and off transformers' layers; `python -m benchmarks estimate` holds the sums against real runs.
"""

from collections.abc import Mapping
from typing import NamedTuple

from pe_dpo.estimate.shape import BaseShape, Weight
from pe_dpo.inference.scorer import ScoringPath
from pe_dpo.objective.head import CHUNKS
from pe_dpo.quantizations import Quantization, bytes_per_weight, is_four_bit

OPTIMIZER_BYTES: Mapping[str, float] = {
    "adamw_torch": 8, "adamw_torch_fused": 8, "adafactor": 0.05, "adamw_anyprecision": 6, "adamw_torch_4bit": 1.1,
    "adamw_torch_8bit": 2.1, "ademamix": 12, "sgd": 0, "adagrad": 4, "adamw_bnb_8bit": 2.1, "adamw_8bit": 2.1,
    "ademamix_8bit": 3.1, "lion_8bit": 1.1, "lion_32bit": 4, "paged_adamw_32bit": 8, "paged_adamw_8bit": 2.1,
    "paged_ademamix_32bit": 12, "paged_ademamix_8bit": 3.1, "paged_lion_32bit": 4, "paged_lion_8bit": 1.1,
    "rmsprop": 4, "rmsprop_bnb": 4, "rmsprop_bnb_8bit": 1.1, "rmsprop_bnb_32bit": 4, "grokadamw": 12, "stable_adamw": 8,
}  # fmt: skip
"""Bytes of state per trained parameter: averages in float32 (4 each) or 8 bits (1, and a scale to 256 of them; the smallest
tensors stay in float32). adafactor keeps rows and columns of a matrix; paged ones may leave the GPU when it is full, and are
counted."""


class Row(NamedTuple):
    """What goes through the model at once."""

    tokens: int
    """Padding included."""
    scored: int
    """Predictions that the head makes and the loss takes."""
    keys: int
    """Keys that the stretches of the row see, together: more than tokens where a prompt stands once for two answers."""
    scores: int
    """Queries times keys, summed over the stretches."""
    columns: int = 0
    """Of padded rows: positions with an answer's token in some row, times rows, for which logits are made."""


class Setup(NamedTuple):
    """How a base is trained, as far as memory goes."""

    shape: BaseShape
    quantize: Quantization
    width: int
    """Bytes of a number that is computed with: 2 or 4."""
    adapted: tuple[tuple[Weight, int], ...]
    """The weights with an adapter, and in how many layers."""
    rank: float
    trained: int
    """Parameters of the trained adapter."""
    frozen: int = 0
    """Parameters of adapters that are not trained: under the trained one, or the copy that is the reference."""
    has_dropout: bool = False
    optimizer: str = "adamw_torch"
    path: ScoringPath = "varlen"
    device: str = "cuda"
    recomputes_above: int | None = None
    """Rows of more tokens than this recompute their activations; 0 for all, None for none."""
    offloads: bool = False
    """Whether what layers begin with waits in the host's memory meanwhile."""
    with_experts: bool = True
    stored: int | None = None
    """Weights that are codes in a base which comes so; None where loading makes them."""

    @property
    def coded(self) -> int:
        """How many weights are codes."""
        made = self.shape.coded(self.quantize, with_experts=self.with_experts)
        return made if self.stored is None else self.stored

    def recomputes(self, row: Row) -> bool:
        """Return whether a row recomputes its activations in the backward."""
        return self.recomputes_above is not None and row.tokens > self.recomputes_above

    def fixed(self) -> dict[str, int]:
        """Return the bytes of what lies in memory all the time, by name."""
        return {
            "codes": round(self.coded * bytes_per_weight(self.quantize)),
            "weights": (self.shape.parameters - self.coded) * self.width,
            "adapters": 4 * (self.trained + self.frozen),
            "gradients": 4 * self.trained,
            "optimizer": round(OPTIMIZER_BYTES[self.optimizer] * self.trained),
        }

    def kept_by_layer(self, row: Row) -> dict[str, float]:
        """Return the bytes that one attending layer keeps of its forward for its backward, by what keeps them.

        The input of a norm is kept in float32 by transformers' norms, whatever is computed in. A linear layer that is frozen
        keeps nothing; its adapter keeps the layer's input, once for all layers that read the same, and x Aᵀ.
        """
        shape, width, tokens = self.shape, self.width, row.tokens
        queries, keys = shape.heads * shape.head_size, shape.key_heads * shape.head_size
        kept = {"norms": 4.0 * tokens * shape.hidden * shape.norms}
        if shape.has_query_norm:
            kept["norms"] += 4.0 * tokens * (queries + keys)
        kept["attention"] = self._attention(row, queries, keys)
        kept["mlp"] = self._mlp(row)
        inputs: dict[tuple[str, int], float] = {}
        narrow = 0.0
        for weight, layers in self.adapted:
            share, block = layers / shape.layers, weight.path.rpartition(".")[0]
            reads_block_input = weight.inputs == shape.hidden and not weight.path.endswith(("o_proj", "down_proj", "out_proj"))
            name = (block if reads_block_input and not self.has_dropout else weight.path, weight.inputs)
            mask = 0 if not self.has_dropout else 1 if self.device == "cuda" else width
            inputs[name] = max(inputs.get(name, 0.0), share * weight.inputs * (width + mask))
            narrow += share * self.rank * width
        kept["inputs of adapters"] = tokens * (sum(inputs.values()) + narrow)
        return kept

    def _attention(self, row: Row, queries: int, keys: int) -> float:
        """The bytes that attention keeps; where an adapter reads the same output, it counts there."""
        shape, width, tokens = self.shape, self.width, row.tokens
        is_read = any(weight.path.endswith("o_proj") for weight, _ in self.adapted)
        output = 0 if is_read else tokens * queries * width
        sums = 4.0 * tokens * shape.heads
        inner = 4 if self.device == "cpu" else width
        if shape.has_softcap:  # tanh, softmax in float32, and that in the dtype of the values
            scores = row.tokens**2 if self.path == "dense" else row.scores
            return scores * shape.heads * (inner + 4 + (0 if inner == 4 else inner)) + inner * queries * (tokens + 2 * row.keys)
        if self.path == "varlen":
            return sums + width * (tokens * queries + 2 * row.keys * keys) + output
        if self.path == "segments" and row.keys > 2 * tokens:  # its own output besides the one that is read
            return sums + inner * queries * 4 * tokens
        if self.path == "segments":  # filled up to a multiple of 4 queries, and copied for it in three of four cases
            return sums + inner * queries * (2.75 * tokens + 2 * row.keys)
        return sums + inner * queries * 3 * tokens + output

    def _mlp(self, row: Row) -> float:
        """The bytes that gate, its activation and up are, or what experts keep; the product is an input of an adapter."""
        shape, width, tokens = self.shape, self.width, row.tokens
        wide = [weight for weight in shape.of_text if ".experts." not in weight.path and weight.path.endswith("down_proj")]
        inner = sum(weight.inputs * len(weight.layers) for weight in wide) / shape.layers
        kept = 3.0 * inner
        experts = [weight for weight in shape.of_text if weight.role == "experts" and weight.path.endswith("down_proj")]
        if experts and is_four_bit(self.quantize) and self.with_experts:
            kept += shape.hidden  # recomputed in the backward
        elif experts:
            size, share = experts[0].inputs, len(experts[0].layers) / shape.layers
            kept += share * shape.experts_a_token * (shape.hidden + 3 * size)
        return kept * width * tokens

    def row_peak(self, row: Row) -> dict[str, float]:
        """Return the bytes above what is fixed at the worst moment of a row's forward and backward, by name."""
        shape, width = self.shape, self.width
        layer = sum(self.kept_by_layer(row).values())
        states = row.tokens * shape.hidden * width
        kept: dict[str, float] = {}
        if self.recomputes(row):
            kept["layer inputs"] = 0.0 if self.offloads else float(shape.layers * states)
        else:
            layers = {name: shape.layers * size for name, size in self.kept_by_layer(row).items()}
            # The input of the first layer needs no gradient, nor does what comes before the first adapter.
            layers["norms"] -= 4.0 * row.tokens * shape.hidden
            if not any("attn" in weight.path for weight, _ in self.adapted):
                layers["norms"] -= 4.0 * row.tokens * shape.hidden
                layers["attention"] *= 1 - 1 / shape.layers
            kept |= layers
        kept["ends"] = 4.0 * row.tokens * shape.hidden + 2 * row.tokens * shape.head_size * width  # last norm, rotations
        if self.path == "dense":
            kept["ends"] += (4 if self.device == "cpu" else width) * shape.masks * row.tokens**2
        slopes = row.scored * shape.hidden * width
        if self.path == "padded":
            kept["head"] = shape.vocabulary * row.scored * 4.0  # the softmax
            moments = {"logits": 4.0 * shape.vocabulary * (row.columns + row.scored) + states + self.wide_head()}
        else:
            kept["head"] = float(slopes)
            moments = {"tile of logits": self.tile(row) + states + slopes}
        moments["gradients in a layer"] = self.passing(row)
        if self.recomputes(row):  # in float32 the input of its first norm is the input that is kept anyway
            moments["gradients in a layer"] += layer - (states if width == 4 else 0)
        name, size = max(moments.items(), key=lambda moment: moment[1])
        return {**kept, name: size}

    def tile(self, row: Row) -> float:
        """Return the bytes of the head's work on one tile of tokens and vocabulary."""
        tokens, entries = CHUNKS["cuda" if self.device == "cuda" else "cpu"]
        tokens, entries = min(tokens, row.scored), min(entries, self.shape.vocabulary)
        # Capped: three of the tile before, and the product, its quotient and the tanh of that.
        copies = 24 if self.shape.caps_logits else 4 + (0 if self.width == 4 else self.width)
        wide = 4.0 * entries * self.shape.hidden if self.wide_head() else 0.0
        return tokens * entries * copies + 3.0 * 4 * tokens * self.shape.hidden + wide

    def wide_head(self) -> float:
        """Return the bytes of the head in float32, in which a CPU multiplies what is in 16 bits; a GPU only sums so."""
        return 4.0 * self.shape.vocabulary * self.shape.hidden if self.device == "cpu" and self.width == 2 else 0.0

    def passing(self, row: Row) -> float:
        """Return the bytes of gradients inside a layer's backward, and of the largest matrix that codes become."""
        shape, width = self.shape, self.width
        widest = max((max(weight.inputs, weight.outputs) for weight in shape.of_text if weight.role == "linear"), default=0)
        within = row.tokens * width * (shape.hidden + 2 * widest)
        return within + self.largest_matrix()

    def largest_matrix(self) -> int:
        """Return the bytes of the largest weight that codes are turned into for a product."""
        if self.quantize == "none":
            return 0
        experts = self.with_experts and is_four_bit(self.quantize)
        reached = [weight for weight in self.shape.of_text if weight.role == "linear" or experts]
        return self.width * max((weight.numbers for weight in reached), default=0)

    def gradient_check(self, short: Row) -> float:
        """Return the bytes above weights and adapters while two short pairs have gradients in the check, nothing recomputed.

        Args:
            short: both pairs as padded rows.
        """
        plain = self._replace(path="padded", recomputes_above=None)
        return sum(plain.row_peak(short).values()) + 3 * 4.0 * self.trained

    def plain_check(self, longest: Row) -> float:
        """Return the bytes above weights and adapters while the longest pair is scored the plain way, without gradients.

        Args:
            longest: the pair as two padded rows.
        """
        shape, width = self.shape, self.width
        logits = 4.0 * shape.vocabulary * (longest.columns + 2 * longest.scored) + self.wide_head()
        widest = max((max(weight.inputs, weight.outputs) for weight in shape.of_text), default=0)
        return logits + longest.tokens * width * (2 * shape.hidden + 3 * widest) + self.largest_matrix()
