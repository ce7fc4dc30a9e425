"""Tables in a terminal: whatever its width, no name and no digit is cut."""

import io
import re
from pathlib import Path

import fake_runs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pe_dpo.cli import console

TEXT = st.text("ab κ=.0", max_size=30).map(lambda text: " ".join(text.split()))
NUMBER = st.one_of(st.floats(-1e9, 1e9).map(lambda value: f"{value:.4g}"), st.just("+0.1234 to +10.4321"), st.just(""))


def printed(width, *arguments, **options):
    """The lines of a table on a screen of this width."""
    screen = Console(width=width, file=io.StringIO())
    screen.print(console.make_table(*arguments, width=width, **options))
    return screen.file.getvalue().splitlines()


def tight(text):
    """The text without spaces: what was folded is whole again."""
    return re.sub(r"\s", "", text)


def columns_of(lines, sign):
    """The cells of each column of a table, one below the other, without spaces; `sign` is ┃ in headings and │ in rows."""
    cells = [line.split(sign)[1:-1] for line in lines if line.startswith(sign)]
    return [tight("".join(column)) for column in zip(*cells, strict=True)]


def assert_whole(lines, header, rows, names):
    """Every heading and every cell is there, in its order, without a sign missing, and a number is on one line."""
    starts = [at for at, line in enumerate(lines) if line.startswith("┏")]
    parts = [lines[start:end] for start, end in zip(starts, [*starts[1:], len(lines)], strict=True)]
    for sign, expected in (("┃", header), ("│", ["".join(column) for column in zip(*rows, strict=True)])):
        found = [columns_of(part, sign) for part in parts]
        assert all(columns[:names] == [tight(name) for name in expected[:names]] for columns in found)
        assert [text for columns in found for text in columns[names:]] == [tight(text) for text in expected[names:]]
    places = [cell.strip() for line in lines for cell in line.split("│")]
    assert {cell for row in rows for cell in row[1:]} - set(places) == set()


@given(
    st.integers(1, 9).flatmap(
        lambda count: st.tuples(
            st.lists(TEXT, min_size=count, max_size=count),
            st.lists(st.tuples(TEXT, *[NUMBER] * (count - 1)), min_size=1, max_size=4),
        )
    ),
    st.integers(50, 130),
)
@pytest.mark.slow
def test_everything_is_whole_and_on_the_screen_whatever_its_width(table, width) -> None:
    header, rows = table
    lines = printed(width, "title", header, rows)
    assert max(map(len, lines)) <= width
    assert_whole(lines, header, rows, 1)


def test_where_there_is_room_nothing_is_folded() -> None:
    assert printed(60, "what it is", ["a long name", "a heading"], [["β = 0.4 with mixout 0.3", "1.77e+14"]]) == [
        "what it is",
        "┏━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━┓",
        "┃ a long name             ┃ a heading ┃",
        "┡━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━┩",
        "│ β = 0.4 with mixout 0.3 │  1.77e+14 │",
        "└─────────────────────────┴───────────┘",
    ]


def test_a_heading_and_a_name_fold_before_a_column_goes_below() -> None:
    lines = printed(34, "", ["point", "a heading"], [["β = 0.4 with mixout 0.3", "1.77e+14"]])
    assert lines[1:-1] == [
        "┃                     ┃        a ┃",
        "┃ point               ┃  heading ┃",
        "┡━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━┩",
        "│ β = 0.4 with mixout │ 1.77e+14 │",
        "│ 0.3                 │          │",
    ]


def test_a_name_without_a_space_folds_and_is_not_cut() -> None:
    name = "beta=0.025,gamma=0.5x,mixout=0.3"
    lines = printed(40, "", ["run", "seed 0"], [[name, "finished"]])
    assert_whole(lines, ["run", "seed 0"], [[name, "finished"]], 1)


def test_columns_without_room_stand_below_beside_the_names_of_their_rows() -> None:
    rows = [["γ = 0", "1", "0.123456", "0.234567"], ["γ = 0", "2", "0.345678", "0.456789"]]
    lines = printed(30, "", ["run", "seed", "first", "second"], rows, names=2)
    assert [line for line in lines if line.startswith("│")] == [
        "│ γ = 0 │    1 │ 0.123456 │",
        "│ γ = 0 │    2 │ 0.345678 │",
        "│ γ = 0 │    1 │ 0.234567 │",
        "│ γ = 0 │    2 │ 0.456789 │",
    ]


def test_text_that_looks_like_markup_stays_text() -> None:
    lines = printed(60, "[b]title", ["", "[i]"], [["[red]name :smile:", "[0.1, 0.2]"]])
    assert lines[0] == "[b]title"
    assert_whole(lines[1:], ["", "[i]"], [["[red]name :smile:", "[0.1, 0.2]"]], 1)


# ---------------------------------------------------------------- every command, at 80 columns


@pytest.fixture
def at_80_columns(pe_dpo, monkeypatch):
    """Run a command on a screen of 80 columns; every table that it shows must be whole."""
    shown = []
    original = console.show_table

    def spy(title, header, rows, *, names=1):
        rows = [list(row) for row in rows]
        assert_whole(printed(80, title, header, rows, names=names), header, rows, names)
        shown.append(title)
        original(title, header, rows, names=names)

    def run(*arguments):
        shown.clear()
        done = pe_dpo(*arguments, columns=80)
        assert done.code == 0, done.err
        lines = [line for line in done.out.splitlines() if line.startswith(("┃", "│", "┏"))]
        assert max(map(len, lines)) <= 80
        assert sum(line.startswith("┏") for line in lines) >= len(shown)
        return shown, done.out

    monkeypatch.setattr(console, "show_table", spy)
    return run


@pytest.mark.slow
def test_train_and_eval_show_whole_tables(at_80_columns, recipe_file, tmp_path) -> None:
    shown, _ = at_80_columns("train", recipe_file, "-o", tmp_path / "run")
    assert len(shown) == 3
    scorer = tmp_path / "judge.py"
    scorer.write_text("def score(prompts, answers):\n    return [len(answer) for answer in answers]\n")
    sampled = ("--prompts", 8, "--max-new-tokens", 4, "--scale", "0.5", "--scorer", f"{scorer}:score")
    shown, out = at_80_columns("eval", tmp_path / "run", *sampled)
    assert "reward accuracy" in out
    assert len(shown) == 8


def test_audit_shows_whole_tables_and_the_gamma_that_one_has_to_type(at_80_columns, recipe_file) -> None:
    shown, out = at_80_columns("audit", recipe_file, "--four-bit-noise", "--gamma", "scale:1")
    assert len(shown) == 5
    assert "balance:0.5" in out


@pytest.mark.slow
def test_compare_shows_whole_tables(at_80_columns, tmp_path) -> None:
    settings = [*fake_runs.GRID, {"loss.gamma": "2x", "mixout.p": 0.3}]
    sweep = fake_runs.write_sweep(tmp_path / "sweep", settings, snapshots=1, steps=4, seeds=(0, 1), scales=(0.5,))
    for options in (("--metric", "accuracy/shift"), ("--metric", "nll/chosen_per_token", "--baseline", "scale")):
        shown, _ = at_80_columns("compare", sweep, "--repeats", 200, *options)
        assert len(shown) == 3


def test_a_plan_of_a_sweep_is_a_whole_table(at_80_columns, recipe_file, tmp_path) -> None:
    shown, _ = at_80_columns("sweep", recipe_file, "--grid", "beta=0.1,0.2", "--plan", "-o", tmp_path / "sweep")
    assert len(shown) == 2


@pytest.mark.slow
def test_merge_shows_whole_tables(at_80_columns, trained, tmp_path) -> None:
    shown, _ = at_80_columns("merge", trained[0], "-o", tmp_path / "merged", "--compare", "--pairs", 4)
    assert len(shown) == 2


def test_chat_shows_whole_tables(at_80_columns, trained, tmp_path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "2+3="}\n')
    shown, _ = at_80_columns("chat", trained[0], "--prompts", tmp_path / "prompts.jsonl", "--max-new-tokens", 4)
    assert len(shown) == 1


def test_the_live_table_of_a_sweep_is_whole(tmp_path: Path) -> None:
    from pe_dpo.cli.sweep import _table
    from pe_dpo.experiments.plan import Point
    from pe_dpo.experiments.point import PointState

    name = "beta=0.025,gamma=0.5x,mixout=0.3"
    metrics = {"accuracy/shift": 0.612, "kl": 1.234}
    states = [PointState(Point(name, {}, seed, f"runs/{name}/seed-{seed}"), "finished", 1.0, metrics) for seed in range(4)]
    screen = Console(width=80, file=io.StringIO())
    screen.print(_table(states, "4 of 4 runs", width=80))
    lines = screen.file.getvalue().splitlines()
    header, row = ["run", *(f"seed {seed}" for seed in range(4))], [name, *["accuracy/shift 0.612, KL 1.23"] * 4]
    assert_whole(lines[:-1], header, [row], 1)
    assert lines[-1] == "4 of 4 runs"
