// The CPU platform: a team is one thread, which holds all 32 virtual lanes in vector registers where there are any.
#pragma once

#include "platform/host_amx_multiply.h"
#include "platform/host_lanes.h"

#if defined(XL_AMX) || defined(__AVX512BF16__)
#define XL_WIDE  // bf16 by bf16 has a wide panel
#endif

namespace xl {

#if !defined(XL_WIDE)
XL_FN size_t packed_elements(int, int) { return 0; }
#endif

struct HostTeam : HostLanes {
  static constexpr int threads = 1, lanes = 1, warps = 1;
  static constexpr int tile = 16, granule = 16, in_flight = 1, block = kPanelRows, rows = 1, panel_rows = Panel<float, float>::rows;
  static constexpr bool lane_groups = false, stages = false;

  float* scratch_;
  bf16* packed_;
  int shared_int_ = 0;
#if defined(XL_AMX)
  Tiles tiles_;
#endif

  // `packed`: memory for packed_elements of WidePanel<bf16, bf16>::rows activations of the longest matrix, on a 64-byte line;
  // null: panels of few rows alone.
  explicit HostTeam(float* scratch, bf16* packed = nullptr) : scratch_(scratch), packed_(packed) {}
  int thread() const { return 0; }
  void forget() {}
  int warp() const { return 0; }
  void sync() {}
  void warp_sync() {}
  void add(uint64_t* word, uint64_t value) { *word += value; }
  float* scratch() { return scratch_; }
  int* shared_ints() { return &shared_int_; }

  template <class W, class A>
  static constexpr Panel<W, A> panel_of(const W*, const A*) {
    return {};
  }

  template <class W, class A>
  XL_FN void dot_panel(const W* const (&w)[kPanelRows], const A* x, int stride, int k, int count, const W* next, float* out,
                       int out_stride) {
    multiply_panel<panel_rows>(w, x, stride, k, count, next, out, out_stride);
  }

  template <class W, class A>
  static constexpr WidePanel<W, A> wide_panel_of(const W*, const A*) {
    return {};
  }

#if defined(XL_WIDE)
  bool packs() const { return packed_ != nullptr; }
  const bf16* pack(const bf16* x, int stride, int k, int count) { return pack_rows(x, stride, k, count, packed_); }
#endif

#if defined(XL_AMX)
  void dot_panel(const bf16* const (&w)[kTileRows], const bf16* x, int, int k, int count, const bf16* next, float* out,
                 int out_stride) {
    multiply_tiles(tiles_, w, x, k, count, next, out, out_stride);
  }
#elif defined(XL_WIDE)
  void dot_panel(const bf16* const (&w)[16], const bf16* x, int, int k, int count, const bf16* next, float* out, int out_stride) {
    multiply_lanes(w, x, k, count, next, out, out_stride);
  }
#endif
};

}  // namespace xl
