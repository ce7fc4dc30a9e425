"""How far a command is: live lines in a terminal, and without one a line every half minute.

step 12/64  loss 0.6658  reward accuracy 0.59  5 s, 21 s left
scoring, reference ━━━━━━━╸         1,024 of 2,000, 310 a second, 3 s left
"""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.progress import Progress

SECONDS_BETWEEN_LINES = 30.0
"""Where there is no terminal."""
BAR = 16
"""Characters of a bar where there is room for them."""


class LiveLines:
    """Shows how far each piece of work is that is under way, how quick, and how long it still takes.

    Args:
        is_silent: whether the output is for a program: then lines go to stderr.
    """

    def __init__(self, *, is_silent: bool = False) -> None:
        from rich.console import Console

        self.is_silent = is_silent
        self.is_terminal = Console().is_terminal
        self._begun: dict[str, tuple[float, int]] = {}
        self._told: dict[str, float] = {}
        self._screen: Progress | None = None
        self._tasks: dict[str, Any] = {}

    def count(self, what: str, done: int, total: int) -> None:
        """Show that so many of all parts of a piece of work are done; 0 are all where nobody knows their number."""
        now = time.monotonic()
        began, before = self._begun.setdefault(what, (now, done))
        rate = (done - before) / max(now - began, 1e-3)
        speed = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        pace = (f"{done:,} of {total:,}" if total else f"{done:,}") + (f", {speed} a second" if rate else "")
        pace += f", {rounded_time((total - done) / rate)} left" if rate and total else ""
        if self.is_terminal:
            self.show(what, lambda: pace, done=done, total=total)
        elif done < total or not total:
            self.tell(what, f"{what}: {pace}")
        if total and done >= total:
            self._begun.pop(what)
            self.end(what)

    def show(self, what: str, words: Callable[[], str], *, done: int | None = None, total: int | None = None) -> None:
        """Show a live line.

        Args:
            what: the name of the work.
            words: gives what stands on the line, and is asked whenever it is drawn.
            done: how many parts are done, for a bar with the name beside it; None without a bar.
            total: how many there are; 0 where nobody knows.
        """
        from rich.progress import Progress, ProgressBar, ProgressColumn, Task
        from rich.table import Table
        from rich.text import Text

        class WholeLine(ProgressColumn):
            """All that a line has, without columns that the lines below would have to share."""

            def render(self, task: Task) -> Any:
                text = Text(task.fields["words"](), no_wrap=True, overflow="crop")
                if not task.fields["has_bar"]:
                    return text
                line = Table.grid(padding=(0, 1, 0, 0))
                room = max(0, min(BAR, screen.console.width - len(task.description) - len(text) - 3))
                bar = ProgressBar(total=task.total, completed=task.completed, width=room, pulse=task.total is None)
                line.add_row(Text(task.description), *([bar] if room else []), text)
                return line

        screen = self._screen or Progress(WholeLine(), transient=True)
        if self._screen is None:
            self._screen = screen
            screen.start()
        how: dict[str, Any] = {"completed": done or 0, "total": total or None, "words": words}
        if what in self._tasks:
            screen.update(self._tasks[what], **how)
        else:
            self._tasks[what] = screen.add_task(what, **how, has_bar=done is not None)

    def tell(self, what: str, line: str) -> None:
        """Print a line where there is no terminal, unless one was printed for this work within the last half minute."""
        now = time.monotonic()
        if now - self._told.setdefault(what, now) >= SECONDS_BETWEEN_LINES:
            self.say(what, line)

    def say(self, what: str, line: str) -> None:
        """Print a line about this work."""
        self._told[what] = time.monotonic()
        with suppress(OSError):  # a terminal that is gone (SIGHUP) must not keep the last checkpoint from being saved
            typer.echo(line, err=self.is_silent)

    def end(self, what: str) -> None:
        """Take the line of this work away."""
        self._told.pop(what, None)
        if self._screen is not None and what in self._tasks:
            self._screen.remove_task(self._tasks.pop(what))
            if not self._tasks:
                self.stop()

    def stop(self) -> None:
        """Take all lines away."""
        if self._screen is not None:
            self._screen.stop()
        self._screen, self._tasks = None, {}


def rounded_time(seconds: float) -> str:
    """Return a time in its unit: "29 s", "12 min", "3.4 h"."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class TrainingLine:
    """How far a run is: step, loss, reward accuracy, time since the start and time left.

    Args:
        lines: where it is shown: a live line in a terminal, elsewhere a line every half minute, and every tenth of a short run.
    """

    def __init__(self, lines: LiveLines) -> None:
        self.lines = lines
        self.began = self.last = 0.0
        self.first = 0
        self.words = ""

    def begin(self, state: Any) -> None:
        """Begin with the first step, or with that where a run goes on."""
        self.began = self.last = time.monotonic()
        self.first = state.global_step
        if self.lines.is_terminal:
            self.lines.show("training", lambda: self.line(state))

    def step(self, state: Any, *, is_logged: bool) -> None:
        """Take note of a step; one that is logged has a line then."""
        self.last = time.monotonic()
        if not self.lines.is_terminal and not is_logged:
            self.lines.tell("training", self.line(state))

    def log(self, state: Any, loss: float, accuracy: float) -> None:
        """Take note of what was logged of the steps since the last line."""
        self.words = f"  loss {loss:{'.4f' if abs(loss) < 1000 else '.4g'}}  reward accuracy {accuracy:.2f}"
        if not self.lines.is_terminal and state.global_step < state.max_steps:
            tell = self.lines.say if state.global_step % max(1, state.max_steps // 10) == 0 else self.lines.tell
            tell("training", self.line(state))

    def end(self, state: Any) -> None:
        """Say how far it came."""
        self.lines.end("training")
        if state.global_step > self.first:
            self.lines.say("training", self.line(state))

    def line(self, state: Any) -> str:
        """Return the line: with the time since the first step and the time left, and without a terminal the pace."""
        now, done = time.monotonic(), state.global_step - self.first
        pace = (self.last - self.began) / done if done else 0.0
        left = max(0.0, (state.max_steps - state.global_step) * pace - (now - self.last))
        if state.global_step == state.max_steps:
            times = rounded_time(now - self.began)
        elif self.lines.is_terminal:
            times = rounded_time(now - self.began) + (f", {rounded_time(left)} left" if done else "")
        else:
            times = f"{f'{pace:.2g} s' if pace < 10 else rounded_time(pace)} a step, {rounded_time(left)} left"
        return f"step {state.global_step}/{state.max_steps}{self.words}  {times}"


def progress_callback(lines: LiveLines) -> Any:
    """Return a Trainer callback that shows how far a run is, in its main process."""
    from transformers import TrainerCallback

    line = TrainingLine(lines)

    class ShowProgress(TrainerCallback):
        """Hands Trainer's events on."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                line.begin(state)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                line.step(state, is_logged=state.global_step % args.logging_steps == 0)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if state.is_world_process_zero and logs and "loss" in logs:
                line.log(state, logs["loss"], logs["rewards/accuracies"])

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                line.end(state)

    return ShowProgress()
