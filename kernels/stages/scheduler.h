// scheduler: cancellations and admissions, first come first served. A request is admitted when there is a slot for it and its
// worst case of pages can be reserved; until then it waits at the head of the submission ring.
#pragma once

#include "mailbox.h"
#include "penalties.h"
#include "stages/commit.h"

namespace xl {

// Events that one round of control may write: every slot's tokens and its end. Planning waits until the ring has room for them.
XL_FN uint64_t events_per_round(const Params& p) { return uint64_t(p.max_slots) * uint64_t(kMaxBlock + 1); }

XL_FN uint64_t free_events(const Params& p, const HostWords& host) {
  return uint64_t(p.event_capacity) - (p.state->event_tail - host.event_head);
}

// Thread 0. Each cancellation ends a running request at once or marks a waiting one; unknown ids have finished already.
XL_FN void take_cancellations(const Grid& grid, const Params& p, const HostWords& host, int page_size, uint64_t now_ns) {
  LoopState& state = *p.state;
  const uint64_t tail = host.cancel_tail;
  if (state.cancel_head == tail) return;
  const uint64_t submitted = load_acquire_system(&p.mailbox->submit_tail);  // again: a request is submitted before it is cancelled
  for (; state.cancel_head < tail && free_events(p, host) > events_per_round(p); ++state.cancel_head) {
    const uint64_t id = ring_entry(p.cancels, p.submission_capacity, state.cancel_head);
    for (int i = 0; i < state.n_order; ++i) {
      if (p.slots[p.order[i]].request_id != id) continue;
      finish_slot(grid, p, page_size, p.order[i], now_ns, FinishReason::kCancelled);
      --state.n_order;
      for (; i < state.n_order; ++i) p.order[i] = p.order[i + 1];
    }
    for (uint64_t at = state.submit_head; at < submitted; ++at)
      if (ring_entry(p.submissions, p.submission_capacity, at).request_id == id)
        ring_entry(p.cancelled, p.submission_capacity, at) = 1;
  }
  store_release_system(&p.mailbox->cancel_head, state.cancel_head);
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

// Thread 0. Takes the head of the ring; its slot, or -1: nothing can be admitted now.
XL_FN int admit_one(const Params& p, const HostWords& host, int page_size, uint64_t now_ns) {
  LoopState& state = *p.state;
  while (state.submit_head < host.submit_tail && free_events(p, host) > events_per_round(p)) {
    const Submission& submission = ring_entry(p.submissions, p.submission_capacity, state.submit_head);
    uint8_t& cancelled = ring_entry(p.cancelled, p.submission_capacity, state.submit_head);
    if (cancelled) {
      cancelled = 0;
      write_finished(p, submission.request_id, now_ns, FinishReason::kCancelled, 0);
      state.prompt_head = submission.prompt_begin + ring_tokens(submission);
      ++state.submit_head;
      continue;
    }
    const int worst = pages_for(submission.prompt_len + submission.max_new_tokens, page_size);
    if (state.n_order == p.max_slots || state.n_reserved_pages + worst > p.n_pages) return -1;
    int slot_id = 0;
    while (p.slots[slot_id].state != int(SlotState::kFree)) ++slot_id;
    Slot& slot = p.slots[slot_id];
    slot = Slot{};
    slot.request_id = submission.request_id;
    slot.seed = submission.seed;
    slot.state = int(SlotState::kPrefill);
    slot.prompt_len = slot.length = submission.prompt_len;
    slot.max_new_tokens = submission.max_new_tokens;
    slot.ignore_eos = submission.ignore_eos;
    slot.n_stop_ids = submission.n_stop_ids;
    copy_sampling(slot, submission);
    slot.oracle_len = submission.oracle_len;
    slot.reserved_pages = worst;
    state.n_reserved_pages += worst;
    p.order[state.n_order++] = slot_id;
    return slot_id;
  }
  return -1;
}

// The team copies the admitted request's tokens from the prompt ring; only then does the ring move on.
template <class Team>
XL_FN void copy_prompt(Team& team, const Params& p, int slot_id) {
  const Submission& submission = ring_entry(p.submissions, p.submission_capacity, p.state->submit_head);
  int32_t* tokens = p.tokens + size_t(slot_id) * size_t(p.max_len);
  int32_t* oracle = p.oracle + size_t(slot_id) * size_t(p.max_len);
  for (int i = team.thread(); i < submission.prompt_len; i += Team::threads)
    tokens[i] = ring_entry(p.prompts, p.prompt_capacity, submission.prompt_begin + uint64_t(i));
  const uint64_t answers = submission.prompt_begin + uint64_t(submission.prompt_len);
  for (int i = team.thread(); i < submission.oracle_len; i += Team::threads)
    oracle[i] = ring_entry(p.prompts, p.prompt_capacity, answers + uint64_t(i));
}

// The team clears the slot's counts and biases, thread 0 enters the prompt's tokens and the bias pairs.
template <class Team, class Dims>
XL_FN void prepare_adjustments(Team& team, const Params& p, const Dims& d, int slot_id) {
  const Slot& slot = p.slots[slot_id];
  if (!slot.adjusted) return;
  const Submission& submission = ring_entry(p.submissions, p.submission_capacity, p.state->submit_head);
  int32_t* counts = p.counts + size_t(slot_id) * size_t(d.vocab_size);
  float* bias = p.bias + size_t(slot_id) * size_t(d.vocab_size);
  for (int i = team.thread(); i < d.vocab_size; i += Team::threads) {
    counts[i] = 0;
    bias[i] = 0.0f;
  }
  team.sync();
  if (team.thread() != 0) return;
  const int32_t* tokens = p.tokens + size_t(slot_id) * size_t(p.max_len);
  for (int i = 0; i < slot.prompt_len; ++i) counts[tokens[i]] = kSeenInPrompt;
  const uint64_t pairs = submission.prompt_begin + uint64_t(submission.prompt_len) + uint64_t(submission.oracle_len);
  for (int i = 0; i < slot.n_bias; ++i) {
    const int token = ring_entry(p.prompts, p.prompt_capacity, pairs + 2 * uint64_t(i));
    bias[token] = from_bits(uint32_t(ring_entry(p.prompts, p.prompt_capacity, pairs + 2 * uint64_t(i) + 1)));
  }
}

template <class Team, class Dims>
XL_FN void stage_scheduler(Team& team, const Grid& grid, const Params& p, const Dims& d, const HostWords& host, uint64_t now_ns) {
  LoopState& state = *p.state;
  const int page_size = d.page_size;
  const uint64_t taken = team.thread() == 0 ? state.submit_head : 0;
  if (team.thread() == 0) take_cancellations(grid, p, host, page_size, now_ns);
  for (;;) {
    if (team.thread() == 0) state.admitted_slot = admit_one(p, host, page_size, now_ns);
    team.sync();
    const int slot_id = state.admitted_slot;
    if (slot_id < 0) break;
    copy_prompt(team, p, slot_id);
    team.sync();
    prepare_adjustments(team, p, d, slot_id);
    if (team.thread() != 0) continue;
    const Submission& submission = ring_entry(p.submissions, p.submission_capacity, state.submit_head);
    Event event = {};
    event.request_id = submission.request_id;
    event.step = state.n_steps + 1;
    event.device_ns = now_ns;
    event.kind = int(EventKind::kAdmitted);
    event.n_drafts = event.n_accepted = event.n_logprobs = -1;
    write_event(p, event);
    state.prompt_head = submission.prompt_begin + ring_tokens(submission);
    ++state.submit_head;
  }
  if (team.thread() == 0 && state.submit_head != taken) {
    store_release_system(&p.mailbox->prompt_head, state.prompt_head);
    store_release_system(&p.mailbox->submit_head, state.submit_head);
  }
}

}  // namespace xl
