"""What nvcc makes of the kernels: no spills, every phase, and the memory operations that the loop needs.

Without a GPU this is all that can be said of the CUDA build: it compiles, fits, and orders memory as the source says.
Which builds there are stands in tests/cubins.py.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache as memoize
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet
from cubins import CARRIERS, CUBINS, MOST

from xlpk import layout
from xlpk.toolchain import Build, find_nvcc

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not on PATH")

PERSISTENT = [name for name, cubin in CUBINS.items() if cubin.source == "xl_persistent_megakernel.cu"]
LAUNCHED = [name for name, cubin in CUBINS.items() if cubin.source == "launched.cu"]


def each(names: Iterable[str]) -> list[ParameterSet]:
    """The carriers of the stand-in driver in the quick suite, the others under `heavy`: a minute of nvcc."""
    quick = CARRIERS.values()
    return [pytest.param(name, marks=[] if CUBINS[name] in quick else pytest.mark.heavy) for name in names]


@pytest.fixture(scope="module")
def builds(cache: Path, request: pytest.FixtureRequest) -> dict[str, Build]:
    """The cubins that are asked for."""
    using = [item for item in request.session.items if "builds" in getattr(item, "fixturenames", ())]
    asked = sorted({item.callspec.params.get("name") for item in using if hasattr(item, "callspec")} & {*CUBINS})
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(asked, pool.map(lambda name: CUBINS[name].build(cache), asked), strict=True))


def test_few_cubins_cover_what_there_is() -> None:
    """Two more are asked for elsewhere: the stand-in driver's own kernels, and the micro-benchmarks."""
    assert len(CUBINS) + 2 <= MOST
    cubins = CUBINS.values()
    assert {cubin.weights for cubin in cubins} == {"bf16", "fp16", "fp32"}
    assert {cubin.arch for cubin in cubins} == {"sm_80", "sm_90a", "sm_100a"}
    assert {cubin.config.head_dim for cubin in cubins} == {64, 80, 128}
    assert {CUBINS[name].layout for name in PERSISTENT} == {"rows", "tiles"}
    assert LAUNCHED


@pytest.mark.parametrize("name", each(CUBINS))
def test_one_persistent_kernel_or_one_kernel_a_phase(builds: dict[str, Build], name: str) -> None:
    kernels = builds[name].kernels
    if name in PERSISTENT:
        expected = ["xl_persistent_megakernel"]
    else:
        expected = [f"xl_phase_{phase}" for phase in layout.PHASE_NAMES if phase != "control"] + ["xl_apply_patches"]
    assert sorted(kernel.name for kernel in kernels) == sorted([*expected, "xl_retile"])
    for kernel in kernels:
        assert kernel.spill_store_bytes == kernel.spill_load_bytes == 0, kernel
        assert kernel.registers <= 255, kernel
        assert kernel.stack_bytes <= 16, kernel  # four random words, of which a token's is picked by index
        # Static: Team.shared_ints, an int a thread, of which control makes use. Scratch is asked for at the launch.
        resident = kernel.name == "xl_persistent_megakernel"
        assert kernel.shared_bytes == (4 * layout.GPU_THREADS if resident else 0), kernel


def find_disassembler() -> list[str] | None:
    """cuobjdump or nvdisasm: on PATH, beside nvcc, or from their Python packages."""
    nvcc = find_nvcc()
    folders = [Path(nvcc).resolve().parent] if nvcc else []
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations or [] if spec else []:
        folders += Path(root).glob("*/bin")
    for tool, options in (("nvdisasm", ["-c"]), ("cuobjdump", ["-sass"])):
        for found in (shutil.which(tool), *(shutil.which(tool, path=str(folder)) for folder in folders)):
            if found:
                return [found, *options]
    return None


@memoize
def disassembly(path: Path) -> str:
    tool = find_disassembler()
    if tool is None:
        pytest.skip("neither nvdisasm nor cuobjdump was found (pip install nvidia-cuda-nvdisasm)")
    return subprocess.run([*tool, str(path)], capture_output=True, text=True, check=True).stdout


def instructions(build: Build, kernel: str = "") -> list[str]:
    """Opcodes with their modifiers, in order, of one kernel or of all."""
    text = disassembly(build.path)
    if kernel:  # its code follows its name, as nvdisasm and as cuobjdump write it
        text = re.split(rf"^(?:\.text\.{kernel}:|\s+Function : {kernel})$", text, flags=re.MULTILINE)[1]
        text = re.split(r"^(?:\s*\.section\s|\s+Function : )", text, maxsplit=1, flags=re.MULTILINE)[0]
    return re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)", text, re.MULTILINE)


@pytest.mark.parametrize("name", each(CUBINS))
def test_nothing_is_read_through_the_constant_path(builds: dict[str, Build], name: str) -> None:
    """A read-only load of what the launch writes may be stale behind an acquire. There is none."""
    code = instructions(builds[name])
    loads = [opcode for opcode in code if opcode.startswith(("LDG", "LD."))]
    assert len(loads) > 100
    assert [opcode for opcode in loads if "CONSTANT" in opcode] == []


@pytest.mark.parametrize("name", each(PERSISTENT))
def test_releases_and_acquires_of_the_persistent_kernel(builds: dict[str, Build], name: str) -> None:
    """A release is a fence and a strong write, an acquire a strong read that empties the first-level cache."""
    code = instructions(builds[name])
    count = Counter(code)

    def strong(operation: str, scope: str) -> int:
        return sum(n for opcode, n in count.items() if re.fullmatch(rf"{operation}\..*STRONG\.{scope}", opcode))

    added = {"RED.E.ADD.64.STRONG.GPU", "REDG.E.ADD.64.STRONG.GPU"}  # by architecture
    arrivals = sum(count[opcode] for opcode in added)
    claims = strong("ATOMG.*CAS", "GPU")
    published = strong("STG", "SYS")
    assert arrivals >= 4  # control and work, idle, the phases' loop
    assert published >= 8  # heads, tails, the abort word
    assert strong("LDG", "GPU") >= 8
    # Control and the idle loop read the host's line by four loads that share an acquire (nvcc narrows some);
    # the tails of a round go out in one store.
    assert count["LDG.E.128.STRONG.SYS"] >= 6
    assert count["STG.E.128.STRONG.SYS"] == 1
    assert count["MEMBAR.ALL.GPU"] + count["MEMBAR.SC.GPU"] >= arrivals + claims
    assert count["MEMBAR.ALL.SYS"] + count["MEMBAR.SC.SYS"] >= published - 1  # the sign of life orders nothing
    assert count["CCTL.IVALL"] >= strong("LDG", "GPU") + claims + 3  # control, idle, cancellations
    for index, opcode in enumerate(code):
        if opcode in added:
            assert any(before.startswith("MEMBAR") for before in code[max(0, index - 8) : index]), "no fence before it"


@pytest.mark.parametrize("name", each(LAUNCHED))
def test_a_sampled_row_is_maximised_by_an_atomic(builds: dict[str, Build], name: str) -> None:
    count = Counter(instructions(builds[name], "xl_phase_lm_head"))
    assert count["REDG.E.MAX.64.STRONG.GPU"] + count["RED.E.MAX.64.STRONG.GPU"] >= 1


@pytest.mark.parametrize("name", each(LAUNCHED))
@pytest.mark.parametrize("phase", ["qkv", "output", "gate_up", "down", "lm_head"])
def test_weights_are_read_sixteen_bytes_at_a_time(builds: dict[str, Build], name: str, phase: str) -> None:
    """In either layout: each load of weights feeds eight multiplies, or four of float32."""
    count = Counter(instructions(builds[name], f"xl_phase_{phase}"))
    wide = sum(n for opcode, n in count.items() if re.fullmatch(r"LDG?\.E\.128(\.\w+)*", opcode))
    assert wide >= 8


@pytest.mark.parametrize("name", each(CUBINS))
def test_a_piece_of_a_matrix_is_moved_sixteen_bytes_at_a_time(builds: dict[str, Build], name: str) -> None:
    count = Counter(instructions(builds[name], "xl_retile"))
    assert count["LDG.E.128"] >= 1
    assert count["STG.E.128"] >= 1


@pytest.mark.parametrize("name", each(PERSISTENT))
def test_a_note_of_the_flight_recorder_is_one_store(builds: dict[str, Build], name: str) -> None:
    """A packet over the bus each: of control and of the forward phases, whose loops the compiler copies."""
    notes = [opcode for opcode in instructions(builds[name]) if re.fullmatch(r"STG?\.E\.128", opcode)]
    assert len(notes) >= 4


@pytest.mark.parametrize("name", each(LAUNCHED))
def test_attention_has_many_keys_and_values_in_flight(builds: dict[str, Build], name: str) -> None:
    """Eight loads of keys are issued before the first is used; values go to shared memory past registers."""
    code = instructions(builds[name], "xl_phase_attend")
    most = run = 0
    for opcode in code:
        if opcode == "LDG.E.128":
            run += 1
        elif opcode.startswith(("FFMA", "SHFL", "BAR", "BRA", "HADD2.F32", "PRMT")):
            run = 0
        most = max(most, run)
    assert most >= 8
    assert code.count("LDGSTS.E.BYPASS.128") >= 4


@pytest.mark.parametrize("name", each(LAUNCHED))
def test_the_filter_adds_to_its_bins_without_a_loop(builds: dict[str, Build], name: str) -> None:
    """64 bits in shared memory are a loop of compare and swap; halves with a carry are two additions."""
    shared = Counter(opcode for opcode in instructions(builds[name], "xl_phase_filter") if opcode.startswith("ATOMS"))
    assert shared["ATOMS.ADD"] >= 4
    assert not any("CAS" in opcode for opcode in shared)
