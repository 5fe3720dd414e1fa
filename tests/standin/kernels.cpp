// The CPU build behind the stand-in driver's launches: the very .cu files, with a block played by one thread. Compiled with the -D
// definitions that nvcc got, and:
//   XL_SOURCE           the .cu file, in quotes
//   XL_KERNELS(entry)   entry(name) for each of its kernels
//   XL_PARAMS_POINTERS, XL_LAYER_POINTERS   offsets of the pointers in Params and in LayerWeights

#include <cstddef>
#include <cstring>
#include <type_traits>
#include <utility>

#include "generated/layout.h"

#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define __device__
#define __forceinline__ inline
#define __shared__ thread_local
#define __align__(bytes) __attribute__((aligned(bytes)))

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
static thread_local Index blockIdx, threadIdx;
static thread_local Index gridDim{1, 1, 1}, blockDim{1, 1, 1};

#include "platform/platform.h"

namespace xl {
using Team = HostTeam;
inline Team this_team(float* scratch) { return Team(scratch); }
}  // namespace xl

#include XL_SOURCE

#include "driver/kernels.h"

namespace {

constexpr size_t kMostShared = 227 << 10;  // bytes a block may have
constexpr size_t kMargin = 4096;           // bytes behind a block's own that are watched
constexpr unsigned char kUntouched = 0xa5;

}  // namespace

alignas(128) thread_local float xl_scratch[(kMostShared + kMargin) / sizeof(float)];

namespace {

constexpr int32_t kParamsPointers[] = {XL_PARAMS_POINTERS};
constexpr int32_t kLayerPointers[] = {XL_LAYER_POINTERS};

bool refused(const void* record, int32_t offset, bool (*is_memory)(const void*)) {
  const void* address;
  std::memcpy(&address, static_cast<const char*>(record) + offset, sizeof address);
  return address && !is_memory(address);
}

template <class First, class... Rest>
int32_t bad_pointer(void** parameters, bool (*is_memory)(const void*)) {
#if defined(XL_VOCAB_SIZE)
  if constexpr (std::is_same_v<First, xl::Params>) {
    const auto& p = *static_cast<const xl::Params*>(parameters[0]);
    for (int32_t offset : kParamsPointers)
      if (refused(&p, offset, is_memory)) return offset;
    for (int layer = 0; layer < xl::ModelDims::num_hidden_layers; ++layer)
      for (int32_t offset : kLayerPointers)
        if (refused(p.layers + layer, offset, is_memory)) return int32_t(offsetof(xl::Params, layers));
  }
#else
  (void)parameters, (void)is_memory;
#endif
  return -1;
}

// A kernel with its arguments' types, so that it can be called with their addresses.
template <auto kKernel>
struct Typed;

template <class... Arguments, void (*kKernel)(Arguments...)>
struct Typed<kKernel> {
  static constexpr int32_t bytes[] = {int32_t(sizeof(Arguments))...};

  template <size_t... I>
  static void call(void** parameters, std::index_sequence<I...>) {
    kKernel(*static_cast<std::remove_cv_t<Arguments>*>(parameters[I])...);
  }

  static bool run(void** parameters, unsigned block, unsigned blocks, unsigned threads, size_t dynamic_shared) {
    auto* behind = reinterpret_cast<unsigned char*>(xl_scratch) + dynamic_shared;
    std::memset(behind, kUntouched, kMargin);
    blockIdx = {block, 0, 0};
    gridDim = {blocks, 1, 1};
    blockDim = {threads, 1, 1};
    call(parameters, std::index_sequence_for<Arguments...>{});
    for (size_t i = 0; i < kMargin; ++i)
      if (behind[i] != kUntouched) return false;
    return true;
  }

  static StandinKernel entry(const char* name) {
    return {name, int32_t(sizeof...(Arguments)), bytes, run, bad_pointer<std::remove_cv_t<Arguments>...>};
  }
};

}  // namespace

extern "C" const StandinKernel* xlpk_standin_kernels() {
#define XL_ENTRY(name) Typed<name>::entry(#name),
  static const StandinKernel kernels[] = {XL_KERNELS(XL_ENTRY){nullptr, 0, nullptr, nullptr, nullptr}};
  return kernels;
}
