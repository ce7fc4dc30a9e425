"""`pe-dpo chat`: base and tuned answers side by side, in a terminal or from a file of prompts to a file of answers."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from signal import SIGINT
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pe_dpo.cli import console
from pe_dpo.interruption import Interrupted, listening
from pe_dpo.printable import counted, printable
from pe_dpo.quantizations import QUANTIZATIONS, QUANTIZATIONS_IN_WORDS

if TYPE_CHECKING:
    from pe_dpo.chat.side_by_side import Conversation, Side, SideBySide
    from pe_dpo.inference.sampling import Growing

COMMANDS = (
    "/new forgets what was said, /system TEXT also sets the system turn, /quit (or Ctrl-D) leaves; Ctrl-C stops an answer"
)
ROWS_AROUND = 6
"""Lines of a terminal that growing answers leave free: the frame, the prompt line."""


def chat(
    target: Annotated[Path, typer.Argument(help="A run folder, or a LoRA adapter.")],
    best: Annotated[
        bool, typer.Option("--best", help="Of a run: the adapter of its best evaluation (train.keep_best).")
    ] = False,
    base: Annotated[str | None, typer.Option(help="The adapter's base, if not the one named in it.")] = None,
    quantize: Annotated[str | None, typer.Option(help=f"{QUANTIZATIONS_IN_WORDS}; default: as in the run.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Answer these instead: JSON lines with prompt or messages, or text, a prompt a line.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="With --prompts: write OUTPUT.jsonl and OUTPUT.md.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the system turn says.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Where to cut an answer that does not end.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw among the most likely tokens of this share; above 0, at most 1.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws; both models get the same noise.")] = 0,
) -> None:
    """Talk to base and tuned model side by side, and see how far training moved each answer."""
    from pe_dpo.errors import UsageError

    if not target.is_dir():
        raise UsageError(f"{target}: no such folder; name a run or an adapter on disk")
    if quantize not in (None, *QUANTIZATIONS):
        raise UsageError(f"--quantize {quantize}: write {QUANTIZATIONS_IN_WORDS}")
    if not 0 < top_p <= 1:
        raise UsageError(f"--top-p {top_p:g}: write a number above 0 and at most 1")
    if prompts is None and output is not None:
        raise UsageError("-o goes with --prompts: only answers to a file of prompts are written")
    if prompts is not None and system is not None:
        raise UsageError("--system is for talking; in --prompts write messages with a system turn")
    if output is not None and not output.parent.is_dir():
        raise UsageError(f"-o {output}: there is no folder {output.parent}; make it first")

    console.start()
    from pe_dpo.chat.prompts import read_prompts
    from pe_dpo.chat.side_by_side import open_side_by_side

    asked = None if prompts is None else read_prompts(prompts)
    pair = open_side_by_side(
        target,
        base=base,
        quantize=quantize,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        best=best,
    )
    if asked is None:
        _talk(pair, system)
    else:
        _answer_file(pair, asked, output)


# ---------------------------------------------------------------- a file of prompts


def _answer_file(pair: "SideBySide", prompts: Any, output: Path | None) -> None:
    from pe_dpo.chat.prompts import answer_prompts, as_text, save_answers

    found = []
    for one in answer_prompts(pair, prompts):
        found.append(one)
        if output is None:
            console.say(f"\n{one.where}  {printable(as_text(one.prompt))}")
            _show_plain(one.answers)
            _show_scores(pair, one.scores)
    if output is not None:
        files = save_answers(found, output, loss=pair.loss)
        console.say(f"{counted(len(found), 'prompt')} answered by base and tuned model: {files[0]}, {files[1]}")
    same = sum(one.answers["base"].ids == one.answers["tuned"].ids for one in found)
    gaps = {side: sum(one.scores[side].gap for one in found) / len(found) for side in ("base", "tuned")}
    console.say(
        f"the same answer to {same} of {len(found)}; mean gap log π − log π0: {gaps['base']:+.2f} nats on the base's answers, "
        f"{gaps['tuned']:+.2f} on the tuned model's"
    )


# ---------------------------------------------------------------- a conversation


def _talk(pair: "SideBySide", system: str | None) -> None:
    from pe_dpo.errors import DataError

    conversation = _new_conversation(pair, system)
    how = f"drawn at temperature {pair.temperature:g}, top-p {pair.top_p:g}" if pair.temperature else "greedy"
    console.say(f"answers: {how}, at most {pair.max_new_tokens} tokens")
    console.say("gap = log π − log π0 of an answer, in nats: above 0 where training made it more likely")
    if pair.loss:
        per_token = " per token" if pair.loss.reduce == "mean" else ""
        console.say(f"reward = {pair.loss.beta:g}·log π − {pair.loss.gamma_value:g}·log π0{per_token}, as in the run's loss")
    turns = (
        "each side goes on from its own answers" if pair.is_chat else "no chat template: every line stands alone, as plain text"
    )
    console.say(f"{turns}\n{COMMANDS}")
    for number, line in enumerate(_lines()):
        command, _, rest = line.strip().partition(" ")
        if command == "/quit":
            return
        if command in ("/new", "/system"):
            system = rest.strip() or None if command == "/system" else system
            conversation = _new_conversation(pair, system)
            console.say("a new conversation" + (f"; system turn: {printable(system)}" if system else ""))
        elif line.startswith("/"):
            console.say(f"{command}: no such command; {COMMANDS}. Begin with a space to say it to the models.")
        elif line.strip():
            try:
                _take_turn(pair, conversation, line.strip(), number)
            except DataError as error:
                console.warn(f"the prompt {error}; nothing was said. /new starts anew")
            except KeyboardInterrupt as stop:
                if isinstance(stop, Interrupted) and stop.number != SIGINT:
                    raise
                with listening() as signals:
                    signals.listen()
                console.say("stopped; this turn is forgotten")


def _new_conversation(pair: "SideBySide", system: str | None) -> "Conversation":
    from pe_dpo.chat.side_by_side import Conversation

    if system and not pair.is_chat:
        console.warn("without a chat template there is no system turn; it is left out")
    return Conversation(is_chat=pair.is_chat, system=system)


def _lines() -> Iterable[str]:
    """Lines from the person, until there are no more."""
    import sys

    is_person = sys.stdin.isatty()
    if is_person:
        import contextlib

        with contextlib.suppress(ImportError):  # arrow keys and history, where Python has it
            import readline  # noqa: F401
    while True:
        try:
            line = input("\nyou    " if is_person else "")
        except EOFError:
            return
        if not is_person:
            typer.echo(f"\nyou    {printable(line)}")
        yield line


def _take_turn(pair: "SideBySide", conversation: "Conversation", question: str, number: int) -> None:
    from pe_dpo.chat.side_by_side import SIDES

    prompts = {side: pair.encode(prompt) for side, prompt in conversation.prompts(question).items()}
    answers = _show_growing(pair.stream(prompts, number=number))
    for side in SIDES:
        if not answers[side].ended:
            room = pair.room(prompts[side])
            limit = (
                "--max-new-tokens"
                if room == pair.max_new_tokens
                else f"the context of {pair.policy.base.context_length} tokens is full"
            )
            console.warn(f"{side}: cut after {room} tokens ({limit}); its log-probs are those of the part")
    _show_scores(pair, {side: pair.score(prompts[side], answers[side].ids) for side in SIDES})
    conversation.keep(question, {side: answer.text for side, answer in answers.items()})


# ---------------------------------------------------------------- how it looks


def _show_growing(stream: Iterable[Mapping["Side", "Growing"]]) -> dict["Side", "Growing"]:
    """Show answers in two columns while they grow, or as lines where there is no terminal; return the finished ones."""
    from rich.console import Console
    from rich.live import Live

    screen = Console()
    shown: dict[Side, Growing] = {}
    if not screen.is_terminal:
        for answers in stream:
            shown.update(answers)
        _show_plain(shown)
        return shown
    rows = max(3, screen.height - ROWS_AROUND)
    # The last lines while they grow, as far as the screen has room; all of them once they have finished.
    with Live(console=screen, transient=True, refresh_per_second=8, get_renderable=lambda: _columns(screen, dict(shown), rows)):
        for answers in stream:
            shown.update(answers)
    screen.print(_columns(screen, shown, None))
    return shown


def _columns(screen: Any, answers: Mapping["Side", "Growing"], rows: int | None) -> Any:
    """Two columns of answers; the last `rows` lines of each, or all."""
    from rich.table import Table
    from rich.text import Text

    width = max(10, (screen.width - 7) // 2)
    table = Table(expand=True)
    cells = []
    for side in ("base", "tuned"):
        table.add_column(side, ratio=1)
        text = _shown_text(answers[side]) if side in answers else ""
        lines = Text(text).wrap(screen, width)
        cells.append(Text("\n").join(lines if rows is None else lines[-rows:]))
    table.add_row(*cells)
    return table


def _show_plain(answers: Mapping["Side", "Growing"]) -> None:
    for side, answer in answers.items():
        typer.echo(f"{side:<6} {_shown_text(answer)}")


def _show_scores(pair: "SideBySide", scores: Any) -> None:
    from pe_dpo.chat.prompts import score_cells

    cells = {side: score_cells(scores[side], pair.loss) for side in ("base", "tuned")}
    console.show_table("", ["answer of", *cells["base"]], [[side, *row.values()] for side, row in cells.items()])


def _shown_text(answer: "Growing") -> str:
    return printable(answer.text) + ("" if answer.ended else " …")
