"""`xlpk ui`: the MLflow server on a store of runs, as a child that starts, listens and ends without noise.

MLflow's own defaults are a service's: ten processes, 950 MB, a line a request. Here one worker serves one person.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from xlpk.errors import InputError, ToolError

DEFAULT_PORT = 5000
TRIED_PORTS = 100  # from DEFAULT_PORT on, where no port was asked for
START_S = 60.0  # until the server answers
STOP_S = 10.0  # for the server to end
ENVIRONMENT = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # 2 processes, not 10
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "PYTHONWARNINGS": "ignore",
}
SERVED = re.compile(r"(sqlite|postgresql|mysql|mssql)(\+\w+)?:")
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # addresses to listen on -> one to open


def checked_store(store: str) -> str:
    """The store's URI, absolute; a path is one of sqlite. Raises InputError for what MLflow could not serve."""
    if store.startswith(("http:", "https:")):
        return store
    if "://" not in store and not SERVED.match(store):
        store = f"sqlite:///{Path(store).resolve()}"
    if not SERVED.match(store):
        raise InputError(
            "--store", store, "a database: a file, sqlite:///FILE, postgresql://..., or a server's http://..."
        )
    if not store.startswith("sqlite:"):
        return store
    path = Path(store.partition(":///")[2]).resolve()
    if not path.exists():
        raise InputError(
            "--store", store, "a store that a run has made: run `python -m xlpk.run` first, or name another"
        )
    if not _is_store(path):
        raise InputError("--store", store, "an MLflow store: this file has none of its tables")
    return f"sqlite:///{path}"


def without_password(uri: str) -> str:
    """For messages."""
    return re.sub(r"//([^:/@]*):[^@/]*@", r"//\1:***@", uri)


def _is_store(path: Path) -> bool:
    try:
        with contextlib.closing(_read_only(path)) as connection:
            return connection.execute("select 1 from sqlite_master where name = 'experiments'").fetchone() is not None
    except sqlite3.Error:
        return False


def _read_only(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)


def landing(uri: str) -> str:
    """The page of the runs of the newest run's experiment, as a fragment of the address; "" where that is not known."""
    if not uri.startswith("sqlite:"):
        return ""
    path = Path(uri.removeprefix("sqlite:///"))
    with contextlib.suppress(sqlite3.Error), contextlib.closing(_read_only(path)) as connection:
        found = connection.execute("select experiment_id from runs order by start_time desc limit 1").fetchone()
        return f"/#/experiments/{found[0]}/runs" if found else ""
    return ""


def free_port(host: str, port: int | None) -> int:
    """The port, or where none was asked for the first free one from DEFAULT_PORT on. Raises InputError."""
    if port is not None and not 1 <= port <= 65535:
        raise InputError("--port", port, "1 to 65535")
    for candidate in [port] if port else range(DEFAULT_PORT, DEFAULT_PORT + TRIED_PORTS):
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, candidate, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
            return candidate
        except PermissionError:
            raise InputError("--port", candidate, "a port above 1023, for which no rights are needed") from None
        except socket.gaierror:
            raise InputError("--host", host, "an address or a name of this machine") from None
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise InputError("--host", host, "an address of this machine; 0.0.0.0 for all of them") from None
    if port:
        raise InputError("--port", port, "a port that no program listens on; without --port a free one is found")
    raise InputError("--port", f"{DEFAULT_PORT}..{DEFAULT_PORT + TRIED_PORTS - 1}", "all busy: name a free one")


def serve(uri: str, host: str, port: int, allowed_hosts: str | None = None) -> int:
    """Serves until Ctrl-C or SIGTERM -> 0. Raises ToolError with the server's last words if it does not come up."""
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--host", host, "--port", str(port)]
    command += ["--workers", "1", "--uvicorn-opts", "--log-level warning"]
    if allowed_hosts:
        command += ["--allowed-hosts", allowed_hosts]
    with _terminable(), _Server(command) as server:
        where = f"http://{EVERYWHERE.get(host, f'[{host}]' if ':' in host else host)}:{port}"
        server.wait_until_up(f"{where}/health")
        beyond = " and at this machine's other addresses" if host in EVERYWHERE else ""
        print(f"MLflow UI: {where}{landing(uri)}{beyond} (Ctrl-C ends it)", flush=True)
        code = server.process.wait()
        raise ToolError(f"the MLflow server ended by itself, exit code {code}")
    return 0


class _Server:
    """The child, in a session of its own: Ctrl-C reaches this process alone, which then ends it and its worker."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **ENVIRONMENT},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
            errors="replace",
        )
        self.said: collections.deque[str] = collections.deque(maxlen=20)  # lines, until it is up
        self.up = False
        assert self.process.stdout is not None
        threading.Thread(target=self._listen, args=(self.process.stdout,), daemon=True).start()

    def _listen(self, stream: IO[str]) -> None:
        for line in stream:
            if self.up:
                print(line, end="", file=sys.stderr, flush=True)
            else:
                self.said.append(line.strip())

    def wait_until_up(self, url: str) -> None:
        deadline = time.monotonic() + START_S
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while time.monotonic() < deadline:
            if (code := self.process.poll()) is not None:
                time.sleep(0.1)  # for its last line
                last = next((line for line in reversed(self.said) if line), "it said nothing")
                raise ToolError(f"the MLflow server did not start (exit code {code}): {last[:300]}")
            with contextlib.suppress(OSError), opener.open(url, timeout=5) as answer:
                if answer.status == 200:
                    self.up = True
                    return
            time.sleep(0.05)
        last = next((line for line in reversed(self.said) if line), "it said nothing")
        raise ToolError(f"the MLflow server did not answer within {START_S:g} s: {last[:300]}")

    def __enter__(self) -> _Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.up = False  # what it says of its end is of no interest
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_S)
                return


class _Ended(Exception):
    """Somebody asked for the end."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the block, and that is all they do."""

    def end(*_: object) -> None:
        for number in before:
            signal.signal(number, signal.SIG_IGN)  # the end is under way: a second one must not cut it short
        raise _Ended

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, end)
        yield
    except _Ended:
        pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
