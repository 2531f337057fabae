"""Measured figures go into the rows of their commands."""

from __future__ import annotations

import re

import pytest

import measure

PRINTED = {
    "python tools/bench/saving.py": (
        "  stall / torch.save        0.118    [0.1, 0.2]   (at most 0.12)\n"
        "  step meanwhile / alone    1.071    [1.0, 1.1]   (at most 1.08)\n",
        "0.118 of it; 1.071 x as long",
    ),
    "python tools/bench/resume.py": ("ratio, median of 9 pairs: 0.971 (at most 1.2)\n", "0.971 x"),
    "python tools/bench/panel.py": (
        "with the panel +0.06 % in the median, +0.10 +- 0.2 % in the mean of the middle four fifths\n"
        "a drawing 0.25 ms, twice a second: 0.050 % of one core\n",
        "0.050 % of one core to draw; switched on and off every half second of a run, +0.06 % in the median",
    ),
    "python tools/bench/loop.py --nproc 2 --peers hand --rounds 31": (
        "MLP, 2 processes: ms per step, ratio to the loop by hand\n"
        "  kit              3.197   1.009  (0.996 to 1.026)\n"
        "GPT, 2 processes: ms per step, ratio to the loop by hand\n"
        "  kit             11.539   0.996  (0.986 to 1.008)\n",
        "3.197 ms MLP 1.009 x (0.996 to 1.026), 11.539 ms GPT 0.996 x (0.986 to 1.008)",
    ),
    "python tools/bench/start.py": (
        "the first step                             0.194   0.182\n"
        "together                                   0.765   0.558\n"
        "without trial and first step                       0.305\n",
        "0.558 s; 0.305 s without the trial of an evaluation and the step. The first launch, with its data: 0.765 s",
    ),
    "python -m kaggle_mgpu check": ("this machine trains correctly; 2 skipped (5.4 s)\n", "5.4 s"),
}


@pytest.mark.parametrize("command", measure.MEASURED)
def test_the_row_of_a_command_gets_its_figures_and_no_other_row_changes(command: str) -> None:
    page = measure.PAGE.read_text(encoding="utf-8")
    printed, cell = PRINTED[command]
    written = measure.filled(page, command, printed)
    (row,) = re.findall(rf"^\| .+ \| (.+) \| `{re.escape(command)}` \|$", written, re.MULTILINE)
    assert row == cell
    others = [[line for line in text.splitlines() if f"`{command}`" not in line] for text in (page, written)]
    assert others[0] == others[1]


def test_a_figure_that_was_not_printed_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"resume\.py: expected .* in what it prints, got:\nTraceback"):
        measure.filled(measure.PAGE.read_text(encoding="utf-8"), "python tools/bench/resume.py", "Traceback")
