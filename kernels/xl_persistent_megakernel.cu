// The persistent megakernel: one launch, one team a multiprocessor, the whole loop. Dimensions are compile-time constants.

#include "persistent.h"
#include "retile.h"

extern __shared__ __align__(128) float xl_scratch[];

extern "C" __global__ void __launch_bounds__(xl::Team::threads, 1) xl_persistent_megakernel(const __grid_constant__ xl::Params p) {
  xl::Team team = xl::this_team(xl_scratch);
  xl::Grid grid = xl::make_grid(p, int(blockIdx.x), int(gridDim.x));
  xl::persistent_loop(team, grid, p, xl::ModelDims{});
}

extern "C" __global__ void __launch_bounds__(xl::Team::threads)
    xl_retile(const xl::WeightUnit* from, xl::WeightUnit* to, int64_t first, int count, int row_units, int tile_units) {
  xl::retile(xl::this_team(xl_scratch), int(blockIdx.x), int(gridDim.x), from, to, first, count, row_units, tile_units);
}
