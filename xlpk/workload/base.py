"""What all workloads have in common: a `Workload` is a node of the config, a `Stream` is what it comes to.

Everything that is drawn comes from `workload.seed`, each kind from a generator of its own: another rate leaves the
prompts as they are, other lengths leave the arrivals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from xlpk.errors import InputError, shown
from xlpk.workload.arrivals import arrival_times, check_arrivals

if TYPE_CHECKING:
    from xlpk.kv import KVPlan
    from xlpk.model import Model

MAX_REQUESTS = 1_000_000  # all of them are made before the first is sent
MAX_TOKENS = 100_000_000  # of all prompts that are drawn: 8 bytes each, since equal ids are one object
MAX_PRIORITY = (1 << 31) - 1
MAX_DEADLINE_MS = 1e9

Prompt = tuple[int, ...]


class Draw(IntEnum):
    """What is drawn from a seed."""

    ARRIVALS = 0
    LENGTHS = 1
    TOKENS = 2
    PRIORITIES = 3
    ORDER = 4


@dataclass
class Stream:
    """The requests that a workload comes to, in the order of their ids; entry i of each column belongs to request i."""

    prompts: list[Prompt]
    output_lens: Sequence[int] | None = None  # tokens, end-of-sequence ignored; None: sampling decides
    arrivals_s: Sequence[float] | None = None  # intended, after the start; None: all at 0
    priorities: Sequence[int] | None = None  # None: drawn by `workload.priorities`
    named: str = "workload.prompt"  # what a refusal of a prompt names
    notes: list[str] = field(default_factory=list)  # a line for each way in which it differs from what was asked for


@dataclass
class Workload:
    """Base of the `workload` group's options."""

    name: str = ""
    seed: int = 0  # of everything that the workload draws
    # {priority: share of the requests}, as in {0: 0.8, 1: 0.2}, or the text "0:0.8,1:0.2"; lower is served first;
    # null: all 0
    priorities: Any = None
    deadline_ms: float = 0.0  # after the intended arrival; 0: none

    def check(self) -> None:
        """What needs no model. Raises InputError."""
        if self.seed < 0:
            raise InputError("workload.seed", self.seed, "at least 0")
        if not 0 <= self.deadline_ms <= MAX_DEADLINE_MS:
            raise InputError("workload.deadline_ms", self.deadline_ms, f"0 (none) to {MAX_DEADLINE_MS:.0e} ms")
        self.shares()

    def stream(self, model: Model, plan: KVPlan) -> Stream:
        """The requests. Raises InputError."""
        raise NotImplementedError

    def rng(self, draw: Draw) -> np.random.Generator:
        """The generator of one kind of draws."""
        return np.random.default_rng([self.seed, int(draw)])

    def shares(self) -> dict[int, float]:
        """`priorities` as {priority: share}; {0: 1} for null. Raises InputError."""
        given = {0: 1.0} if self.priorities is None else self.priorities
        pairs = _pairs(given) if isinstance(given, str) else given
        if not isinstance(pairs, dict) or not _are_shares(pairs):
            allowed = "{priority: share, ...} with whole numbers and shares that sum to 1, as in {0: 0.8, 1: 0.2}"
            raise InputError("workload.priorities", shown(given), allowed)
        return {priority: float(share) for priority, share in pairs.items()}

    def draw_priorities(self, count: int) -> list[int]:
        """[count], independent draws by the shares."""
        shares = self.shares()
        if len(shares) == 1:
            return list(shares) * count
        weights = np.array(list(shares.values()))
        drawn = self.rng(Draw.PRIORITIES).choice(list(shares), size=count, p=weights / weights.sum())
        return [int(priority) for priority in drawn]


def _are_shares(pairs: dict[Any, Any]) -> bool:
    for priority, share in pairs.items():
        if type(priority) is not int or abs(priority) > MAX_PRIORITY:
            return False
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            return False
    return math.isclose(math.fsum(pairs.values()), 1, abs_tol=1e-6)


def _pairs(text: str) -> dict[int, float] | None:
    """`0:0.8,1:0.2` -> {0: 0.8, 1: 0.2}, or None."""
    pairs: dict[int, float] = {}
    for part in text.split(","):
        priority, _, share = part.partition(":")
        try:
            key, value = int(priority), float(share)
        except ValueError:
            return None
        if key in pairs:
            return None
        pairs[key] = value
    return pairs


@dataclass
class Arriving(Workload):
    """Base of the workloads whose arrivals are drawn; vLLM's `--request-rate` and `--burstiness`."""

    rate_per_s: float = math.inf  # requests a second; inf: all at the start
    burstiness: float = 1.0  # shape of the gamma distributed gaps: 1 Poisson, lower burstier, inf constant
    rescale: bool = True  # stretch the arrivals so that the last one is at requests / rate_per_s, as vLLM does

    def check(self) -> None:
        super().check()
        check_arrivals(getattr(self, "requests", None), self.rate_per_s, self.burstiness)

    def arrivals(self, count: int) -> list[float]:
        """[count] intended times in s."""
        times_s = arrival_times(count, self.rate_per_s, self.burstiness, self.rescale, self.rng(Draw.ARRIVALS))
        return [float(time_s) for time_s in times_s]


class Vocabulary:
    """Token ids as Python integers, one object an id: a tuple of them then takes 8 bytes a token instead of 36."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._ids = list(range(size))

    def prompt(self, ids: npt.NDArray[np.integer[Any]]) -> Prompt:
        """[tokens] as a tuple."""
        return tuple(map(self._ids.__getitem__, ids.tolist()))


def capacity(plan: KVPlan) -> int:
    """Tokens of prompt and output that one request can have at most."""
    return min(plan.max_len, plan.usable_pages * plan.page_size)


def opened(path: Path, allowed: str) -> BinaryIO:
    """The file of `workload.file`. Raises InputError saying what is `allowed`."""
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError("workload.file", shown(str(path)), f"{allowed} ({error.strerror})") from None


def check_count(key: str, value: int, most: int, least: int = 1) -> None:
    """Raises InputError."""
    if not least <= value <= most:
        raise InputError(f"workload.{key}", value, f"{least} to {most}")
