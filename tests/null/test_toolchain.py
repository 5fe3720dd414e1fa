"""What is built when, and what is said when it cannot be; compilers here are small scripts."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from xlpk import toolchain
from xlpk.errors import ToolError

PTXAS = """ptxas info    : Compiling entry function 'one' for 'sm_90a'
ptxas info    : Function properties for one
    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 212 registers, used 1 barriers, 1024 bytes smem
ptxas info    : Compiling entry function 'two' for 'sm_90a'
ptxas info    : Function properties for two
    48 bytes stack frame, 32 bytes spill stores, 40 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
"""


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that counts its calls, writes its last argument, and fails if `fail` stands beside it."""
    script = tmp_path / "c++"
    script.write_text(
        f"""#!/bin/sh
case "$*" in --version) echo "test compiler 1.0"; exit 0;; esac
echo call >> {tmp_path}/calls
if [ -e {tmp_path}/fail ]; then echo "cpu.cpp:3:1: error: no such luck" >&2; exit 1; fi
for last; do :; done
echo built > "$last"
"""
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return tmp_path


def sources(folder: Path) -> Path:
    (folder / "kernels").mkdir()
    (folder / "kernels" / "cpu.cpp").write_text("int x;")
    (folder / "kernels" / "part.h").write_text("// part")
    return folder / "kernels"


def calls(folder: Path) -> int:
    return len((folder / "calls").read_text().splitlines())


def test_a_build_is_made_once_and_again_when_an_input_changes(compiler: Path) -> None:
    kernels, cache = sources(compiler), compiler / "cache"
    first = toolchain.build_cpu_library(cache, folder=kernels)
    again = toolchain.build_cpu_library(cache, folder=kernels)
    assert (first.cached, again.cached, calls(compiler)) == (False, True, 1)
    assert first.path == again.path
    assert first.path.read_text() == "built\n"
    assert "test compiler 1.0" in first.compiler
    other_flags = toolchain.build_cpu_library(cache, folder=kernels, extra_flags=["-DX"])
    (kernels / "part.h").write_text("// another part")
    other_text = toolchain.build_cpu_library(cache, folder=kernels)
    assert len({first.path, other_flags.path, other_text.path}) == 3
    assert calls(compiler) == 3


def test_a_failed_build_says_where_and_leaves_nothing(compiler: Path) -> None:
    kernels, cache = sources(compiler), compiler / "cache"
    (compiler / "fail").touch()
    with pytest.raises(ToolError, match=r"cpu\.cpp:3:1: error: no such luck"):
        toolchain.build_cpu_library(cache, folder=kernels)
    assert not list((cache / "build").iterdir())


def test_no_compiler_is_one_line_with_a_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ToolError) as refused:
        toolchain.find_cxx()
    assert "g++, clang++" in str(refused.value)
    assert "apt-get install g++" in str(refused.value)
    assert "pip install 'xlpk[compiler]'" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_clang_is_taken_where_there_is_no_gcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    (tmp_path / "clang++").write_text("#!/bin/sh\n")
    os.chmod(tmp_path / "clang++", 0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert toolchain.find_cxx() == "clang++"


def test_the_wheel_is_the_last_resort(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "ziglang").mkdir()
    (tmp_path / "ziglang" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert toolchain.find_cxx().endswith("-m ziglang c++")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ToolError, match="CXX=no-such-compiler"):
        toolchain.find_cxx()


def test_nvcc_of_the_path_comes_before_that_of_the_wheels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    of_wheels, on_path = tmp_path / "nvidia" / "cu13" / "bin" / "nvcc", tmp_path / "bin" / "nvcc"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PATH", str(on_path.parent))
    for nvcc in (of_wheels, on_path):
        nvcc.parent.mkdir(parents=True)
        nvcc.touch(mode=0o755)
        assert toolchain.find_nvcc() == str(nvcc)


def test_ptxas_reports_are_read() -> None:
    one, two = toolchain.parse_ptxas(PTXAS)
    assert (one.name, one.registers, one.spill_store_bytes, one.spill_load_bytes) == ("one", 212, 0, 0)
    assert (one.stack_bytes, one.shared_bytes) == (16, 1024)
    assert (two.name, two.registers, two.spill_store_bytes, two.spill_load_bytes) == ("two", 255, 32, 40)
    assert (two.stack_bytes, two.shared_bytes) == (48, 0)


def test_flags_forbid_contraction() -> None:
    assert "-ffp-contract=off" in toolchain.CXX_FLAGS
    assert "-fmad=false" in toolchain.NVCC_FLAGS
    assert not {"-ffast-math", "-Ofast", "--use_fast_math"} & {*toolchain.CXX_FLAGS, *toolchain.NVCC_FLAGS}


def test_without_nvcc_a_cubin_of_the_same_sources_will_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def compiled(command: Sequence[str], target: Path) -> tuple[str, float]:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"cubin")
        return "", 1.0

    def build(**defines: str) -> toolchain.Build:
        return own("launched.cu", tmp_path, arch="sm_90a", defines=defines)

    own = inspect.unwrap(toolchain.build_cubin)  # not the stand-in driver's, nor the one that counts

    monkeypatch.setattr(toolchain, "_compile", compiled)
    monkeypatch.setattr(toolchain, "version_line", lambda command: "release 13.0")
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: "nvcc")
    made = build(XL_HIDDEN_SIZE="64")
    assert (made.cached, build(XL_HIDDEN_SIZE="64").cached) == (False, True)
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: None)
    assert build(XL_HIDDEN_SIZE="64").path == made.path
    with pytest.raises(ToolError, match="nvcc was not found"):
        build(XL_HIDDEN_SIZE="128")
