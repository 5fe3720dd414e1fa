"""backend=hf where its libraries are missing, and what its config refuses and says; without torch."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from xlpk import point
from xlpk.backends import choose, hf_model
from xlpk.errors import InputError, ToolError
from xlpk.settings import HfBackend
from xlpk.speculation import Keyed, Ngram, NoSpec


@pytest.mark.parametrize("missing", [("torch",), ("transformers",), ("torch", "transformers")])
def test_missing_libraries_are_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: tuple[str, ...]
) -> None:
    monkeypatch.setattr(hf_model.importlib.util, "find_spec", lambda name: None if name in missing else object())
    with pytest.raises(ToolError) as refused:
        choose.resolve(HfBackend(), tmp_path)
    assert str(refused.value) == f"backend=hf: no {' and no '.join(missing)} here: pip install 'xlpk[peers]'"
    assert refused.value.exit_code == 3


def test_nothing_is_imported_to_find_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hf_model.importlib.util, "find_spec", lambda name: object())
    assert choose.resolve(HfBackend(), tmp_path) == (HfBackend(), "")


def test_a_cuda_device_that_torch_does_not_see() -> None:
    class Torch:
        class cuda:
            @staticmethod
            def is_available() -> bool:
                return False

    assert hf_model.device_of(Torch, "auto") == hf_model.device_of(Torch, "cpu") == "cpu"
    with pytest.raises(ToolError, match=r"backend\.device=cuda: this torch sees no GPU"):
        hf_model.device_of(Torch, "cuda")


def test_kv_follows_the_model() -> None:
    for plan, dtype in (("bf16", "bf16"), ("fp32", "fp32"), ("bf16", "fp16")):
        hf_model.check_kv_dtype(plan, dtype)
    for plan, dtype in (("fp32", "bf16"), ("bf16", "fp32")):
        with pytest.raises(InputError, match=rf"kv\.dtype={plan}: auto"):
            hf_model.check_kv_dtype(plan, dtype)


@pytest.mark.parametrize(
    ("device", "driver", "apart"), [("auto", True, True), ("cpu", True, False), ("cuda", False, False)]
)
def test_a_point_of_a_sweep_on_a_gpu_is_a_process(
    monkeypatch: pytest.MonkeyPatch, device: str, driver: bool, apart: bool
) -> None:
    monkeypatch.setattr(point.os.path, "exists", lambda path: driver and path == "/dev/nvidiactl")
    assert point._takes_a_device(OmegaConf.create({"backend": {"name": "hf", "device": device}})) == apart


def test_it_says_when_requests_run_alone() -> None:
    assert HfBackend().note(NoSpec()) == ""
    assert "spec=ngram serves one request at a time" in HfBackend().note(Ngram())
    assert "backend.cache=static serves one request" in HfBackend(cache="static").note(NoSpec())
    HfBackend(cache="static", compile=True).check(NoSpec(), Keyed())
