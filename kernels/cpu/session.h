// A session of the CPU's library: its teams with their memory, its record, its stream. cpu.cpp alone includes what lies here.
#pragma once

#include <stdlib.h>

#include <algorithm>
#include <memory>
#include <thread>
#include <vector>

#include "launched.h"
#include "persistent.h"

namespace {

using namespace xl;

#if defined(XL_RACE)
using Team = RaceTeam<4, 2>;
using TeamShared = Team::Shared;
#else
using Team = HostTeam;
struct TeamShared {
  float* scratch = nullptr;
  bf16* packed = nullptr;
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
  return Team(s.shared[size_t(team)].scratch, s.shared[size_t(team)].packed);
#endif
}

// Memory for what the teams pack, untouched until they do. False: there is none.
bool give_packed_rows(Session& s) {
#if !defined(XL_RACE)
  const int widest = s.dims.num_attention_heads * s.dims.head_dim, most = std::min(s.params.max_rows, WidePanel<bf16, bf16>::rows);
  size_t elements = 0;
  for (const int k : {s.dims.hidden_size, s.dims.intermediate_size, widest})
    elements = std::max(elements, (packed_elements(most, k) + 31) / 32 * 32);  // whole lines
  s.packed.reset(static_cast<bf16*>(aligned_alloc(64, std::max(size_t(64), size_t(s.teams) * elements * sizeof(bf16)))));
  for (int team = 0; team < s.teams; ++team) s.shared[size_t(team)].packed = s.packed.get() + size_t(team) * elements;
  return s.packed != nullptr;
#else
  (void)s;
  return true;
#endif
}

}  // namespace
