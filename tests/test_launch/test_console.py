import io
import re
from itertools import pairwise

import pytest

from launch.watching.console import PlainConsole, RichConsole, SilentConsole, make_console
from launch.watching.readings import Readings, amount, cell, duration, perplexity

RECORD = {"loss": 3.25, "lr": 1e-3, "tokens_per_second": 12345.6, "memory_bytes": 1.5e9, "mfu": 0.41}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """A clock that only moves when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def terminal(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    return Terminal()


def lines(file: io.StringIO) -> list[str]:
    return file.getvalue().splitlines()


def test_a_pipe_gets_plain_lines_a_terminal_a_bar_and_other_ranks_nothing(terminal):
    assert isinstance(make_console(True, io.StringIO()), PlainConsole)
    assert isinstance(make_console(True, terminal), RichConsole)
    assert isinstance(make_console(False, terminal), SilentConsole)


def test_a_disabled_console_writes_nothing(capsys):
    console = make_console(False)
    console.info("hello")
    console.table("title", ["a"], [[1]])
    with console.progress(2) as progress, console.track("work", 2) as track:
        progress.update(1, RECORD, 1, 2)
        track.advance()
    assert capsys.readouterr() == ("", "")


def test_plain_output_is_ascii_and_brackets_are_not_markup():
    file = io.StringIO()
    make_console(True, file).info("caf\u00e9 [bold]x[/bold]")
    assert lines(file) == ["caf\\xe9 [bold]x[/bold]"]


def test_a_progress_line_names_every_value():
    file = io.StringIO()
    with make_console(True, file).progress(200) as progress:
        progress.update(1, RECORD, 1, 10)
    assert lines(file) == [
        "step 1/200 (0%)  cycle 2/10  loss 3.2500  ppl 25.79  lr 1.00e-03  12.3k tok/s  mfu 41.0%  mem 1.50 GB  left ?"
    ]


def test_plain_lines_come_by_share_when_fast_and_by_time_when_slow(clock):
    file = io.StringIO()
    with make_console(True, file).progress(1000) as progress:
        for step in range(1, 401):  # fast: 0.1 s a step, so that 5 % take 5 s
            clock.now += 0.1
            progress.update(step, RECORD)
        for step in range(401, 421):  # slow: 10 s a step
            clock.now += 10
            progress.update(step, RECORD)
    shown = [int(re.match(r"step (\d+)/", line)[1]) for line in lines(file)]
    assert all(50 <= later - earlier <= 52 for earlier, later in pairwise(shown[:8]))
    slow = [step for step in shown if step > 400]
    assert len(slow) > 4
    assert all(later - earlier == 3 for earlier, later in pairwise(slow))


def test_very_fast_steps_do_not_flood_the_log(clock):
    file = io.StringIO()
    with make_console(True, file).progress(1000) as progress:
        for step in range(1, 1001):
            clock.now += 0.001
            progress.update(step, RECORD)
    assert [line.split("/")[0] for line in lines(file)] == ["step 1", "step 1000"]


def test_a_record_without_a_field_keeps_the_value_shown():
    readings = Readings(10, 0)
    readings.update(1, {"loss": 2.0, "val_loss": None}, None, None)
    readings.update(2, {"lr": 0.5}, None, None)
    assert readings.numbers() == ["loss 2.0000  ppl 7.389", "lr 5.00e-01"]


def test_time_left_is_told_from_the_steps_after_the_first_and_after_a_resume(clock):
    readings = Readings(total_steps=110, start_step=50)
    clock.now += 500  # compilation
    readings.update(51, {}, None, None)
    assert readings.left == "?"
    clock.now += 18
    readings.update(60, {}, None, None)
    assert readings.left == "1:40"


def test_a_terminal_shows_a_bar_and_the_numbers_below_it(terminal):
    with make_console(True, terminal).progress(200, 40) as progress:
        progress.update(100, RECORD, 1, 10)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert re.search(r"step 100/200 .* 50%\s+left \?", text)
    assert "cycle 2/10  loss 3.2500  ppl 25.79  lr 1.00e-03  12.3k tok/s  mfu 41.0%" in text


def test_messages_on_a_terminal_are_not_read_as_markup(terminal):
    console = make_console(True, terminal)
    with console.progress(5) as progress:
        progress.update(1, {})
        console.info("see [red]/tmp/x[/red]")
    assert "see [red]/tmp/x[/red]" in terminal.getvalue()


def test_tables_align_numbers_right_and_words_left():
    file = io.StringIO()
    rows = (row for row in [["q_proj", 262144, 0.25], ["head", None, 12.0]])
    make_console(True, file).table("Layers", ["kind", "parameters", "share"], rows)
    assert lines(file) == [
        "Layers",
        "  kind    parameters  share",
        "  q_proj     262,144   0.25",
        "  head             -     12",
    ]


def test_a_table_on_a_terminal_shows_every_cell(terminal):
    make_console(True, terminal).table("Layers", ["kind", "parameters"], [["[q]", 262144]])
    text = terminal.getvalue()
    assert all(word in text for word in ("Layers", "kind", "parameters", "[q]", "262,144"))


def test_counted_work_says_how_far_it_is_and_how_long_it_took(clock):
    file = io.StringIO()
    with make_console(True, file).track("Tokenising", 4000) as track:
        for _ in range(4):
            clock.now += 31
            track.advance(1000)
    assert lines(file)[0] == "Tokenising: 1.00k/4.00k"
    assert lines(file)[-1] == "Tokenising: 4.00k in 2:04"


def test_short_counted_work_is_one_line(clock):
    file = io.StringIO()
    with make_console(True, file).track("Reading") as track:
        for _ in range(100):
            clock.now += 0.01
            track.advance()
    assert lines(file) == ["Reading: 100 in 0:01"]


def test_an_error_inside_passes_through_every_console(terminal):
    for console in (make_console(False), make_console(True, io.StringIO()), make_console(True, terminal)):
        with pytest.raises(KeyError), console.progress(3):
            raise KeyError
        with pytest.raises(KeyError), console.track("work", 3):
            raise KeyError


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.5, "0.5"), (999, "999"), (1000, "1.00k"), (12345, "12.3k"), (999_999, "1.00M"), (3.2e9, "3.20G")],
)
def test_amounts_have_three_digits(value, text):
    assert amount(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (200_000, "2d 7h")]
)
def test_durations_carry_over(seconds, text):
    assert duration(seconds) == text


def test_the_perplexity_of_a_diverged_loss_fits_the_line():
    assert [perplexity(loss) for loss in (0.0, 30.0, float("inf"), float("nan"))] == ["1", ">1e8", ">1e8", "nan"]


def test_cells_tell_flags_from_numbers():
    assert [cell(value) for value in (True, 1234567, 0.1 + 0.2, None, "x")] == ["True", "1,234,567", "0.3", "-", "x"]
