"""Records shared with the device: the header in the tree is the one that Python renders, and a compiler agrees."""

from __future__ import annotations

import importlib
import pkgutil
import re
import shutil
import subprocess
from enum import IntEnum
from pathlib import Path

import pytest

from xlpk import layout
from xlpk.layout.header import RECORDS, render
from xlpk.toolchain import find_cxx, kernels_folder

HEADER = Path("generated") / "layout.h"


def test_the_header_is_not_stale() -> None:
    assert (kernels_folder() / HEADER).read_text() == render(), "run `python -m xlpk.layout`"


def test_every_declaration_is_rendered_and_public() -> None:
    """Whatever a module of the package declares stands in the header, and in the package's interface."""
    modules = [importlib.import_module(f"xlpk.layout.{found.name}") for found in pkgutil.iter_modules(layout.__path__)]
    declared = {name: value for module in modules for name, value in vars(module).items()}
    records = {name: value for name, value in declared.items() if isinstance(value, layout.Record)}
    enums = {name: value for name, value in declared.items() if isinstance(value, type) and issubclass(value, IntEnum)}
    assert {record.name for record in records.values()} == {record.name for record in RECORDS}
    assert set(enums.values()) == set(layout.ENUMS)
    assert {*records, *enums} <= set(layout.__all__)


def compiles(header: str, folder: Path) -> str:
    """What the compiler says; empty: it is content."""
    (folder / "layout.h").write_text(header)
    (folder / "check.cpp").write_text('#include "layout.h"\n')
    command = [*find_cxx().split(), "-std=c++17", "-fsyntax-only", str(folder / "check.cpp")]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


def test_the_compiler_checks_every_size_and_offset(tmp_path: Path) -> None:
    header = render()
    assert compiles(header, tmp_path) == ""
    for record in RECORDS:
        assert f"static_assert(sizeof({record.name})" in header
        for name, _, _ in record.fields:
            assert f"static_assert(offsetof({record.name}, {name})" in header


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name)
def test_a_moved_field_does_not_compile(tmp_path: Path, record: layout.Record) -> None:
    broken = render().replace(f"struct {record.name} {{\n", f"struct {record.name} {{\n  int32_t moved;\n", 1)
    assert "static assertion failed" in compiles(broken, tmp_path) or shutil.which("clang++")


def test_phases_of_the_header() -> None:
    """Each phase but control has a file of its name; the enum has Python's order."""
    text = (kernels_folder() / HEADER).read_text()
    listed = re.findall(r"X\((\w+), (k\w+)\)", text)
    assert [name for name, _ in listed] == list(layout.PHASE_NAMES[:-1])
    for name in layout.PHASE_NAMES[:-1]:
        assert f"phase_{name}(" in (kernels_folder() / "phases" / f"{name}.h").read_text()
    assert f"constexpr int kPhases = {len(layout.PHASES)};" in text


def test_mailbox_words_of_two_writers_share_no_line() -> None:
    fields = layout.MAILBOX.dtype.fields
    assert fields is not None
    line = layout.CONSTANTS["kLine"][0]
    writer = {name: doc.split(":")[0] for name, _, doc in layout.MAILBOX.fields if doc}
    assert "watchdog" in writer.values()
    writer = {name: "host" if who == "watchdog" else who for name, who in writer.items()}  # on the host's side too
    lines: dict[int, set[str]] = {}
    for name, who in writer.items():
        lines.setdefault(fields[name][1] // line, set()).add(who)
    assert all(len(who) == 1 for who in lines.values())
    assert set().union(*lines.values()) == {"host", "device"}
    state = layout.GRID_STATE.dtype.fields
    assert state is not None
    assert state["arrivals"][1] // line != state["abort"][1] // line
