"""Runs become configurations, configurations are compared, and --fail-if holds them against thresholds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_folders import run_folder, sweep

from xlpk import compare, rundata, thresholds
from xlpk.compare import HIGHER, LOWER, NEITHER, Configuration
from xlpk.errors import InputError
from xlpk.statistics import Comparison

RATE = "throughput/tokens_per_s"


def load(*folders: Path) -> list[Configuration]:
    return compare.group(rundata.find(folders))


def test_repetitions_of_a_sweep_are_one_configuration(tmp_path: Path) -> None:
    made = load(sweep(tmp_path, {"2": [10, 11, 12], "8": [20, 21, 22]}))
    assert [one.label for one in made] == ["spec.block=2", "spec.block=8"]
    assert [one.values(RATE) for one in made] == [[10, 11, 12], [20, 21, 22]]
    assert [[run.repetition for run in one.runs] for one in made] == [[0, 1, 2]] * 2


def test_runs_named_one_by_one_stay_apart_and_show_what_was_not_typed(tmp_path: Path) -> None:
    config = {"spec": {"name": "ngram", "block": 4}}
    a = run_folder(tmp_path / "a", [], sweep_id=None, config=config)
    b = run_folder(tmp_path / "b", ["spec.block=8"], sweep_id=None, config=config)
    assert [one.label for one in load(a, b)] == ["A: spec.block=4", "B: spec.block=8"]
    same = run_folder(tmp_path / "c", [], sweep_id=None, config=config)
    assert [one.label for one in load(a, same)] == ["A: a", "B: c"]
    assert [compare.letter(n) for n in (0, 25, 26, 27, 701, 702)] == ["A", "Z", "AA", "AB", "ZZ", "AAA"]


def test_only_runs_of_one_sweep_are_paired(tmp_path: Path) -> None:
    drift = [1.0, 1.3, 1.7, 2.2, 2.8]
    rates = {"2": drift, "8": [1.2 * rate for rate in drift]}
    one = load(sweep(tmp_path / "one", rates))
    paired = compare.compare(one[0], one[1], RATE)
    assert paired is not None
    assert paired.paired
    assert paired.shown
    assert paired.ratio == pytest.approx(1.2)
    first = load(
        sweep(tmp_path / "x", {"2": rates["2"]}, sweep_id="x"), sweep(tmp_path / "y", {"2": rates["8"]}, sweep_id="y")
    )
    unpaired = compare.compare(first[0], first[1], RATE)
    assert unpaired is not None
    assert not unpaired.paired
    assert not unpaired.shown


def test_a_repetition_that_failed_leaves_its_pair(tmp_path: Path) -> None:
    sweep(tmp_path, {"2": [10, 11, 12], "8": [20, 22, 99]})
    folder = tmp_path / "4"  # repetition 2 of spec.block=2
    (folder / "status.json").write_text((folder / "status.json").read_text().replace("FINISHED", "FAILED"))
    made = load(tmp_path)
    found = compare.compare(made[0], made[1], RATE)
    assert found is not None
    assert (found.n, found.ratio) == (2, pytest.approx(2.0))


@pytest.mark.parametrize(
    ("comparison", "better", "text"),
    [
        (Comparison(1.2, 1.1, 1.3, 5, True), HIGHER, "faster by 1.200x (95 % interval 1.100x..1.300x)"),
        (Comparison(1.2, 1.1, 1.3, 5, True), LOWER, "slower by 1.200x (95 % interval 1.100x..1.300x)"),
        (Comparison(0.5, 0.4, 0.8, 5, True), LOWER, "faster by 2.000x (95 % interval 1.250x..2.500x)"),
        (Comparison(0.5, 0.4, 0.8, 5, True), NEITHER, "lower by 2.000x (95 % interval 1.250x..2.500x)"),
        (Comparison(1.2, 0.9, 1.6, 5, False), HIGHER, "no difference shown (0.900x..1.600x)"),
        (Comparison(1.2, float("nan"), float("nan"), 1, False), HIGHER, "1.200x (one run: no interval)"),
        (None, HIGHER, "-"),
    ],
)
def test_verdicts(comparison: Comparison | None, better: int, text: str) -> None:
    assert " ".join(compare.verdict(comparison, better).split()) == text


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("latency/itl_ms.p50 > 1.05x", ("latency/itl_ms.p50", ">", 1.05, True)),
        ("throughput/tokens_per_s<0.9x", ("throughput/tokens_per_s", "<", 0.9, True)),
        ("  loop/steps  >=  128 ", ("loop/steps", ">=", 128.0, False)),
        ("a <= -1e-3", ("a", "<=", -0.001, False)),
        ("spec/acceptance_at.1 < .5 x", ("spec/acceptance_at.1", "<", 0.5, True)),
    ],
)
def test_expressions(text: str, parts: tuple[object, ...]) -> None:
    found = thresholds.parse(text)
    assert (found.metric, found.operator, found.number, found.relative) == parts


@pytest.mark.parametrize(
    "text", ["", "a", "a >", "a > b", "a == 1", "a >> 1", "a > 1.05y", "> 1", "a > 0x", "a > -1x", "a b > 1"]
)
def test_a_bad_expression_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(InputError) as refused:
        thresholds.parse(text)
    assert "\n" not in str(refused.value)
    assert refused.value.exit_code == 2


@given(st.text(max_size=40) | st.from_regex(r"[a-z/]{1,5} ?[<>=]{1,2} ?[0-9.e+-]{1,12}x?", fullmatch=True))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        found = thresholds.parse(text)
    except InputError:
        return
    assert re.fullmatch(r"[\w./-]+", found.metric)


def lines(expression: str, *folders: Path, certain: bool = False) -> list[tuple[bool, str]]:
    found = thresholds.check(thresholds.parse(expression), load(*folders), certain)
    return [(outcome.failed, outcome.line) for outcome in found]


def test_relative_to_the_first_argument(tmp_path: Path) -> None:
    a = run_folder(tmp_path / "a", sweep_id=None, throughput__tokens_per_s=100.0)
    b = run_folder(tmp_path / "b", sweep_id=None, throughput__tokens_per_s=90.0)
    [(failed, line)] = lines(f"{RATE} < 0.95x", a, b)
    assert failed
    assert "90 against 100" in line
    assert "0.9000x" in line
    assert "no interval" in line
    assert [failed for failed, _ in lines(f"{RATE} < 0.85x", a, b)] == [False]
    assert [failed for failed, _ in lines(f"{RATE} < 0.95x", b, a)] == [False]
    assert [failed for failed, _ in lines(f"{RATE} < 0.95x", a, b, certain=True)] == [False]


def test_a_single_sweep_is_held_against_its_first_configuration(tmp_path: Path) -> None:
    sweep(tmp_path, {"2": [100.0] * 5, "4": [96.0, 97, 95, 96, 96], "8": [50.0, 60, 150, 80, 120]})
    found = lines(f"{RATE} < 0.98x", tmp_path)
    assert [failed for failed, _ in found] == [True, True]
    assert "does not exclude" not in found[0][1]
    assert "does not exclude the threshold" in found[1][1]
    assert [failed for failed, _ in lines(f"{RATE} < 0.98x", tmp_path, certain=True)] == [True, False]


def test_two_sweeps_are_compared_configuration_by_configuration(tmp_path: Path) -> None:
    before = sweep(tmp_path / "a", {"2": [100.0], "8": [200.0]}, sweep_id="a")
    after = sweep(tmp_path / "b", {"2": [100.0], "8": [150.0]}, sweep_id="b")
    assert [failed for failed, _ in lines(f"{RATE} < 0.9x", before, after)] == [False, True]
    other = sweep(tmp_path / "c", {"3": [1.0]}, sweep_id="c")
    with pytest.raises(InputError, match="a configuration like"):
        lines(f"{RATE} < 0.9x", before, other)


def test_an_absolute_number_holds_for_every_configuration(tmp_path: Path) -> None:
    sweep(tmp_path, {"2": [100.0], "8": [200.0]})
    assert [failed for failed, _ in lines(f"{RATE} < 150", tmp_path)] == [True, False]


def test_what_cannot_be_checked_is_refused(tmp_path: Path) -> None:
    a = run_folder(tmp_path / "a", sweep_id=None, latency__itl_ms_p99=None)
    dead = run_folder(tmp_path / "dead", sweep_id=None, status="FAILED")
    for expression, folders, why in (
        (f"{RATE} < 1x", [a], "two runs or more"),
        ("no/such < 1", [a], "has no no/such"),
        ("latency/itl_ms.p99 < 1", [a], "too few"),
        (f"{RATE} < 1x", [a, dead], r"did not \(FAILED\)"),
    ):
        with pytest.raises(InputError, match=why):
            lines(expression, *folders)


def test_a_zero_has_no_ratio_but_an_order(tmp_path: Path) -> None:
    a = run_folder(tmp_path / "a", sweep_id=None, latency__itl_ms_p50=0.0)
    b = run_folder(tmp_path / "b", sweep_id=None, latency__itl_ms_p50=0.5)
    [(failed, line)] = lines("latency/itl_ms.p50 > 1.05x", a, b)
    assert failed
    assert "device_latency" in line
    assert [failed for failed, _ in lines("latency/itl_ms.p50 > 1.05x", a, a)] == [False]
