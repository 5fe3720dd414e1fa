"""The peer backend: the same requests through Hugging Face `transformers`, as a user of that library would serve them.

A decode loop of our own over `model.forward` with the library's caches, not `generate()`: tokens are published one by
one with their times, requests come and go, stop and cancel as in the other backends, and the sampler is the keyed one,
so that the same tokens come out and a comparison is of the same work. A `Streamer` would tell neither steps nor rows.

First come, first served. A prompt is one forward pass of its own. `cache=dynamic` without drafts decodes all running
requests as one batch, padded on the left as `generate()` pads it. `cache=static`, compiled or not, and `spec=ngram`
(the library's prompt lookup, which it offers for one sequence only) serve one request at a time.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from xlpk import layout
from xlpk.backend import Admitted, BackendReport, Event, Finished, StepDone, Token
from xlpk.backends import hf_model
from xlpk.backends.hf_forward import ForwardPasses, Table
from xlpk.backends.hf_request import Running, prompt_lookup
from xlpk.backends.library import usable_cores
from xlpk.backends.power import PowerMeter, Sample
from xlpk.backends.submitter import check_request
from xlpk.errors import BackendError, InputError
from xlpk.kv import KVPlan
from xlpk.model import Model
from xlpk.sampling import Picker, logprobs_of
from xlpk.settings import HfBackend as Choice
from xlpk.settings import Scheduler
from xlpk.speculation import Acceptance, Greedy, Keyed, Ngram, NoSpec, Proposer
from xlpk.workload import Request

_STEP_FIELDS = [name for name, _, _ in layout.STEP_RECORD.fields if name != "phase_ns"]


class HfBackend:
    """Implements xlpk.backend.Backend; a poll runs one step. Pages are counted, not held: see docs/metrics.md."""

    name = "hf"

    def __init__(
        self,
        choice: Choice,
        *,
        cache: Path,
        max_num_seqs: int = Scheduler.max_num_seqs,
        max_step_rows: int = Scheduler.max_step_rows,
        prefill_chunk: int = Scheduler.prefill_chunk,
        spec: Proposer | None = None,
        acceptance: Acceptance | None = None,
        debug_logits: bool = False,
    ) -> None:
        """`max_step_rows` and `prefill_chunk` say nothing here. `debug_logits`: keep the logits of the last prompt,
        which a cache of fixed size then takes token by token."""
        self.choice, self._cache, self._debug_logits = choice, cache, debug_logits
        self.spec: Proposer = spec or NoSpec()
        self.acceptance: Acceptance = acceptance or Keyed()
        choice.check(self.spec, self.acceptance)
        self._alone = choice.cache == "static" or not isinstance(self.spec, NoSpec)
        self._most_running = 1 if self._alone else max_num_seqs
        self._waiting: deque[Request] = deque()
        self._deadlines: dict[int, int] = {}  # request id -> host clock, ns
        self._prefilling: deque[Running] = deque()
        self._running: list[Running] = []
        self._events: list[Event] = []
        self._report = BackendReport(counted=False)
        self._n_steps = 0
        self._is_open = False
        self._power: PowerMeter | None = None

    # ------------------------------------------------------------------------------------------ the session

    def open(self, model: Model, plan: KVPlan) -> None:
        begin_s = time.perf_counter()
        self._torch = torch = hf_model.libraries(self._cache / "inductor")
        self._device = hf_model.device_of(torch, self.choice.device)
        dtype = model.weights.dtype if self.choice.dtype == "auto" else self.choice.dtype
        hf_model.check_kv_dtype(plan.dtype, dtype)
        threads = self.choice.threads or usable_cores()
        torch.set_num_threads(threads)
        self._model, self._plan, self._vocab = model, plan, model.config.vocab_size
        with self._memory():
            self._passes = ForwardPasses(
                torch,
                model,
                dtype,
                self._device,
                static_length=self._static_length if self.choice.cache == "static" else 0,
                alone=self._alone,
                keep_logits=self._debug_logits,
            )
            self._is_open = True
        self._report.details = {
            "orchestration": self.choice.orchestration,
            "threads": str(threads),
            "dtype": dtype,
            "cache": self.choice.cache,
            "compile": hf_model.COMPILED_STATIC[self._device] if self.choice.compile else "none",
            "load_seconds": f"{time.perf_counter() - begin_s:.2f}",
            **hf_model.details(self._passes.net, self._device),
        }
        if self.choice.compile:
            self._report.details["compile_seconds"] = f"{self._passes.compile():.2f}"
        if self._device == "cuda":
            self._power = PowerMeter(hf_model.device_uuid())
            self._power.start()

    @property
    def _static_length(self) -> int:
        """Tokens of the cache of fixed size: what positions and kv.budget allow a sequence."""
        return min(self._plan.max_len, self._plan.pages * self._plan.page_size)

    def clock_ns(self) -> int:
        """The loop runs on the host, and so does its clock."""
        return time.monotonic_ns()

    def submit(self, request: Request) -> bool:
        check_request(request, self._model, self._plan)
        if isinstance(self.acceptance, Greedy) and isinstance(self.spec, Ngram) and request.temperature > 0:
            allowed = "keyed: transformers accepts a draft iff it samples that token itself"
            raise InputError("acceptance", "greedy", f"{allowed}; or sampling.temperature=0")
        if len(self._waiting) >= Scheduler.max_waiting:  # the default: the option is for the loop of the kernels
            return False
        self._waiting.append(request)
        if request.deadline_ms:
            self._deadlines[request.request_id] = time.monotonic_ns() + round(request.deadline_ms * 1e6)
        return True

    def cancel(self, request_id: int) -> None:
        self._end(request_id, "cancelled")

    def _end(self, request_id: int, reason: str) -> None:
        """Of a request wherever it is, if it is."""
        for request in [r for r in self._waiting if r.request_id == request_id]:
            self._waiting.remove(request)
            self._events.append(Finished(request_id, self._n_steps, *self._now(), reason, 0))
        for one in [one for one in (*self._prefilling, *self._running) if one.request.request_id == request_id]:
            self._finish(one, reason)
            self._forget([one])

    def poll(self) -> list[Event]:
        if self._is_open:
            for request_id in [one for one, at_ns in self._deadlines.items() if at_ns <= time.monotonic_ns()]:
                del self._deadlines[request_id]
                self._end(request_id, "deadline")
            self._admit()
            with self._memory(), self._torch.inference_mode():
                if self._prefilling:
                    self._step([self._prefilling.popleft()], prefill=True)
                elif self._running:
                    self._step(list(self._running), prefill=False)
        events, self._events = self._events, []
        return events

    def logits(self, count: int) -> Table:
        """Logits [count, vocab_size] float32 by position, of the last prompt; needs debug_logits."""
        assert self._passes.logits is not None
        return self._passes.logits[:count].copy()

    def power_samples(self) -> list[Sample]:
        """What the power meter saw of the session, in order; complete once it is closed."""
        return list(self._power.samples) if self._power is not None else []

    def free_pages(self) -> int:
        """Pages of the plan that no running request occupies."""
        return self._plan.pages - self._pages_active()

    def close(self) -> BackendReport:
        if self._power is not None:
            self._power.stop()
        if self._is_open:
            self._is_open = False
            self._running.clear()
            self._prefilling.clear()
            self._passes.close()
        return self._report

    @contextlib.contextmanager
    def _memory(self) -> Iterator[None]:
        """torch's own error as ours, in one line."""
        try:
            yield
        except self._torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            raise BackendError(f"backend=hf: {reason}; kv.budget, model.max_len or fewer requests") from None

    def _now(self) -> tuple[int, int]:
        now_ns = time.monotonic_ns()
        return now_ns, now_ns

    # ------------------------------------------------------------------------------------------ a step

    def _admit(self) -> None:
        """A request is admitted when there is a place and, padded to the longest, the plan's pages hold all of them."""
        while self._waiting and len(self._running) + len(self._prefilling) < self._most_running:
            request = self._waiting[0]
            one = Running(request, Picker(request, self._vocab), list(request.prompt))
            together = [*self._running, *self._prefilling, one]
            if len(together) * self._plan.pages_for(max(other.most for other in together)) > self._plan.pages:
                return
            self._waiting.popleft()
            self._prefilling.append(one)
            self._events.append(Admitted(request.request_id, self._n_steps + 1, *self._now()))

    def _step(self, rows: list[Running], *, prefill: bool) -> None:
        """One forward pass of a prompt or of all running requests, and what follows from it."""
        begin_ns = time.monotonic_ns()
        self._n_steps += 1
        values = dict.fromkeys(_STEP_FIELDS, 0) | {"step": self._n_steps, "begin_ns": begin_ns}
        if not prefill:
            for one in rows:
                one.drafts = self._propose(one)
        n_drafts = sum(len(one.drafts) for one in rows)
        n_rows = len(rows[0].tokens) if prefill else len(rows) + n_drafts
        values |= {
            "n_rows": n_rows,
            "n_prefill_rows": n_rows if prefill else 0,
            "n_decode_rows": 0 if prefill else len(rows),
            "n_draft_rows": n_drafts,
            "n_sample_rows": 1 if prefill else n_rows,
            "n_prefill": int(prefill),
            "n_decode": 0 if prefill else len(rows),
            "n_waiting": len(self._waiting),
            "context_tokens": n_rows + sum(one.computed for one in rows),
        }
        forward_ns = time.monotonic_ns()
        passes = self._passes
        best, host = passes.fetch(rows, passes.prefill(rows[0]) if prefill else passes.decode(rows))
        forward_ns = time.monotonic_ns() - forward_ns
        if prefill:
            self._running.append(rows[0])
        values |= self._pages(n_drafts)
        done: list[Running] = []
        for i, one in enumerate(rows):
            table = None if host is None else host[i]
            plain = one.picker.plain and -1 not in best[i]
            picked = best[i] if plain or table is None else self._pick(one, table)
            if self._commit(one, picked, table, values, verified=not prefill):
                done.append(one)
        self._forget(done)
        length = self._passes.batch.length or max((one.computed for one in self._running), default=0)
        values["live_tokens"] = sum(one.computed for one in self._running)
        values["live_pages"] = len(self._running) * self._plan.pages_for(length)
        values["end_ns"], host_ns = self._now()
        phase_ns = {"forward": forward_ns, "control": values["end_ns"] - begin_ns - forward_ns}
        self._events.append(StepDone(self._n_steps, host_ns, values, phase_ns))

    def _pick(self, one: Running, table: Table) -> list[int]:
        """The keyed sample of each row of [rows, vocab], up to the first that is no draft."""
        out: list[int] = []
        first = one.computed  # the position that row 0 samples for
        for i, row in enumerate(table):
            out.append(one.picker.pick(row, first + i, one.drafts[:i]))
            if i < len(one.drafts) and out[-1] != one.drafts[i]:
                break
        return out

    # ------------------------------------------------------------------------------------------ speculation

    def _propose(self, one: Running) -> list[int]:
        """Drafts by prompt lookup, as many as may still be needed."""
        if not isinstance(self.spec, Ngram):
            return []
        count = min(self.spec.block - 1, one.most - len(one.tokens) - 1)
        if count < 1:
            return []
        eos_ids = () if one.request.ignore_eos else self._model.config.eos_token_ids
        return prompt_lookup(one.tokens, count, self.spec.max_n, one.most, eos_ids)

    # ------------------------------------------------------------------------------------------ what follows

    def _commit(
        self, one: Running, picked: list[int], table: Table | None, values: dict[str, int], *, verified: bool
    ) -> bool:
        """Publishes the accepted drafts and one token more; whether the request has finished."""
        drafts, one.drafts = one.drafts, []
        n_accepted = 0
        while n_accepted < min(len(drafts), len(picked)) and picked[n_accepted] == drafts[n_accepted]:
            n_accepted += 1
        emitted = picked[: n_accepted + 1]
        reason = ""
        tokens: list[Token] = []
        for i, token in enumerate(emitted):
            if token < 0:
                reason = "error"
                break
            one.tokens.append(token)
            one.picker.commit(token)
            logprob, top = None, None
            if one.request.logprobs is not None and table is not None:
                logprob, top = logprobs_of(table[i], token, one.request.logprobs)
            index = one.n_output - 1
            where = one.request.request_id, self._n_steps, *self._now()
            tokens.append(Token(*where, token, index, -1, -1, logprob, top))
            if reason := one.reason_after(token, self._model.config.eos_token_ids):
                break
        # The last token of an output counts as the target's own, even if a draft had it.
        counted = min(n_accepted, len(tokens) - 1) if reason else n_accepted
        if tokens and verified:
            tokens[0] = tokens[0]._replace(n_drafts=len(drafts), n_accepted=max(counted, 0))
            values["n_accepted"] += max(counted, 0)
        self._events += tokens
        values["n_tokens"] += len(tokens)
        if reason:
            self._finish(one, reason)
            values["n_finished"] += 1
            return True
        one.computed += n_accepted
        if len(drafts) > n_accepted:
            self._passes.batch.crop(len(drafts) - n_accepted)
        return False

    def _finish(self, one: Running, reason: str) -> None:
        self._events.append(Finished(one.request.request_id, self._n_steps, *self._now(), reason, one.n_output))

    def _forget(self, gone: list[Running]) -> None:
        """Their places, and their part of the batch's cache."""
        if not gone:
            return
        kept = [i for i, one in enumerate(self._running) if one not in gone]
        if self.choice.cache != "static" and len(kept) < len(self._running):
            self._passes.batch.keep(kept)
        self._running = [self._running[i] for i in kept]
        for one in gone:
            self._deadlines.pop(one.request.request_id, None)
            if one in self._prefilling:
                self._prefilling.remove(one)

    def _pages_active(self, drafts: int = 0) -> int:
        """Pages that the tensors of the cache would fill: padding counts, and all of a cache of fixed size."""
        if not self._running:
            return 0
        if self.choice.cache == "static":
            return self._plan.pages_for(self._static_length)
        return len(self._running) * self._plan.pages_for(self._passes.batch.length - drafts)

    def _pages(self, drafts: int) -> dict[str, int]:
        active = self._pages_active(drafts)
        grows = drafts and self.choice.cache != "static"
        draft = self._plan.pages_for(self._passes.batch.length) - active if grows else 0
        total = max(self._plan.pages, active + draft)
        free = total - active - draft
        pages = {"pages_total": total, "pages_free": free, "pages_active": active, "pages_draft": draft}
        return pages | {"pages_locked": active}
