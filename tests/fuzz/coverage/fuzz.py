"""Coverage-guided fuzzing with atheris: `python tests/fuzz/coverage/fuzz.py TARGET [-max_total_time=60 | -runs=N]`.

Targets: header, index, config, generation, template, tokenizer, size, override. Each must give a result or raise
InputError in one short line; anything else is a crash, which libFuzzer writes to a file `crash-...` and replays with
the file's path as an argument. Seeds are made here; options are libFuzzer's.
"""

from __future__ import annotations

import json
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["xlpk", "json", "jinja2", "omegaconf"]):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from xlpk import config
    from xlpk.errors import InputError
    from xlpk.generation import FILE as GENERATION
    from xlpk.generation import read_generation_config
    from xlpk.jsonfile import parse_json
    from xlpk.model import ModelConfig
    from xlpk.safetensors_file import INDEX, check_header, locate
    from xlpk.text import ChatTemplate, IncrementalText, decode, encode
    from xlpk.units import parse_bytes

FOLDER = Path(tempfile.mkdtemp(prefix="xlpk-fuzz-"))
ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
}
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_k": 5, "top_p": 0.9, "eos_token_id": [1, 2]}
TOKENIZER = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}}


def header(content: bytes) -> None:
    check_header(content, "file")


def index(content: bytes) -> None:
    (FOLDER / INDEX).write_bytes(content)
    locate(FOLDER)


def model_config(content: bytes) -> None:
    made = ModelConfig.from_hf(parse_json(content, "config.json"), "config.json")
    if made.num_hidden_layers < 100:
        made.tensor_shapes()
    made.inv_freq()


def generation(content: bytes) -> None:
    (FOLDER / GENERATION).write_bytes(content)
    read_generation_config(FOLDER)


def template(content: bytes) -> None:
    made = ChatTemplate(content.decode("utf-8", "replace"), "chat_template.jinja", {"bos_token": "<s>"})
    made.render([{"role": "user", "content": "a"}])


def tokenizer(content: bytes) -> None:
    from tokenizers import Tokenizer

    try:
        made = Tokenizer.from_str(content.decode("utf-8", "replace"))
    except Exception:  # what Model.tokenizer turns into one line
        return
    ids = encode(made, "a b\u20ac")
    text = IncrementalText(made)
    assert "".join(map(text.push, ids)) + text.finish() == decode(made, ids)


def size(content: bytes) -> None:
    parse_bytes(content.decode("utf-8", "replace"), "kv.budget")


def override(content: bytes) -> None:
    try:
        OverridesParser.create().parse_override(content.decode("utf-8", "replace"))
    except (*config.COMPOSITION_ERRORS, ValueError) as error:
        raise config.explain(error) from None


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def _file(value: object, data: int) -> bytes:
    return struct.pack("<Q", len(_json(value))) + _json(value) + bytes(data)


TARGETS: dict[str, tuple[Callable[[bytes], None], list[bytes]]] = {
    "header": (header, [_file({}, 0), _file({"a": ENTRY, "__metadata__": {"format": "pt"}}, 24)]),
    "index": (index, [_json({"metadata": {}, "weight_map": {"a": "model-1.safetensors"}})]),
    "config": (model_config, [_json(LLAMA)]),
    "generation": (generation, [_json(SAMPLING)]),
    "template": (template, [b"{% for m in messages %}{{ m.role | trim }}{{ m | tojson }}{% endfor %}{{ bos_token }}"]),
    "tokenizer": (tokenizer, [_json(TOKENIZER)]),
    "size": (size, [b"64MiB", b"1.5GB", b"7B"]),
    "override": (override, [b"spec.block=8", b"+a.b=[1,2]", b'workload.prompt="a, b"', b"x={a:1}"]),
}


def one_line(target: Callable[[bytes], None]) -> Callable[[bytes], None]:
    def call(content: bytes) -> None:
        try:
            target(content)
            return
        except InputError as error:
            line = str(error)
        assert line.isprintable(), ascii(line)
        assert len(line) < 1000

    return call


def main(argv: list[str]) -> None:
    if len(argv) < 2 or argv[1] not in TARGETS:
        raise SystemExit(f"usage: fuzz.py {'|'.join(TARGETS)} [libFuzzer options]")
    target, seeds = TARGETS[argv[1]]
    corpus = FOLDER / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds):
        (corpus / str(number)).write_bytes(seed)
    options: list[Any] = [argv[0], *argv[2:]]
    if not any(Path(option).is_file() for option in argv[2:]):  # else a crash is replayed
        options.append(str(corpus))
    atheris.Setup(options, one_line(target))
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv)
