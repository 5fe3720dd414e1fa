// control: what one team does between two steps: verify and commit the step that ran, publish, admit, draft, plan the next.
// The persistent loop runs it on the device; orchestrations that launch from the host run this same code there.
#pragma once

#include "clock.h"
#include "mailbox.h"
#include "stages/commit.h"
#include "stages/decode.h"
#include "stages/draft.h"
#include "stages/kv.h"
#include "stages/preempt.h"
#include "stages/prefill.h"
#include "stages/scheduler.h"
#include "stages/spec_verify.h"

namespace xl {

// Thread 0. Ends the step that ran: its record was begun when it was planned.
template <class Dims>
XL_FN void commit_step(const Grid& grid, const Params& p, const Dims& d, uint64_t now_ns) {
  LoopState& state = *p.state;
  trace(p, TraceKind::kRound, now_ns, 1);
  StepRecord& record = *p.record;
  int kept = 0;
  for (int i = 0; i < state.n_order; ++i) {
    const int slot_id = p.order[i];
    Slot& slot = p.slots[slot_id];
    bool finished = false;
    if (slot.row_count > 0) {
      stage_spec_verify(p, slot);
      finished = stage_commit(grid, p, d, slot_id, now_ns, record);
    }
    if (!finished) {
      record.live_tokens += slot.computed;
      record.live_pages += slot.n_pages;
      p.order[kept++] = slot_id;
    }
  }
  state.n_order = kept;
  // A page with k references is full, and counts once.
  const int more = state.n_pinned_pages - (state.n_refs - state.n_active_pages);
  record.live_pages += more;
  record.live_tokens += more * d.page_size;
  check_page_conservation(grid, p);
  record.end_ns = now_ns;
  for (int i = 0; i < kPhases; ++i) {
    // Control's ticks are this code's own; the forward phases may have run on another device.
    const uint64_t span_ticks = i == int(Phase::kControl) && kTicksAreNs ? 0 : state.span_ticks;
    record.phase_ns[i] = ns_of_ticks(state.phase_ticks[i], state.span_ns, span_ticks);
    state.phase_ticks[i] = 0;
  }
  state.span_ns = state.span_ticks = 0;
  ring_entry(p.step_records, p.step_capacity, state.step_tail++) = record;
  p.step->n_rows = 0;
}

// Thread 0. Plans the next step from decoding slots, their drafts, and prompt chunks. n_rows stays 0: there is nothing to do.
XL_FN void plan_step(const Grid& grid, const Params& p, int page_size, uint64_t now_ns) {
  LoopState& state = *p.state;
  Step& step = *p.step;
  StepRecord& record = *p.record;
  step.n_rows = step.n_sample_rows = step.n_filter_rows = step.n_prefill_rows = step.n_decode_rows = step.n_draft_rows = 0;
  step.n_prefill = step.n_decode = 0;
  if (state.n_order == 0) return;
  trace(p, TraceKind::kPlan, 0, state.draft_rows);
  record = StepRecord{};
  secure_pages(grid, p, page_size, now_ns);
  secure_draft_pages(grid, p, page_size);
  step.n_moves = record.n_moves = state.n_moves;
  state.n_moves = 0;
  stage_decode(p, page_size, record);
  stage_prefill(p, page_size, record);
  step.step = record.step = ++state.n_steps;
  step.begin_ns = record.begin_ns = now_ns;
  record.n_rows = step.n_rows;
  record.n_prefill_rows = step.n_prefill_rows;
  record.n_decode_rows = step.n_decode_rows;
  record.n_draft_rows = step.n_draft_rows;
  record.n_sample_rows = step.n_sample_rows;
  record.n_prefill = step.n_prefill;
  record.n_decode = step.n_decode;
  record.n_preempted = state.n_preempted;
  record.n_waiting = state.n_queued - state.n_preempted;
  record.n_preemptions = state.n_preemptions;
  record.n_evictions = state.n_evictions;
  state.n_preemptions = state.n_evictions = 0;
  record.pages_total = p.n_pages;
  record.pages_free = state.n_free_pages;
  record.pages_cached = state.n_cached_pages;
  record.pages_active = state.n_active_pages - record.pages_draft;
  record.pages_pinned = state.n_pinned_pages;
  record.pages_locked = record.pages_active - unlocked_pages(p);
  trace(p, TraceKind::kStep, step.step, step.n_rows, step.n_sample_rows, step.n_moves);
}

// Rows that drafts may take: what the cap leaves behind decode rows and prompt chunks.
XL_FN int rows_for_drafts(const Params& p) {
  int rows = p.max_rows;
  for (int i = 0; i < p.state->n_order; ++i) {
    const Slot& slot = p.slots[p.order[i]];
    rows -= slot.state == int(SlotState::kDecode) ? 1 : chunk_of(p, slot);
  }
  return rows > 0 ? rows : 0;
}

XL_FN bool step_ring_has_room(const Params& p, const HostWords& host) {
  return p.state->step_tail - host.step_head + 1 < uint64_t(p.step_capacity);
}

// Thread 0. Both rings have room for whatever the next step may write.
XL_FN bool rings_have_room(const Params& p, const HostWords& host) {
  return free_events(p, host) >= events_per_round(p) && step_ring_has_room(p, host);
}

// Thread 0. Why the loop should leave now; its clocks are those of this launch.
XL_FN LeaveReason leave_reason(const Params& p, const HostWords& host, uint64_t now_ns) {
  LoopState& state = *p.state;
  if (host.stop != 0) return LeaveReason::kStop;
  if (p.heartbeat_ns > 0) {
    if (host.heartbeat != state.beat) {
      state.beat = host.heartbeat;
      state.beat_ns = now_ns;
    } else if (now_ns - state.beat_ns > p.heartbeat_ns) {
      return LeaveReason::kHeartbeat;
    }
  }
  if (p.lease_ns > 0 && now_ns - state.launched_ns > p.lease_ns) return LeaveReason::kLease;
  if (state.n_order > 0 || state.n_queued > 0 || host.submit_tail != state.submit_seen) state.busy_ns = now_ns;
  if (p.idle_ns > 0 && now_ns - state.busy_ns > p.idle_ns) return LeaveReason::kIdle;
  return LeaveReason::kNone;
}

// Thread 0. The last words of a round of control.
XL_FN void publish_round(const Params& p) {
  Mailbox& mailbox = *p.mailbox;
  mailbox.running = uint32_t(p.state->n_order + p.state->n_queued);
  publish_trace(p);
  store_relaxed_system(&mailbox.progress, ++p.state->n_rounds);  // a sign of life, which nobody reads others by
  if (p.step->leave == int(LeaveReason::kNone)) {
    ++p.state->n_check_ins;  // who leaves does not check in
    return;
  }
  mailbox.leave = uint32_t(p.step->leave);
  store_release_system(&mailbox.n_left, ++p.state->n_left);
}

// Thread 0, behind the commit of a step if there was one. Whether the round has anything to do.
XL_FN void trace_round(const Params& p, const HostWords& host, bool committed, uint64_t now_ns) {
  const LoopState& state = *p.state;
  if (p.trace == nullptr) return;
  if (!committed) {
    if (state.n_order + state.n_queued == 0 && host.submit_tail == state.submit_seen && host.cancel_tail == state.cancel_head) return;
    trace(p, TraceKind::kRound, now_ns, 0);
  }
  const uint64_t room = free_events(p, host);
  trace(p, TraceKind::kRoom, 0, room < 0x7fffffff ? int(room) : 0x7fffffff, step_ring_has_room(p, host));
}

// The whole team, at `now_ns` of the clock that stamps events. Afterwards Step says what to run: `leave`, a step of n_rows, or
// nothing.
template <class Team, class Dims>
XL_FN void phase_control_at(Team& team, const Grid& grid, const Params& p, const Dims& d, uint64_t now_ns) {
  LoopState& state = *p.state;
  const uint64_t begin_ticks = clock_ticks();
  HostWords host = {};  // thread 0's
  if (team.thread() == 0) {
    begin_trace(p);
    state.round_ns = now_ns;
    const bool committed = p.step->n_rows > 0;
    if (committed) commit_step(grid, p, d, now_ns);
    begin_phase(state, Phase::kControl, begin_ticks);  // behind the commit, which takes the time of rounds before this one
    host = read_host(*p.mailbox);
    trace_round(p, host, committed, now_ns);
  }
  stage_scheduler(team, grid, p, d, host, now_ns);
  if (team.thread() == 0) {
    for (int i = 0; i < state.n_order; ++i) p.slots[p.order[i]].row_count = p.slots[p.order[i]].n_drafts = 0;
    p.step->leave = int(leave_reason(p, host, now_ns));
    state.draft_rows = !p.step->leave && rings_have_room(p, host) ? rows_for_drafts(p) : -1;
  }
  team.sync();
  const int draft_rows = state.draft_rows;
  if (draft_rows > 0) {
    stage_draft(team, p, d, draft_rows);
    team.sync();  // planning may preempt, and who drafts reads who runs
  }
  if (team.thread() == 0) {
    if (draft_rows >= 0) plan_step(grid, p, d.page_size, now_ns);
    store_release_system(&p.mailbox->event_tail, state.event_tail, state.step_tail);  // whoever sees a step sees its events
    publish_round(p);
    end_phase(state, Phase::kControl);
  }
  team.sync();
}

template <class Team, class Dims>
XL_FN void phase_control(Team& team, const Grid& grid, const Params& p, const Dims& d) {
  phase_control_at(team, grid, p, d, clock_ns());
}

}  // namespace xl
