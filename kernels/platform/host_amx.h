// Intel's AMX: the tile registers of a thread and the three things done with them (load, multiply, store), and whether this
// process may use them. XL_AMX is defined in a build that has them: the compiler's target has AMX and XL_NO_AMX is not defined,
// or XL_AMX_EMULATED is, which puts C++ of the same bits in the place of the instructions.
#pragma once

#include "platform/host_chunk.h"

// clang 14 spells both names without the middle underscore.
#if (defined(__AMX_TILE__) && defined(__AMX_BF16__)) || (defined(__AMXTILE__) && defined(__AMXBF16__))
#define XL_HAS_AMX 1
#endif

#if defined(XL_AMX_EMULATED) || (defined(XL_HAS_AMX) && !defined(XL_NO_AMX))
#define XL_AMX 1

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace xl {

constexpr int kTileRows = 16, kTileBytes = 64;  // of a tile at most
constexpr int kTileDepth = 32;                  // bf16 of a row of a tile: what one product sums

// c[m][n] += the sum over pairs p < 16 of a[m][p] . b[p][n], n < columns <= 16, as the Intel SDM defines TDPBF16PS (vol. 2, "Dot
// Product of BF16 Tiles Accumulated into Packed Single Precision Tile"): the even elements of the pairs are summed from 0 in
// ascending order and so are the odd ones, one rounding a step; then their sum is added to c. Words of a and b: pairs of bf16.
// To be called with subnormals flushed (`tile_product`).
__attribute__((noinline)) inline void tile_product_in_mode(const uint32_t (&a)[16][16], const uint32_t (&b)[16][16],
                                                           int columns, float (&c)[16][16]) {
  for (int m = 0; m < kTileRows; ++m) {
    float even[16] = {}, odd[16] = {};
    for (int p = 0; p < 16; ++p) {
      const float a_even = from_bits(a[m][p] << 16), a_odd = from_bits(a[m][p] & 0xffff0000u);
      for (int n = 0; n < 16; ++n) even[n] = fma_(a_even, from_bits(b[p][n] << 16), even[n]);
      for (int n = 0; n < 16; ++n) odd[n] = fma_(a_odd, from_bits(b[p][n] & 0xffff0000u), odd[n]);
    }
    for (int n = 0; n < columns; ++n) c[m][n] = c[m][n] + (even[n] + odd[n]);
  }
}

// The instruction neither reads nor writes MXCSR: subnormals are zero and rounding is to nearest even, whatever it says.
inline void tile_product(const uint32_t (&a)[16][16], const uint32_t (&b)[16][16], int columns, float (&c)[16][16]) {
#if defined(__x86_64__)
  const unsigned mode = __builtin_ia32_stmxcsr();
  __builtin_ia32_ldmxcsr(0x9fc0u);  // exceptions masked, flush to zero, subnormal operands are zero
  tile_product_in_mode(a, b, columns, c);
  __builtin_ia32_ldmxcsr(mode);
#else
  tile_product_in_mode(a, b, columns, c);
#endif
}

// The eight tile registers of the calling thread, which alone may use the object. A tile has 16 rows: of `columns` words in
// tiles 0..3, of 16 words in tiles 4..7. The template arguments are numbers of tiles.
class Tiles {
 public:
  Tiles() = default;
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  // Makes tiles 0..3 `columns` <= 16 words wide; what the tiles hold is lost if that is new.
  void configure(int columns) {
    if (columns == columns_) return;
    columns_ = columns;
#if !defined(XL_AMX_EMULATED)
    Config config;
    for (int t = 0; t < 8; ++t) {
      config.row_bytes[t] = uint16_t(t < 4 ? 4 * columns : kTileBytes);
      config.rows[t] = kTileRows;
    }
    asm volatile("ldtilecfg %0" : : "m"(config));
#endif
  }

#if defined(XL_AMX_EMULATED)

  template <int T>
  void zero() {
    memset(words_[T], 0, sizeof words_[T]);
  }
  template <int T>
  void load(const void* from, size_t stride_bytes) {
    zero<T>();
    for (int row = 0; row < kTileRows; ++row)
      memcpy(words_[T][row], static_cast<const char*>(from) + row * stride_bytes, row_bytes<T>());
  }
  template <int T>
  void store(void* to, size_t stride_bytes) const {
    for (int row = 0; row < kTileRows; ++row)
      memcpy(static_cast<char*>(to) + row * stride_bytes, words_[T][row], row_bytes<T>());
  }
  template <int C, int A, int B>
  void add_product() {
    float c[16][16];
    memcpy(c, words_[C], sizeof c);
    tile_product(words_[A], words_[B], int(row_bytes<C>()) / 4, c);
    memcpy(words_[C], c, sizeof c);
  }

 private:
  template <int T>
  size_t row_bytes() const {
    return T < 4 ? size_t(4) * size_t(columns_) : size_t(kTileBytes);
  }

  uint32_t words_[8][16][16];

#else

  ~Tiles() {
    if (columns_) asm volatile("tilerelease");
  }

  // By hand: the intrinsics of g++ 12 name no memory as read, so that stores in front of them may be moved behind.
  template <int T>
  void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(T));
  }
  template <int T>
  void load(const void* from, size_t stride_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride_bytes), "i"(T) : "memory");
  }
  template <int T>
  void store(void* to, size_t stride_bytes) const {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride_bytes), "i"(T) : "memory");
  }
  // Tile C += tile A . tile B.
  template <int C, int A, int B>
  void add_product() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }

 private:
  struct Config {  // Intel SDM vol. 1, "Tile Configuration", palette 1
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
  static_assert(sizeof(Config) == 64, "LDTILECFG reads 64 bytes");

#endif

  int columns_ = 0;  // 0: the registers are not this object's yet
};

// Asks Linux for the tile registers, on behalf of all threads of the process. False: it refuses.
inline bool tiles_permitted() {
#if defined(XL_AMX_EMULATED)
  return true;
#elif defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace xl

#endif
