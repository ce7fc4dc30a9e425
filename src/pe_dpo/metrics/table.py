"""Pairs and sampled answers as tables: columns, one row a pair or an answer, saved and read as parquet.

Δ = log-prob(chosen) − log-prob(rejected), in nats          table.delta("policy"), table.delta("reference", per_token=True)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from pe_dpo.disk import appearing_whole
from pe_dpo.errors import UsageError
from pe_dpo.links import LinkName

Floats = NDArray[np.float64]
Texts = Sequence[str]
Model = Literal["policy", "reference", "initial"]
"""Whose log-probs: those of the policy as it is, of the reference, or of the policy at step 0."""


def delta(chosen: Floats, rejected: Floats, chosen_lengths: Floats, rejected_lengths: Floats, *, per_token: bool) -> Floats:
    """Return Δ of each pair, (N,) nats: of summed log-probs, or of log-probs per token."""
    return chosen / chosen_lengths - rejected / rejected_lengths if per_token else chosen - rejected


@dataclass(frozen=True, eq=False, kw_only=True)
class Table:
    """What tables of pairs and of answers have in common: every field is a column of N rows, but for those in SETTINGS."""

    NAME: ClassVar[str]
    """The column that tells the rows of one prompt apart."""
    TEXTS: ClassVar[tuple[str, ...]]
    """Columns that a reader of numbers does without."""
    SETTINGS: ClassVar[tuple[str, ...]] = ()

    prompt_key: Texts

    def __len__(self) -> int:
        return len(self.prompt_key)

    @classmethod
    def column_names(cls) -> list[str]:
        """Return the names of all columns that there can be, in the order in which a file has them."""
        return [field.name for field in fields(cls) if field.name not in cls.SETTINGS]

    def columns(self) -> dict[str, Any]:
        """Return the columns that there are."""
        return {name: column for name in self.column_names() if (column := getattr(self, name)) is not None}

    def knows(self, *names: str) -> bool:
        """Return whether all of these columns or settings are there; a column of nothing but NaN is not."""
        values = [getattr(self, name) for name in names]
        return all(value is not None and not (isinstance(value, np.ndarray) and np.isnan(value).all()) for value in values)

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> Self:
        """Return the table of these rows, in their order."""
        taken: dict[str, Any] = {
            name: column[rows] if isinstance(column, np.ndarray) else [column[row] for row in rows]
            for name, column in self.columns().items()
        }
        return replace(self, **taken)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Return several tables of the same columns and settings as one."""
        joined: dict[str, Any] = {}
        for name, first in parts[0].columns().items():
            columns = [getattr(part, name) for part in parts]
            joined[name] = (
                np.concatenate(columns) if isinstance(first, np.ndarray) else [row for part in columns for row in part]
            )
        return replace(parts[0], **joined)

    def in_order(self) -> Self:
        """Return the rows in the order of their prompts' keys and their names, which does not depend on how they were read."""
        names = [str(name) for name in getattr(self, self.NAME)]
        return self.take(sorted(range(len(self)), key=lambda row: (self.prompt_key[row], names[row])))

    def save(self, path: Path) -> None:
        """Write the columns as parquet, so that a reader sees the old or the new file, never a part."""
        import pyarrow
        import pyarrow.parquet

        with appearing_whole(path) as partial:
            pyarrow.parquet.write_table(pyarrow.table(self.columns()), partial)

    @classmethod
    def load(cls, path: Path, *, remedy: str, needs: Iterable[str] = (), with_texts: bool = True) -> Self | None:
        """Return the table in a file, with numbers in float64; None where there is no file, or no row in it.

        Args:
            path: of the file.
            remedy: what to do about a file that cannot be read, for the message.
            needs: columns without which the file is of no use; other numbers that it lacks are NaN.
            with_texts: whether to read prompts and answers too.

        Raises:
            UsageError: the file cannot be read, or lacks a column that is needed.
        """
        from pyarrow import ArrowException, parquet

        if not path.is_file():
            return None
        texts = (*cls.TEXTS, "where", "prompt_key")
        try:
            with parquet.ParquetFile(path) as file:
                there = set(file.schema_arrow.names)
                missing = [name for name in ("prompt_key", cls.NAME, *needs) if name not in there]
                if missing:
                    raise UsageError(f"{path}: has no column {', '.join(missing)}; {remedy}")
                wanted = [name for name in cls.column_names() if name in there and (with_texts or name not in cls.TEXTS)]
                read = file.read(columns=wanted)
                columns: dict[str, Any] = {
                    name: read[name].to_pylist() if name in texts else np.asarray(read[name].to_numpy(), dtype=np.float64)
                    for name in wanted
                }
        except (OSError, ArrowException, ValueError, TypeError, MemoryError) as error:
            raise UsageError(f"{path}: cannot be read: {error}; {remedy}") from error
        odd = [name for name in texts if not all(isinstance(row, str) for row in columns.get(name, ()))]
        if odd:
            raise UsageError(f"{path}: {odd[0]} is no column of text; {remedy}")
        unknown = np.full(read.num_rows, np.nan)
        absent = [field.name for field in fields(cls) if field.default is not None and field.name not in columns]
        columns |= {name: unknown for name in absent if name not in cls.SETTINGS}
        return cls(**columns) if read.num_rows else None


@dataclass(frozen=True, eq=False, kw_only=True)
class PairTable(Table):
    """Pairs with all that was computed of them: columns of N float64, log-probs in nats and summed, lengths in tokens."""

    NAME = "where"
    TEXTS = ("prompt", "chosen", "rejected")
    SETTINGS = ("beta", "gamma", "reduce", "reference_floor", "link", "rejected_weight")

    where: Texts
    """Place of each pair in the data."""
    prompt_key: Texts
    """Pairs of one prompt have one key, and are not independent."""
    policy_chosen: Floats
    policy_rejected: Floats
    reference_chosen: Floats
    """NaN where the reference was not run (γ = 0 in training)."""
    reference_rejected: Floats
    chosen_lengths: Floats
    rejected_lengths: Floats
    loss: Floats
    score: Floats
    """z."""
    weight: Floats
    """−∂loss/∂(β·log π(chosen)), see `objective.PreferenceLoss`, with the loss's β and with the pair's weight."""
    chosen_reward: Floats
    rejected_reward: Floats
    initial_chosen: Floats | None = None
    """Log-probs of the policy at step 0; None where they are not known."""
    initial_rejected: Floats | None = None
    pair_beta: Floats | None = None
    """β of each pair, where the data give one in the place of the loss's; γ is κ times it."""
    pair_weight: Floats | None = None
    """What the loss of each pair is multiplied by, where the data say so."""
    prompt: Texts | None = None
    chosen: Texts | None = None
    rejected: Texts | None = None

    beta: float | None = None
    """Of the loss, as all that follows; None where the loss is not known."""
    gamma: float | None = None
    reduce: Literal["sum", "mean"] = "sum"
    reference_floor: float | None = None
    link: LinkName | None = None
    rejected_weight: float = 1.0
    """λ: the score has it on the log-probs of rejected answers; Δ and rewards do not."""

    @property
    def has_reference(self) -> bool:
        """Whether the reference was run on these pairs."""
        return self.knows("reference_chosen")

    def delta(self, model: Model = "policy", *, per_token: bool = False) -> Floats:
        """Return Δ of each pair: of summed log-probs, or of log-probs per token."""
        logprobs = getattr(self, f"{model}_chosen"), getattr(self, f"{model}_rejected")
        return delta(*logprobs, self.chosen_lengths, self.rejected_lengths, per_token=per_token)

    def shift(self, *, per_token: bool = False) -> Floats:
        """Return Δπ − Δ0 of each pair."""
        return self.delta("policy", per_token=per_token) - self.delta("reference", per_token=per_token)

    def scored(self, model: Model = "policy") -> Floats:
        """Return log-prob(chosen) − λ·log-prob(rejected) of each pair as the score has it: Δ where λ is 1."""
        logprobs = getattr(self, f"{model}_chosen"), self.rejected_weight * getattr(self, f"{model}_rejected")
        return delta(*logprobs, self.chosen_lengths, self.rejected_lengths, per_token=self.reduce == "mean")

    @property
    def length_difference(self) -> Floats:
        """|chosen| − |rejected| in tokens."""
        return self.chosen_lengths - self.rejected_lengths

    @property
    def reward_margin(self) -> Floats:
        """Reward of chosen minus reward of rejected: β·Δπ − γ·Δ0, per token where the loss is."""
        return self.chosen_reward - self.rejected_reward

    @property
    def implicit_preference(self) -> Floats:
        """z + m, the score before margins; it is the margin of rewards, but for a floor or a λ."""
        if self.reference_floor is None and self.rejected_weight == 1:
            return self.reward_margin
        assert self.beta is not None and self.gamma is not None, "a loss with a floor or a λ is known"
        beta = self.beta if self.pair_beta is None else self.pair_beta
        if self.gamma == 0:
            return beta * self.scored()
        reference = self.scored("reference")
        floored = reference if self.reference_floor is None else np.maximum(reference, self.reference_floor)
        return beta * self.scored() - self.gamma / self.beta * beta * floored

    def effective_margin(self, model: Model = "policy") -> Floats:
        """Return M, which Δπ has to reach: z >= 0 ⇔ Δπ >= M = (γ·max(Δ0, floor) + m)/β.

        With λ other than 1 it is M for a rejected answer that is as likely as under this model, and moves as that does.
        """
        assert self.beta is not None, "the loss is known"
        rest = self.scored(model) - self.delta(model, per_token=self.reduce == "mean")
        return self.scored() - self.score / (self.beta if self.pair_beta is None else self.pair_beta) - rest

    def displacement(self, side: Literal["chosen", "rejected"]) -> Floats:
        """Return log π − log π0 of one answer of each pair."""
        policy, reference = getattr(self, f"policy_{side}"), getattr(self, f"reference_{side}")
        moved: Floats = policy - reference
        return moved

    def since(self, first: Self | None) -> Self:
        """Return the pairs with the log-probs of step 0.

        Args:
            first: the same pairs at step 0; None: the policy was the reference then.
        """
        if first is None:
            return replace(self, initial_chosen=self.reference_chosen, initial_rejected=self.reference_rejected)
        return replace(self, initial_chosen=first.policy_chosen, initial_rejected=first.policy_rejected)


@dataclass(frozen=True, eq=False, kw_only=True)
class AnswerTable(Table):
    """Sampled answers with what both models make of them: columns of N numbers, summed over an answer's tokens, in nats."""

    NAME = "sample"
    TEXTS = ("prompt", "answer", "reference_answer")

    prompt_key: Texts
    prompt: Texts | None = None
    sample: NDArray[Any]
    """Which of the answers to its prompt, from 0."""
    answer: Texts | None = None
    tokens: NDArray[Any]
    """Tokens that were drawn, the end token among them."""
    ended: NDArray[Any]
    """Whether the answer was not cut."""
    kl: Floats
    """Σ_t KL(π(·|x, y_<t) ‖ π0(·|x, y_<t))."""
    log_policy: Floats
    log_reference: Floats
    entropy: Floats
    score: Floats | None = None
    """What a scorer makes of the answer; None without one, as all that follows."""
    reference_answer: Texts | None = None
    """The reference's own answer to the same prompt."""
    reference_tokens: NDArray[Any] | None = None
    reference_score: Floats | None = None

    @property
    def score_difference(self) -> Floats:
        """Score of each answer minus that of the reference's own."""
        assert self.score is not None and self.reference_score is not None, "answers were scored"
        return self.score - self.reference_score
