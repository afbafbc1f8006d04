// few_rows: out[M, N] = scale * (left[M, K] right[N, K]^T + low[M, R] thin[N, R]^T) + bias[N] for few rows of left.
//
// Used for y = x W^T + h B^T + bias and for h = x A^T where x has few rows, as when tokens are generated. There W is
// read from memory once and hardly used: nothing is packed, each element is a dot product of rows as they lie, and the
// rows of W after these come from memory meanwhile.
// Layouts: rows with a stride, low padded to kLanes. Tiles: up to 6 rows (2 without AVX-512) by 4 columns of sums, a
// vector along K each. A block of 4 rows of W meets all rows of left before the next one.
// Numerics: fp32 sums in as many lanes as a vector has, bf16 by vdpbf16ps; the update in fp32 whatever B's dtype is.
#include "few_rows.h"

#include "bf16_dot.h"

namespace fused_lora::cpu {
namespace {

constexpr int64_t kColumns = 4;  // of a tile
constexpr int64_t kChunk = 64;   // columns whose sums are stored at once

// A tile's operands: x[rows, K], w[columns, K]; low[rows, Rp], b[columns, Rp].
template <class T> struct Tile {
  const T *x, *w;
  int64_t ldx, ldw, K;
  const float *low, *b;
  int64_t Rp, ldb;
};

template <class V> INLINE float sum_of(const V& v) {
  constexpr int W = sizeof(V) / sizeof(float);
  float sums[W];
  store(sums, v);
  for (int n = W / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) sums[i] += sums[i + n];
  return sums[0];
}

// sums[i * kChunk + j] = x_i . w_j + low_i . b_j
template <int MR, int NR, class V> INLINE void dots(const Tile<float>& t, float* sums) {
  constexpr int W = sizeof(V) / sizeof(float);
  V acc[MR][NR] = {}, left, right[NR];
  for (int64_t r = 0; r < t.Rp; r += W) {
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) load(right[j], t.b + j * t.ldb + r);
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i) {
      load(left, t.low + i * t.Rp + r);
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j) acc[i][j] += left * right[j];
    }
  }
  int64_t k = 0;
  for (; k + W <= t.K; k += W) {
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) {
      __builtin_prefetch(t.w + (NR + j) * t.ldw + k, 0, 2);
      load(right[j], t.w + j * t.ldw + k);
    }
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i) {
      load(left, t.x + i * t.ldx + k);
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j) acc[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) {
      float sum = sum_of(acc[i][j]);
      for (int64_t q = k; q < t.K; ++q) sum += t.x[i * t.ldx + q] * t.w[j * t.ldw + q];
      sums[i * kChunk + j] = sum;
    }
}

#ifdef FUSED_LORA_BF16_DOT
template <int MR, int NR> BF16_DOT_INLINE void dots_bf16(const Tile<uint16_t>& t, float* sums) {
  constexpr int64_t kStep = 2 * kLanes;
  __m512 acc[MR][NR] = {};
  for (int64_t r = 0; r < t.Rp; r += kLanes)
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j)
        acc[i][j] =
            _mm512_fmadd_ps(_mm512_loadu_ps(t.low + i * t.Rp + r), _mm512_loadu_ps(t.b + j * t.ldb + r), acc[i][j]);
  for (int64_t k = 0; k < t.K; k += kStep) {
    const __mmask32 some = first32(t.K - k);
    const auto part = [&](const uint16_t* from) BF16_DOT_INLINED {
      return (__m512bh)(some == ~0u ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(some, from));
    };
    __m512bh right[NR];
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) {
      _mm_prefetch(reinterpret_cast<const char*>(t.w + (NR + j) * t.ldw + k), _MM_HINT_T1);
      right[j] = part(t.w + j * t.ldw + k);
    }
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i) {
      const __m512bh left = part(t.x + i * t.ldx + k);
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], left, right[j]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) sums[i * kChunk + j] = _mm512_reduce_add_ps(acc[i][j]);
}

template <int NR> BF16_DOT void tile_bf16(int64_t rows, const Tile<uint16_t>& t, float* sums) {
  switch (rows) {
    case 1: return dots_bf16<1, NR>(t, sums);
    case 2: return dots_bf16<2, NR>(t, sums);
    case 3: return dots_bf16<3, NR>(t, sums);
    case 4: return dots_bf16<4, NR>(t, sums);
    case 5: return dots_bf16<5, NR>(t, sums);
    default: return dots_bf16<6, NR>(t, sums);
  }
}

void tile(int64_t rows, int64_t columns, const Tile<uint16_t>& t, float* sums) {
  if (columns == kColumns) tile_bf16<kColumns>(rows, t, sums);
  else tile_bf16<1>(rows, t, sums);
}
#endif

template <int NR> void tile_fp32(int64_t rows, const Tile<float>& t, float* sums) {
  widest_vector([=]<class L>(L) INLINED {
    using V = typename L::Vector;
    if constexpr (sizeof(V) == sizeof(Vec16)) {
      switch (rows) {
        case 1: return dots<1, NR, V>(t, sums);
        case 2: return dots<2, NR, V>(t, sums);
        case 3: return dots<3, NR, V>(t, sums);
        case 4: return dots<4, NR, V>(t, sums);
        case 5: return dots<5, NR, V>(t, sums);
        default: return dots<6, NR, V>(t, sums);
      }
    } else {
      rows == 1 ? dots<1, NR, V>(t, sums) : dots<2, NR, V>(t, sums);
    }
  });
}

void tile(int64_t rows, int64_t columns, const Tile<float>& t, float* sums) {
  if (columns == kColumns) tile_fp32<kColumns>(rows, t, sums);
  else tile_fp32<1>(rows, t, sums);
}

// sums[M, columns (row stride kChunk)] for columns n.. of right; thin: [kColumns, Rp] to spare.
template <class T> void sums_of(const FewRows& f, int64_t n, int64_t columns, int64_t Rp, float* thin, float* sums) {
  const int64_t most = avx512() ? 6 : 2, parts = (f.M + most - 1) / most;
  for (int64_t j = 0; j < columns;) {
    const int64_t width = columns - j < kColumns ? 1 : kColumns;
    const bool as_it_lies = f.thin_dtype == Dtype::f32 && f.R == Rp;
    const void* B = f.low ? at(f.thin, (n + j) * f.R, f.thin_dtype) : nullptr;
    if (B && !as_it_lies) load_matrix(B, f.thin_dtype, thin, width, f.R, Rp);
    for (int64_t i = 0; i < parts; ++i) {
      const Range rows = part(f.M, 1, i, parts);
      const Tile<T> t{static_cast<const T*>(f.left) + rows.begin * f.ld_left,
                      static_cast<const T*>(f.right) + (n + j) * f.ld_right,
                      f.ld_left,
                      f.ld_right,
                      f.K,
                      f.low ? f.low + rows.begin * Rp : nullptr,
                      as_it_lies ? static_cast<const float*>(B) : thin,
                      f.low ? Rp : 0,
                      Rp};
      tile(rows.end - rows.begin, width, t, sums + rows.begin * kChunk + j);
    }
    j += width;
  }
}

}  // namespace

void few_rows(const FewRows& f, Buffers& buffers, int threads) {
  const int64_t Rp = round_up(f.R, kLanes);
  std::vector<float*> sums, thins, biases;
  for (int t = 0; t < threads; ++t) {
    sums.push_back(buffers.take(f.M * kChunk));
    thins.push_back(buffers.take(kColumns * Rp));
    biases.push_back(buffers.take(kChunk));
  }
  parallel(threads, [&](int thread) {
    const auto t = static_cast<size_t>(thread);
    const Range range = part(f.N, kColumns, thread, threads);
    for (int64_t n = range.begin; n < range.end; n += kChunk) {
      const int64_t columns = std::min(kChunk, range.end - n);
#ifdef FUSED_LORA_BF16_DOT
      if (f.dtype == Dtype::bf16) sums_of<uint16_t>(f, n, columns, Rp, thins[t], sums[t]);
      else
#endif
        sums_of<float>(f, n, columns, Rp, thins[t], sums[t]);
      if (f.bias) load_matrix(at(f.bias, n, f.dtype), f.dtype, biases[t], 1, columns, columns);
      for (int64_t m = 0; m < f.M; ++m) {
        float* row = sums[t] + m * kChunk;
        for (int64_t j = 0; f.scale && j < columns; ++j) row[j] *= f.scale[n + j];
        for (int64_t j = 0; f.bias && j < columns; ++j) row[j] += biases[t][j];
        store_row(row, at(f.out, m * f.N + n, f.dtype), f.dtype, columns);
      }
    }
  });
}

}  // namespace fused_lora::cpu
