// Single-producer, single-consumer rings between host and device: entries first, then a release store of the running index.
// Capacities are powers of two; indices run on and are never reset. One writer a word.
#pragma once

#include "platform/platform.h"

namespace xl {

template <class T>
XL_FN T& ring_entry(T* entries, int capacity, uint64_t index) {
  return entries[index & uint64_t(capacity - 1)];
}

// The consumer's side: copies up to `most` published entries, oldest first, and gives their places back; how many.
template <class T>
XL_FN int32_t ring_take(T* entries, int capacity, uint64_t* head, const uint64_t* tail, T* out, int32_t most) {
  const uint64_t published = load_acquire_system(tail);
  uint64_t next = *head;
  int32_t count = 0;
  while (next < published && count < most) out[count++] = ring_entry(entries, capacity, next++);
  store_release_system(head, next);
  return count;
}

}  // namespace xl
