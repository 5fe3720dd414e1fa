"""docs/tutorial.md, command by command: what it prints is what the page says, figures aside."""

from __future__ import annotations

from pathlib import Path

import pytest
from guide import tutorial


@pytest.mark.heavy
def test_every_command_prints_what_the_page_says(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "xlpk"
    tutorial.prepare(folder, cache)
    blocks = tutorial.steps(tutorial.PAGE.read_text(encoding="utf-8"))
    assert sum(map(len, blocks)) > 12
    for step in (step for block in blocks for step in block):
        printed = tutorial.run(step.command, folder)
        assert tutorial.stable(printed) == tutorial.stable(step.output), f"{step.command}\n{printed}"


def test_figures_are_not_compared_but_words_are() -> None:
    line = "throughput   3,261.4 tokens/s, 2.90e-05 (52.5%), outputs/runs/2026-11-24/13-16-06-6d37\n"
    same = "throughput 12.0 tokens/s, 1 (1%), outputs/runs/2027-01-01/00-00-00-ffff\n"
    assert tutorial.stable(line) == tutorial.stable(same)
    assert tutorial.stable(line) != tutorial.stable(same.replace("tokens", "requests"))
    slower = "slower by 1.113x (95 % interval 1.024x..1.174x)"
    assert tutorial.stable(slower) == tutorial.stable("no difference shown (0.951x..1.174x)") == ["VERDICT"]
    assert tutorial.stable("exit code 0") != tutorial.stable("exit code 1")


def test_steps_of_a_page() -> None:
    page = "text\n```console\n$ one\n1\n2\n$ two\n```\n\n```console\n$ three\n3\n```\n"
    assert tutorial.steps(page) == [
        [tutorial.Step("one", "1\n2\n"), tutorial.Step("two", "")],
        [tutorial.Step("three", "3\n")],
    ]
