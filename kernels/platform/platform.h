// What differs between a GPU and a CPU, behind one interface. Phases and stages use nothing else.
//
// A Team is a thread block: `threads` threads in warps of `lanes`. Every reduction runs over kVirtualLanes virtual lanes:
// virtual lane v belongs to real lane v % lanes, so a warp of any width sums in the same order.
//
//   Team::threads, lanes, warps            compile-time constants
//   thread() warp() lane()                 who am I
//   forget()                               what is derived from these is not kept in registers across the call
//   sync() warp_sync()                     barriers of the team, of the warp
//   shuffle_xor(v, mask)                   the value of lane ^ mask
//   add(word, v)                           integer sum into a word that the team shares; no order
//   stages, copy16(to, from), copied()     whether the team copies values into scratch; 16 bytes, aligned; this thread's are there
//   scratch()                              memory that the team shares, Params.scratch_floats floats
//   shared_ints()                          `threads` ints that the team shares
//   Chunk, Pairs                           this lane's part of 32 consecutive elements (load, store, fma, sum, ...), of 64 bf16
//   granule, in_flight                     units that a warp's share is dealt in; chunks that a warp loads before it stores
//   tile, block                            units of work a multiply takes at a time, weight rows in registers or in the cache
//   rows, panel_rows                       activations in registers; the most that a panel takes, 0: there is no dot_panel
//   dot_block<N, R>(w, x, stride, k, out)  out[j][r] = w[j][0..k) . x[r * stride ..], j < N; k a multiple of 32; a whole warp
//   panel_of(w, x), wide_panel_of(w, x)    Panel and WidePanel of these types: weight rows, the most rows of activations
//   packs(), pack(x, stride, k, count)     whether it can; activations as dot_panel of a WidePanel takes them, until the next call
//   lane_groups, dot_rows(row, ...)        whether a warp takes several short rows at a time: dot products, a sink(n, r, value)
//   dot_panel(w, x, stride, k, count, next, out, out_stride)  the same for `count` rows
//
// A multiply of bf16 weights by bf16 activations sums pairs (LanePairs) or products of tiles (host_amx.h); any other widens both
// to float.
//
// Free functions: load_acquire (device scope), load_acquire_system, store_release_system, store_relaxed_system (words that the
// host writes or reads), store16, add_own, add_release, max_relaxed, claim, clock_ns, clock_ticks (kTicksAreNs), relax (one turn
// of a spin), forget, fma_, sqrt_.
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
