// scheduler: what arrived, what ends by cancellation or deadline, and who is admitted: by rank (queue.h), when there is a place
// among the running and there are pages for all that is known of its sequence. Nobody passes the first in rank. A request that
// was preempted waits in the same queue, with its old rank and its tokens still in its slot.
#pragma once

#include "mailbox.h"
#include "penalties.h"
#include "stages/commit.h"
#include "stages/queue.h"

namespace xl {

// Events that one round of control may write: the tokens and the end of each running request, and its preemption. Planning and
// admissions wait until the ring has room for them.
XL_FN uint64_t events_per_round(const Params& p) { return uint64_t(p.max_running) * uint64_t(kMaxBlock + 2); }

XL_FN uint64_t free_events(const Params& p, const HostWords& host) {
  return uint64_t(p.event_capacity) - (p.state->event_tail - host.event_head);
}

// Prompt ring entries that belong to a submission: prompt, right answers, bias pairs.
XL_FN uint64_t ring_tokens(const Submission& s) {
  return uint64_t(s.prompt_len) + uint64_t(s.oracle_len) + 2 * uint64_t(s.n_bias);
}

XL_FN void copy_sampling(Slot& slot, const Submission& submission) {
  slot.temperature = submission.temperature;
  slot.top_k = submission.top_k;
  slot.top_p = submission.top_p;
  slot.min_p = submission.min_p;
  slot.repetition_penalty = submission.repetition_penalty;
  slot.presence_penalty = submission.presence_penalty;
  slot.frequency_penalty = submission.frequency_penalty;
  slot.n_logprobs = submission.n_logprobs;
  slot.n_bias = submission.n_bias;
  slot.n_target = submission.n_target;
  for (int i = 0; i < kMaxTarget; ++i) slot.target[i] = submission.target[i];
  for (int i = 0; i < kMaxStopIds; ++i) slot.stop_ids[i] = submission.stop_ids[i];
  slot.penalized = slot.repetition_penalty != 1.0f || slot.presence_penalty != 0.0f || slot.frequency_penalty != 0.0f;
  slot.adjusted = slot.penalized || slot.n_bias > 0;
  const bool drops = slot.top_k > 0 || slot.top_p < 1.0f || slot.min_p > 0.0f;
  slot.filtered = (drops && slot.temperature > 0.0f) || slot.n_logprobs >= 0;
}

// Thread 0. How far this round looks. A request is submitted before it is cancelled: what is cancelled now is seen now.
XL_FN void look_at_rings(const Params& p, const HostWords& host) {
  p.state->submit_tail = host.submit_tail;
  if (host.cancel_tail != p.state->cancel_head) p.state->submit_tail = load_acquire_system(&p.mailbox->submit_tail);
}

// The team copies what the host has submitted since; thread 0 gives it a rank and a place in the queue.
template <class Team>
XL_FN void take_submissions(Team& team, const Params& p, uint64_t now_ns) {
  LoopState& state = *p.state;
  const uint64_t seen = state.submit_seen, tail = state.submit_tail;
  if (seen == tail) return;
  constexpr uint64_t kWords = sizeof(Submission) / sizeof(uint32_t);
  for (uint64_t i = uint64_t(team.thread()); i < (tail - seen) * kWords; i += uint64_t(Team::threads)) {
    const uint32_t* from = reinterpret_cast<const uint32_t*>(&ring_entry(p.submissions, p.submission_capacity, seen + i / kWords));
    reinterpret_cast<uint32_t*>(&ring_entry(p.queue, p.submission_capacity, seen + i / kWords))[i % kWords] = from[i % kWords];
  }
  team.sync();
  if (team.thread() != 0) return;
  const uint64_t after_ns = now_ns - state.round_ns;
  for (; state.submit_seen < tail; ++state.submit_seen) {
    Submission& submission = ring_entry(p.queue, p.submission_capacity, state.submit_seen);
    if (submission.deadline_ns != 0) {
      submission.deadline_ns += now_ns;
      if (state.next_deadline_ns == 0 || submission.deadline_ns < state.next_deadline_ns)
        state.next_deadline_ns = submission.deadline_ns;
    }
    trace(p, TraceKind::kSeen, submission.request_id, int(after_ns & 0x7fffffff), int(after_ns >> 31));
    ring_entry(p.gone, p.submission_capacity, state.submit_seen) = 0;
    queue_push(p, rank_of(p, submission, state.n_steps), state.submit_seen, -1);
  }
}

// Whether a request of the queue was preempted: its slot has what nobody else has.
XL_FN bool ran_before(const Params& p, const QueueEntry& entry) {
  return entry.slot >= 0 && p.slots[entry.slot].state == int(SlotState::kPreempted);
}

// Thread 0. Nothing in the rings is needed of this submission any more.
XL_FN void let_submission_go(const Params& p, uint64_t number) {
  LoopState& state = *p.state;
  ring_entry(p.gone, p.submission_capacity, number) = 1;
  for (; state.submit_head < state.submit_seen && ring_entry(p.gone, p.submission_capacity, state.submit_head); ++state.submit_head) {
    const Submission& oldest = ring_entry(p.queue, p.submission_capacity, state.submit_head);
    state.prompt_head = oldest.prompt_begin + ring_tokens(oldest);
  }
}

// Thread 0. Ends a request of the queue.
XL_FN void finish_queued(const Grid& grid, const Params& p, int page_size, int at, uint64_t now_ns, FinishReason reason) {
  const QueueEntry entry = p.heap[at];
  queue_remove(p, at);
  if (ran_before(p, entry)) return finish_slot(grid, p, page_size, entry.slot, now_ns, reason);
  if (entry.slot >= 0) free_slot(p, entry.slot);
  const uint64_t id = ring_entry(p.queue, p.submission_capacity, entry.number).request_id;
  trace(p, TraceKind::kFinish, id, int(reason), 0);
  write_finished(p, id, now_ns, reason, 0);
  let_submission_go(p, entry.number);
}

// Thread 0. Ends the i-th running request.
XL_FN void finish_running(const Grid& grid, const Params& p, int page_size, int i, uint64_t now_ns, FinishReason reason) {
  finish_slot(grid, p, page_size, p.order[i], now_ns, reason);
  --p.state->n_order;
  for (; i < p.state->n_order; ++i) p.order[i] = p.order[i + 1];
}

XL_FN uint64_t queued_id(const Params& p, const QueueEntry& entry) {
  return entry.slot >= 0 ? p.slots[entry.slot].request_id : ring_entry(p.queue, p.submission_capacity, entry.number).request_id;
}

XL_FN uint64_t queued_deadline(const Params& p, const QueueEntry& entry) {
  return entry.slot >= 0 ? p.slots[entry.slot].deadline_ns : ring_entry(p.queue, p.submission_capacity, entry.number).deadline_ns;
}

// Thread 0. A cancellation ends its request wherever it is; unknown ids have finished already.
XL_FN void take_cancellations(const Grid& grid, const Params& p, const HostWords& host, int page_size, uint64_t now_ns) {
  LoopState& state = *p.state;
  if (state.cancel_head == host.cancel_tail) return;
  for (; state.cancel_head < host.cancel_tail && free_events(p, host) > events_per_round(p); ++state.cancel_head) {
    const uint64_t id = ring_entry(p.cancels, p.submission_capacity, state.cancel_head);
    trace(p, TraceKind::kCancel, id);
    int i = 0, at = 0;
    while (i < state.n_order && p.slots[p.order[i]].request_id != id) ++i;
    if (i < state.n_order) {
      finish_running(grid, p, page_size, i, now_ns, FinishReason::kCancelled);
      continue;
    }
    while (at < state.n_queued && queued_id(p, p.heap[at]) != id) ++at;
    if (at < state.n_queued) finish_queued(grid, p, page_size, at, now_ns, FinishReason::kCancelled);
  }
  store_release_system(&p.mailbox->cancel_head, state.cancel_head);
}

// Thread 0. Ends what has outlived its deadline; looks at nobody before the earliest of them.
XL_FN void end_late_requests(const Grid& grid, const Params& p, const HostWords& host, int page_size, uint64_t now_ns) {
  LoopState& state = *p.state;
  if (state.next_deadline_ns == 0 || now_ns < state.next_deadline_ns) return;
  uint64_t next = 0;
  const auto late = [&](uint64_t deadline_ns) {
    if (deadline_ns == 0) return false;
    if (deadline_ns <= now_ns && free_events(p, host) > events_per_round(p)) return true;
    if (next == 0 || deadline_ns < next) next = deadline_ns;
    return false;
  };
  for (int i = 0; i < state.n_order;) {
    if (late(p.slots[p.order[i]].deadline_ns))
      finish_running(grid, p, page_size, i, now_ns, FinishReason::kDeadline);
    else
      ++i;
  }
  for (int at = state.n_queued - 1; at >= 0;) {
    if (at < state.n_queued && late(queued_deadline(p, p.heap[at])))
      finish_queued(grid, p, page_size, at, now_ns, FinishReason::kDeadline);  // another may be here now
    else
      --at;
  }
  state.next_deadline_ns = next;
}

// Thread 0. Takes its slot from the last in rank of those that wait and never ran; false: there is none.
XL_FN bool revoke_slot(const Params& p) {
  QueueEntry* last = nullptr;
  for (int at = 0; at < p.state->n_queued; ++at) {
    QueueEntry& entry = p.heap[at];
    if (entry.slot >= 0 && !ran_before(p, entry) && (last == nullptr || goes_before(*last, entry))) last = &entry;
  }
  if (last == nullptr) return false;
  free_slot(p, last->slot);
  last->slot = -1;
  return true;
}

// Thread 0. Gives a request of the queue a slot for its tokens, which stay in the ring until it is admitted; -1: those that run
// or were preempted have them all.
XL_FN int open_slot(const Params& p, QueueEntry& entry) {
  if (p.state->n_free_slots == 0 && !revoke_slot(p)) return -1;
  const int slot_id = p.free_slots[--p.state->n_free_slots];
  const Submission& submission = ring_entry(p.queue, p.submission_capacity, entry.number);
  Slot& slot = p.slots[slot_id];
  slot = Slot{};
  slot.request_id = submission.request_id;
  slot.seed = submission.seed;
  slot.rank = entry.rank;
  slot.number = entry.number;
  slot.deadline_ns = submission.deadline_ns;
  slot.state = int(SlotState::kWaiting);
  slot.prompt_len = slot.length = submission.prompt_len;
  slot.max_new_tokens = submission.max_new_tokens;
  slot.ignore_eos = submission.ignore_eos;
  slot.n_stop_ids = submission.n_stop_ids;
  slot.share = submission.share && p.prefix_sharing;
  slot.pin = slot.share && submission.pin;
  copy_sampling(slot, submission);
  slot.oracle_len = submission.oracle_len;
  return entry.slot = slot_id;
}

// The team copies the tokens of the slot's request from the prompt ring.
template <class Team>
XL_FN void copy_prompt(Team& team, const Params& p, int slot_id) {
  const Submission& submission = ring_entry(p.queue, p.submission_capacity, p.slots[slot_id].number);
  int32_t* tokens = tokens_of(p, slot_id);
  int32_t* oracle = p.oracle + size_t(slot_id) * size_t(p.max_len);
  for (int i = team.thread(); i < submission.prompt_len; i += Team::threads)
    tokens[i] = ring_entry(p.prompts, p.prompt_capacity, submission.prompt_begin + uint64_t(i));
  const uint64_t answers = submission.prompt_begin + uint64_t(submission.prompt_len);
  for (int i = team.thread(); i < submission.oracle_len; i += Team::threads)
    oracle[i] = ring_entry(p.prompts, p.prompt_capacity, answers + uint64_t(i));
}

// The team clears the slot's counts and biases and enters the bias pairs, whose tokens differ; thread 0 enters the prompt's tokens.
template <class Team, class Dims>
XL_FN void prepare_adjustments(Team& team, const Params& p, const Dims& d, int slot_id) {
  const Slot& slot = p.slots[slot_id];
  if (!slot.adjusted) return;
  const Submission& submission = ring_entry(p.queue, p.submission_capacity, slot.number);
  int32_t* counts = p.counts + size_t(slot_id) * size_t(d.vocab_size);
  float* bias = p.bias + size_t(slot_id) * size_t(d.vocab_size);
  for (int i = team.thread(); i < d.vocab_size; i += Team::threads) {
    counts[i] = 0;
    bias[i] = 0.0f;
  }
  team.sync();
  const uint64_t pairs = submission.prompt_begin + uint64_t(submission.prompt_len) + uint64_t(submission.oracle_len);
  for (int i = team.thread(); i < slot.n_bias; i += Team::threads) {
    const int token = ring_entry(p.prompts, p.prompt_capacity, pairs + 2 * uint64_t(i));
    bias[token] = from_bits(uint32_t(ring_entry(p.prompts, p.prompt_capacity, pairs + 2 * uint64_t(i) + 1)));
  }
  if (team.thread() != 0) return;
  const int32_t* tokens = tokens_of(p, slot_id);
  for (int i = 0; i < slot.prompt_len; ++i) counts[tokens[i]] = kSeenInPrompt;
}

// The team gets all that is needed of a request before it is admitted.
template <class Team, class Dims>
XL_FN void fill_slot(Team& team, const Params& p, const Dims& d, int slot_id) {
  copy_prompt(team, p, slot_id);
  team.sync();
  prepare_adjustments(team, p, d, slot_id);
  const Slot& slot = p.slots[slot_id];
  const int full = (slot.length - 1) / d.page_size;
  if (team.thread() == 0 && slot.share && full > 0) page_hash(p, d.page_size, slot_id, full - 1);
  team.sync();
}

// Thread 0. Gives a slot that nobody needs to the first in rank of those that have none; -1: either is missing.
XL_FN int open_slot_ahead(const Params& p) {
  QueueEntry* first = nullptr;
  for (int at = 0; p.state->n_free_slots > 0 && at < p.state->n_queued; ++at) {
    QueueEntry& entry = p.heap[at];
    if (entry.slot < 0 && (first == nullptr || goes_before(entry, *first))) first = &entry;
  }
  return first ? open_slot(p, *first) : -1;
}

// The team, beside a step that runs: takes what has arrived, and fills the slot of one request that waits. It writes nothing that
// phases or the commit of the step read, and changes no decision: control would do the same later, with the time of a step.
template <class Team, class Dims>
XL_FN void prepare_requests_at(Team& team, const Params& p, const Dims& d, uint64_t now_ns) {
  LoopState& state = *p.state;
  if (team.thread() == 0) {
    begin_trace(p);
    state.submit_tail = load_acquire_system(&p.mailbox->submit_tail);
  }
  team.sync();
  take_submissions(team, p, now_ns);
  if (team.thread() == 0) state.filled_slot = open_slot_ahead(p);
  team.sync();
  const int slot_id = state.filled_slot;
  if (slot_id >= 0) fill_slot(team, p, d, slot_id);
}

template <class Team, class Dims>
XL_FN void prepare_requests(Team& team, const Params& p, const Dims& d) {
  prepare_requests_at(team, p, d, clock_ns());
}

// Pages that running requests still lack for the sequences with which they were admitted.
XL_FN int owed_pages(const Params& p, int page_size) {
  int owed = 0;
  for (int i = 0; i < p.state->n_order; ++i) {
    const Slot& slot = p.slots[p.order[i]];
    const int lacking = pages_for(slot.length, page_size) - slot.n_pages;
    owed += lacking > 0 ? lacking : 0;
  }
  return owed;
}

// Thread 0. The slot joins the running if there are pages for all of its tokens.
XL_FN bool admit(const Grid& grid, const Params& p, int page_size, int slot_id, uint64_t now_ns) {
  LoopState& state = *p.state;
  Slot& slot = p.slots[slot_id];
  const SharedPrefix found = find_shared_prefix(p, page_size, slot_id);
  const int spare = state.n_order > 0 ? p.n_pages / kWatermark : 0;
  const int available = state.n_free_pages + state.n_cached_pages - found.n_cached - owed_pages(p, page_size) - spare;
  if (pages_for(slot.length, page_size) - found.n_pages > available) return false;
  hold_shared_prefix(p, page_size, slot_id, found);
  const int before = slot.n_pages;
  if (slot.n_swapped > before) swap_in(grid, p, slot_id);
  release_swap(p, slot_id);
  const bool resumed = slot.state == int(SlotState::kPreempted);
  if (!resumed) let_submission_go(p, slot.number);
  trace(p, TraceKind::kAdmit, slot.request_id, resumed, found.n_pages, slot.n_pages - before);
  if (resumed) --state.n_preempted;
  slot.state = int(slot.length > slot.prompt_len && slot.computed == slot.length - 1 ? SlotState::kDecode : SlotState::kPrefill);
  int at = state.n_order++;
  for (; at > 0; --at) {
    const Slot& before = p.slots[p.order[at - 1]];
    if (!goes_before(slot.rank, slot.number, before.rank, before.number)) break;
    p.order[at] = p.order[at - 1];
  }
  p.order[at] = slot_id;
  Event event = request_event(p, slot.request_id, now_ns, resumed ? EventKind::kResumed : EventKind::kAdmitted);
  event.step = state.n_steps + 1;
  event.n_cached = found.n_pages * page_size;
  write_event(p, event);
  return true;
}

// Thread 0. Admits from the top of the queue until somebody's tokens have to be copied first: that slot; -1: nobody can be admitted.
XL_FN int admit_from_queue(const Grid& grid, const Params& p, const HostWords& host, int page_size, uint64_t now_ns) {
  LoopState& state = *p.state;
  while (state.n_queued > 0 && state.n_order < p.max_running && free_events(p, host) > events_per_round(p)) {
    QueueEntry& top = p.heap[0];
    if (top.slot < 0) return open_slot(p, top);
    if (!admit(grid, p, page_size, top.slot, now_ns)) return -1;
    queue_remove(p, 0);
  }
  return -1;
}

template <class Team, class Dims>
XL_FN void stage_scheduler(Team& team, const Grid& grid, const Params& p, const Dims& d, const HostWords& host, uint64_t now_ns) {
  LoopState& state = *p.state;
  const int page_size = d.page_size;
  const uint64_t taken = team.thread() == 0 ? state.submit_head : 0;
  if (team.thread() == 0) look_at_rings(p, host);
  team.sync();
  take_submissions(team, p, now_ns);
  if (team.thread() == 0) {
    take_cancellations(grid, p, host, page_size, now_ns);
    end_late_requests(grid, p, host, page_size, now_ns);
  }
  for (;;) {
    if (team.thread() == 0) state.filled_slot = admit_from_queue(grid, p, host, page_size, now_ns);
    team.sync();
    const int slot_id = state.filled_slot;
    if (slot_id < 0) break;
    fill_slot(team, p, d, slot_id);
  }
  if (team.thread() == 0 && state.submit_head != taken) {
    store_release_system(&p.mailbox->prompt_head, state.prompt_head);
    store_release_system(&p.mailbox->submit_head, state.submit_head);
  }
}

}  // namespace xl
