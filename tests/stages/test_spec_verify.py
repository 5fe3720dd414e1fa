"""Acceptance policies: what keeps the text, and what a lossy one loses."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from stages.audit import Audit
from stages.sessions import serial_text, serve, session

from xlpk.backends.cpu import CpuLibrary
from xlpk.model import Model
from xlpk.speculation import Acceptance, Forced, Greedy, Keyed, Ngram
from xlpk.workload import Request


def requests(temperature: float) -> list[Request]:
    rng = np.random.RandomState(20)
    return [
        Request(i, tuple(rng.randint(3, 6, 30).tolist()), 40, temperature=temperature, seed=i, ignore_eos=True)
        for i in range(8)
    ]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("acceptance", [Keyed(), Greedy(), Forced(stride=3)], ids=lambda policy: policy.name)
def test_policies_follow_their_rule(
    small: Callable[[str], Model], cpu_library: CpuLibrary, acceptance: Acceptance, temperature: float
) -> None:
    model = small("alphabet")
    batch = requests(temperature)
    options = {"max_num_seqs": 8, "max_step_rows": 64, "spec": Ngram(block=6), "acceptance": acceptance}
    with session(model, cpu_library, **options) as backend:
        audit = Audit(backend)
        log = serve(backend, batch, each=audit)
    assert audit.n_accepted > 10
    assert audit.n_rejected > 10
    same = [tuple(log.tokens[r.request_id]) == serial_text(model, cpu_library, r) for r in batch]
    assert all(same) == acceptance.lossless(temperature)
