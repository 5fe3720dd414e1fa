"""Imports go downward only, and heavy libraries are imported where the design says and nowhere else."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import xlpk

ROOT = Path(xlpk.__file__).parent
LEVELS = {
    0: "errors layout units dtypes jsonfile process models kernels",
    1: "model hf_config generation rope weights hash_weights safetensors_file text kv speculation workload slo "
    "event_log trace trace_events trace_decisions metrics waterfall costs fit hardware statistics reference sampling "
    "divergence",
    2: "settings backend clock simulator toolchain stopping",
    3: "backends",
    4: "engine event_writer answers quality tracking report record sweep_table sweep_folder progress terminal "
    "interrupts mlflow_fields trace_file side_by_side rundata compare thresholds acceptance"
    " plot_style plots report_figures report_sections report_page",
    5: "config launchers run point sweep isolate cli conf doctor bench bench_child bench_report bench_startup "
    "bench_control bench_batching prediction calibrate soak capacity fleet ui completion config_reference",
}
LEVEL = {name: level for level, names in LEVELS.items() for name in names.split()}
ONLY_IN = {  # library -> modules that may import it
    "mlflow": {"tracking"},
    "torch": {"backends"},
    "transformers": {"backends"},
    "llama_cpp": {"backends"},
    "gguf": {"backends"},
    "pycuda": {"backends"},
    "matplotlib": {"plot_style", "report_page"},
    "hydra": {"config", "run", "point", "sweep"},
    "rich": {"terminal", "progress", "report"},
}
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def module_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """(library, module within xlpk or "") of every import in the file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [node.module or ""]
            if node.module == "xlpk":
                names = [f"xlpk.{alias.name}" for alias in node.names if not alias.name.startswith("_")]
        else:
            continue
        for name in names:
            parts = name.split(".")
            yield parts[0], parts[1] if parts[0] == "xlpk" and len(parts) > 1 else ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downward(path: Path) -> None:
    module = module_of(path)
    assert module in LEVEL, f"{module}: give it a level in this test"
    for library, target in imports(path):
        if target:
            assert LEVEL[target] <= LEVEL[module], f"{module} (L{LEVEL[module]}) imports {target} (L{LEVEL[target]})"
        if library in ONLY_IN:
            assert module in ONLY_IN[library], f"{module} imports {library}"


def test_the_check_sees_an_upward_import(tmp_path: Path) -> None:
    file = tmp_path / "kv.py"
    file.write_text("def f():\n    from xlpk import engine\n    import xlpk.run\n    import mlflow.tracking\n")
    assert list(imports(file)) == [("xlpk", "engine"), ("xlpk", "run"), ("mlflow", "")]


def test_no_module_imports_what_is_heavy() -> None:
    """Heavy libraries come when they are chosen; PyCUDA's own module is one that a backend chooses."""
    names = [".".join(path.relative_to(ROOT.parent).with_suffix("").parts) for path in FILES]
    light = [name.removesuffix(".__init__") for name in names if name != "xlpk.backends.gpu_module"]
    heavy = "mlflow torch transformers pycuda matplotlib rich pandas tokenizers jinja2 scipy sqlalchemy llama_cpp"
    code = (
        "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\n"
        f"print(sorted(set({heavy.split()}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *light], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr + done.stdout
