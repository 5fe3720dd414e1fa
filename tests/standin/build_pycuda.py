"""Builds PyCUDA against a CUDA toolkit, with no driver needed, and installs it into a virtual environment.

    python tests/standin/build_pycuda.py [--python VENV/bin/python] [--wheel-only]

PyCUDA is distributed as source only and its build wants three things that a machine without a GPU lacks: a libcuda to
link (a stub with every symbol of cuda.h is made), curand.h (cuRAND is left out), and the toolkit beside the first nvcc
on PATH (that one may be a wrapper script; nvcc is asked). The extension looks for libcuda.so.1 when it is imported, so
the same wheel runs on a real driver and on the stand-in of this folder. The wheel is kept in the cache: 80 s once.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from toolkit import driver_symbols, toolkit_root

PYCUDA = "pycuda==2026.1"
STUB_RESULT = 34  # CUDA_ERROR_STUB_LIBRARY
DEFAULTS = "CUDA_ROOT = {root!r}\nCUDA_ENABLE_CURAND = False\nCUDADRV_LIB_DIR = [{stub!r}]\n"


def build_stub(include: Path, folder: Path) -> None:
    """libcuda.so in `folder`: enough to link against, since an empty library would be dropped by --as-needed."""
    source = "\n".join(f'extern "C" int {name}() {{ return {STUB_RESULT}; }}' for name in driver_symbols(include))
    command = ["g++", "-shared", "-fPIC", "-x", "c++", "-", "-Wl,-soname,libcuda.so.1", "-o", "libcuda.so"]
    subprocess.run(command, cwd=folder, input=source, text=True, check=True)


def build_wheel(python: str, cache: Path) -> Path:
    """The wheel of PyCUDA for this interpreter and toolkit, built if the cache lacks it."""
    root = toolkit_root()
    tag = subprocess.run(
        [python, "-c", "import sys, sysconfig; print(sys.implementation.cache_tag, sysconfig.get_platform())"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    facts = "\0".join((PYCUDA, tag, (root / "include" / "cuda.h").read_text(), DEFAULTS))
    folder = cache / hashlib.sha256(facts.encode()).hexdigest()[:20]
    if not any(folder.glob("pycuda-*.whl")):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            home = Path(temporary)
            build_stub(root / "include", home)
            # PyCUDA's setup reads this file in $HOME; the user's own home is left alone.
            (home / ".aksetup-defaults.py").write_text(DEFAULTS.format(root=str(root), stub=str(home)))
            settings = {"XDG_CONFIG_HOME": str(Path.home() / ".config")}  # pip's, for instance
            environment = settings | os.environ | {"HOME": str(home)}
            # pip's own cache would give back a wheel of another toolkit.
            command = [python, "-m", "pip", "--no-cache-dir", "wheel", "--quiet", "--no-deps", "--no-binary", "pycuda"]
            built = home / "wheels"
            subprocess.run([*command, "--wheel-dir", str(built), PYCUDA], env=environment, check=True)
            for wheel in built.glob("pycuda-*.whl"):
                unfinished = folder / f".{wheel.name}.{os.getpid()}"
                unfinished.write_bytes(wheel.read_bytes())
                unfinished.replace(folder / wheel.name)
    return next(folder.glob("pycuda-*.whl"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environment to install into")
    parser.add_argument("--wheel-only", action="store_true", help="install nothing; print where the wheel lies")
    arguments = parser.parse_args()
    wheel = build_wheel(arguments.python, Path(__file__).parents[2] / "outputs" / "cache" / "pycuda")
    if not arguments.wheel_only:
        subprocess.run([arguments.python, "-m", "pip", "install", "--quiet", str(wheel)], check=True)
    print(wheel if arguments.wheel_only else f"installed {wheel.name}")


if __name__ == "__main__":
    main()
