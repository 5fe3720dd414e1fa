// Single-producer, single-consumer rings between host and device: entries first, then a release store of the running index.
// Capacities are powers of two; indices run on and are never reset. One writer a word.
#pragma once

#include "platform/platform.h"

namespace xl {

template <class T>
XL_FN T& ring_entry(T* entries, int capacity, uint64_t index) {
  return entries[index & uint64_t(capacity - 1)];
}

}  // namespace xl
