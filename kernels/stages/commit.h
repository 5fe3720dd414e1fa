// commit: emitted tokens join the sequence and are published; finished requests give everything back.
#pragma once

#include "ring.h"
#include "stages/kv.h"

namespace xl {

// Writes an event; the host sees it when control publishes the tail.
XL_FN void write_event(const Params& p, const Event& event) {
  ring_entry(p.events, p.event_capacity, p.state->event_tail++) = event;
}

XL_FN void write_finished(const Params& p, uint64_t request_id, uint64_t now_ns, FinishReason reason, int n_output) {
  Event event = {};
  event.request_id = request_id;
  event.step = p.step->step;
  event.device_ns = now_ns;
  event.kind = int(EventKind::kFinished);
  event.output_index = n_output;
  event.reason = int(reason);
  event.n_drafts = event.n_accepted = -1;
  write_event(p, event);
}

XL_FN bool contains(const int32_t* ids, int count, int token) {
  for (int i = 0; i < count; ++i)
    if (ids[i] == token) return true;
  return false;
}

XL_FN FinishReason finish_reason_of(const Params& p, const Slot& slot, int token) {
  if (token < 0) return FinishReason::kError;
  if (!slot.ignore_eos && contains(p.eos_ids, p.n_eos_ids, token)) return FinishReason::kEos;
  if (contains(slot.stop_ids, slot.n_stop_ids, token)) return FinishReason::kStop;
  if (slot.length - slot.prompt_len >= slot.max_new_tokens) return FinishReason::kLength;
  return FinishReason::kNone;
}

// Ends a running request: event, pages and reservation back, slot free. Its place in `order` is the caller's to close.
XL_FN void finish_slot(const Grid& grid, const Params& p, int page_size, int slot_id, uint64_t now_ns, FinishReason reason) {
  Slot& slot = p.slots[slot_id];
  write_finished(p, slot.request_id, now_ns, reason, slot.length - slot.prompt_len);
  stage_kv_shrink(grid, p, page_size, slot_id, 0);
  p.state->n_reserved_pages -= slot.reserved_pages;
  slot.reserved_pages = 0;
  slot.row_count = 0;
  slot.state = int(SlotState::kFree);
}

// Commits what verification emitted for one slot. `record` gathers the step's counts. True: the request has finished.
XL_FN bool stage_commit(const Grid& grid, const Params& p, int page_size, int slot_id, uint64_t now_ns, StepRecord& record) {
  Slot& slot = p.slots[slot_id];
  const bool verified = slot.state == int(SlotState::kDecode);
  int32_t* tokens = p.tokens + size_t(slot_id) * size_t(p.max_len);
  slot.computed += verified ? 1 + slot.n_accepted : slot.row_count;
  if (verified) record.n_accepted += slot.n_accepted;
  for (int i = 0; i < slot.n_emitted; ++i) {
    const int token = slot.emitted[i];
    if (token >= 0) {
      tokens[slot.length++] = token;
      Event event = {};
      event.request_id = slot.request_id;
      event.step = p.step->step;
      event.device_ns = now_ns;
      event.kind = int(EventKind::kToken);
      event.token = token;
      event.output_index = slot.length - slot.prompt_len - 1;
      event.n_drafts = verified && i == 0 ? slot.n_drafts : -1;
      event.n_accepted = verified && i == 0 ? slot.n_accepted : -1;
      write_event(p, event);
      ++record.n_tokens;
    }
    const FinishReason reason = finish_reason_of(p, slot, token);
    if (reason != FinishReason::kNone) {
      finish_slot(grid, p, page_size, slot_id, now_ns, reason);
      ++record.n_finished;
      return true;
    }
  }
  if (slot.n_emitted > 0) slot.state = int(SlotState::kDecode);
  stage_kv_shrink(grid, p, page_size, slot_id, slot.computed);
  return false;
}

}  // namespace xl
