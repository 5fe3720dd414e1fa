// The control plane as a function: one call is one round, from the commit of the step in flight to the plan of the next.
#include "control.h"
#include "platform/host.h"

using namespace xl;

extern "C" void planner_round(const Params* params, const xl::Dims* dims, uint64_t now_ns) {
  HostTeam team(params->scratch);
  const Grid grid{params->grid, params->mailbox, 0, 1, params->spin_deadline_ns, 0};
  phase_control_at(team, grid, *params, *dims, now_ns);
}
