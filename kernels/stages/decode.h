// decode: rows of the next step for decoding slots: the last committed token, then its drafts; all of them are sampled.
#pragma once

#include "stages/kv.h"

namespace xl {

XL_FN void add_row(const Params& p, Slot& slot, int slot_id, int position, int token, bool sampled) {
  p.record->attended_tokens += position + 1;
  Step& step = *p.step;
  if (slot.row_count == 0) slot.row_begin = step.n_rows;
  ++slot.row_count;
  Row& row = p.rows[step.n_rows];
  row.slot = slot_id;
  row.position = position;
  row.token = token;
  row.sample_row = sampled ? step.n_sample_rows : -1;
  if (sampled) p.sample_rows[step.n_sample_rows++] = step.n_rows;
  if (sampled && slot.filtered) ++step.n_filter_rows;
  ++step.n_rows;
}

XL_FN void stage_decode(const Params& p, int page_size, StepRecord& record) {
  Step& step = *p.step;
  for (int i = 0; i < p.state->n_order; ++i) {
    const int slot_id = p.order[i];
    Slot& slot = p.slots[slot_id];
    if (slot.state != int(SlotState::kDecode)) continue;
    record.pages_draft += slot.n_pages - pages_for(slot.length, page_size);
    record.context_tokens += slot.length + slot.n_drafts;
    trace(p, TraceKind::kRows, slot.request_id, slot.length - 1, 1 + slot.n_drafts, 0);
    const int last = tokens_of(p, slot_id)[slot.length - 1];
    add_row(p, slot, slot_id, slot.length - 1, last, true);
    for (int j = 0; j < slot.n_drafts; ++j) add_row(p, slot, slot_id, slot.length + j, slot.drafts[j], true);
    ++step.n_decode_rows;
    step.n_draft_rows += slot.n_drafts;
    ++step.n_decode;
  }
}

}  // namespace xl
