"""`python tests/fake_run.py [--die N | --interrupt N] OVERRIDES`: xlpk.run with a scripted backend and a stub model."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

from fake_backend import FakeBackend

import xlpk.model
from xlpk import engine, run
from xlpk.generation import GenerationConfig
from xlpk.model import ModelConfig

CONFIG = ModelConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
    max_position_embeddings=512,
    tie_word_embeddings=True,
    dtype="bfloat16",
    bos_token_id=0,
    eos_token_ids=(0,),
)


class Bytes:
    """A tokenizer of bytes."""

    def encode(self, text: str, add_special_tokens: bool = True) -> Any:
        return SimpleNamespace(ids=list(text.encode()))

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return bytes(ids).decode("latin-1")


def load_model(name: str, path: Any = None, seed: int = 0, dtype: str = "auto", fill: Any = None) -> Any:
    weights = SimpleNamespace(dtype="bf16")
    facts = {"tokenizer": Bytes(), "fingerprint": "f" * 64, "generation": GenerationConfig(), "path": None}
    return SimpleNamespace(name=name, config=CONFIG, weights=weights, **facts)


def main() -> int:
    argv, script = sys.argv[1:], {}
    while argv and argv[0] in ("--die", "--interrupt"):
        script[f"{argv[0][2:]}_at_step"] = int(argv[1])
        argv = argv[2:]
    xlpk.model.load_model = load_model
    engine.make_backend = lambda settings, spec, acceptance: FakeBackend(spec, acceptance, **script)
    return run.main(argv)


if __name__ == "__main__":
    raise SystemExit(main())
