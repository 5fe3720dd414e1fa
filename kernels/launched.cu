// The same phases as one kernel each, for a host that launches them in order. The end of a kernel is the grid barrier.

#include "forward.h"

extern __shared__ __align__(128) float xl_scratch[];

#define XL_PHASE_KERNEL(name, id)                                                                                    \
  extern "C" __global__ void __launch_bounds__(xl::Team::threads, 1)                                                 \
      xl_phase_##name(const __grid_constant__ xl::Params p, int layer) {                                             \
    xl::Team team = xl::this_team(xl_scratch);                                                                       \
    const xl::Grid grid{p.grid, p.mailbox, int(blockIdx.x), int(gridDim.x), p.spin_deadline_ns, 0};                  \
    xl::phase_##name(team, grid, p, xl::ModelDims{}, layer);                                                         \
  }

XL_FORWARD_PHASES(XL_PHASE_KERNEL)
