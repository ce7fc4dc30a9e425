"""The options that several commands share, how they become overrides of a recipe, and which flag gives which argument."""

import itertools
import json
import re
import shlex
from collections.abc import Mapping
from typing import Annotated, Any, get_args

import typer
from typer.core import TyperCommand

from pe_dpo.links import LinkName

LINKS = get_args(LinkName)

Loss = Annotated[str | None, typer.Option("--loss", help="A named loss: dpo, gdpo, hinge, simpo, … (recipes losses).")]
Beta = Annotated[float | None, typer.Option("--beta", help="Weight of the policy.")]
Gamma = Annotated[
    str | None,
    typer.Option(
        "--gamma", help='Weight of the reference: a number, "0.5x" times beta, or found from data: auto, balance:S, scale:G.'
    ),
]
Margin = Annotated[float | None, typer.Option("--margin", help="Constant subtracted from the score.")]
Link = Annotated[str | None, typer.Option("--link", help=f"{', '.join(LINKS[:-1])} or {LINKS[-1]}.")]
Mixout = Annotated[
    float | None, typer.Option("--mixout", help="Share of the input units taken from the reference in training; 0 is off.")
]
LearningRate = Annotated[str | None, typer.Option("--lr", help="Learning rate.")]
Epochs = Annotated[float | None, typer.Option("--epochs", help="Passes over the pairs.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of adapter, data order and dropout.")]
Output = Annotated[str | None, typer.Option("--output", "-o", help="Folder of the run.")]
Scorer = Annotated[
    str | None,
    typer.Option(
        "--scorer", help="Judges sampled answers against the base's: module:function, file.py:function, or a reward model."
    ),
]
Settings = Annotated[list[str] | None, typer.Option("--set", help="Any other key: --set section.key=value. Repeatable.")]

_SAME = """
    allow_base_mismatch base baseline best by confidence data dtype engine equivalent gpu like max_new_tokens metric onto output
    override overwrite pairs prompts quantize repeats resume scale scorer seed seeds sft tokens
"""
_OTHER = {"folder": "output", "grids": "grid", "overrides": "set", "scales": "scale", "contrasts": "contrast"}
_FLAGS = {name: f"--{flag.replace('_', '-')}" for name, flag in {**{name: name for name in _SAME.split()}, **_OTHER}.items()}
"""The arguments of the library that its messages name in backticks, and the flags with which a person gives them."""


def in_flags(message: str) -> str:
    """Return a message of the library as the command line says it: "name it with `base`" → "name it with --base"."""
    return re.sub(r"`(\w+)`", lambda name: _FLAGS.get(name[1], name[0]), message)


def scales(option: str, text: str | None) -> list[float] | None:
    """Return the fractions of "0.5,0.75"; no fraction for "none", and None where the option was not given.

    Raises:
        UsageError: they are no fractions.
    """
    from pe_dpo.errors import UsageError
    from pe_dpo.recipe.schema import check_scales

    if text is None or text.strip() == "none":
        return None if text is None else []
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError as error:
        raise UsageError(f"{option} {text}: write fractions of the adapter with commas between them, as 0.5,0.75") from error
    try:
        check_scales(found)
    except ValueError as error:
        raise UsageError(f"{option} {text}: {error}") from error
    return found


def overrides(settings: list[str] | None, **given: str | float | int | None) -> list[str]:
    """Return "section.key=value" for every hyperparameter that was given an option, after the plain settings.

    Raises:
        UsageError: a key is set twice.
    """
    from pe_dpo.recipe.names import SHORT_NAMES

    turned = {name: value for name, value in given.items() if value is not None}
    words = {name: f"{value:g}" if isinstance(value, float) else value for name, value in turned.items()}
    check_once(settings, {f"--{name} {words[name]}": SHORT_NAMES[name] for name in turned})
    if "output" in turned:  # a path is taken as it is, not read as YAML
        turned["output"] = json.dumps(turned["output"], ensure_ascii=False)
    return [*(settings or []), *(f"{SHORT_NAMES[name]}={value}" for name, value in turned.items())]


def as_settings(override: list[str]) -> list[str]:
    """Return "section.key=value" for each of `--override KEY=VALUE`; a key alone sets nothing, the recipe has its value."""
    from pe_dpo.recipe.names import SHORT_NAMES

    parts = [one.partition("=") for one in override]
    return [f"{SHORT_NAMES.get(key.strip(), key.strip())}={value}" for key, equals, value in parts if equals]


def check_once(settings: list[str] | None, options: Mapping[str, str]) -> None:
    """Check that no key of the recipe is set twice; of two values one would be dropped in silence.

    Args:
        settings: "section.key=value", as given to --set.
        options: other options as they were given, and the key that each sets.

    Raises:
        UsageError: naming both.
    """
    from pe_dpo.errors import UsageError

    given = [(f"--set {setting}", setting.partition("=")[0].strip()) for setting in settings or []]
    for (one, key), (other, again) in itertools.combinations([*given, *options.items()], 2):
        if f"{again}.".startswith(f"{key}.") or f"{key}.".startswith(f"{again}."):  # the same, or a section and a key of it
            raise UsageError(f"{one} and {other}: {max(key, again, key=len)} is given twice; give it once")


class OnceEach(TyperCommand):
    """A command that refuses an option with a value that is given twice, unless it is repeatable, and a list for a number."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Return what is left of the arguments.

        Raises:
            UsageError: an option is given twice, or several numbers where one is wanted.
        """
        from pe_dpo.errors import UsageError

        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for option in order:
            if order.count(option) > 1 and not (getattr(option, "multiple", True) or getattr(option, "is_flag", True)):
                given = " and ".join(f"{flag} {value}" for flag, value in _given(option, args))
                raise UsageError(f"{given}: {option.opts[0]} is given twice; give it once")
        try:
            return super().parse_args(ctx, list(args))
        except typer.BadParameter as error:
            for flag, value in _given(error.param, args) if error.param else []:
                if re.fullmatch(r"[-+.\de]+(, ?[-+.\de]+)+", value):
                    raise UsageError(f"{flag} {value}: {_one_number(flag, value)}") from error
            raise


def _given(option: Any, args: list[str]) -> list[tuple[str, str]]:
    """The flags by which an option was given, each with its value."""
    pairs = itertools.pairwise([*args, ""])
    return [(word, value) if word in option.opts else (word.partition("=")[0], word.partition("=")[2])
            for word, value in pairs if word.partition("=")[0] in option.opts]  # fmt: skip


def _one_number(flag: str, value: str) -> str:
    """What to write instead of several numbers."""
    from pe_dpo.recipe.names import SHORT_NAMES

    name = flag.lstrip("-")
    if name == "seeds":
        return f"how many seeds is wanted, not which; they count up from train.seed: --seeds {value.count(',') + 1}"
    if name in SHORT_NAMES and name != "seed":  # which other commands have, for draws of theirs
        grid = shlex.quote(f"{name}={value.replace(' ', '')}")
        return "one number is wanted; a run for each of several: pe-dpo sweep RECIPE --grid " + grid
    return f"one number is wanted, without commas; for example {value.replace(' ', '').partition(',')[0]}"
