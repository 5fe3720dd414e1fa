// What differs between a GPU and a CPU, behind one interface. Phases and stages use nothing else.
//
// A Team is a thread block: `threads` threads in warps of `lanes`. Every reduction runs over kVirtualLanes virtual lanes:
// virtual lane v belongs to real lane v % lanes, so a warp of any width sums in the same order.
//
//   Team::threads, lanes, warps            compile-time constants
//   thread() warp() lane()                 who am I
//   sync() warp_sync()                     barriers of the team, of the warp
//   shuffle_xor(v, mask)                   the value of lane ^ mask
//   add(word, v), raise(word, v)           integer sum, maximum into a word that the team shares; no order
//   scratch()                              memory that the team shares, Params.scratch_floats floats
//   shared_ints()                          `threads` ints that the team shares
//   Chunk                                  this lane's part of 32 consecutive elements: load, store, fma, sum, max, ...
//   tile, block, rows                      shape of a multiply: units of work at a time, weight rows and activations in registers
//   dot_block<N, R>(w, x, stride, k, out)  out[j][r] = w[j] . x[r], j < N, in the order of dot
//   dot<R>(w, x, stride, k, out)           out[r] = w[0..k) . x[r * stride ..]; k a multiple of 32; a whole warp
//
// Free functions: load_acquire (device scope), load_acquire_system, store_release_system (words that the
// host writes or reads), add_release, max_relaxed, claim, clock_ns, relax (one turn of a spin), fma_, sqrt_.
// Acquire and release operations only: free-standing fences and `volatile` are invisible to ThreadSanitizer.
#pragma once

#include "generated/layout.h"

#if defined(__CUDACC__)
#include "platform/cuda.h"
#elif defined(XL_RACE)
#include "platform/race.h"
#else
#include "platform/host.h"
#endif
