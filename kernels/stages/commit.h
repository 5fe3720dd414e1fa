// commit: emitted tokens join the sequence and are published; finished requests give everything back.
#pragma once

#include "ring.h"
#include "sampling.h"
#include "stages/swap.h"

namespace xl {

// Writes an event; the host sees it when control publishes the tail.
XL_FN void write_event(const Params& p, const Event& event) {
  ring_entry(p.events, p.event_capacity, p.state->event_tail++) = event;
}

XL_FN Event request_event(const Params& p, uint64_t request_id, uint64_t now_ns, EventKind kind) {
  Event event = {};
  event.request_id = request_id;
  event.step = p.step->step;
  event.device_ns = now_ns;
  event.kind = int(kind);
  event.n_drafts = event.n_accepted = event.n_logprobs = -1;
  return event;
}

XL_FN void write_finished(const Params& p, uint64_t request_id, uint64_t now_ns, FinishReason reason, int n_output) {
  Event event = request_event(p, request_id, now_ns, EventKind::kFinished);
  event.output_index = n_output;
  event.reason = int(reason);
  write_event(p, event);
}

XL_FN bool contains(const int32_t* ids, int count, int token) {
  for (int i = 0; i < count; ++i)
    if (ids[i] == token) return true;
  return false;
}

// Whether the output's last tokens are the request's target.
XL_FN bool ends_with_target(const Params& p, int slot_id) {
  const Slot& slot = p.slots[slot_id];
  if (slot.n_target == 0 || slot.length - slot.prompt_len < slot.n_target) return false;
  const int32_t* last = tokens_of(p, slot_id) + size_t(slot.length - slot.n_target);
  for (int i = 0; i < slot.n_target; ++i)
    if (last[i] != slot.target[i]) return false;
  return true;
}

XL_FN FinishReason finish_reason_of(const Params& p, int slot_id, int token) {
  const Slot& slot = p.slots[slot_id];
  if (token < 0) return FinishReason::kError;
  if (!slot.ignore_eos && contains(p.eos_ids, p.n_eos_ids, token)) return FinishReason::kEos;
  if (contains(slot.stop_ids, slot.n_stop_ids, token)) return FinishReason::kStop;
  if (ends_with_target(p, slot_id)) return FinishReason::kTarget;
  if (slot.length - slot.prompt_len >= slot.max_new_tokens) return FinishReason::kLength;
  return FinishReason::kNone;
}

XL_FN void free_slot(const Params& p, int slot_id) {
  p.slots[slot_id].state = int(SlotState::kFree);
  p.free_slots[p.state->n_free_slots++] = slot_id;
}

// Ends the request of a slot: event, pages back, slot free. Its place in `order` or in the queue is the caller's to close.
XL_FN void finish_slot(const Grid& grid, const Params& p, int page_size, int slot_id, uint64_t now_ns, FinishReason reason) {
  Slot& slot = p.slots[slot_id];
  trace(p, TraceKind::kFinish, slot.request_id, int(reason), slot.length - slot.prompt_len);
  write_finished(p, slot.request_id, now_ns, reason, slot.length - slot.prompt_len);
  // Pages that were to come back from the swap space, and did not, hold nothing that others may find.
  const bool stored = !drop_moves(p, slot_id);
  if (stored) stage_kv_publish(grid, p, page_size, slot_id, slot.computed < slot.length ? slot.computed : slot.length);
  stage_kv_shrink(grid, p, page_size, slot_id, 0);
  release_swap(p, slot_id);
  if (slot.state == int(SlotState::kPreempted)) --p.state->n_preempted;
  slot.row_count = 0;
  free_slot(p, slot_id);
}

// Beside the event that is about to be written: the logprobs of the i-th emitted token, from the row that it was sampled in.
// An emitted token is the row's keyed sample or its argmax.
XL_FN void write_logprobs(const Params& p, const Slot& slot, int i, int token) {
  if (slot.n_logprobs < 0) return;
  const int first = slot.state == int(SlotState::kDecode) ? slot.row_begin : slot.row_begin + slot.row_count - 1;
  const int sampled = p.rows[first + i].sample_row;
  Logprobs found = p.row_logprobs[sampled];
  found.token = (token == unpack_token(p.best[2 * size_t(sampled)]) ? found.keyed : found.greedy) - found.log_sum;
  ring_entry(p.logprobs, p.event_capacity, p.state->event_tail) = found;
}

// Commits what verification emitted for one slot. `record` gathers the step's counts. True: the request has finished.
template <class Dims>
XL_FN bool stage_commit(const Grid& grid, const Params& p, const Dims& d, int slot_id, uint64_t now_ns, StepRecord& record) {
  Slot& slot = p.slots[slot_id];
  const int page_size = d.page_size;
  const bool verified = slot.state == int(SlotState::kDecode);
  int32_t* tokens = tokens_of(p, slot_id);
  slot.computed += verified ? 1 + slot.n_accepted : slot.row_count;
  const uint64_t first_event = p.state->event_tail;
  int n_accepted = slot.n_accepted;
  FinishReason reason = FinishReason::kNone;
  bool counted = false;  // the first event carries n_accepted
  const int before = slot.length;
  for (int i = 0; i < slot.n_emitted && reason == FinishReason::kNone; ++i) {
    const int token = slot.emitted[i];
    if (token >= 0) {
      tokens[slot.length++] = token;
      if (slot.penalized) ++p.counts[size_t(slot_id) * size_t(d.vocab_size) + size_t(token)];
      write_logprobs(p, slot, i, token);
      Event event = request_event(p, slot.request_id, now_ns, EventKind::kToken);
      event.token = token;
      event.output_index = slot.length - slot.prompt_len - 1;
      event.n_drafts = verified && i == 0 ? slot.n_drafts : -1;
      event.n_accepted = verified && i == 0 ? slot.n_accepted : -1;
      counted = counted || event.n_accepted >= 0;
      event.n_logprobs = slot.n_logprobs;
      write_event(p, event);
      ++record.n_tokens;
    }
    reason = finish_reason_of(p, slot_id, token);
    // The last token of an output counts as the target's own, even if a draft had it: emitted = accepted + 1 always.
    if (reason != FinishReason::kNone && n_accepted > i) n_accepted = i;
  }
  if (verified) {
    record.n_accepted += n_accepted;
    // Written, never read back: on a GPU the ring lies in the host's memory.
    if (counted) ring_entry(p.events, p.event_capacity, first_event).n_accepted = n_accepted;
  }
  const int stored = slot.computed < slot.length ? slot.computed : slot.length;
  trace(p, TraceKind::kCommit, slot.request_id, slot.length - before, verified ? n_accepted : 0, stored);
  if (reason != FinishReason::kNone) {
    finish_slot(grid, p, page_size, slot_id, now_ns, reason);
    ++record.n_finished;
    return true;
  }
  // What a preempted request had put out is prefilled like a prompt, up to its last token.
  if (slot.n_emitted > 0 || (slot.length > slot.prompt_len && slot.computed == slot.length - 1))
    slot.state = int(SlotState::kDecode);
  stage_kv_shrink(grid, p, page_size, slot_id, slot.computed);
  stage_kv_publish(grid, p, page_size, slot_id, slot.computed);
  return false;
}

}  // namespace xl
