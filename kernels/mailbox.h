// The host's words of the mailbox, which lie over the bus from a GPU: a round of control reads them once, all together.
#pragma once

#include "platform/platform.h"

namespace xl {

// The words as they were read. A tail may be older than another that was written before it.
struct HostWords {
  uint64_t submit_tail, cancel_tail, event_head, step_head, prompt_tail, heartbeat, ping, stop;
};
constexpr int kHostWords = sizeof(HostWords) / sizeof(uint64_t);
static_assert(offsetof(Mailbox, submit_tail) == 0 && offsetof(Mailbox, cancel_tail) == offsetof(HostWords, cancel_tail), "order");
static_assert(offsetof(Mailbox, event_head) == offsetof(HostWords, event_head), "order");
static_assert(offsetof(Mailbox, step_head) == offsetof(HostWords, step_head), "order");
static_assert(offsetof(Mailbox, prompt_tail) == offsetof(HostWords, prompt_tail), "order");
static_assert(offsetof(Mailbox, heartbeat) == offsetof(HostWords, heartbeat), "order");
static_assert(offsetof(Mailbox, ping) == offsetof(HostWords, ping), "order");
static_assert(offsetof(Mailbox, stop) == offsetof(HostWords, stop), "order");
static_assert(offsetof(Mailbox, event_tail) % 16 == 0, "stored together with step_tail");

XL_FN HostWords read_host(const Mailbox& mailbox) {
  uint64_t w[kHostWords];
  load_acquire_system(&mailbox.submit_tail, w);
  return {w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]};
}

}  // namespace xl
