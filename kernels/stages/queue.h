// queue: who waits, in a binary heap by (rank, number); the smallest goes first. Ranks do not change while a request waits:
// ageing is in them. Under Policy::kPriority a rank is the step of arrival plus ageing_steps times the priority, so a request
// that has waited ageing_steps longer goes before one of the next better priority, and nobody is overtaken by requests that
// arrive later than ageing_steps times the difference of their priorities. Under kShortestPrompt, kTokensPerLevel prompt tokens
// count as one level. Under kFcfs all ranks are equal and the number of the submission decides.
#pragma once

#include "ring.h"
#include "sync.h"

namespace xl {

XL_FN int64_t rank_of(const Params& p, const Submission& submission, uint64_t step) {
  switch (Policy(p.policy)) {
    case Policy::kPriority:
      return int64_t(step) + int64_t(p.ageing_steps) * submission.priority;
    case Policy::kShortestPrompt:
      return int64_t(step) + int64_t(p.ageing_steps) * (submission.prompt_len / kTokensPerLevel);
    default:
      return 0;
  }
}

XL_FN bool goes_before(int64_t rank, uint64_t number, int64_t other_rank, uint64_t other_number) {
  return rank != other_rank ? rank < other_rank : number < other_number;
}

XL_FN bool goes_before(const QueueEntry& a, const QueueEntry& b) { return goes_before(a.rank, a.number, b.rank, b.number); }

// Moves the entry at `at` towards the top, then towards the bottom, until the heap is in order.
XL_FN void queue_settle(const Params& p, int at) {
  QueueEntry* heap = p.heap;
  const int count = p.state->n_queued;
  const QueueEntry entry = heap[at];
  for (; at > 0 && goes_before(entry, heap[(at - 1) / 2]); at = (at - 1) / 2) heap[at] = heap[(at - 1) / 2];
  for (int child; (child = 2 * at + 1) < count; at = child) {
    if (child + 1 < count && goes_before(heap[child + 1], heap[child])) ++child;
    if (!goes_before(heap[child], entry)) break;
    heap[at] = heap[child];
  }
  heap[at] = entry;
}

XL_FN void queue_push(const Params& p, int64_t rank, uint64_t number, int slot) {
  QueueEntry& entry = p.heap[p.state->n_queued++];
  entry.rank = rank;
  entry.number = number;
  entry.slot = slot;
  queue_settle(p, p.state->n_queued - 1);
}

XL_FN void queue_remove(const Params& p, int at) {
  const int last = --p.state->n_queued;
  if (at == last) return;
  p.heap[at] = p.heap[last];
  queue_settle(p, at);
}

}  // namespace xl
