// The choices of heuristics.h for Python: in every build, for tests, workspaces and `python -m fused_lora info`.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "plans.h"

namespace py = pybind11;
using namespace fused_lora;

namespace {

void require(bool good, const char* what) {
  if (!good) throw std::invalid_argument(what);
}

Dtype half_dtype(int dtype) {
  require(fused_dtype(Dtype(dtype)), "dtype must be 1 (fp16) or 2 (bf16)");
  return Dtype(dtype);
}

py::dict describe(const GemmConfig& c) {
  py::dict d;
  d["block_m"] = kGemmBlockM;
  d["block_n"] = c.kind.block_n;
  d["block_k"] = kGemmBlockK;
  d["cluster"] = kGemmCluster;
  d["stages"] = c.kind.stages();
  d["smem_bytes"] = c.kind.smem_bytes();
  d["grid"] = c.grid;
  d["row_tiles"] = c.row_tiles;
  d["col_tiles"] = c.col_tiles;
  d["low_blocks"] = c.low_blocks;
  d["rank_tile"] = c.kind.rank_tile;
  d["one_launch"] = c.kind.rank_tile > 0;
  d["low_columns"] = c.low_columns;
  d["dropout"] = c.kind.dropout;
  d["gradients"] = c.kind.gradients;
  d["threads"] = 128 * c.kind.warpgroups();
  return d;
}

py::dict describe(const WgradConfig& c) {
  py::dict d;
  d["rank_tile"] = c.rank_tile;
  d["rank_chunks"] = c.rank_chunks;
  d["rows_per_split"] = c.rows_per_split;
  d["splits"] = c.splits;
  d["smem_bytes"] = wgrad_smem_bytes(c.rank_tile);
  return d;
}

py::dict describe(const SmallConfig& c) {
  py::dict d;
  d["rows"] = c.rows;
  d["cols"] = kSmallCols;
  d["stages"] = small_stages(c.rows);
  d["smem_bytes"] = c.smem;
  d["strips"] = c.strips;
  d["splits"] = c.splits;
  return d;
}

py::tuple describe(const Region& r) { return py::make_tuple(r.offset, r.bytes); }

py::dict lora_gemm_config(int64_t M, int64_t N, int64_t K, int64_t R, int dtype, int sms, bool makes_low, bool dropout,
                          bool backward, bool gradients, int block_n, bool halves) {
  half_dtype(dtype);
  require(K >= 1, "K must be at least 1");
  require(block_n == 0 || block_n == 128 || block_n == 256, "block_n must be 128, 256, or 0 for the faster");
  const GemmConfig c = gemm_config({.M = M,
                                    .N = N,
                                    .R = R,
                                    .sms = sms,
                                    .makes_low = makes_low,
                                    .dropout = dropout,
                                    .backward = backward,
                                    .gradients = gradients,
                                    .block_n = block_n,
                                    .halves = halves});
  require(c.valid,
          "sizes must be 1 <= M, N < 2**31 - 512 and 0 <= R <= 256, with at least 2 SMs and fewer than 2**31 tiles");
  return describe(c);
}

py::tuple lora_gemm_tile(int t, int row_tiles, int col_tiles, int low_columns) {
  require(t >= 0 && row_tiles >= 1 && col_tiles >= 1 && t < int64_t{row_tiles} * col_tiles,
          "t must name one of row_tiles * col_tiles tiles");
  require(low_columns >= 0 && low_columns <= std::min(col_tiles, 2), "low_columns must be 0, 1 or 2 of col_tiles");
  const TileIndex tile = gemm_tile(t, row_tiles, col_tiles, low_columns);
  return py::make_tuple(tile.row, tile.col);
}

py::tuple lora_gemm_walk(int col, int low_columns, int k_blocks) {
  require(col >= 0 && low_columns >= 0 && low_columns <= 2 && k_blocks >= std::max(low_columns, 1),
          "k_blocks must be at least 1 for each of low_columns, which are at most 2");
  const KWalk walk = k_walk(col, low_columns, k_blocks);
  return py::make_tuple(walk.first, walk.low_begin, walk.low_end);
}

// A CudaPlan from its values in order.
CudaPlan plan_of(const PlanValues& v) {
  return {CudaPlan::Product(v[0]), CudaPlan::Low(v[1]),      CudaPlan::Product(v[2]), CudaPlan::Low(v[3]),
          CudaPlan::Weights(v[4]), CudaPlan::Launches(v[5]), CudaPlan::Share(v[6]),   CudaPlan::Share(v[7])};
}

void require_plan(const char* refused, const CudaPlan& plan) {
  if (refused) throw std::invalid_argument(refused + ("; got '" + words_of(plan) + "'"));
}

py::dict plan_forward(int64_t M, int64_t N, int64_t K, int64_t R, int dtype, int adapter_dtype, bool dropout, int sms,
                      const PlanValues& plan) {
  const CudaPlan want = plan_of(plan);
  const ForwardPlan p = forward_plan({.M = M,
                                      .N = N,
                                      .K = K,
                                      .R = R,
                                      .dtype = half_dtype(dtype),
                                      .adapter_dtype = Dtype(adapter_dtype),
                                      .dropout = dropout,
                                      .sms = sms,
                                      .plan = want});
  require_plan(p.refused, want);
  py::dict d, regions;
  d["plan"] = words_of(p.plan);
  if (p.small.valid) d["small"] = describe(p.small);
  else d["gemm"] = describe(p.gemm);
  if (p.h_gemm.valid) d["h_gemm"] = describe(p.h_gemm);
  regions["control"] = describe(p.control);
  regions["low_sums"] = describe(p.low_sums);
  regions["A"] = describe(p.A);
  regions["B"] = describe(p.B);
  d["regions"] = regions;
  d["bytes"] = p.bytes;
  return d;
}

py::dict plan_backward(int64_t M, int64_t N, int64_t K, int64_t R, int dtype, int adapter_dtype, bool dropout,
                       bool need_x, bool need_A, bool need_B, bool need_bias, bool deterministic, int sms,
                       const PlanValues& plan) {
  const CudaPlan want = plan_of(plan);
  const BackwardPlan p = backward_plan({.M = M,
                                        .N = N,
                                        .K = K,
                                        .R = R,
                                        .dtype = half_dtype(dtype),
                                        .adapter_dtype = Dtype(adapter_dtype),
                                        .dropout = dropout,
                                        .need_x = need_x,
                                        .need_A = need_A,
                                        .need_B = need_B,
                                        .need_bias = need_bias,
                                        .deterministic = deterministic,
                                        .sms = sms,
                                        .plan = want});
  require_plan(p.refused, want);
  py::dict d, regions;
  d["plan"] = words_of(p.plan);
  if (need_x) d["gemm"] = describe(p.gemm);
  if (p.h_gemm.valid) d["h_gemm"] = describe(p.h_gemm);
  if (p.plan.wgrad == CudaPlan::Weights::apart) d["wgrad"] = describe(p.wgrad);
  if (p.bias_apart) d["bias_wgrad"] = describe(p.bias_wgrad);
  regions["control"] = describe(p.control);
  regions["low_sums"] = describe(p.low_sums);
  regions["mask"] = describe(p.mask);
  regions["A"] = describe(p.A);
  regions["B"] = describe(p.B);
  regions["dh"] = describe(p.dh);
  regions["dA"] = describe(p.dA);
  regions["dB"] = describe(p.dB);
  regions["dbias"] = describe(p.dbias);
  d["regions"] = regions;
  d["bytes"] = p.bytes;
  return d;
}

}  // namespace

void bind_heuristics(py::module_& m) {
  using namespace py::literals;
  m.def("lora_gemm_config", &lora_gemm_config, py::kw_only(), "M"_a, "N"_a, "K"_a, "R"_a, "dtype"_a, "sms"_a,
        "makes_low"_a = true, "dropout"_a = false, "backward"_a = false, "gradients"_a = false, "block_n"_a = 0,
        "halves"_a = false,
        "The tile, stages, shared memory and grid of out[M, N] = left[M, K] right + low[M, R] thin.");
  m.def("lora_gemm_tile", &lora_gemm_tile, py::kw_only(), "t"_a, "row_tiles"_a, "col_tiles"_a, "low_columns"_a,
        "(row, column) of tile number t; those of the columns that make low lead.");
  m.def("lora_gemm_walk", &lora_gemm_walk, py::kw_only(), "col"_a, "low_columns"_a, "k_blocks"_a,
        "(first k-block, first step that makes low, step after the last) of a tile in column `col`.");
  m.def("cuda_shrink_splits", &shrink_splits, py::kw_only(), "M"_a, "K"_a, "R"_a, "sms"_a,
        "Blocks of a cluster of shrink, which share K.");
  m.def("cuda_forward_plan", &plan_forward, py::kw_only(), "M"_a, "N"_a, "K"_a, "R"_a, "dtype"_a, "adapter_dtype"_a,
        "dropout"_a, "sms"_a, "plan"_a = PlanValues{}, "What the CUDA forward launches and the workspace it needs.");
  m.def("cuda_backward_plan", &plan_backward, py::kw_only(), "M"_a, "N"_a, "K"_a, "R"_a, "dtype"_a, "adapter_dtype"_a,
        "dropout"_a, "need_x"_a, "need_A"_a, "need_B"_a, "need_bias"_a, "deterministic"_a, "sms"_a,
        "plan"_a = PlanValues{}, "What the CUDA backward launches and the workspace it needs.");
  m.def(
      "cuda_plan_conflict",
      [](int64_t M, int64_t R, const PlanValues& plan) {
        const char* const refused = plan_conflict(plan_of(plan), M, R, false);
        return refused ? py::object(py::str(refused)) : py::none();
      },
      py::kw_only(), "M"_a, "R"_a, "plan"_a, "What a plan must not say at these sizes, or None.");
  py::list words;
  for (const auto& [word, field, value] : kPlanWords) words.append(py::make_tuple(word, field, value));
  m.attr("cuda_plan_words") = py::tuple(words);  // (word, its field of a plan's values, its value); 0: not said
  py::dict codes;
  codes["float32"] = static_cast<int>(Dtype::f32);
  codes["float16"] = static_cast<int>(Dtype::f16);
  codes["bfloat16"] = static_cast<int>(Dtype::bf16);
  m.attr("dtype_codes") = codes;  // torch's name of each dtype: its number in csrc/lora.h
  m.attr("cuda_max_rank") = kMaxRank;
  m.attr("cuda_smem_limit") = kSmemLimit;
}
