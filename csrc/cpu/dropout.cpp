// dropout: the LoRA dropout mask of one panel or of whole rows.
//
//   dropout_mask   mask[rows, kPanel]: Dropout::scale() or 0 for each element
//   dropout_bits   bits[rows, words]: a bit for each element that is kept, 32 columns a word
//
// Used for drop(x) in the forward and in dA, and for dx. Drawn anew each time from (seed, row, column) as in philox.h.
// The draws of a row's groups are independent, so the compiler runs 4 to 16 Philox calls side by side.
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
    uint32_t words[4][kPanel / 8];
    for (int64_t m = 0; m < rows; ++m) {
      const uint32_t row = static_cast<uint32_t>(row0 + m);
      for (uint32_t g = 0; g < groups; ++g) {
        const Philox philox(seed, row, group0 + g);
        for (int j = 0; j < 4; ++j) words[j][g] = philox.w[j];
      }
      float* out = mask + m * kPanel;
      for (uint32_t g = 0; g < groups; ++g)
        for (int j = 0; j < 8; ++j)
          out[8 * g + j] = (words[j / 2][g] >> (16 * (j % 2)) & 0xffffu) >= threshold ? scale : 0.0f;
    }
  });
}

void dropout_bits(const Dropout& dropout, uint32_t* bits, int64_t row0, int64_t rows, int64_t cols) {
  widest([=]() INLINED {
    const uint64_t seed = static_cast<uint64_t>(*dropout.seed);
    const uint32_t threshold = dropout.threshold;
    const int64_t words = (cols + 31) / 32;
    auto* bytes = reinterpret_cast<uint8_t*>(bits);
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t g = 0; g < 4 * words; ++g) {
        const Philox philox(seed, static_cast<uint32_t>(row0 + m), static_cast<uint32_t>(g));
        uint32_t byte = 0;
        for (int j = 0; j < 8; ++j) byte |= static_cast<uint32_t>(philox.draw(j) >= threshold) << j;
        bytes[m * 4 * words + g] = static_cast<uint8_t>(byte);
      }
  });
}

}  // namespace fused_lora::cpu
