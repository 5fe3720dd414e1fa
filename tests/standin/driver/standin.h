// A libcuda for machines with no GPU: device memory is host memory, a stream is a thread, a block is a thread, and a launch runs
// the CPU build of the kernel that was asked for. What is not emulated answers CUDA_ERROR_NOT_SUPPORTED.
//
// Emulated because host code may get it wrong: current contexts, ownership and bounds of allocations, garbage in fresh memory,
// asynchronous errors that stick, resources that limit how many blocks are resident, what waits for what (a call on the default
// stream for blocking streams, cuMemFree for every kernel), what a capture forbids.
#pragma once

#include <cuda.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

// What was really called, for comparison with the counters of the host code. Each field is a uint64_t; COUNTER_NAMES of
// library.py lists them in this order.
struct Counters {
  std::atomic<uint64_t> launches;         // kernels launched one by one
  std::atomic<uint64_t> graph_launches;   // graphs launched
  std::atomic<uint64_t> graph_kernels;    // kernels in them
  std::atomic<uint64_t> syncs;            // synchronisations of a stream, an event or the context
  std::atomic<uint64_t> waits;            // times the host learned that a stream's work was done: by one of those or by asking
  std::atomic<uint64_t> h2d_copies, d2h_copies, h2d_bytes, d2h_bytes;
  std::atomic<uint64_t> allocations, frees;  // of device or page-locked memory; registrations
  std::atomic<uint64_t> module_loads;
  // While a kernel ran: on a GPU each may wait for it, which is a deadlock if the kernel waits for the host.
  std::atomic<uint64_t> resident_allocations, resident_frees, resident_module_loads, resident_default_stream;
};

extern "C" __attribute__((visibility("default"))) Counters xlpk_standin_counters;

namespace standin {

inline Counters& counters() { return xlpk_standin_counters; }

// One line on stderr: why a call was refused, in more words than its error code has.
void complain(const char* format, ...) __attribute__((format(printf, 1, 2)));

// XLPK_STANDIN_<name> as an integer.
uint64_t setting(const char* name, uint64_t otherwise);

// Whether the fault is asked for by XLPK_STANDIN_FAULT=name or name:number,...; its number, 0 without one.
bool fault(const char* name, uint64_t* number = nullptr);

// Whether this is the N-th call, N given by the fault, or one from the N-th on; counts calls.
bool fault_now(const char* name, std::atomic<uint64_t>& calls);
bool fault_from_now(const char* name, std::atomic<uint64_t>& calls);

// The first asynchronous error stays: from then on every call answers it.
CUresult sticky_error();
void set_sticky_error(CUresult error);

// What a call begins with: the sticky error, or CUDA_ERROR_INVALID_CONTEXT on a thread with no current context.
CUresult enter();

#define STANDIN_ENTER()                                             \
  do {                                                              \
    if (CUresult entered = standin::enter(); entered != CUDA_SUCCESS) return entered; \
  } while (false)

// One piece of work of a stream, or one node of a graph.
struct Operation {
  enum Kind { kKernel, kCopy, kMemset, kOther } kind;
  std::function<CUresult()> run;
  std::function<void()> count = {};  // into the counters, each time it is handed to a stream
};

// What a stream records instead of running it.
struct Capture {
  CUstreamCaptureMode mode;
  std::thread::id thread;  // that began it
  bool broken = false;     // by a call that a capture forbids; there will be no graph
  std::vector<Operation> operations = {};
};

class Stream {
 public:
  Stream(bool blocking, int priority);
  void push(Operation operation);
  bool idle() const;
  // Whether work was done that no call of this had found done before.
  bool newly_idle();
  // Until all that was pushed before is done, or an error sticks.
  CUresult wait();
  // The worker ends when its work does. The object stays: somebody may wait for it.
  void retire();

  const bool blocking;  // waits for the default stream and makes it wait
  const int priority;
  std::unique_ptr<Capture> capture;  // null: not capturing

 private:
  void work();

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Operation> queue_;
  uint64_t pushed_ = 0, done_ = 0, seen_ = 0;
  bool retired_ = false;
};

// The stream of a handle; null if there is none. The default stream has the handles 0, 1 and 2.
Stream* find_stream(CUstream handle);
bool is_default(CUstream handle);
void retire_streams();

// Runs on the stream, or records it if the stream is being captured.
CUresult submit(CUstream handle, Operation operation);

// What a call on the default stream does first: waits for blocking streams.
CUresult wait_for_blocking_streams();
CUresult wait_for_all_streams();

// For calls that wait or allocate: whether a capture forbids them to this thread, by its mode. That capture is broken then.
bool breaks_capture();

// Kernels that run now.
std::atomic<int>& resident_kernels();

// kNone: host memory that the driver does not know.
enum class Memory { kNone, kDevice, kPinned, kManaged };

// The kind of memory that holds all of [address, address + bytes).
Memory memory_of(const void* address, size_t bytes);

int multiprocessors();

// Fault launch_refused:N, counted over launches of kernels and of graphs.
bool launch_is_refused();

// Runs blocks 0 .. blocks - 1, each on a thread of its own, `resident` of them at a time.
CUresult run_blocks(const char* name, int blocks, int resident, const std::function<bool(int block)>& body);

}  // namespace standin
