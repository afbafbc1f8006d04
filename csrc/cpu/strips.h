// Strips of rows: how the products cut their left side.
#pragma once

#include <algorithm>
#include <type_traits>

#include "kernels.h"
#include "simd.h"
#include "walk.h"

namespace fused_lora::cpu {

static_assert(kStrip == 12);

// Calls body(std::integral_constant<int, height>), a height of at most kStrip rows.
template <class Body> INLINE void with_height(int64_t height, const Body& body) {
  switch (height) {
    case 1: return body(std::integral_constant<int, 1>{});
    case 2: return body(std::integral_constant<int, 2>{});
    case 3: return body(std::integral_constant<int, 3>{});
    case 4: return body(std::integral_constant<int, 4>{});
    case 5: return body(std::integral_constant<int, 5>{});
    case 6: return body(std::integral_constant<int, 6>{});
    case 7: return body(std::integral_constant<int, 7>{});
    case 8: return body(std::integral_constant<int, 8>{});
    case 9: return body(std::integral_constant<int, 9>{});
    case 10: return body(std::integral_constant<int, 10>{});
    case 11: return body(std::integral_constant<int, 11>{});
    case 12: return body(std::integral_constant<int, 12>{});
  }
}

// Calls body(number, first row, height as with_height has it) for every strip of the rows [begin, end): of equal
// height, give or take one, so that 64 rows are 4 x 11 + 2 x 10 and not 5 x 12 + 4.
template <class Body> INLINE void for_strips(int64_t begin, int64_t end, const Body& body) {
  const int64_t rows = end - begin, strips = (rows + kStrip - 1) / kStrip;
  for (int64_t i = 0; i < strips; ++i) {
    const int64_t from = rows * i / strips, to = rows * (i + 1) / strips;
    with_height(to - from, [&](auto height) INLINED { body(i, begin + from, height); });
  }
}

// out[H, kColumns] += (or =) x[H, k (row stride ld)] p[k, kColumns (row stride ldp)], of 16 columns or 8: the register
// tile of a strip, two of AVX2.
template <int H, int kColumns, bool kAdd = true>
INLINE void strip_tile(const float* x, int64_t ld, const float* p, int64_t ldp, int64_t k, float* out, int64_t ldo) {
  if constexpr (kColumns == 16)
    if (avx512()) return tile<H, Vec16, 1, kAdd>(x, ld, 1, p, ldp, k, out, ldo);
  constexpr int kFirst = H > 6 ? (H + 1) / 2 : H;
  tile<kFirst, Vec8, kColumns / 8, kAdd>(x, ld, 1, p, ldp, k, out, ldo);
  if constexpr (H > 6)
    tile<H - kFirst, Vec8, kColumns / 8, kAdd>(x + kFirst * ld, ld, 1, p, ldp, k, out + kFirst * ldo, ldo);
}

// The tasks of a product: a panel has 32 columns, and a task two at the least.
INLINE Split split_of(int64_t M, int64_t N, int threads) {
  return split_tasks((M + kStrip - 1) / kStrip, (N + 31) / 32, (N + 63) / 64, threads);
}

}  // namespace fused_lora::cpu
