// Streams and events.

#include <chrono>
#include <ctime>
#include <set>

#include "standin.h"

namespace standin {

namespace {

std::mutex streams_mutex;
std::set<Stream*> streams;  // but the default stream

Stream& default_stream() {
  static Stream& stream = *new Stream(true, 0);  // lives until the process ends
  return stream;
}

std::vector<Stream*> all_streams() {
  std::lock_guard<std::mutex> lock(streams_mutex);
  std::vector<Stream*> all(streams.begin(), streams.end());
  all.push_back(&default_stream());
  return all;
}

uint64_t now_ns() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return uint64_t(time.tv_sec) * 1000000000u + uint64_t(time.tv_nsec);
}

}  // namespace

Stream::Stream(bool blocking_, int priority_) : blocking(blocking_), priority(priority_) {
  std::thread([this] { work(); }).detach();
}

void Stream::push(Operation operation) {
  std::lock_guard<std::mutex> lock(mutex_);
  queue_.push_back(std::move(operation));
  ++pushed_;
  changed_.notify_all();
}

bool Stream::idle() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return done_ == pushed_;
}

bool Stream::newly_idle() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (done_ != pushed_ || seen_ == pushed_) return false;
  seen_ = pushed_;
  return true;
}

CUresult Stream::wait() {
  std::unique_lock<std::mutex> lock(mutex_);
  const uint64_t until = pushed_;
  // An error may stick in another stream, which does not notify this one.
  while (done_ < until && sticky_error() == CUDA_SUCCESS) changed_.wait_for(lock, std::chrono::milliseconds(5));
  return sticky_error();
}

void Stream::retire() {
  std::lock_guard<std::mutex> lock(mutex_);
  retired_ = true;
  changed_.notify_all();
}

void Stream::work() {
  for (;;) {
    Operation operation;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [this] { return retired_ || !queue_.empty(); });
      if (queue_.empty()) break;
      operation = std::move(queue_.front());
      queue_.pop_front();
    }
    if (sticky_error() == CUDA_SUCCESS) {
      if (this == &default_stream()) wait_for_blocking_streams();
      if (CUresult error = operation.run(); error != CUDA_SUCCESS) set_sticky_error(error);
    }
    std::lock_guard<std::mutex> lock(mutex_);
    ++done_;
    changed_.notify_all();
  }
}

bool is_default(CUstream handle) { return uintptr_t(handle) <= uintptr_t(CU_STREAM_PER_THREAD); }

Stream* find_stream(CUstream handle) {
  if (is_default(handle)) return &default_stream();
  std::lock_guard<std::mutex> lock(streams_mutex);
  const auto found = streams.find(reinterpret_cast<Stream*>(handle));
  return found == streams.end() ? nullptr : *found;
}

void retire_streams() {
  std::lock_guard<std::mutex> lock(streams_mutex);
  for (Stream* stream : streams) stream->retire();
  streams.clear();
}

CUresult submit(CUstream handle, Operation operation) {
  Stream* stream = find_stream(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  if (stream->capture) {
    stream->capture->operations.push_back(std::move(operation));
    return CUDA_SUCCESS;
  }
  if (is_default(handle) && breaks_capture()) return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
  if (is_default(handle) && resident_kernels() > 0) ++counters().resident_default_stream;
  if (operation.count) operation.count();
  stream->push(std::move(operation));
  return CUDA_SUCCESS;
}

CUresult wait_for_blocking_streams() {
  for (Stream* stream : all_streams()) {
    if (!stream->blocking || stream == &default_stream()) continue;
    if (CUresult error = stream->wait(); error != CUDA_SUCCESS) return error;
  }
  return sticky_error();
}

CUresult wait_for_all_streams() {
  for (Stream* stream : all_streams())
    if (CUresult error = stream->wait(); error != CUDA_SUCCESS) return error;
  return sticky_error();
}

bool breaks_capture() {
  bool breaks = false;
  for (Stream* stream : all_streams()) {
    Capture* capture = stream->capture.get();
    if (!capture || capture->mode == CU_STREAM_CAPTURE_MODE_RELAXED) continue;
    if (capture->mode == CU_STREAM_CAPTURE_MODE_THREAD_LOCAL && capture->thread != std::this_thread::get_id()) continue;
    breaks = capture->broken = true;
  }
  return breaks;
}

// Waiting for a stream that is being captured breaks the capture in every mode.
static bool is_captured(Stream& stream) {
  if (stream.capture) stream.capture->broken = true;
  return stream.capture != nullptr;
}

std::atomic<int>& resident_kernels() {
  static std::atomic<int> count{0};
  return count;
}

struct Event {
  bool timed;
  std::mutex mutex;
  std::condition_variable changed;
  uint64_t recorded = 0, done = 0, time_ns = 0;

  CUresult wait(uint64_t until) {
    std::unique_lock<std::mutex> lock(mutex);
    while (done < until && sticky_error() == CUDA_SUCCESS) changed.wait_for(lock, std::chrono::milliseconds(5));
    return sticky_error();
  }
};

static std::atomic<uint64_t> synchronisations{0};

// Where the host learns of an asynchronous error.
static CUresult learn() {
  if (fault_now("sticky", synchronisations)) set_sticky_error(CUDA_ERROR_ILLEGAL_ADDRESS);
  return sticky_error();
}

}  // namespace standin

using namespace standin;

extern "C" {

CUresult cuStreamCreate(CUstream* stream, unsigned flags) {
  int least = 0;
  return cuStreamCreateWithPriority(stream, flags, least);
}

CUresult cuStreamCreateWithPriority(CUstream* stream, unsigned flags, int priority) {
  STANDIN_ENTER();
  auto* created = new Stream(!(flags & CU_STREAM_NON_BLOCKING), priority);
  std::lock_guard<std::mutex> lock(streams_mutex);
  streams.insert(created);
  *stream = reinterpret_cast<CUstream>(created);
  return CUDA_SUCCESS;
}

CUresult cuStreamDestroy(CUstream handle) {
  STANDIN_ENTER();
  Stream* stream = is_default(handle) ? nullptr : find_stream(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  {
    std::lock_guard<std::mutex> lock(streams_mutex);
    streams.erase(stream);
  }
  stream->retire();
  return CUDA_SUCCESS;
}

CUresult cuStreamSynchronize(CUstream handle) {
  STANDIN_ENTER();
  Stream* stream = find_stream(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  if (is_captured(*stream)) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  ++counters().syncs;
  if (CUresult error = learn(); error != CUDA_SUCCESS) return error;
  const CUresult error = stream->wait();
  if (stream->newly_idle()) ++counters().waits;
  return error;
}

CUresult cuStreamQuery(CUstream handle) {
  STANDIN_ENTER();
  Stream* stream = find_stream(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  if (is_captured(*stream)) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  if (!stream->idle()) return CUDA_ERROR_NOT_READY;
  if (!stream->newly_idle()) return sticky_error();
  ++counters().waits;
  return learn();
}

CUresult cuStreamWaitEvent(CUstream handle, CUevent event, unsigned) {
  STANDIN_ENTER();
  Stream* stream = find_stream(handle);
  if (!stream || !event) return CUDA_ERROR_INVALID_HANDLE;
  if (stream->capture) return CUDA_ERROR_NOT_SUPPORTED;
  auto* awaited = reinterpret_cast<Event*>(event);
  std::lock_guard<std::mutex> lock(awaited->mutex);
  return submit(handle, {Operation::kOther, [awaited, until = awaited->recorded] { return awaited->wait(until); }});
}

CUresult cuStreamGetFlags(CUstream handle, unsigned* flags) {
  STANDIN_ENTER();
  Stream* stream = find_stream(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  *flags = stream->blocking ? CU_STREAM_DEFAULT : CU_STREAM_NON_BLOCKING;
  return CUDA_SUCCESS;
}

CUresult cuStreamGetPriority(CUstream handle, int* priority) {
  STANDIN_ENTER();
  Stream* stream = find_stream(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  *priority = stream->priority;
  return CUDA_SUCCESS;
}

CUresult cuEventCreate(CUevent* event, unsigned flags) {
  STANDIN_ENTER();
  auto* created = new Event{};
  created->timed = !(flags & CU_EVENT_DISABLE_TIMING);
  *event = reinterpret_cast<CUevent>(created);
  return CUDA_SUCCESS;
}

// The event is leaked: a stream may still come to it.
CUresult cuEventDestroy(CUevent event) {
  STANDIN_ENTER();
  return event ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

CUresult cuEventRecord(CUevent handle, CUstream stream) {
  STANDIN_ENTER();
  Stream* on = find_stream(stream);
  if (!handle || !on) return CUDA_ERROR_INVALID_HANDLE;
  if (on->capture) return CUDA_ERROR_NOT_SUPPORTED;
  auto* event = reinterpret_cast<Event*>(handle);
  uint64_t record;
  {
    std::lock_guard<std::mutex> lock(event->mutex);
    record = ++event->recorded;
  }
  const auto run = [event, record] {
    std::lock_guard<std::mutex> lock(event->mutex);
    event->done = record;
    event->time_ns = now_ns();
    event->changed.notify_all();
    return CUDA_SUCCESS;
  };
  return submit(stream, {Operation::kOther, run});
}

CUresult cuEventQuery(CUevent handle) {
  STANDIN_ENTER();
  if (!handle) return CUDA_ERROR_INVALID_HANDLE;
  auto* event = reinterpret_cast<Event*>(handle);
  std::lock_guard<std::mutex> lock(event->mutex);
  return event->done == event->recorded ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

CUresult cuEventSynchronize(CUevent handle) {
  STANDIN_ENTER();
  if (!handle) return CUDA_ERROR_INVALID_HANDLE;
  ++counters().syncs;
  if (CUresult error = learn(); error != CUDA_SUCCESS) return error;
  auto* event = reinterpret_cast<Event*>(handle);
  return event->wait(event->recorded);
}

CUresult cuEventElapsedTime(float* milliseconds, CUevent from, CUevent to) {
  STANDIN_ENTER();
  auto *begin = reinterpret_cast<Event*>(from), *end = reinterpret_cast<Event*>(to);
  if (!begin || !end || !begin->timed || !end->timed || !begin->recorded || !end->recorded) return CUDA_ERROR_INVALID_HANDLE;
  if (begin->done < begin->recorded || end->done < end->recorded) return CUDA_ERROR_NOT_READY;
  *milliseconds = float(double(int64_t(end->time_ns - begin->time_ns)) * 1e-6);
  return CUDA_SUCCESS;
}

}  // extern "C"
