"""The data of a recipe: one place that pairs come from or several, and what happens to the rows that do not fit."""

from datetime import date
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from pe_dpo.recipe.section import Count, Location, Positive, Section

Column = Literal[
    "prompt", "chosen", "rejected", "margin", "beta", "weight", "system", "chosen_score", "rejected_score",
    "instruction", "input", "history", "messages", "tools", "chat_template_kwargs", "winner",
]  # fmt: skip
"""Names of columns of preference data that `data.columns` may map to a file's own; beta and weight are read by a map alone."""


class DataSource(Section):
    """One of several places that pairs come from."""

    path: Location = Field(description="File, glob, folder or hub id.")
    weight: Positive = Field(1.0, description="How often its pairs are trained on; 0.5: half of its prompts, chosen by hash.")
    split: str | None = Field(None, description="Of a saved data set, a hub id or a folder; default: its training side.")
    subset: str | None = Field(None, description="Of a hub id: the name of its configuration.")
    revision: str | None = Field(None, description="Of a hub id: branch, tag or commit.")
    columns: dict[Column, str] | None = Field(None, description="As data.columns, for this place alone.")


def _kind_of_place(value: Any) -> str | None:
    if isinstance(value, bool) or value is None:
        return None
    kinds = {"path": str, "source": dict | DataSource, "list": list, "share": int | float}
    return next((kind for kind, types in kinds.items() if isinstance(value, types)), None)


def _told_apart(expected: str) -> Discriminator:
    words = f"{expected} is expected"
    return Discriminator(_kind_of_place, custom_error_type="place", custom_error_message=words)


_OBJECT = "an object such as {path: pairs.jsonl, weight: 0.5}"
_Path = Annotated[Location, Tag("path")]
_Source = Annotated[DataSource, Tag("source")]
_List = Annotated[list[Annotated[_Path | _Source, _told_apart(f"A path, or {_OBJECT}")]], Field(min_length=1), Tag("list")]
_Share = Annotated[float, Field(ge=0, lt=1), Tag("share")]
Sources = Annotated[_Path | _Source | _List, _told_apart(f"A path, {_OBJECT}, or a list of these")]
"""Where pairs come from: one place or several, each its path alone or with more about it."""


def list_sources(places: Sources) -> list[DataSource]:
    """Return each of the places, with the defaults of what the recipe does not say."""
    several = places if isinstance(places, list) else [places]
    return [DataSource(path=place) if isinstance(place, str) else place for place in several]


def describe_sources(places: Sources | float | None) -> str:
    """Return the places for people, in one line: `a.jsonl, b.jsonl (weight 0.5)`; a share and null as they are."""
    if places is None or isinstance(places, float):
        return str(places)
    described = []
    for source in list_sources(places):
        said = {name: getattr(source, name) for name in ("subset", "split", "revision")}
        more = [f"{name} {value}" for name, value in said.items() if value is not None]
        more += [f"weight {source.weight:g}"] if source.weight != 1 else []
        described.append(f"{source.path} ({', '.join(more)})" if more else source.path)
    return ", ".join(described)


class DataSection(Section):
    """Preference pairs: where they are, and what happens to the rows that do not fit."""

    train: Sources = Field(description="File, glob, folder or hub id; or a list of them, plain or with path, weight, split, …")
    eval: Annotated[_Share | _Path | _Source | _List, _told_apart(f"A share, a path, {_OBJECT}, or a list")] | None = Field(
        None,
        description="Held-out share (split by prompt), or places; default: the folder's own test file, else 0.05, at most "
        "2,000 pairs.",
    )
    max_length: Count | None = Field(
        None, description="Most tokens of prompt plus the longer answer; default: 2048, or the model's context if shorter."
    )
    columns: dict[Column, str] | None = Field(
        None,
        description="Our name: the file's column name, for files in a shape of their own. {beta: NAME} gives each pair its own "
        "β in the place of loss.beta, with γ in the same ratio to it; {weight: NAME} multiplies its loss.",
    )
    ignore: list[str] = Field(
        default_factory=list,
        description="Columns left unread on purpose, such as [weight]; without it those that matter stop.",
    )
    template: Literal["auto", "chat", "plain"] | Location = Field(
        "auto",
        description="auto: the tokenizer's chat template if it has one; plain: text as it is; or a file with one.",
    )
    template_args: dict[str, str | bool | int | float] = Field(
        default_factory=dict, description="Arguments of the chat template, such as {enable_thinking: false}."
    )
    template_date: date | None = Field(
        None,
        strict=False,
        description="Today for a chat template that writes the date; default: the day on which the run starts.",
    )
    score: Literal["all", "last", "everything"] = Field(
        "all",
        description="Of an answer of several turns: score all of the assistant's turns, its last one alone, or everything, the "
        "user's words included, as the first runs did.",
    )
    overlong: Literal["drop", "truncate_prompt", "error"] = Field(
        "drop",
        description="Pairs above max_length: left out and counted; the prompt's beginning cut, answers whole; or an error.",
    )
    bad_rows: Literal["error", "drop"] = Field(
        "error", description="Malformed rows: stop with file and line, or are left out, counted and named."
    )
    limit: Count | None = Field(None, description="Read only this many rows, for a try.")

    @property
    def pair_columns(self) -> tuple[str, ...]:
        """Which of beta and weight the data give the pairs, in some place at least."""
        places = list_sources(self.train) + (
            [] if self.eval is None or isinstance(self.eval, float) else list_sources(self.eval)
        )
        named = {*(self.columns or {})}.union(*(place.columns or {} for place in places))
        return tuple(name for name in ("beta", "weight") if name in named)

    @field_validator("train", "eval")
    @classmethod
    def _simplest_form(cls, places: Any) -> Any:
        """Write one place, and one of which only the path is said, as a path, so that equal recipes are equal."""
        if places is None or isinstance(places, float):
            return places
        several = [place.path if place == DataSource(path=place.path) else place for place in list_sources(places)]
        return several if len(several) > 1 else several[0]

    @model_validator(mode="after")
    def _held_out_pairs_have_no_weight(self) -> "DataSection":
        places = [] if self.eval is None or isinstance(self.eval, float) else list_sources(self.eval)
        weighted = [place for place in places if place.weight != 1]
        if weighted:
            found = f"{weighted[0].path} has weight {weighted[0].weight:g}"
            raise ValueError(f"eval: {found}, which acts on training alone; leave it out")
        return self
