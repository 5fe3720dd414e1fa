"""`make bench` as a smoke test: the tiny model, one round; tables, then one line of JSON that is also on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from xlpk import bench, bench_child, bench_report
from xlpk.backends.library import CpuLibrary
from xlpk.backends.peer_files import hf_folder, llama_name, pairs_together
from xlpk.dtypes import decode
from xlpk.errors import ToolError
from xlpk.model import Model, load_model


def test_quick(cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--quick", "--peers", "none", "--threads", "1", "--widths", "1,8", "--cache", str(cache)]
    assert bench.main([*options, "--outputs", str(tmp_path)]) == 0
    lines = capfd.readouterr().out.strip().splitlines()
    report = json.loads(lines[-1])
    (written,) = (tmp_path / "bench").glob("*.json")
    assert json.loads(written.read_text()) == report
    (row,) = report["rows"]
    assert lines[0].startswith("tiny, 1 threads")
    assert row["model"] == "tiny"
    (engine,) = row["engines"].values()
    for name in ("prefill_tokens_per_s", "decode_tokens_per_s", "mbu"):
        assert engine[name]["least"] > 0
    assert row["read_gb_per_s"]["least"] > 0
    assert row["width_cost"]["1"]["median"] == 1
    assert row["width_cost"]["8"]["median"] > 0
    assert 0 < row["fixed_step_us"]["median"] < row["step_us"]["median"]
    assert 0 < engine["beyond_bytes"] < engine["peak_bytes"]
    assert row["phase_us"]["gate_up"] > 0
    seen = [report["first_token"][name]["median"] for name in ("header_s", "submit_s", "token_s")]
    assert 0 < seen[0] < seen[1] < seen[2]


@pytest.mark.heavy
def test_batching(cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its cases meet what they are named after, and the stream comes to its end over one launch."""
    arguments = ["--batching", "--rounds", "1", "--requests", "500", "--cache", str(cache), "--outputs", str(tmp_path)]
    assert bench.main(arguments) == 0
    *lines, last = capfd.readouterr().out.strip().splitlines()
    report = json.loads(last)
    found = {(case["running"], case["what"]): case for case in report["cases"]}
    rows = {key: case["rows_per_step"]["median"] for key, case in found.items()}
    assert rows[1, "ample"] < 2 < rows[64, "ample"] < rows[64, "drafts"]
    assert found[64, "pressure"]["preemptions"]["median"] > 0 == found[64, "ample"]["preemptions"]["median"]
    assert found[64, "sharing"]["prefill_rows"]["median"] == found[64, "ample"]["prefill_rows"]["median"] == 64 * 16
    assert all(0 < case["control_share"]["median"] < 1 for case in found.values())
    tokens = {key: case["tokens_per_s"]["median"] for key, case in found.items()}
    assert report["batching_gain"]["median"] == pytest.approx(tokens[64, "ample"] / tokens[1, "ample"], rel=1e-4)
    assert (report["stream"]["requests"], report["stream"]["tokens"], report["stream"]["launches"]) == (500, 2000, 1)
    assert len(lines) == 9


@pytest.mark.heavy
def test_startup(cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--startup", "--rounds", "1", "--cache", str(cache), "--outputs", str(tmp_path)]) == 0
    *lines, last = capfd.readouterr().out.strip().splitlines()
    report = json.loads(last)
    for found in report.values():
        moments = [found[f"{name}_s"]["median"] for name in ("header", "step", "end", "exit")]
        assert moments == sorted(moments)
        assert moments[0] > 0
    assert report["mlflow"]["tracking_s"]["median"] > 0  # MLflow's import alone takes a second
    assert len(lines) == 5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value"),
    [("--models", "huge"), ("--peers", "fast"), ("--rounds", "0"), ("--decode", "1"), ("--widths", "0,8")],
)
def test_refuses(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([option, value]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert option in message


def test_peers_are_chosen_by_engine_or_mode() -> None:
    assert bench.parse(["--peers", "none"]).peers == []
    assert bench.parse(["--peers", "llama.cpp"]).peers == ["llama.cpp:bf16", "llama.cpp:f16"]
    chosen = bench.parse(["--peers", "transformers:static,llama.cpp:f16"]).peers
    assert chosen == ["transformers:static", "llama.cpp:f16"]


def test_absent_peers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "find_spec", lambda name: None if name == "gguf" else object())
    args = bench.parse(["--peers", "transformers:eager,llama.cpp"])
    (note,) = bench.missing_peers(args)
    assert note.startswith("llama.cpp: skipped, gguf not installed")
    assert "bench-peers" in note
    assert args.peers == ["transformers:eager"]


def test_an_engine_that_fails_answers_with_one_line(cache: Path) -> None:
    child = bench.Child(cache, 1, {})
    job = {"engine": "xlpk", "model": "no such model", "mapped": False}
    assert "no such model" in child.ask(job)["error"]
    assert child.ask({"engine": "bandwidth", "threads": 1, "buffer_bytes": 1 << 20})["gb_per_s"] > 0
    child._process.kill()
    assert "exit code -9" in child.ask(job)["error"]
    child.close()


def test_a_failing_peer_is_asked_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Scripted:
        def __init__(self, *_: object) -> None:
            pass

        def ask(self, job: dict[str, Any]) -> dict[str, Any]:
            asked.append(job["engine"])
            if job["engine"] == "files":
                return {"folder": "x", "gguf": {}, "prompt": [1], "dtype": "bf16"}
            return {"error": "broken"} if job["engine"] == failing else {}

        def close(self) -> None:
            pass

    monkeypatch.setattr(bench, "Child", Scripted)
    args = bench.parse(["--models", "tiny", "--peers", "transformers:eager", "--outputs", str(tmp_path)])
    failing = "transformers"
    rounds = bench.measure(args, "tiny", 1)
    assert [answers["transformers eager"] for answers in rounds] == [{"error": "broken"}] * 3
    assert asked.count("transformers") == 1
    assert asked.count("xlpk") == 3
    failing = "xlpk"
    with pytest.raises(ToolError, match="broken"):
        bench.measure(args, "tiny", 1)


def _round(xlpk: float, peer: float | None, read: float) -> dict[str, dict[str, Any]]:
    ours = {
        "prefill_tokens_per_s": 10 * xlpk, "decode_tokens_per_s": xlpk, "tokens": [5, 6, 7],
        "width_step_s": {"1": 1 / xlpk, "8": 2 / xlpk},
        "phase_us": {"qkv": 1.0}, "bytes_per_token": 10**9, "weights_bytes": 90, "kv_bytes": 10, "peak_bytes": 160,
    }  # fmt: skip
    theirs = {"prefill_tokens_per_s": peer, "decode_tokens_per_s": peer, "tokens": [5, 6, 8]}
    return {
        "bandwidth": {"gb_per_s": read},
        "xlpk": ours,
        "a": theirs if peer else {"error": "no"},
        "b": {"error": "never"},
    }


def test_summary_by_hand() -> None:
    """Ratios are taken within a round: 8/4, 6/2 and 9/9, of which the median is 2, not 8/4 of the medians."""
    rounds = [_round(8, 4, 10), _round(6, 2, 12), _round(9, 9, 9)]
    row = bench_report.summarise("m", 2, rounds, [1, 8])
    assert row["engines"]["a"]["xlpk_is_times"]["decode_tokens_per_s"] == {"median": 2, "least": 1, "most": 3}
    assert row["engines"]["xlpk"]["mbu"] == {"median": 0.8, "least": 0.5, "most": 1}
    assert row["engines"]["a"]["same_tokens"] == 2
    assert row["engines"]["b"] == {"error": "never"}
    assert row["xlpk_is_times_best"]["prefill_tokens_per_s"]["median"] == 20
    assert row["width_cost"]["8"]["median"] == 2
    assert row["engines"]["xlpk"]["beyond_bytes"] == 60
    partly = bench_report.summarise("m", 2, [_round(8, 4, 10), _round(6, None, 12)], [1, 8])
    assert partly["engines"]["a"]["rounds"] == 1
    assert partly["xlpk_is_times_best"]["decode_tokens_per_s"] == {"median": 2, "least": 2, "most": 2}


def test_table_shows_every_engine(capsys: pytest.CaptureFixture[str]) -> None:
    row = bench_report.summarise("m", 2, [_round(8, 4, 10)], [1, 8])
    bench_report.print_row(row)
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("  a ")).split() == [
        "a",
        "4",
        "20.00",
        "4.0",
        "2.00",
        "0.40",
        "2",
        "of",
        "3",
    ]
    assert next(line for line in lines if line.startswith("  b ")).split() == ["b", "never"]


def test_folder_written_for_transformers(cpu_library: CpuLibrary, tmp_path: Path) -> None:
    """The official reader finds the bits of the hash weights, and our own loader a model of the same values."""
    model = bench_child.hollow(load_model("llama_160m_shape", fill=cpu_library.fill_hash))
    folder = hf_folder(model, tmp_path)
    stored = load_file(folder / "model.safetensors")
    again = load_model("again", folder)
    assert set(stored) == set(model.config.tensor_shapes())
    for name, shape in model.config.tensor_shapes().items():
        held = model.weights.matrix(name).base if len(shape) == 2 else model.weights.vector(name)
        assert np.array_equal(stored[name].astype(np.float32), decode(held))
    assert again.config == model.config
    assert hf_folder(model, tmp_path) == folder


@pytest.mark.peers
def test_transformers_reads_the_folder(cpu_library: CpuLibrary, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs the extra `peers`")
    from xlpk.backends.hf_speed import Transformers

    model = bench_child.hollow(load_model("llama_160m_shape", fill=cpu_library.fill_hash))
    peer = Transformers(hf_folder(model, tmp_path), "bf16", 1, tmp_path)
    prompt = bench_child.prompt_of(model, 16, 1)
    eager = peer.measure("eager", prompt, 6)
    assert len(eager["tokens"]) == 6
    assert eager["tokens"][0] == peer.measure("static", prompt, 6, prefills=2)["tokens"][0]


def test_rows_that_llama_cpp_rotates_together(tiny: Model) -> None:
    """Row i and row i + d/2 of a head become rows 2i and 2i + 1."""
    rows = np.arange(2 * 8).reshape(16, 1)
    assert pairs_together(rows, 2).ravel().tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    names = [llama_name(name) for name in tiny.config.tensor_shapes()]
    assert len(set(names)) == len(names)
    assert {"token_embd.weight", "output_norm.weight", "blk.5.attn_output.weight"} <= set(names)
