// dropout: mask[rows, kPanel], the LoRA dropout mask of one panel: Dropout::scale() or 0 for each element.
//
// Used for drop(x) in the forward and in dA, and for dx. Drawn anew each time from (seed, row, column) as in philox.h.
// The draws of a row's groups are independent, so the compiler runs 4 to 16 Philox calls side by side.
#include <bit>
#include <cstring>

#include "kernels.h"
#include "philox.h"
#include "simd.h"

namespace fused_lora::cpu {

void dropout_mask(const Dropout& dropout, float* mask, int64_t row0, int64_t col0, int64_t rows, int64_t cols) {
  widest([=]() INLINED {
    const uint64_t seed = static_cast<uint64_t>(*dropout.seed);
    const uint32_t threshold = dropout.threshold, groups = static_cast<uint32_t>((cols + 7) / 8),
                   group0 = static_cast<uint32_t>(col0 / 8);
    const float scale = dropout.scale();
    uint32_t words[kPanel / 2];
    for (int64_t m = 0; m < rows; ++m) {
      const uint32_t row = static_cast<uint32_t>(row0 + m);
      for (uint32_t g = 0; g < groups; ++g) {
        const Philox philox(seed, row, group0 + g);
        for (int j = 0; j < 4; ++j) words[4 * g + j] = philox.w[j];
      }
      uint16_t draws[kPanel];  // the words' halves, the lower one first, lie in the order of the columns
      if constexpr (std::endian::native == std::endian::little) std::memcpy(draws, words, sizeof draws);
      else
        for (int64_t i = 0; i < kPanel; ++i) draws[i] = static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
      float* out = mask + m * kPanel;
      for (uint32_t n = 0; n < 8 * groups; ++n) out[n] = draws[n] >= threshold ? scale : 0.0f;
    }
  });
}

}  // namespace fused_lora::cpu
