// The low-rank products on AMX tiles: shrink, wgrad, and the column sums of dbias.
//
//   shrink   low = factor * blocks down       h = s drop(x) A^T     dh = s dy B
//   wgrad    sums += lowT blocks              dA = dh^T drop(x)     dB^T = h^T dy, or turned: dB
//
// Layouts as in amx.h. Tiles: shrink holds 32 rows by 32 ranks of sums, or by 16 ranks twice, of even and odd steps;
// wgrad holds 16 ranks by 64 columns, whose 64 columns of x are brought into pairs once for all ranks (4 KiB a block).
// Numerics: fp32 sums in the order of the depth; a call of wgrad starts at zero and joins its sums at its end, so that
// errors grow with a block of rows and not with all of M.
#include <algorithm>

#include "amx.h"

#ifdef FUSED_LORA_AMX

namespace fused_lora::cpu {
namespace {

// low[16, 16 (row stride Rp)] = factor * sums in bf16, zero past rows and ranks, which an Inf beside the padding's
// zeros has made NaN.
BF16_DOT_INLINE void store_low(const float* sums, __m512 factor, uint16_t* low, int64_t Rp, int64_t rows,
                               int64_t ranks) {
  const __mmask16 there = first16(ranks);
  for (int64_t i = 0; i < 16; ++i) {
    const __m512 scaled = _mm512_maskz_mul_ps(i < rows ? there : 0, factor, _mm512_load_ps(sums + 16 * i));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(low + i * Rp), (__m256i)_mm512_cvtneps_pbh(scaled));
  }
}

// What a tile has summed up, ranks r.. by columns k.., goes out: as it lies, or its transpose.
BF16_DOT_INLINE void store_sums(const float* tile, const AmxSums& out, int64_t r, int64_t R, int64_t k) {
  const int64_t ranks = std::min<int64_t>(16, R - r), cols = std::min<int64_t>(16, out.cols - k);
  const __m512 factor = _mm512_set1_ps(out.factor);
  __m512i rows[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) rows[i] = _mm512_load_si512(tile + 16 * i);
  if (out.turned) transpose16(rows);
  const int64_t height = out.turned ? cols : ranks;
  const __mmask16 there = first16(out.turned ? ranks : cols);
  float* to = out.to + (out.turned ? k * out.ld + r : r * out.ld + k);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i, to += out.ld) {
    if (i >= height) break;
    __m512 sum = _mm512_mul_ps(factor, (__m512)rows[i]);
    if (out.add) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(there, to));
    _mm512_mask_storeu_ps(to, there, sum);
  }
}

}  // namespace

BF16_DOT void shrink_amx(const uint16_t* blocks, const uint16_t* down, float factor, uint16_t* low, int64_t Rp,
                         int64_t rows, int64_t steps, int64_t R) {
  alignas(64) float sums[4][256];
  const __m512 scale = _mm512_set1_ps(factor);
  for (int64_t r = 0; r < R; r += kSide) {
    const uint16_t *a = blocks, *b = down + r / kSide * steps * kBlock;
    const bool two = R - r > 16;
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    for (int64_t k = 0; two && k < steps; ++k, a += kBlock, b += kBlock) {
      tile_load<4>(a, 64), tile_load<6>(b, 64), tile_dot<0, 4, 6>();
      tile_load<7>(b + kTile, 64), tile_dot<1, 4, 7>();
      tile_load<5>(a + kTile, 64), tile_dot<2, 5, 6>(), tile_dot<3, 5, 7>();
    }
    for (int64_t k = 0; !two && k < steps; k += 2, a += 2 * kBlock, b += 2 * kBlock) {
      tile_load<4>(a, 64), tile_load<6>(b, 64), tile_dot<0, 4, 6>();
      tile_load<5>(a + kTile, 64), tile_dot<2, 5, 6>();
      if (k + 1 == steps) break;
      tile_load<4>(a + kBlock, 64), tile_load<7>(b + kBlock, 64), tile_dot<1, 4, 7>();
      tile_load<5>(a + kBlock + kTile, 64), tile_dot<3, 5, 7>();
    }
    tile_store<0>(sums[0], 64), tile_store<1>(sums[1], 64);
    tile_store<2>(sums[2], 64), tile_store<3>(sums[3], 64);
    if (!two)
      for (int i = 0; i < 256; ++i) sums[0][i] += sums[1][i], sums[2][i] += sums[3][i];
    for (int half = 0; half < 2; ++half) {
      uint16_t* to = low + 16 * half * Rp + r;
      store_low(sums[2 * half], scale, to, Rp, rows - 16 * half, R - r);
      store_low(sums[2 * half + 1], scale, to + 16, Rp, rows - 16 * half, R - r - 16);
    }
  }
}

BF16_DOT void wgrad_amx(const uint16_t* blocks, const uint16_t* lowT, const AmxSums& out, uint16_t* pairs, int64_t n,
                        int64_t steps, int64_t R) {
  alignas(64) float sums[4][256];
  for (int64_t k = 0; k < steps; k += 2) {
    const int64_t wide = k + 1 < steps ? 2 : 1;
    for (int64_t m = 0; m < n; ++m)
      for (int64_t j = 0; j < wide; ++j) {
        const uint16_t* from = blocks + (m * steps + k + j) * kBlock;
        uint16_t* to = pairs + (2 * m + j) * kBlock;
        for (int64_t i = 0; i < kSide; i += 2, from += 2 * kSide, to += kSide)
          store_pair(to, _mm512_load_si512(from), _mm512_load_si512(from + kSide));
      }
    for (int64_t r = 0; r < R; r += 16) {
      const uint16_t *a = lowT + r / 16 * n * kTile, *b = pairs;
      tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
      for (int64_t m = 0; m < n; ++m, a += kTile, b += 2 * kBlock) {
        tile_load<4>(a, 64);
        tile_load<5>(b, 64), tile_dot<0, 4, 5>();
        tile_load<6>(b + kTile, 64), tile_dot<1, 4, 6>();
        if (wide == 1) continue;
        tile_load<7>(b + 2 * kTile, 64), tile_dot<2, 4, 7>();
        tile_load<5>(b + 3 * kTile, 64), tile_dot<3, 4, 5>();
      }
      tile_store<0>(sums[0], 64), tile_store<1>(sums[1], 64);
      tile_store<2>(sums[2], 64), tile_store<3>(sums[3], 64);
      for (int64_t j = 0; j < 2 * wide; ++j) store_sums(sums[j], out, r, R, k * kSide + 16 * j);
    }
  }
}

BF16_DOT void column_sums_amx(const uint16_t* blocks, float* out, int64_t n, int64_t steps) {
  for (int64_t k = 0; k < steps; ++k) {
    __m512 lo = {}, hi = {};
    for (int64_t m = 0; m < n; ++m) {
      const uint16_t* block = blocks + (m * steps + k) * kBlock;
      for (int64_t i = 0; i < kSide; ++i) {
        const __m512i row = _mm512_load_si512(block + i * kSide);
        lo = _mm512_add_ps(lo, to_fp32(_mm512_castsi512_si256(row)));
        hi = _mm512_add_ps(hi, to_fp32(_mm512_extracti64x4_epi64(row, 1)));
      }
    }
    float* to = out + k * kSide;
    _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), lo));
    _mm512_storeu_ps(to + 16, _mm512_add_ps(_mm512_loadu_ps(to + 16), hi));
  }
}

}  // namespace fused_lora::cpu

#endif
