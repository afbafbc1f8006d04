// The walks over groups of rows on AMX tiles (grouped.cpp has their formulas and their split into tasks).
//
// A task of by_rows packs its group's two factors into pairs, brings 32 rows at a time into blocks for the shrink, and
// then updates all its rows of `out`, which it reads through the caches once more. A task of gradient brings its
// columns of x, or dy, into blocks and multiplies them by dh, or h, of the same rows.
// Layouts as in amx.h; of groups with fewer than 32 rows the rest of a block is zero. Scattered rows are read and
// updated where they lie.
// Numerics: h and dh are rounded to bf16; a gradient starts afresh every kRowsAtOnce rows.
#include "amx.h"
#include "grouped.h"

#ifdef FUSED_LORA_AMX

namespace fused_lora::cpu {
namespace {

constexpr int64_t kRowsAtOnce = 256;  // what one wgrad sums up

// A piece of a group in one of the two passes.
class Task {
 public:
  Task(const CpuGroups& params, const RowsPass& of, const Piece& piece)
      : p(params),
        pass(of),
        begin(piece.begin),
        M(piece.end - piece.begin),
        R(p.ranks[piece.g]),
        Rp(round_up(R, kSide)),
        at(p.rows ? p.rows + begin : nullptr),
        dropout(dropout_of(p, piece.g)),
        scaling(p.scaling[piece.g]),
        down(pass.down[piece.g]),
        thin(pass.thin[piece.g]),
        low(buffers.take<uint16_t>(round_up(M, kSide) * Rp)) {}

  void run() {
    make_low();
    if (pass.low) unpad_low(low, Rp, static_cast<uint16_t*>(pass.low) + begin * p.R, p.R, M, R);
    if (pass.out) update();
  }

 private:
  // Where row m of the piece lies, for who takes `at` too.
  int64_t first() const { return at ? 0 : begin; }

  void make_low() {
    const int64_t depth = pass.cols_in, steps = sides(depth), panel = steps * kBlock;
    auto* pairs = buffers.take<uint16_t>(sides(R) * panel);
    auto* blocks = buffers.take<uint16_t>(steps * kBlock);
    if (pass.backward) pair_panels(down, p.adapter_dtype, R, pairs, panel, depth, R);
    else pair_panels_transposed(down, p.adapter_dtype, depth, pairs, panel, depth, R);
    const bool drops = dropout.threshold && !pass.backward;
    const Tiles tiles;
    for (int64_t m = 0; m < M; m += kSide) {
      const int64_t rows = std::min(kSide, M - m), row0 = at ? 0 : begin + m;
      const auto* in = static_cast<const uint16_t*>(pass.in) + row0 * pass.ld_in;
      const int64_t* where = at ? at + m : nullptr;
      if (drops) to_dropped_blocks(in, pass.ld_in, dropout, row0, nullptr, blocks, nullptr, rows, depth, 0, where);
      else to_blocks(in, pass.ld_in, blocks, rows, depth, where);
      const float factor = drops ? scaling * dropout.scale() : scaling;
      shrink_amx(blocks, pairs, factor, low + m * Rp, Rp, rows, steps, R);
    }
  }

  void update() {
    uint32_t* keep = nullptr;
    const int64_t words = sides(pass.cols_out);
    if (dropout.threshold && pass.backward) {
      keep = buffers.take<uint32_t>(M * words);
      for (int64_t m = 0; m < M; ++m)
        dropout_bits(dropout, keep + m * words, words, at ? at[m] : begin + m, 0, 1, pass.cols_out);
    }
    const AmxGemm g{.left = nullptr,
                    .right = nullptr,
                    .low = low,
                    .thin = thin,
                    .bias = nullptr,
                    .out_scale = nullptr,
                    .keep = keep,
                    .out = static_cast<uint16_t*>(pass.out) + (at ? 0 : begin * pass.cols_out),
                    .M = M,
                    .N = pass.cols_out,
                    .K = 0,
                    .R = R,
                    .ld_right = 0,
                    .thin_dtype = p.adapter_dtype,
                    .scale = keep ? dropout.scale() : 1.0f,
                    .by_rows = false,
                    .thin_by_rows = pass.backward,
                    .rows = at};
    amx_gemm(g, AmxScratch(g, buffers, 1));
  }

  const CpuGroups& p;
  const RowsPass& pass;
  int64_t begin, M, R, Rp;
  const int64_t* at;  // the piece's rows, or null: begin and those after it
  Dropout dropout;
  float scaling;
  const void *down, *thin;
  Buffers buffers;
  uint16_t* low;  // [M rounded up to 32, Rp]
};

}  // namespace

void OnTiles::by_rows(const CpuGroups& p, const RowsPass& pass, int threads) {
  const std::vector<Piece> work = pieces(p, threads);
  run_tasks(static_cast<int64_t>(work.size()), threads,
            [&](int64_t i) { Task(p, pass, work[static_cast<size_t>(i)]).run(); });
}

void OnTiles::gradient(const CpuGroupedBackwardParams& p, const void* dh, const Strip& strip) {
  const auto [is_A, first, end, n, cols] = strip;
  const int64_t R = p.ranks[first], Rp = round_up(R, kSide), steps = sides(cols), ld = is_A ? p.ldx : p.lddy;
  const bool direct = p.adapter_dtype == Dtype::f32;
  void* dst = is_A ? at(p.dA[first], n, p.adapter_dtype) : at(p.dB[first], n * R, p.adapter_dtype);
  Buffers buffers;
  auto* blocks = buffers.take<uint16_t>(kRowsAtOnce * steps * kSide);
  auto* pairs = buffers.take<uint16_t>(kRowsAtOnce * 2 * kSide);
  auto *low = buffers.take<uint16_t>(kRowsAtOnce * Rp), *lowT = buffers.take<uint16_t>(kRowsAtOnce * Rp);
  AmxSums sums{.to = direct ? static_cast<float*>(dst) : buffers.take(R * cols),
               .ld = !is_A    ? R
                     : direct ? p.K
                              : cols,
               .cols = cols,
               .turned = !is_A,
               .add = false,
               .factor = 1.0f};
  const Tiles tiles;
  for (int64_t g = first; g < end; ++g) {
    const Dropout dropout = is_A ? dropout_of(p, g) : Dropout{p.seed, 0};
    sums.factor = dropout.scale();
    for (int64_t m = p.offsets[g]; m < p.offsets[g + 1]; m += kRowsAtOnce, sums.add = true) {
      const int64_t rows = std::min(kRowsAtOnce, p.offsets[g + 1] - m), row0 = p.rows ? 0 : m;
      const int64_t* where = p.rows ? p.rows + m : nullptr;
      const auto* in = static_cast<const uint16_t*>(is_A ? p.x : p.dy) + row0 * ld + n;
      if (dropout.threshold) to_dropped_blocks(in, ld, dropout, row0, nullptr, blocks, nullptr, rows, cols, n, where);
      else to_blocks(in, ld, blocks, rows, cols, where);
      pad_low(static_cast<const uint16_t*>(is_A ? dh : p.h) + m * p.R, p.R, low, Rp, rows, R);
      transpose_low(low, Rp, lowT, round_up(rows, kSide));
      wgrad_amx(blocks, lowT, sums, pairs, sides(rows), steps, R);
    }
  }
  const int64_t lines = is_A ? R : cols, width = is_A ? cols : R, step = is_A ? p.K : R;
  for (int64_t i = 0; i < lines && !(direct && sums.add); ++i) {  // no rows, or another dtype
    float* line = sums.to + i * sums.ld;
    if (!sums.add) std::fill_n(line, width, 0.0f);
    if (!direct) store_row(line, at(dst, i * step, p.adapter_dtype), p.adapter_dtype, width);
  }
}

}  // namespace fused_lora::cpu

#endif
