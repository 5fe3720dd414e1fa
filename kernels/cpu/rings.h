// The rings and the mailbox, from the host's side: every backend's. `params`: a record with the host's addresses of them.
#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "stages/scheduler.h"

namespace {

using namespace xl;

class Heartbeat {
 public:
  Heartbeat(Mailbox* mailbox, uint64_t interval_ns)
      : thread_([=] {
          std::unique_lock<std::mutex> lock(mutex_);
          for (uint64_t beat = 1; !ended_; ++beat) {
            store_release_system(&mailbox->heartbeat, beat);
            wake_.wait_for(lock, std::chrono::nanoseconds(interval_ns));
          }
        }) {}
  ~Heartbeat() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ended_ = true;
    }
    wake_.notify_one();
    thread_.join();
  }

 private:
  std::mutex mutex_;
  std::condition_variable wake_;
  bool ended_ = false;
  std::thread thread_;  // last: it uses the others
};

}  // namespace

extern "C" {

// 1: the request and its tokens (prompt, oracle, bias pairs) are in the rings. 0: one of them is full.
int32_t xl_submit(const Params* params, const Submission* request, const int32_t* tokens) {
  const Params& p = *params;
  Mailbox& mailbox = *p.mailbox;
  const uint64_t count = ring_tokens(*request);
  const uint64_t tail = mailbox.submit_tail, prompt_tail = mailbox.prompt_tail;
  if (tail - load_acquire_system(&mailbox.submit_head) >= uint64_t(p.submission_capacity)) return 0;
  if (prompt_tail + count - load_acquire_system(&mailbox.prompt_head) > uint64_t(p.prompt_capacity)) return 0;
  for (uint64_t i = 0; i < count; ++i) ring_entry(p.prompts, p.prompt_capacity, prompt_tail + i) = tokens[i];
  Submission& entry = ring_entry(p.submissions, p.submission_capacity, tail);
  entry = *request;
  entry.prompt_begin = prompt_tail;
  store_relaxed_system(&mailbox.prompt_tail, prompt_tail + count);  // its own, but control reads the whole line
  store_release_system(&mailbox.submit_tail, tail + 1);
  return 1;
}

// 1: the cancellation is in its ring. 0: it is full.
int32_t xl_cancel(const Params* params, uint64_t request_id) {
  const Params& p = *params;
  const uint64_t tail = p.mailbox->cancel_tail;
  if (tail - load_acquire_system(&p.mailbox->cancel_head) >= uint64_t(p.submission_capacity)) return 0;
  ring_entry(p.cancels, p.submission_capacity, tail) = request_id;
  store_release_system(&p.mailbox->cancel_tail, tail + 1);
  return 1;
}

// Takes up to `most` events, oldest first, and what lies beside them in `logprobs`; how many.
int32_t xl_take_events(const Params* params, Event* out, Logprobs* logprobs, int32_t most) {
  const Params& p = *params;
  const uint64_t head = p.mailbox->event_head, tail = load_acquire_system(&p.mailbox->event_tail);
  if (uint64_t(most) > tail - head) most = int32_t(tail - head);
  for (int32_t i = 0; i < most; ++i) {
    const bool asked = ring_entry(p.events, p.event_capacity, head + uint64_t(i)).n_logprobs >= 0;
    if (asked) logprobs[i] = ring_entry(p.logprobs, p.event_capacity, head + uint64_t(i));
  }
  return ring_take(p.events, p.event_capacity, &p.mailbox->event_head, &p.mailbox->event_tail, out, most);
}

// Takes up to `most` step records, oldest first; how many.
int32_t xl_take_steps(const Params* params, StepRecord* out, int32_t most) {
  const Params& p = *params;
  return ring_take(p.step_records, p.step_capacity, &p.mailbox->step_head, &p.mailbox->step_tail, out, most);
}

// Takes up to `most` entries of the decision trace, oldest first; how many.
int32_t xl_take_trace(const Params* params, TraceEntry* out, int32_t most) {
  const Params& p = *params;
  return ring_take(p.trace, p.trace_capacity, &p.mailbox->trace_head, &p.mailbox->trace_tail, out, most);
}

// AbortReason of the loop, 0 while it is well.
int32_t xl_aborted(const Params* params) { return int32_t(load_acquire_system(&params->mailbox->abort)); }

// Launches that ended with their state kept.
uint64_t xl_left(const Params* params) { return load_acquire_system(&params->mailbox->n_left); }

void xl_stop(const Params* params) { store_release_system(&params->mailbox->stop, uint64_t(1)); }

// Asks an idle loop for its clock; 0: no answer within the time.
uint64_t xl_ping(const Params* params, uint64_t within_ns) {
  Mailbox& mailbox = *params->mailbox;
  const uint64_t number = mailbox.ping + 1, give_up = clock_ns() + within_ns;
  store_release_system(&mailbox.ping, number);
  while (load_acquire_system(&mailbox.pong) != number) {
    if (clock_ns() > give_up) return 0;
    pause_cpu();
  }
  return mailbox.pong_ns;
}

// Changes Mailbox.heartbeat each `interval_ns` from a thread of its own, which no interpreter's lock can stop.
Heartbeat* xl_heartbeat(const Params* params, uint64_t interval_ns) { return new Heartbeat(params->mailbox, interval_ns); }

void xl_heartbeat_end(Heartbeat* heartbeat) { delete heartbeat; }

}  // extern "C"
