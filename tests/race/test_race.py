"""The kernels with real threads for a team's threads, under sanitizers: no report, the same tokens as the plain build.
And planted faults, each of which must be found.

What is proved is the logic and the C++ memory model of what every backend compiles; not warps, not a compiler for GPUs.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from race.driver import CUT, SPECS, TIGHT, WAVE, requests, waves

from xlpk.speculation import Ngram, Oracle, Proposer
from xlpk.toolchain import Build, build_cpu_library, find_cxx, kernels_folder
from xlpk.workload import Request

pytestmark = pytest.mark.heavy

DRIVER = Path(__file__).with_name("driver.py")
FOUND = 66  # exit status of a process whose sanitizer has something to report
RACE = ("-DXL_RACE", "-O1", "-g")
SANITIZERS = {  # name -> (flags, runtime to preload, options)
    "thread": (("-fsanitize=thread",), "libtsan.so", {"TSAN_OPTIONS": f"exitcode={FOUND} halt_on_error=1"}),
    "address": (
        ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        "libasan.so",
        {"ASAN_OPTIONS": f"detect_leaks=0:exitcode={FOUND}", "UBSAN_OPTIONS": f"print_stacktrace=1:exitcode={FOUND}"},
    ),
}
KINDS = ("none", "ngram", "oracle", "chaos")
SCENARIOS = [f"{orchestration}-{kind}" for orchestration in ("persistent", "launched") for kind in KINDS]
SCENARIOS += ["persistent-lease", "persistent-pressure", "launched-swap", "persistent-swap"]
SCENARIOS += ["persistent-storm", "launched-storm"]


def environment(sanitizer: str) -> dict[str, str]:
    """Of a process that has the sanitizer's runtime; skips where there is none."""
    _, runtime, options = SANITIZERS[sanitizer]
    command = [*shlex.split(find_cxx()), f"-print-file-name={runtime}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"{find_cxx()} has no {runtime}")
    env = {**os.environ, **options, "LD_PRELOAD": path}
    tried = subprocess.run([sys.executable, "-c", "print(1)"], env=env, capture_output=True, text=True, check=False)
    if tried.returncode != 0 or tried.stdout != "1\n":
        pytest.skip(f"{runtime} cannot be preloaded here: {(tried.stderr.strip() or 'no output').splitlines()[0]}")
    return env


@dataclass
class Run:
    """What a process of the driver left behind."""

    returncode: int
    report: str
    outputs: dict[str, dict[str, tuple[str, list[int], list[list[int]]]]]
    causes: dict[str, dict[str, int]]


def drive(
    build: Build, checkpoint: Path, folder: Path, answers: Path, scenarios: list[str], env: dict[str, str]
) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "out.json"
    command = [sys.executable, str(DRIVER), str(build.path), str(checkpoint), str(answers), str(out), *scenarios]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=900)
    left = json.loads(out.read_text()) if out.exists() else {"outputs": {}, "causes": {}}
    return Run(done.returncode, done.stderr, left["outputs"], left["causes"])


@pytest.fixture(scope="module")
def model_path(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("race")


@pytest.fixture(scope="module")
def answers(cache: Path, model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The right texts by request id: the plain library, serially."""
    folder = tmp_path_factory.mktemp("answers")
    build = build_cpu_library(cache, extra_flags=["-DXL_NO_AMX"])  # the order of sums of the race build
    run = drive(build, model_path, folder, folder / "none", ["persistent-none"], dict(os.environ))
    assert run.returncode == 0, run.report
    texts = {request_id: tokens for request_id, (_, tokens, _) in run.outputs["persistent-none"].items()}
    (folder / "answers.json").write_text(json.dumps(texts))
    return folder / "answers.json"


def expected_verifications(spec: Proposer, request: Request, text: list[int]) -> list[list[int]]:
    """[drafts, accepted] of each verification of a request with this output."""
    done, out = 1, []
    while done < len(text):
        count = min(spec.block, len(text) - done) - 1
        drafts: list[int] = []
        if isinstance(spec, Ngram):
            drafts = spec.propose([*request.prompt, *text[:done]], count)
        elif isinstance(spec, Oracle):
            wrong = [(done + j + 1) % spec.mismatch_stride == 0 for j in range(count)]
            drafts = [-1 if wrong[j] else text[done + j] for j in range(count)]
        accepted = next((j for j, draft in enumerate(drafts) if draft != text[done + j]), len(drafts))
        out.append([len(drafts), accepted])
        done += accepted + 1
    return out


def mistakes(run: Run, answers: Path) -> list[str]:
    """Requests that ended by length must have the whole text by the right verifications; others a part of it."""
    texts = json.loads(answers.read_text())
    wrong = []
    for scenario, outputs in run.outputs.items():
        kind = scenario.split("-")[1]
        batch = requests({})[1 if kind in TIGHT else 0 :]
        for request in waves(batch) if kind == "storm" else batch:
            reason, tokens, verified = outputs[str(request.request_id)]
            text = texts[str(request.request_id % WAVE)]
            where = f"{scenario} request {request.request_id} ({reason})"
            if tokens != (text if reason == "length" else text[: len(tokens)]):
                wrong.append(f"{where}: {tokens} instead of {text}")
            if reason != "length" and kind not in CUT:
                wrong.append(f"{where} instead of length")
            expected = expected_verifications(SPECS[kind], request, text)
            if reason == "length" and verified != expected:
                wrong.append(f"{where}: verifications {verified} instead of {expected}")
    return wrong


@pytest.fixture(scope="module")
def pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(2)


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_no_report_and_the_same_tokens(
    cache: Path, model_path: Path, answers: Path, tmp_path: Path, pool: ThreadPoolExecutor, sanitizer: str
) -> None:
    env = environment(sanitizer)
    build = build_cpu_library(cache, extra_flags=(*RACE, *SANITIZERS[sanitizer][0]))
    halves = SCENARIOS[: len(SCENARIOS) // 2], SCENARIOS[len(SCENARIOS) // 2 :]
    runs = pool.map(lambda part: drive(build, model_path, tmp_path / part[0], answers, part, env), halves)
    causes: Counter[str] = Counter()  # of all scenarios: whether requests meet in one of them is a matter of time
    for run, scenarios in zip(runs, halves, strict=True):
        assert run.returncode == 0, run.report[-6000:]
        assert run.report == ""
        assert list(run.outputs) == scenarios
        assert mistakes(run, answers) == []
        for scenario, outputs in run.outputs.items():
            if scenario.endswith("chaos"):
                assert "cancelled" in {reason for reason, *_ in outputs.values()}
            if scenario.endswith(("ngram", "oracle", "lease")):
                verified = [pair for _, _, pairs in outputs.values() for pair in pairs]
                assert any(accepted > 0 for _, accepted in verified)
            assert not run.causes[scenario]["moved"] or scenario.endswith(("swap", "storm"))
            causes.update(run.causes[scenario])
            causes.update(reason or "stopped" for reason, *_ in outputs.values())
            if scenario.endswith("oracle"):
                assert any(accepted < drafts for drafts, accepted in verified)
    wanted = ("preempted", "moved", "evicted", "cached", "length", "cancelled", "deadline", "stopped")
    assert [name for name in wanted if not causes[name]] == []


# ---------------------------------------------------------------------------------------------- planted faults


@dataclass(frozen=True)
class Fault:
    """One edit of a copy of the kernels, and a scenario that trips over it."""

    file: str
    old: str
    new: str
    scenario: str = "persistent-none"
    sanitizer: str = "thread"


ARRIVE = "add_release(&state->arrivals, 1);"
RELAXED_ARRIVE = "__atomic_fetch_add(&state->arrivals, uint64_t(1), __ATOMIC_RELAXED);"
AWAIT = "load_acquire(&state->arrivals)"
RELAXED_AWAIT = "__atomic_load_n(&state->arrivals, __ATOMIC_RELAXED)"
NORMED = """.store(out + size_t(r) * n + i, lane);
    }
  }
  team.sync();"""
SUMMED = "        bins[b * copies] = sum;\n      }\n"
TILE = "    team.sync();  // the next tile overwrites `{}`\n"


def relaxed(store: str) -> str:
    """store_release[_system](&word, value) without its release."""
    word, value = store[store.index("(") + 1 : -2].split(", ", 1)
    return f"__atomic_store_n({word}, {value}, __ATOMIC_RELAXED);"


SUBMIT_TAIL = "store_release_system(&mailbox.submit_tail, tail + 1);"
TAILS = "store_release_system(&p.mailbox->event_tail, state.event_tail, state.step_tail);"
RELAXED_EVENT_TAIL = "__atomic_store_n(&p.mailbox->event_tail, state.event_tail, __ATOMIC_RELAXED);"
RELAXED_STEP_TAIL = "__atomic_store_n(&p.mailbox->step_tail, state.step_tail, __ATOMIC_RELAXED);"
PROMPT_HEAD = "store_release_system(&p.mailbox->prompt_head, state.prompt_head);"
SUBMIT_HEAD = "store_release_system(&p.mailbox->submit_head, state.submit_head);"
ISSUED = "store_release(&session->issued, next + 1);"
COMPLETED = "store_release(&s.completed, next + 1);"

FAULTS = {
    "normed rows read before they are written": Fault("phases/norm.h", NORMED, NORMED.removesuffix("\n  team.sync();")),
    "qkv: next tile too early": Fault("phases/qkv.h", TILE.format("normed"), ""),
    "gate_up: next tile too early": Fault("phases/gate_up.h", TILE.format("normed"), ""),
    "output: next tile too early": Fault("phases/output.h", TILE.format("merged"), ""),
    "output: merged rows read before they are written": Fault(
        "phases/output.h", "    }\n  }\n  team.sync();\n}", "    }\n  }\n}"
    ),
    "attend: scores read before they are written": Fault("phases/attend.h", "scores);\n  team.sync();\n", "scores);\n"),
    "attend: weights and values read before they are there": Fault(
        "phases/attend.h", "    team.copied();\n    team.sync();\n    for", "    team.copied();\n    for"
    ),
    "attend: later values read before they are there": Fault(
        "phases/attend.h", "      team.copied();\n      team.sync();\n", "      team.copied();\n"
    ),
    "attend: values overwritten too early": Fault(
        "phases/attend.h", "      team.sync();  // the next values, or the next item, overwrite what was read\n", ""
    ),
    "grid barrier: arrives relaxed": Fault("sync.h", ARRIVE, RELAXED_ARRIVE),
    "grid barrier: waits relaxed": Fault("sync.h", AWAIT, RELAXED_AWAIT),
    "grid barrier: the team does not gather first": Fault(
        "sync.h", "    ++epoch;\n    team_.sync();\n", "    ++epoch;\n"
    ),
    "idle: control rewrites the descriptor while others read it": Fault(
        "persistent.h", "      if (!grid.sync(team)) return;  // nobody", "      // nobody"
    ),
    "leases: a launch begins without a census": Fault(
        "persistent.h", "  if (!grid.census(team, p.census_ns)) return;\n", "", "persistent-lease"
    ),
    "planner: control does not wait for it": Fault(
        "persistent.h",
        "    if (grid.team == 0 && p.planner) {\n      if (!await",
        "    if (false) {\n      if (!await",
        "persistent-swap",
    ),
    "planner: checks in relaxed": Fault(
        "sync.h",
        "add_release(&grid.state->check_ins, 1)",
        "__atomic_fetch_add(&grid.state->check_ins, uint64_t(1), __ATOMIC_RELAXED)",
        "persistent-swap",
    ),
    "leases: barriers start anew": Fault(
        "sync.h", "load_acquire(&p.grid->arrivals) / uint64_t(teams)", "0 * uint64_t(teams)", "persistent-lease"
    ),
    "forward: a team asks late whether there is a filter phase": Fault(
        "forward.h", "Phase::kFilter && !filters", "Phase::kFilter && p.step->n_filter_rows == 0"
    ),
    "filter: bins cleared while they are read": Fault(
        "phases/filter.h", "    team.sync();  // and the next round clears the bins\n", ""
    ),
    "filter: bins read before all copies are summed": Fault("phases/filter.h", f"{SUMMED}      team.sync();\n", SUMMED),
    "filter: a sum is read before all have added": Fault(
        "phases/filter.h", "cells[team.warp()] = own;\n  team.sync();\n", "cells[team.warp()] = own;\n"
    ),
    "filter: a sum overwritten while it is read": Fault(
        "phases/filter.h", "  team.sync();  // the cells are written again\n  return all;\n", "  return all;\n"
    ),
    "scheduler: counts are entered while they are cleared": Fault(
        "stages/scheduler.h", "    bias[i] = 0.0f;\n  }\n  team.sync();\n", "    bias[i] = 0.0f;\n  }\n"
    ),
    "draft: shared words reused too early": Fault(
        "stages/draft.h",
        "XL_FN int team_max(Team& team, int value) {\n  team.sync();\n",
        "XL_FN int team_max(Team& team, int value) {\n",
        "persistent-ngram",
    ),
    "scheduler: a prompt is hashed before it is copied": Fault(
        "stages/scheduler.h", "  copy_prompt(team, p, slot_id);\n  team.sync();\n", "  copy_prompt(team, p, slot_id);\n"
    ),
    "launched: the shared word is rewritten while it is read": Fault(
        "cpu/threads.h", "  team.sync();  // the shared word may still be read\n", "", "launched-none"
    ),
    "launched: a command is published before it is written": Fault("cpu.cpp", ISSUED, relaxed(ISSUED), "launched-none"),
    "launched: a step is done before it is written": Fault(
        "cpu/threads.h", COMPLETED, relaxed(COMPLETED), "launched-none"
    ),
    "submissions published before they are written": Fault(
        "cpu/rings.h", SUBMIT_TAIL, relaxed(SUBMIT_TAIL), "persistent-quiet"
    ),
    "submissions given back before they are read": Fault(  # either head alone would hide it: the host reads both
        "stages/scheduler.h",
        f"{PROMPT_HEAD}\n    {SUBMIT_HEAD}",
        f"{relaxed(PROMPT_HEAD)}\n    {relaxed(SUBMIT_HEAD)}",
        "persistent-quiet",
    ),
    "events published before they are written": Fault(  # the tail of steps, written next, would hide it
        "control.h", TAILS, f"{RELAXED_EVENT_TAIL}\n    {RELAXED_STEP_TAIL}"
    ),
    "steps published before they are written": Fault(
        "control.h", TAILS, f"store_release_system(&p.mailbox->event_tail, state.event_tail);\n    {RELAXED_STEP_TAIL}"
    ),
    "a maximum without an atomic": Fault(
        "phases/lm_head.h",
        "max_relaxed(&p.best[2 * first + i], best[i]);",
        "if (p.best[2 * first + i] < best[i]) p.best[2 * first + i] = best[i];",
    ),
    "one normed row too many": Fault("phases/norm.h", "item < count * parts; item", "item <= count * parts; item"),
    "address: a row behind the last one": Fault(
        "phases/embed.h",
        "p.best[2 * r] = p.best[2 * r + 1] = 0;",
        "p.best[2 * r] = p.best[2 * p.max_rows + 16] = 0;",
        sanitizer="address",
    ),
}


def plant(fault: Fault, folder: Path) -> Path:
    """A copy of the kernels with the edit."""
    shutil.copytree(kernels_folder(), folder)
    file = folder / fault.file
    text = file.read_text()
    assert fault.old in text, f"{fault.file} no longer has this line: {fault.old}"
    file.write_text(text.replace(fault.old, fault.new))
    return folder


@pytest.fixture(scope="module")
def planted(
    model_path: Path,
    answers: Path,
    pool: ThreadPoolExecutor,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> dict[str, Future[Run]]:
    """Every chosen fault, built and run in the background, two at a time."""
    root = tmp_path_factory.mktemp("planted")
    using = [item for item in request.session.items if "planted" in getattr(item, "fixturenames", ())]
    chosen = [item.callspec.params["name"] for item in using]  # type: ignore[attr-defined]
    environments = {sanitizer: environment(sanitizer) for sanitizer in {FAULTS[name].sanitizer for name in chosen}}

    def work(number: int, fault: Fault) -> Run:
        kernels = plant(fault, root / str(number) / "kernels")
        flags = (*RACE, *SANITIZERS[fault.sanitizer][0])
        build = build_cpu_library(root / str(number), extra_flags=flags, folder=kernels)
        scenarios, env = [fault.scenario], environments[fault.sanitizer]
        return drive(build, model_path, root / str(number), answers, scenarios, env)

    return {name: pool.submit(work, number, FAULTS[name]) for number, name in enumerate(chosen)}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(planted: dict[str, Future[Run]], answers: Path, name: str) -> None:
    """By a report, a wrong text or verification, or an aborted loop."""
    run = planted[name].result()
    if run.returncode == 0:
        assert mistakes(run, answers) != [], "nothing noticed"
    else:
        known = "WARNING: ThreadSanitizer", "ERROR: AddressSanitizer", "runtime error", "the loop aborted"
        assert any(word in run.report for word in known), run.report[-3000:]
