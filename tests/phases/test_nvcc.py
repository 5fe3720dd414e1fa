"""What nvcc makes of the kernels for sm_90a: no spills, every phase, and the memory operations that the loop needs.

Without a GPU this is all that can be said of the CUDA build: it compiles, fits, and orders memory as the source says.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from xlpk import layout
from xlpk.backends.memory import dims_record
from xlpk.kv import KV, KVPlan
from xlpk.model import SHAPES
from xlpk.toolchain import Build, build_cubin, dims_defines, find_nvcc

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not on PATH")

ONE_B = SHAPES["llama_1b_shape"]
MODELS = {  # (config, type of weights, type of KV)
    "llama_1b_bf16": (ONE_B, "bf16", "bf16"),
    "head128_fp32": (replace(ONE_B, head_dim=128, num_attention_heads=16, num_key_value_heads=4), "fp32", "fp32"),
    "head80_fp16": (replace(ONE_B, head_dim=80, attention_bias=True, mlp_bias=True), "fp16", "bf16"),
}
SOURCES = ("xl_persistent_megakernel.cu", "launched.cu")


OTHER_ARCHES = ("sm_80", "sm_100a")  # the same source, one model: do they build without spills as well


@pytest.fixture(scope="module")
def builds(cache: Path) -> dict[tuple[str, str], Build]:
    def build(job: tuple[str, str]) -> Build:
        (config, weights, pages), source = MODELS[job[0]], job[1]
        plan = KVPlan.make(KV(dtype=pages), config, weights, 4096)
        return build_cubin(
            source, cache, arch="sm_90a", defines=dims_defines(dims_record(config, plan), weights, pages)
        )

    jobs = [(name, source) for name in MODELS for source in SOURCES]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(jobs, pool.map(build, jobs), strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_one_persistent_kernel_and_one_kernel_a_phase(builds: dict[tuple[str, str], Build], name: str) -> None:
    persistent, launched = (builds[name, source].kernels for source in SOURCES)
    assert [kernel.name for kernel in persistent] == ["xl_persistent_megakernel"]
    phases = [phase for phase in layout.PHASE_NAMES if phase != "control"]
    names = [*(f"xl_phase_{phase}" for phase in phases), "xl_apply_patches"]
    assert sorted(kernel.name for kernel in launched) == sorted(names)
    for kernel in (*persistent, *launched):
        assert kernel.spill_store_bytes == kernel.spill_load_bytes == 0, kernel
        assert kernel.registers <= 255, kernel
        assert kernel.stack_bytes <= 16, kernel  # four random words, of which a token's is picked by index


@pytest.mark.parametrize("arch", OTHER_ARCHES)
def test_other_architectures_build_without_spills(cache: Path, arch: str) -> None:
    config, weights, pages = MODELS["llama_1b_bf16"]
    plan = KVPlan.make(KV(dtype=pages), config, weights, 4096)
    defines = dims_defines(dims_record(config, plan), weights, pages)
    (kernel,) = build_cubin(SOURCES[0], cache, arch=arch, defines=defines).kernels
    assert kernel.spill_store_bytes == kernel.spill_load_bytes == 0, kernel
    assert kernel.registers <= 255, kernel


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


def instructions(build: Build) -> list[str]:
    """Opcodes with their modifiers, in order."""
    tool = find_disassembler()
    if tool is None:
        pytest.skip("neither nvdisasm nor cuobjdump was found (pip install nvidia-cuda-nvdisasm)")
    text = subprocess.run([*tool, str(build.path)], capture_output=True, text=True, check=True).stdout
    return re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)", text, re.MULTILINE)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("source", SOURCES)
def test_nothing_is_read_through_the_constant_path(
    builds: dict[tuple[str, str], Build], name: str, source: str
) -> None:
    """A read-only load of what the launch writes may be stale behind an acquire. There is none."""
    code = instructions(builds[name, source])
    loads = [opcode for opcode in code if opcode.startswith(("LDG", "LD."))]
    assert len(loads) > 100
    assert [opcode for opcode in loads if "CONSTANT" in opcode] == []


@pytest.mark.parametrize("name", MODELS)
def test_releases_and_acquires_of_the_persistent_kernel(builds: dict[tuple[str, str], Build], name: str) -> None:
    """A release is a fence and a strong write, an acquire a strong read that empties the first-level cache."""
    code = instructions(builds[name, "xl_persistent_megakernel.cu"])
    count = Counter(code)

    def strong(operation: str, scope: str) -> int:
        return sum(n for opcode, n in count.items() if re.fullmatch(rf"{operation}\..*STRONG\.{scope}", opcode))

    arrivals = count["REDG.E.ADD.64.STRONG.GPU"]
    claims = strong("ATOMG.*CAS", "GPU")
    published = strong("STG", "SYS")
    assert arrivals >= 4  # control and work, idle, the phases' loop
    assert published >= 8  # heads, tails, the abort word
    assert strong("LDG", "GPU") >= 8
    assert strong("LDG", "SYS") >= 8
    assert count["MEMBAR.ALL.GPU"] + count["MEMBAR.SC.GPU"] >= arrivals + claims
    assert count["MEMBAR.ALL.SYS"] + count["MEMBAR.SC.SYS"] >= published
    assert count["CCTL.IVALL"] >= strong("LDG", "GPU") + strong("LDG", "SYS") + claims
    for index, opcode in enumerate(code):
        if opcode == "REDG.E.ADD.64.STRONG.GPU":
            assert any(before.startswith("MEMBAR") for before in code[max(0, index - 8) : index]), "no fence before it"


@pytest.mark.parametrize("name", MODELS)
def test_a_sampled_row_is_maximised_by_an_atomic(builds: dict[tuple[str, str], Build], name: str) -> None:
    assert Counter(instructions(builds[name, "launched.cu"]))["REDG.E.MAX.64.STRONG.GPU"] >= 1
