"""The cubins of a test session: few, each for several of the things that are asserted of what nvcc makes.

Every type of weights, both layouts, three architectures and three shapes of heads occur. The stand-in driver takes one
of each source as the carrier of all models (standin/hook.py): from a cubin it reads names, parameters and resources
only, and what runs is the CPU build with the model's own dimensions and layout.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from xlpk.backends.memory import dims_record
from xlpk.kv import KV, KVPlan
from xlpk.model import SHAPES, ModelConfig
from xlpk.toolchain import Build, dims_defines

MOST = 6  # that a session may ask for: these, the stand-in's own kernels and the micro-benchmarks
RECORD = "XLPK_TEST_CUBINS"  # names the file that `record` appends to, in children too
ONE_B = SHAPES["llama_1b_shape"]
WIDE_HEADS = replace(ONE_B, head_dim=128, num_attention_heads=16, num_key_value_heads=4)
BIASES = replace(ONE_B, head_dim=80, attention_bias=True, mlp_bias=True)


@dataclass(frozen=True)
class Cubin:
    """`kernels/<source>` for a model, its types of weights and of KV pages, a layout of weights and an architecture."""

    source: str
    config: ModelConfig
    weights: str
    pages: str
    layout: str
    arch: str

    @property
    def defines(self) -> dict[str, str]:
        plan = KVPlan.make(KV(dtype=self.pages), self.config, self.weights, 4096)
        return dims_defines(dims_record(self.config, plan), self.weights, self.pages, self.layout)

    def build(self, cache: Path) -> Build:
        from xlpk import toolchain  # as it is now: others may have replaced `build_cubin`

        return toolchain.build_cubin(self.source, cache, arch=self.arch, defines=self.defines)


CUBINS = {  # the persistent kernel uses all registers that there are, so it is the one that may spill
    "persistent": Cubin("xl_persistent_megakernel.cu", ONE_B, "bf16", "bf16", "rows", "sm_90a"),
    "persistent_biases_tiles": Cubin("xl_persistent_megakernel.cu", BIASES, "fp16", "bf16", "tiles", "sm_90a"),
    "persistent_sm_80": Cubin("xl_persistent_megakernel.cu", WIDE_HEADS, "fp32", "fp32", "rows", "sm_80"),
    "launched_tiles_sm_100a": Cubin("launched.cu", ONE_B, "bf16", "bf16", "tiles", "sm_100a"),
}
CARRIERS = {CUBINS[name].source: CUBINS[name] for name in ("persistent", "launched_tiles_sm_100a")}


def record(source: str, cache: Path, *, arch: str, defines: Mapping[str, str]) -> None:
    """Notes that the session asks for this cubin, whether it is in the cache or not."""
    file = os.environ.get(RECORD)
    if file and cache.is_relative_to(Path(__file__).parents[1]):
        with Path(file).open("a") as stream:
            stream.write(f"{Path(source).name} {arch} {sorted(defines.items())}\n")


def recorded() -> set[str]:
    """What the session has asked for, one text each."""
    file = Path(os.environ[RECORD])
    return set(file.read_text().splitlines()) if file.exists() else set()
