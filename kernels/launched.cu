// The same phases as one kernel each, for a host that launches them in order.

#include "launched.h"
#include "retile.h"

extern __shared__ __align__(128) float xl_scratch[];

namespace {

__device__ __forceinline__ xl::Grid launched_grid(const xl::Params& p) {
  return xl::Grid{p.grid, p.mailbox, int(blockIdx.x), int(gridDim.x), p.spin_deadline_ns, 0};
}

}  // namespace

#define XL_PHASE_KERNEL(name, id)                                                                                    \
  extern "C" __global__ void __launch_bounds__(xl::Team::threads, 1)                                                 \
      xl_phase_##name(const __grid_constant__ xl::Params p, int layer) {                                             \
    xl::Team team = xl::this_team(xl_scratch);                                                                       \
    xl::launched_phase(xl::Phase::id, team, launched_grid(p), p, xl::ModelDims{}, layer);                            \
  }

XL_FORWARD_PHASES(XL_PHASE_KERNEL)

extern "C" __global__ void __launch_bounds__(xl::Team::threads, 1) xl_apply_patches(const __grid_constant__ xl::Params p) {
  const xl::Team team = xl::this_team(xl_scratch);
  xl::apply_patches(team, launched_grid(p), p);
}

extern "C" __global__ void __launch_bounds__(xl::Team::threads)
    xl_retile(const xl::WeightUnit* from, xl::WeightUnit* to, int64_t first, int count, int row_units, int tile_units) {
  xl::retile(xl::this_team(xl_scratch), int(blockIdx.x), int(gridDim.x), from, to, first, count, row_units, tile_units);
}
