"""The line of a logged step: what fits, what is stacked, and that it is read again."""

from __future__ import annotations

import io

import pytest

from megatron_mlra.command_line.log_line import LoggedStep, LogLine, duration, logged_steps

LEARNING = ["step 9/100,000", "lm loss 2.3456", "grad norm 0.800", "lr 1.05e-04"]
CPU = ["892 tokens/s", "0.4 GiB", "11 s left"]
GPU = ["671,234 tokens/s", "MFU 41.2 %", "71.3 GiB", "19 h 51 min left"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", [40, 80, 100, 200])
@pytest.mark.parametrize("machine", [CPU, GPU])
def test_no_line_is_wider_than_the_terminal_or_than_100(monkeypatch, columns, machine):
    monkeypatch.setenv("COLUMNS", str(columns))
    line = LogLine(Terminal())(LEARNING, machine, growth=6)
    assert max(map(len, line.splitlines())) <= min(columns, 100)
    for part in (*LEARNING, *machine):
        assert part in line
    assert list(logged_steps(line)) == [
        LoggedStep(9, 2.3456, int(machine[0].split()[0].replace(",", "")))
    ]


def test_lines_of_a_run_are_laid_out_alike():
    line = LogLine(io.StringIO())
    assert "\n" not in line(LEARNING, CPU)
    wide = line(LEARNING, GPU)
    assert wide == f"{' | '.join(LEARNING)}\n  {' | '.join(GPU)}"
    assert line(LEARNING, CPU).count("\n") == 1
    # The last steps' numbers have more digits than the first ones'.
    assert "\n" in LogLine(io.StringIO())(LEARNING, CPU, growth=20)


def test_a_log_is_read_again_with_what_lies_between():
    text = (
        "validation at step 0: lm loss 6.3\n"
        "step 1/1,500 | lm loss 7.0000 | grad norm 1.000\n"
        "step 10/1,500 | lm loss 6.5000 | lr 1\n  1,234 tokens/s | MFU 40.0 %\n"
        "saved step 10 to x (0.5 s)\n"
        "step 20/1,500 | lm loss 6.0000 | 99 tokens/s | TFLOP/s a device: model 1, hardware 1\n"
        "step 30/1,500 | lm loss nan\n"
    )
    *finite, last = logged_steps(text)
    assert finite == [(1, 7.0, None), (10, 6.5, 1234), (20, 6.0, 99)]
    assert last.step == 30 and last.loss != last.loss


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 s"),
        (89, "89 s"),
        (90, "2 min"),
        (5370, "1 h 30 min"),
        (71460, "19 h 51 min"),
        (129600, "1 d 12 h"),
        (273600, "3 d 4 h"),
    ],
)
def test_durations(seconds, said):
    assert duration(seconds) == said
