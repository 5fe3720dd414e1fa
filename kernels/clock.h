// Times of phases. The global timer, which stamps events, may tick a microsecond at a time; phases are timed by the counter of the
// multiprocessor that marks them, and its ticks are scaled by two readings of both clocks, a step apart. An error of a mark is
// below one tick of the global timer and what the counter's rate drifts within the step.
#pragma once

#include "platform/platform.h"

namespace xl {

// Both clocks at once.
struct ClockPair {
  uint64_t ns, ticks;
};

XL_FN ClockPair read_clocks() {
  const uint64_t ns = clock_ns();
  return {ns, kTicksAreNs ? ns : clock_ticks()};
}

// One thread brackets a phase by begin_phase and end_phase. No register holds a mark meanwhile: the word has its negative.
XL_FN void begin_phase(LoopState& state, Phase phase, uint64_t ticks) { add_own(&state.phase_ticks[int(phase)], 0 - ticks); }
XL_FN void end_phase(LoopState& state, Phase phase) { add_own(&state.phase_ticks[int(phase)], clock_ticks()); }

// The same of the span by which a step's ticks are scaled.
XL_FN void begin_span(LoopState& state) {
  const ClockPair now = read_clocks();
  add_own(&state.span_ns, 0 - now.ns);
  add_own(&state.span_ticks, 0 - now.ticks);
}
XL_FN void end_span(LoopState& state) {
  const ClockPair now = read_clocks();
  add_own(&state.span_ns, now.ns);
  add_own(&state.span_ticks, now.ticks);
}

// Nanoseconds of so many ticks, of which span_ticks took span_ns. span_ticks = 0: ticks are nanoseconds.
XL_FN uint64_t ns_of_ticks(uint64_t ticks, uint64_t span_ns, uint64_t span_ticks) {
  if (span_ticks == 0) return ticks;
  return uint64_t(double(ticks) * (double(span_ns) / double(span_ticks)) + 0.5);
}

}  // namespace xl
