"""The CUDA toolkit that nvcc belongs to, and the names of the driver API that its cuda.h declares."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from xlpk.errors import ToolError
from xlpk.toolchain import find_nvcc


def toolkit_root() -> Path:
    """The toolkit's folder, asked of nvcc itself: the first nvcc on PATH may be a script that calls the real one."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise ToolError("nvcc was not found: put the bin folder of a CUDA toolkit on PATH, or pip install 'xlpk[nvcc]'")
    lines = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True, check=True)
    top = re.search(r"^#\$ TOP=(.+)$", lines.stderr, re.MULTILINE)
    if top is None:
        raise ToolError(f"{nvcc} --dryrun names no TOP: cannot tell where the CUDA toolkit lies")
    return Path(top[1]).resolve()


def driver_symbols(include: Path) -> list[str]:
    """Every symbol of libcuda in cuda.h and cudaProfiler.h, old versions (`cuMemAlloc`) and new (`cuMemAlloc_v2`)."""
    preprocess = ["g++", "-E", "-P", "-x", "c++", f"-I{include}", "-include", f"{include}/cudaProfiler.h"]
    texts = [
        subprocess.run([*preprocess, *extra, f"{include}/cuda.h"], capture_output=True, text=True, check=True).stdout
        for extra in ([], ["-D__CUDA_API_VERSION_INTERNAL"])
    ]
    return sorted(set(re.findall(r"\bCUresult\s+(cu[A-Z]\w+)\s*\(", "\n".join(texts))))
