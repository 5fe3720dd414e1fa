// The CPU entry: the kernels as a shared library. Threads play the teams; they are started once per session. Every address in
// Params belongs to the caller and outlives the session.

#include <stdlib.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "launched.h"
#include "persistent.h"

namespace {

using namespace xl;

#if defined(XL_RACE)
using Team = RaceTeam<4, 2>;
using ControlTeam = RaceTeam<1, 1>;
using TeamShared = Team::Shared;
#else
using Team = HostTeam;
using ControlTeam = HostTeam;
struct TeamShared {
  float* scratch = nullptr;
#if defined(XL_AMX)
  bf16* packed = nullptr;
#endif
};
#endif

struct Free {
  void operator()(void* memory) const { free(memory); }
};

// Dimensions known at run time, so that one library serves every checkpoint.
template <class W, class C>
struct RuntimeDims : xl::Dims {
  using Weight = W;
  using Cache = C;
  static constexpr WeightLayout weight_layout = WeightLayout::kRows;
};

struct Command {
  Phase phase;
  int layer;
};

constexpr uint64_t kCommands = 1024;

struct Session {
  Params params;
  xl::Dims dims;
  WeightType weight, cache;
  int teams;
  std::vector<TeamShared> shared;
  std::unique_ptr<bf16, Free> packed;  // activations of all teams, if the build packs them
  std::vector<std::thread> threads;
  // Orchestration `launched`: a stream of phases in order, as a GPU's stream is.
  Command commands[kCommands];
  alignas(kLine) uint64_t issued = 0;     // host
  alignas(kLine) uint64_t completed = 0;  // team 0
};

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

template <class Visit>
void with_dims(const Session& s, Visit visit) {
  const auto call = [&](auto typed) {
    static_cast<xl::Dims&>(typed) = s.dims;
    visit(typed);
  };
  const bool wide = s.cache == WeightType::kFp32;
  if (s.weight == WeightType::kBf16) {
    wide ? call(RuntimeDims<bf16, float>{}) : call(RuntimeDims<bf16, bf16>{});
  } else if (s.weight == WeightType::kFp16) {
    wide ? call(RuntimeDims<f16, float>{}) : call(RuntimeDims<f16, bf16>{});
  } else {
    wide ? call(RuntimeDims<float, float>{}) : call(RuntimeDims<float, bf16>{});
  }
}

Team make_team(Session& s, int team, int thread) {
#if defined(XL_RACE)
  return Team(&s.shared[size_t(team)], thread);
#else
  (void)thread;
#if defined(XL_AMX)
  return Team(s.shared[size_t(team)].scratch, s.shared[size_t(team)].packed);
#else
  return Team(s.shared[size_t(team)].scratch);
#endif
#endif
}

// Memory for what the teams pack, untouched until they do. False: there is none.
bool give_packed_rows(Session& s) {
#if defined(XL_AMX)
  const int widest = s.dims.num_attention_heads * s.dims.head_dim;
  const int longest = std::max({s.dims.hidden_size, s.dims.intermediate_size, widest});
  const size_t elements = packed_elements(std::min(s.params.max_rows, Panel<bf16, bf16>::rows), longest);
  s.packed.reset(static_cast<bf16*>(aligned_alloc(64, size_t(s.teams) * elements * sizeof(bf16))));
  for (int team = 0; team < s.teams; ++team) s.shared[size_t(team)].packed = s.packed.get() + size_t(team) * elements;
  return s.packed != nullptr;
#else
  (void)s;
  return true;
#endif
}

// Team t stays on the t-th core that the process may use, if there are as many teams as cores; fewer might meet another
// process's on the same core, and more need the scheduler. The host's own thread is left alone.
void pin_to_core(const Session& s, int team) {
#if defined(__linux__) && !defined(XL_RACE)
  cpu_set_t usable, one;
  if (s.teams < 2 || sched_getaffinity(0, sizeof usable, &usable) != 0 || CPU_COUNT(&usable) != s.teams) return;
  int core = 0;
  for (int skipped = 0; core < CPU_SETSIZE && (!CPU_ISSET(core, &usable) || skipped++ < team);) ++core;
  CPU_ZERO(&one);
  CPU_SET(core, &one);
  sched_setaffinity(0, sizeof one, &one);  // a refusal costs speed only
#else
  (void)s, (void)team;
#endif
}

void run_persistent(Session& s, int team_id, int thread) {
  pin_to_core(s, team_id);
  flush_subnormals();
  Team team = make_team(s, team_id, thread);
  for (;;) {  // the census of a launch waits for the last team that leaves the one before
    Grid grid = make_grid(s.params, team_id, s.teams);
    with_dims(s, [&](const auto& d) { persistent_loop(team, grid, s.params, d); });
    if (load_acquire(&s.params.grid->abort) != 0 || s.params.step->leave == int(LeaveReason::kStop)) return;
  }
}

// Whether command `next` was issued; false: the session ends.
bool wait_for_command(Session& s, Team& team, uint64_t next) {
  team.sync();  // the shared word may still be read
  if (team.thread() == 0) {
    int turns = 0;
    bool more = true;
    while (load_acquire(&s.issued) <= next) {
      if (load_acquire_system(&s.params.mailbox->stop) != 0 || load_acquire(&s.params.grid->abort) != 0) {
        more = false;
        break;
      }
      relax(turns);
    }
    team.shared_ints()[0] = more ? 1 : 0;
  }
  team.sync();
  return team.shared_ints()[0] != 0;
}

void run_launched(Session& s, int team_id, int thread) {
  pin_to_core(s, team_id);
  flush_subnormals();
  Team team = make_team(s, team_id, thread);
  Grid grid = make_grid(s.params, team_id, s.teams);
  with_dims(s, [&](const auto& d) {
    for (uint64_t next = 0; wait_for_command(s, team, next); ++next) {
      const Command command = s.commands[next % kCommands];
      const uint64_t begin = clock_ticks();
      begin_team_span(team, grid, s.params, command.phase, command.layer, s.params.step->step, grid.spans);
      run_phase(command.phase, team, grid, s.params, d, command.layer);
      end_team_span(team, grid, s.params, grid.spans);
      if (!grid.sync(team)) return;
      if (team_id == 0 && thread == 0) {
        s.params.state->phase_ticks[int(command.phase)] += clock_ticks() - begin;
        store_release(&s.completed, next + 1);
      }
    }
  });
}

}  // namespace

extern "C" {

int32_t xl_layout_version() { return kLayoutVersion; }

int32_t xl_threads_per_team() { return Team::threads; }

uint64_t xl_clock_ns() { return clock_ns(); }

// Why this build's sessions cannot run on this machine; null: they can.
const char* xl_refusal() {
#if defined(XL_AMX)
  return tiles_refused();
#else
  return nullptr;
#endif
}

// Starts the threads of `teams` teams. Null: the layout of the caller is not this library's, xl_refusal has a reason, or memory is
// short.
Session* xl_open(const Params* params, const xl::Dims* dims, int32_t weight, int32_t cache, int32_t teams, int32_t persistent) {
  if (params->version != kLayoutVersion || xl_refusal()) return nullptr;
  auto session = std::make_unique<Session>();
  Session& s = *session;
  s.params = *params;
  s.dims = *dims;
  s.weight = WeightType(weight);
  s.cache = WeightType(cache);
  s.teams = teams;
  s.shared = std::vector<TeamShared>(size_t(teams));
  for (int team = 0; team < teams; ++team)
    s.shared[size_t(team)].scratch = params->scratch + size_t(team) * size_t(params->scratch_floats);
  if (!give_packed_rows(s)) return nullptr;
  for (int team = 0; team < teams; ++team)
    for (int thread = 0; thread < Team::threads; ++thread)
      s.threads.emplace_back(persistent ? run_persistent : run_launched, std::ref(s), team, thread);
  return session.release();
}

// Asks the loop to leave, joins its threads, frees the session. The abort reason stays in the mailbox.
void xl_close(Session* session) {
  store_release_system(&session->params.mailbox->stop, uint64_t(1));
  for (std::thread& thread : session->threads) thread.join();
  delete session;
}

// The rings, from the host's side. `params`: a record with the host's addresses of the mailbox and the rings.

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

// Launched from the host: control on the calling thread, on the host's copy of the state; rows of the step that it planned.
int32_t xl_control(const Params* params, const xl::Dims* dims) {
#if defined(XL_RACE)
  RaceShared<1, 1> shared;
  ControlTeam team(&shared, 0);
#else
  ControlTeam team(nullptr);
#endif
  const Grid grid{params->grid, params->mailbox, 0, 1, params->spin_deadline_ns, 0};
  begin_control_span(*params);
  phase_control(team, grid, *params, *dims);
  end_control_span(*params);
  return params->step->n_rows;
}

// Launched from the host, beside the step that it planned: what control would do for requests that wait.
void xl_prepare(const Params* params, const xl::Dims* dims) {
#if defined(XL_RACE)
  RaceShared<1, 1> shared;
  ControlTeam team(&shared, 0);
#else
  ControlTeam team(nullptr);
#endif
  prepare_requests(team, *params, *dims);
}

// Launched from a host with a device: after control, what changed in the page table and in the counts since the last call, as
// Params.patches and Step.n_page_patches, n_count_patches. What the device has: `table` as Params.page_table; by slot the request
// in `ids` (its id + 1) and the number of its tokens in the counts in `counted`. `fresh`: slots whose whole rows of counts and
// bias must be sent; `tables`: slots whose row of `table` must be; `n_rows`: [2], how many of each. The number of patches, or -1:
// more than `capacity`.
int32_t xl_collect_patches(const Params* params, const xl::Dims* dims, int32_t* table, uint64_t* ids, int32_t* counted,
                           int32_t* fresh, int32_t* tables, int32_t* n_rows, int32_t capacity) {
  constexpr int kFewPages = 8;  // a request that gets more of them at once found a shared prefix: its row is sent
  const Params& p = *params;
  int n = 0;
  n_rows[0] = n_rows[1] = 0;
  const auto add = [&](size_t index, int32_t value) {
    if (n < capacity) p.patches[n] = Patch{int32_t(index), value};
    ++n;
  };
  for (int i = 0; i < p.state->n_order; ++i) {
    const size_t begin = size_t(p.order[i]) * size_t(p.max_slot_pages), end = begin + size_t(p.slots[p.order[i]].n_pages);
    int changed = 0;
    for (size_t at = begin; at < end; ++at) changed += table[at] != p.page_table[at];
    const bool whole = changed > kFewPages || n + changed > capacity - p.max_rows;  // the counts need a place a row
    if (whole) tables[n_rows[1]++] = p.order[i];
    for (size_t at = begin; at < end; ++at) {
      if (table[at] == p.page_table[at]) continue;
      table[at] = p.page_table[at];
      if (!whole) add(at, table[at]);
    }
  }
  p.step->n_page_patches = n;
  for (int i = 0; i < p.state->n_order; ++i) {
    const int slot_id = p.order[i];
    const Slot& slot = p.slots[slot_id];
    if (ids[slot_id] != slot.request_id + 1) {
      ids[slot_id] = slot.request_id + 1;
      counted[slot_id] = slot.length;
      if (slot.adjusted) fresh[n_rows[0]++] = slot_id;
    }
    for (int32_t& at = counted[slot_id]; at < slot.length; ++at) {
      if (!slot.penalized) continue;
      const size_t index = size_t(slot_id) * size_t(dims->vocab_size) + size_t(tokens_of(p, slot_id)[at]);
      add(index, p.counts[index]);
    }
  }
  p.step->n_count_patches = n - p.step->n_page_patches;
  return n <= capacity ? n : -1;
}

// Changes Mailbox.heartbeat each `interval_ns` from a thread of its own, which no interpreter's lock can stop.
Heartbeat* xl_heartbeat(const Params* params, uint64_t interval_ns) { return new Heartbeat(params->mailbox, interval_ns); }

void xl_heartbeat_end(Heartbeat* heartbeat) { delete heartbeat; }

// Orchestration `launched`: appends one phase to the stream and returns at once.
void xl_launch(Session* session, int32_t phase, int32_t layer) {
  const uint64_t next = session->issued;
  int turns = 0;
  while (next - load_acquire(&session->completed) >= kCommands && xl_aborted(&session->params) == 0) relax(turns);
  session->commands[next % kCommands] = Command{Phase(phase), layer};
  store_release(&session->issued, next + 1);
}

// Orchestration `launched`: waits until the stream is empty. The abort reason, 0 if there is none.
int32_t xl_synchronize(Session* session) {
  int turns = 0;
  while (load_acquire(&session->completed) < session->issued && xl_aborted(&session->params) == 0) relax(turns);
  return xl_aborted(&session->params);
}

// Weights by a counter hash: elements first .. first + count of tensor `tensor`, as xlpk/weights.py defines them. `first` is a
// multiple of 4.
void xl_fill_hash(void* out, uint64_t first, uint64_t count, uint32_t tensor, uint64_t seed, float scale, int32_t type) {
  constexpr int kBlocks = 64;  // counters at a time, for vector units
  float values[kBlocks][4];
  for (uint64_t done = 0; done < count; done += 4 * kBlocks) {
    const uint64_t block = (first + done) / 4;
    for (int b = 0; b < kBlocks; ++b) {
      const Words4 words = philox(uint32_t(block + uint64_t(b)), uint32_t((block + uint64_t(b)) >> 32), tensor, 0, seed);
      for (int j = 0; j < 4; ++j) values[b][j] = hashed_weight(words.w[j], scale);
    }
    const uint64_t left = count - done, n = left < 4 * kBlocks ? left : 4 * kBlocks;
    if (WeightType(type) == WeightType::kFp16) {
      for (uint64_t i = 0; i < n; ++i) static_cast<f16*>(out)[done + i] = to_f16(values[i / 4][i % 4]);
    } else if (WeightType(type) == WeightType::kBf16) {
      for (uint64_t i = 0; i < n; ++i) static_cast<bf16*>(out)[done + i] = to_bf16(values[i / 4][i % 4]);
    } else {
      for (uint64_t i = 0; i < n; ++i) static_cast<float*>(out)[done + i] = values[i / 4][i % 4];
    }
  }
}

}  // extern "C"
