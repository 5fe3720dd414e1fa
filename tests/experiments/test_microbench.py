"""The micro-benchmarks: what nvcc makes of them, their logic and host side on the stand-in driver, their arithmetic."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from phases.test_nvcc import find_disassembler

from xlpk.errors import ToolError
from xlpk.layout import AbortReason
from xlpk.toolchain import Build, find_cxx, find_nvcc, kernels_folder

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "microbench"
needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not on PATH")


@pytest.fixture(scope="module", autouse=True)
def on_path() -> Iterator[None]:
    """The experiment's modules import one another by their plain names."""
    names = ("bench", "cases", "tables", "run")
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def cases() -> Any:
    return importlib.import_module("cases")


@pytest.fixture(scope="module")
def built() -> Build:
    build: Build = importlib.import_module("bench").build("sm_90a")
    return build


@pytest.fixture(scope="module")
def opcodes(built: Build) -> dict[str, list[str]]:
    """Of each kernel, with their modifiers, in order."""
    tool = find_disassembler()
    if tool is None:
        pytest.skip("neither nvdisasm nor cuobjdump was found (pip install nvidia-cuda-nvdisasm)")
    text = subprocess.run([*tool, str(built.path)], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"(?:\.section\s+\.text\.|Function : )(\w+)", text)
    pattern = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)", re.MULTILINE)
    return {name: pattern.findall(body) for name, body in zip(parts[1::2], parts[2::2], strict=True)}


def test_one_definition_of_what_both_sides_know(cases: Any) -> None:
    job = (FOLDER / "job.h").read_text()
    struct = re.search(r"struct Job \{(.*?)\n\};", job, re.DOTALL)
    assert struct is not None
    assert tuple(re.findall(r"^ .*?(\w+);", struct[1], re.MULTILINE)) == cases.JOB_FIELDS
    constants = {name: int(value) for name, value in re.findall(r"constexpr int (k\w+) = (\d+);", job)}
    assert constants["kBins"] == cases.BINS
    assert constants["kCyclesABin"] == cases.CYCLES_A_BIN
    assert constants["kLoaderThreads"] == cases.LOADER_THREADS
    assert all(case.slots <= constants["kMostSlots"] for case in cases.all_cases() if case.kernel == "ring")
    assert set(importlib.import_module("bench").SOURCES) == {
        path.name for path in FOLDER.iterdir() if path.suffix in {".h", ".cu"}
    }


def test_every_case_is_a_kernel_and_fits_a_multiprocessor(cases: Any) -> None:
    kernels = set(re.findall(r"^MICRO_TEAM\((\w+)", (FOLDER / "kernels.cu").read_text(), re.MULTILINE)) | {"ring"}
    every = cases.all_cases()
    assert {case.kernel for case in every} == kernels
    assert len({case.name for case in every}) == len(every)
    h200 = cases.Machine(132, cases.STREAM_BYTES, read_bytes_per_ns=4300.0)
    for case in every:
        assert case.shared_bytes + 4096 <= 232448  # what a block may have; 4 KiB for static arrays
        if case.section in ("read", "ring"):
            assert 0.98 <= case.stream_bytes(h200) / cases.STREAM_BYTES <= 1
            assert (case.window_bytes // case.tile_bytes).bit_count() == 1
    sections = Counter(case.section for case in every[:6])
    assert sections == {"read": 2, "barrier": 1, "broadcast": 2, "ring": 1}  # the four numbers come first


@pytest.mark.heavy
@needs_nvcc
def test_no_spills_and_room_for_one_team(built: Build, cases: Any) -> None:
    assert {kernel.name for kernel in built.kernels} == {case.kernel for case in cases.all_cases()} | {"fill", "timer"}
    for kernel in built.kernels:
        assert kernel.spill_store_bytes == kernel.spill_load_bytes == kernel.stack_bytes == 0, kernel
        assert kernel.registers <= 128, kernel
    four_teams = {case.kernel for case in cases.all_cases() if case.blocks == 4}
    assert all(kernel.registers <= 64 for kernel in built.kernels if kernel.name in four_teams)


def test_a_gpu_without_bulk_copies_is_refused() -> None:
    with pytest.raises(ToolError, match=r"sm_89 has no bulk copies: .* compute capability 9\.0 or newer"):
        importlib.import_module("bench").build("sm_89")


@pytest.mark.heavy
@needs_nvcc
def test_loads_have_the_width_and_the_number_that_the_names_say(opcodes: dict[str, list[str]]) -> None:
    checked = 0
    for name, code in opcodes.items():
        loads = [opcode for opcode in code if opcode.startswith("LDG.")]
        if match := re.fullmatch(r"read_(readonly|plain)(\d+)_x(\d+)", name):
            width = {"4": "", "8": ".64", "16": ".128"}[match[2]]
            opcode = f"LDG.E.NA{width}.CONSTANT" if match[1] == "readonly" else f"LDG.E{width}"
            assert loads == [opcode] * int(match[3]), name
            checked += 1
        else:  # what the launch writes must not come through the read-only path
            assert not [opcode for opcode in loads if "CONSTANT" in opcode], name
    assert checked == 7


@pytest.mark.heavy
@needs_nvcc
def test_copies_are_those_that_the_names_say(opcodes: dict[str, list[str]]) -> None:
    for stages in (2, 4, 8):
        count = Counter(opcodes[f"read_async_x{stages}"])
        assert count["LDGSTS.E.BYPASS.128"] >= 4
        assert count["LDGDEPBAR"] == stages
        assert count["DEPBAR.LE"] >= 1
    for name in ("ring", "broadcast_bulk"):
        count = Counter(opcodes[name])
        assert count["UBLKCP.S.G"] == 1
        assert sum(n for opcode, n in count.items() if opcode.startswith("SYNCS.PHASECHK.TRANS64.TRYWAIT")) >= 2
    bulk = opcodes["broadcast_bulk"]
    assert "FENCE.VIEW.ASYNC.G" in bulk[bulk.index("UBLKCP.S.G") - 80 : bulk.index("UBLKCP.S.G")]
    assert Counter(opcodes["broadcast_shared"])["STS.128"] >= 1
    assert all("UBLKCP" not in opcode for opcode in (*opcodes["broadcast_shared"], *opcodes["broadcast_warps"]))


@pytest.mark.heavy
@needs_nvcc
def test_barriers_order_memory_and_differ_as_their_names_say(opcodes: dict[str, list[str]]) -> None:
    barriers = {name: code for name, code in opcodes.items() if name.startswith("barrier_")}
    assert len(barriers) == 9
    for name, code in barriers.items():
        arrivals = [i for i, opcode in enumerate(code) if re.match(r"(REDG|ATOMG)\.E\.ADD|STG\.E\.STRONG\.GPU", opcode)]
        fenced = [any(before.startswith("MEMBAR") for before in code[max(0, i - 8) : i]) for i in arrivals]
        # Every arrival releases; the last one of all is the check's sum.
        assert fenced == [True] * (len(arrivals) - 1) + [False], name
        assert len(arrivals) >= 3, name  # the first barrier and those of the loop
        assert code.count("CCTL.IVALL") >= 2, name
    count = {name.removeprefix("barrier_"): Counter(code) for name, code in barriers.items()}
    assert [name for name in count if count[name]["NANOSLEEP"]] == [
        name for name in count if name in ("ours", "red_acquire_nap")
    ]
    assert all(
        count[name]["REDG.E.ADD.64.STRONG.GPU"] >= 2 for name in ("ours", "red_acquire", "red_relaxed", "grouped")
    )
    assert all(count[name]["ATOMG.E.ADD.64.STRONG.GPU"] >= 2 for name in ("atom_relaxed", "grouped"))
    for kind in ("all", "root", "tree"):
        adds = [opcode for opcode in barriers[f"barrier_flags_{kind}"] if re.match(r"(REDG|ATOMG)\.E\.ADD", opcode)]
        aborts = sum("CAS" in opcode for opcode in barriers[f"barrier_flags_{kind}"])
        assert len(adds) == aborts + 1, kind  # an abort goes into the arrivals of xl::Grid; the check's
    # A relaxed look does not empty the first-level cache, and the one fence behind the wait costs no MEMBAR.
    assert count["red_relaxed"]["CCTL.IVALL"] < count["red_acquire"]["CCTL.IVALL"]
    assert count["red_relaxed"]["MEMBAR.ALL.GPU"] == count["red_acquire"]["MEMBAR.ALL.GPU"]
    # Ours finds an abort in the arrivals and reads no other word.
    assert count["ours"]["LDG.E.STRONG.GPU"] == 0


@pytest.fixture(scope="module")
def ring_threads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ring.h with real threads under ThreadSanitizer; see ring_threads.cpp."""
    folder = tmp_path_factory.mktemp("ring")
    for name in ("job.h", "ring.h"):
        shutil.copy(FOLDER / name, folder)
    shutil.copy(Path(__file__).parent / "ring_threads.cpp", folder / "primitives.h")
    (folder / "main.cpp").write_text('#include "primitives.h"\n')
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=thread", "-pthread", f"-I{kernels_folder()}", f"-I{folder}"]
    command = [*shlex.split(find_cxx()), *flags, str(folder / "main.cpp"), "-o", str(folder / "ring")]
    subprocess.run(command, check=True)
    return folder / "ring"


def play(program: Path, *numbers: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *map(str, numbers)], capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("tiles", "slots", "tile_warps", "barriers"),
    [(60, 4, 8, 7), (61, 1, 8, 0), (64, 8, 1, 7), (75, 16, 1, 0), (40, 12, 8, 40), (7, 12, 8, 20)],
)
def test_the_ring_delivers_every_tile_once(
    ring_threads: Path, tiles: int, slots: int, tile_warps: int, barriers: int
) -> None:
    teams = 3
    done = play(ring_threads, teams, 0, tiles, slots, tile_warps, barriers, 20000)
    words = teams * tiles * 4096 // 8
    assert (done.returncode, done.stdout.split()) == (0, [str(words * (words - 1) // 2), "0", "0", "0"]), done.stderr


@pytest.mark.heavy
@pytest.mark.parametrize("tile_warps", [8, 1])
def test_a_ring_whose_barrier_fails_ends_with_no_copy_under_way(ring_threads: Path, tile_warps: int) -> None:
    done = play(ring_threads, 3, 1, 64, 8, tile_warps, 7, 300)
    assert (done.returncode, done.stdout.split()[1:]) == (0, [str(int(AbortReason.BARRIER_TIMEOUT)), "0", "0"])


@pytest.mark.heavy
def test_threads_see_a_ring_with_too_few_slots_for_warps_of_their_own(ring_threads: Path, cases: Any) -> None:
    assert "data race" in play(ring_threads, 3, 0, 60, 4, 1, 7, 2000).stderr
    own = [case for case in cases.all_cases() if case.tile_warps == 1]
    assert own
    assert all(case.slots % 8 == 0 for case in own)


def test_the_floor_of_a_ring_is_known_where_it_has_a_closed_form(cases: Any) -> None:
    def floor(tiles: int, barriers: int, slots: int, tile: float, held: float, barrier: float) -> float:
        found: float = cases.ring_floor_ns(tiles, barriers, slots, tile_ns=tile, held_ns=held, barrier_ns=barrier)
        return found

    assert floor(1000, 0, 4, 3, 0, 500) == 3000  # memory alone
    assert floor(1000, 0, 4, 3, 2, 500) == 3002
    assert floor(1000, 0, 4, 3, 5, 500) == 3 + 5000  # the consumer alone
    assert floor(1000, 10, 1, 3, 2, 7) == 1000 * 5 + 10 * 7 - 9 * 3  # nothing ahead but the next tile
    assert floor(1000, 10, 100, 3, 0, 7) == 3000 + 7  # a ring that hides every barrier but the last
    assert floor(1000, 10, 10, 3, 0, 50) == 3000 + 10 * 50 - 9 * 30  # a barrier longer than the ring
    assert floor(1000, 10, 1000, 3, 3, 7) == 3 + 3000 + 70  # a consumer as slow as memory never catches up


def test_quantiles_of_a_histogram() -> None:
    bench = importlib.import_module("bench")
    histogram = np.zeros(bench.BINS, np.uint64)
    histogram[[100, 200, 4095]] = 80, 19, 1
    found = bench.distribution(histogram, 2.0)
    assert (found["p10_ns"], found["p50_ns"], found["p90_ns"], found["p99_ns"]) == (402, 402, 802, 802)
    assert found["over_range"] == 1
    assert found["histogram_cycles"] == {"800": 80, "1600": 19, "32760": 1}


def start(out: Path, *options: str, **fault: str) -> subprocess.CompletedProcess[str]:
    """The program on the stand-in driver."""
    from standin.session import child_environment

    command = [sys.executable, str(FOLDER / "run.py"), "--out", str(out), *options]
    own = child_environment() | {f"XLPK_STANDIN_{name}": value for name, value in fault.items()}
    return subprocess.run(command, env=own, capture_output=True, text=True, timeout=400, check=False)


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The kernels are in the cache, so that the time of a run is that of its cases."""
    assert start(tmp_path_factory.mktemp("warm"), "--seconds", "0.001").returncode == 0


def results(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "microbench.json").read_text())
    return found


@pytest.mark.heavy
@needs_nvcc
def test_every_case_runs_and_reads_what_it_should(tmp_path: Path, cases: Any) -> None:
    """On the stand-in: a wrong sum or a vector that is not the one before the barrier is an error of its case."""
    done = start(tmp_path, "--seconds", "100", SMS="14")  # groups of 12 and 2, or 6, 6 and 2 teams
    assert done.returncode == 0, done.stderr
    found = results(tmp_path)
    assert found["not_run"] == []
    assert found["cases"].keys() == {case.name for case in cases.all_cases()}
    assert [record["error"] for record in found["cases"].values() if "error" in record] == []
    assert "stand-in" in found["device"]["name"]
    assert found["device"]["uuid"].startswith("GPU-")
    for case in cases.all_cases():
        record = found["cases"][case.name]
        assert len(record["samples_us"]) == len(record["event_us"]) >= 1
        if case.section == "barrier":
            assert sum(record["histogram_cycles"].values()) == record["barriers"] > 0
        if case.section == "ring":
            assert record["floor_us"] > 0
    page = (tmp_path / "microbench.md").read_text()
    assert page.count("\n| ") == len(found["cases"]) + 4  # a row each, a head a table
    last = json.loads(done.stdout.splitlines()[-1])
    assert None not in last.values()


@pytest.mark.heavy
@needs_nvcc
@pytest.mark.usefixtures("warm")
def test_a_run_that_is_cut_short_says_what_it_left_and_goes_on(tmp_path: Path, cases: Any) -> None:
    done = start(tmp_path, "--seconds", "0.001")
    assert done.returncode == 0, done.stderr
    assert len(results(tmp_path)["not_run"]) == len(cases.all_cases())
    assert "Not run, out of time: read_readonly16_x8, " in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["barrier_p50_ns"] is None
    assert start(tmp_path, "--resume", "--seconds", "10").returncode == 0
    first = results(tmp_path)
    assert cases.READ.name in first["cases"]
    assert start(tmp_path, "--resume", "--seconds", "0.001").returncode == 0
    assert results(tmp_path)["cases"][cases.READ.name] == first["cases"][cases.READ.name]
    other = start(tmp_path, "--resume", "--bytes", "16MiB")
    assert (other.returncode, other.stderr.count("\n")) == (2, 1)
    assert "results of the same device, kernels and --bytes" in other.stderr


@pytest.mark.heavy
@needs_nvcc
def test_what_is_refused_is_refused_in_one_line(tmp_path: Path) -> None:
    refusals = {
        "--out": start(FOLDER.parent / "results" / "standin"),
        "--seconds": start(tmp_path, "--seconds", "0"),
        "--bytes": start(tmp_path, "--bytes", "4KiB"),
    }
    for option, done in refusals.items():
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert done.stderr.startswith(f"error: {option}=")
    assert not (FOLDER.parent / "results" / "standin").exists()


@pytest.mark.heavy
@needs_nvcc
@pytest.mark.usefixtures("warm")
def test_a_team_that_does_not_come_fails_its_case_only(tmp_path: Path, cases: Any) -> None:
    done = start(tmp_path, "--seconds", "12", FAULT="missing_team")
    assert done.returncode == 0, done.stderr
    found = results(tmp_path)["cases"]
    assert "error" not in found[cases.READ.name]  # has no barrier
    ring = found[replace(cases.RING, rounds=0).name]
    assert "timeout within 3000 ms" in ring["error"]
    assert not ring["fatal"]


@pytest.mark.heavy
@needs_nvcc
@pytest.mark.usefixtures("warm")
def test_a_hang_ends_the_program_and_is_not_tried_again(tmp_path: Path, cases: Any) -> None:
    done = start(tmp_path, FAULT="freeze:2500")
    assert (done.returncode, done.stderr.count("\n")) == (4, 1), done.stderr
    assert "HANG" in done.stderr
    found = results(tmp_path)["cases"]
    hung = [name for name, record in found.items() if record.get("fatal")]
    assert len(hung) == 1
    assert start(tmp_path, "--resume", "--seconds", "0.001").returncode == 0
    assert results(tmp_path)["cases"][hung[0]] == found[hung[0]]
