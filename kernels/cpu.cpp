// The CPU entry: the kernels as a shared library. Threads play the teams; they are started once per session. Every address in
// Params belongs to the caller and outlives the session.

#include "cpu/hash_weights.h"
#include "cpu/host_control.h"
#include "cpu/rings.h"
#include "cpu/session.h"
#include "cpu/threads.h"

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

}  // extern "C"
