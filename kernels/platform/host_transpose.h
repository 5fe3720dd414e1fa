// Tiles of 32-bit words turned over: of activations, a pair of each of 16 rows side by side; of sums, back to rows.
#pragma once

#include "platform/host_chunk.h"

namespace xl {

// to[c * to_stride + r] = from[r * from_stride + c], r < rows, c < columns, both at most 16; strides in words of 32 bits.
XL_FN void transpose(const void* from, size_t from_stride, int rows, int columns, void* to, size_t to_stride) {
#if defined(__AVX512F__)
  const __mmask16 some = __mmask16((1u << columns) - 1);
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r)
    a[r] = _mm512_maskz_loadu_epi32(r < rows ? some : 0, static_cast<const uint32_t*>(from) + r * from_stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // a[i + c]: in quarter q, column 4 q + c of rows i .. i + 4
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i even_low = _mm512_shuffle_i32x4(a[c], a[c + 4], 0x88), odd_low = _mm512_shuffle_i32x4(a[c], a[c + 4], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(a[c + 8], a[c + 12], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(a[c + 8], a[c + 12], 0xdd);
    b[c] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    b[c + 4] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    b[c + 8] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    b[c + 12] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
  const __mmask16 written = __mmask16((1u << rows) - 1);
#pragma GCC unroll 16
  for (int c = 0; c < 16; ++c)
    if (c < columns) _mm512_mask_storeu_epi32(static_cast<uint32_t*>(to) + c * to_stride, written, b[c]);
#else
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < columns; ++c)
      memcpy(static_cast<uint32_t*>(to) + c * to_stride + r, static_cast<const uint32_t*>(from) + r * from_stride + c, 4);
#endif
}

}  // namespace xl
