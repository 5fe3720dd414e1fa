"""Long random play by `python -m xlpk.soak`, and plays with a decision trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kinds import CACHE

from xlpk import layout, soak
from xlpk.backends.play import Played, play
from xlpk.layout import TraceKind


def test_a_traced_play_is_the_same_play_again() -> None:
    """Deadlines included. What is kept of it agrees with its own counts and with its trace."""
    seed = next(seed for seed in range(100) if soak.scene(seed)["rules"]["deadline_one_in"] == 5)
    options = soak.scene(seed)
    options["rules"] |= {"max_requests": 300}
    one, two = (play(CACHE, **options, trace=True) for _ in range(2))
    plain = play(CACHE, **options)
    for result in (one.result, two.result, plain):
        del result["control_ns"]
    assert one.result == two.result == plain
    assert one.entries.tobytes() == two.entries.tobytes()
    assert (one.requests, one.outputs) == (two.requests, two.outputs)
    assert one.result["late"] > 0
    check_kept(one)


def check_kept(played: Played) -> None:
    def of_kind(kind: TraceKind) -> Any:
        return played.entries[played.entries["kind"] == kind]

    ends = of_kind(TraceKind.FINISH)
    assert sorted(ends["value"]) == sorted(one.request_id for one in played.requests) == sorted(played.outputs)
    assert {int(end["value"]): int(end["b"]) for end in ends} == {key: len(out) for key, out in played.outputs.items()}
    assert len(played.requests) == played.result["requests"]
    late = np.count_nonzero(ends["a"] == layout.FinishReason.DEADLINE)
    assert late == played.result["late"] <= sum(one.deadline_ns > 0 for one in played.requests)
    assert sum(len(one.prompt) for one in played.requests) == played.result["prompt_tokens"]
    assert len(of_kind(TraceKind.EVICT)) >= played.result["evictions"]
    for one in played.requests:  # right answers are what it puts out, as far as it came
        if one.answers:
            assert one.answers[: len(played.outputs[one.request_id])] == played.outputs[one.request_id]


def test_scenes_are_drawn_from_their_seed_alone_and_hold() -> None:
    """The first few, one run of `soak` over them: no fault, each cause; a second one has nothing left to do."""
    assert soak.scene(7) == soak.scene(7) != soak.scene(8)
    causes = dict.fromkeys(soak.CAUSES, 0)
    for seed in range(6):
        options = soak.scene(seed)
        options["rules"] |= {"max_requests": 500}
        result = play(CACHE, **options)
        assert (result["fault"], result["detail"]) == ("none", 0), f"seed {seed}"
        for cause in causes:
            causes[cause] += result[cause]
    assert min(causes.values()) > 0, causes


@pytest.fixture
def plays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Seeds as they are played; the one of seed 5 goes wrong."""
    played: list[int] = []

    def fake(_cache: Path, rules: dict[str, int], **_options: Any) -> dict[str, Any]:
        played.append(rules["seed"])
        fault = "refs" if rules["seed"] == 5 else "none"
        return {"fault": fault, "detail": 9, "events": 1000, **dict.fromkeys(soak.CAUSES, 1)}

    monkeypatch.setattr(soak, "play", fake)
    return played


def run(tmp_path: Path, *arguments: str) -> int:
    (tmp_path / "cache").mkdir(exist_ok=True)
    (tmp_path / "cache" / "build").unlink(missing_ok=True)
    (tmp_path / "cache" / "build").symlink_to(CACHE / "build")
    return soak.main(["--outputs", str(tmp_path), "--jobs", "1", *arguments])


def test_it_goes_on_where_it_was_and_stops_at_the_first_fault(
    plays: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "--events", "2000") == 0
    assert "2,000 of 2,000 events" in capsys.readouterr().out
    state = json.loads((tmp_path / "soak.json").read_text())
    assert (state["next_seed"], state["events"], state["causes"]["late"]) == (2, 2000, 2)
    plays.clear()
    assert run(tmp_path, "--events", "1e9") == 1
    assert plays[:4] == [2, 3, 4, 5]
    out = capsys.readouterr().out
    assert "goes on behind seed 1, 2,000 events" in out
    assert "soak: seed 5: refs (detail 9) after 1,000 events" in out
    assert "python -m xlpk.soak --only 5\n" in out
    assert json.loads((tmp_path / "soak.json").read_text())["next_seed"] == 5
    assert run(tmp_path, "--only", "5") == 1
    assert json.loads(capsys.readouterr().out)["fault"] == "refs"
    # Other kernels: from the beginning.
    (tmp_path / "soak.json").write_text((tmp_path / "soak.json").read_text().replace("libxlpk-play", "libxlpk-old"))
    plays.clear()
    assert run(tmp_path, "--events", "1000") == 0
    assert plays[0] == 0


def test_bad_arguments_are_refused(plays: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--events", "many"], "--events=many: a number of events"),
        (["--events", "0"], "--events=0: a number of events"),
        (["--jobs", "-1"], "--jobs=-1: at least 0"),
    ):
        assert soak.main(["--outputs", str(tmp_path), *arguments]) == 2
        assert message in capsys.readouterr().err
    assert plays == []
