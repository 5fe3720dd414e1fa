"""Completion: what is offered for a line, and real shells that are asked through a terminal."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from xlpk import cli, completion

SETUP = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], 'eval "$(xlpk completion bash)"'),
    "zsh": (["zsh", "-f", "-i"], "autoload -U compinit; compinit -u -D; source <(xlpk completion zsh)"),
    "fish": (["fish", "--private", "-i"], "xlpk completion fish | source"),
}
PATIENCE_S = 180.0
KEEP = ("\x1b[c", b"\x1b[?62;c"), ("\x1b[6n", b"\x1b[1;1R")  # a terminal's answers, without which fish waits


def offered(line: str) -> list[str]:
    words = completion.words_of(line)
    return [word for word, _ in completion.complete(words[1:], cli._parser())]


def test_subcommands_and_their_options() -> None:
    assert {"run", "ui", "upload", "doctor", "completion"} <= set(offered("xlpk "))
    assert offered("xlpk do") == ["doctor"]
    assert {"--store", "--host", "--port"} <= set(offered("xlpk ui --"))
    assert offered("xlpk completion z") == ["zsh"]
    assert offered("xlpk nonsense ") == []
    assert not [word for word in offered("xlpk ") if word.startswith("_")]


def test_groups_keys_and_values() -> None:
    assert offered("xlpk run back") == ["backend=", "backend."]
    assert {"backend=auto", "backend=cpu", "backend=persistent"} <= set(offered("xlpk run backend="))
    assert offered("xlpk run backend=gr") == ["backend=graph"]
    assert offered("xlpk run backend.orchestration=") == [
        "backend.orchestration=persistent",
        "backend.orchestration=launched",
    ]
    assert offered("xlpk run sampling.ignore_eos=") == ["sampling.ignore_eos=true", "sampling.ignore_eos=false"]
    assert offered("xlpk run --mu") == ["--multirun"]
    assert offered("xlpk run sampling.top") == ["sampling.top_k=", "sampling.top_p="]


def test_keys_follow_the_options_typed_before() -> None:
    by_default = offered("xlpk run spec.")
    assert "spec.max_n=" in by_default
    assert "spec.mismatch_stride=" not in by_default
    by_mode = offered("xlpk run mode=forced_rejection spec.")
    assert "spec.mismatch_stride=" in by_mode
    assert "spec.max_n=" not in by_mode
    assert offered("xlpk run mode=forced_rejection spec=ngram spec.") == by_default
    assert (
        offered("xlpk run experiment=forced_rejection_grid spec.") == by_default
    )  # the mode stands in no `sets` of spec
    assert {"spec.max_n=", "spec.mismatch_stride="} <= set(offered("xlpk run -m spec=ngram,oracle spec."))


def test_a_sweep_goes_on_after_a_comma() -> None:
    found = offered("xlpk run -m mode=serial_decode,")
    assert "mode=serial_decode,speculative_decode" in found
    assert "mode=serial_decode,serial_decode" not in found


def test_files_are_left_to_the_shell() -> None:
    assert offered("xlpk upload ") == []
    assert offered("xlpk run model.path=") == []


def test_an_open_quote_is_no_error() -> None:
    assert offered('xlpk run \'workload.prompt="a b" back') == ["backend=", "backend."]


def test_what_a_shell_calls_is_light(tmp_path: Path) -> None:
    heavy = "{'mlflow', 'torch', 'transformers', 'pandas', 'rich', 'matplotlib', 'tokenizers', 'pycuda'}"
    code = f"import sys; from xlpk import cli; cli.main(sys.argv[1:]); print(sorted({heavy} & set(sys.modules)))"
    command = [sys.executable, "-c", code, "_complete", "--line", "xlpk run backend=pers"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    first, last = done.stdout.splitlines()
    assert first.startswith("backend=persistent\t")
    assert last == "[]"


class Terminal:
    """A shell behind a terminal."""

    def __init__(self, argv: list[str], environment: dict[str, str]) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execvpe(argv[0], argv, environment)
        self.seen = ""

    def type(self, text: str, until: str) -> None:
        """Types, and reads until `until` has come after it."""
        self.seen = ""
        os.write(self.fd, text.encode())
        deadline = time.monotonic() + PATIENCE_S
        while until not in self.seen:
            assert time.monotonic() < deadline, f"{until!r} did not come: {self.seen!r}"
            if select.select([self.fd], [], [], 0.1)[0]:
                said = os.read(self.fd, 65536).decode(errors="replace")
                self.seen += said
                for asked, answer in KEEP:
                    if asked in said:
                        os.write(self.fd, answer)

    def close(self) -> None:
        os.close(self.fd)  # hangs it up
        os.waitpid(self.pid, 0)


@pytest.mark.parametrize(
    "shell", ["bash", pytest.param("zsh", marks=pytest.mark.heavy), pytest.param("fish", marks=pytest.mark.heavy)]
)
def test_in_a_real_shell(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    command = tmp_path / "bin" / "xlpk"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m xlpk.cli "$@"\n')
    command.chmod(0o755)
    (tmp_path / "checkpoint_folder").mkdir()
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("EDITOR", "VISUAL")},  # vi keys in zsh
        "PATH": f"{command.parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "TERM": "xterm",
        "COLUMNS": "200",
    }
    argv, setup = SETUP[shell]
    terminal = Terminal(argv, environment)
    try:
        terminal.type(f"cd {tmp_path}\n", until="cd")
        terminal.type(f"{setup}; echo rea''dy\n", until="ready\r\n")
        for typed, completed in (
            ("xlpk doc\t", "doctor"),
            ("xlpk run backend=pers\t", "istent"),
            ("xlpk run spec.blo\t4", "ck=4"),  # no space in between
            ("xlpk run -m mode=serial_decode,for\t", "forced_rejection" if shell == "fish" else "ced_rejection"),
            ("xlpk upload checkp\t", "oint_folder"),
            ("xlpk run model.path=checkp\t", "oint_folder"),
        ):
            terminal.type(typed, until=completed)
            terminal.type("\x15", until="")  # clears the line
    finally:
        terminal.close()
