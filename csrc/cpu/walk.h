// What the walks and the products share: scratch memory, the split over threads and row blocks, the slabs that
// gradients gather in.
//
// A walk is written once, for a Block: what one thread needs for a block of rows, and the products with it. BlockFp32
// multiplies in fp32 whatever the dtype is, BlockBf16 in bf16 on CPUs that can.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <memory_resource>
#include <new>
#include <thread>
#include <vector>

#include "cpu_features.h"
#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace fused_lora::cpu {

// Memory aligned to whole cache lines, none where the system has none left. From 2 MiB on in huge pages: a tile of
// 1 KiB is 16 lines, and waits for a page's address as for the lines. In a mapping of its own, for advice given to the
// heap would stay with whoever gets that piece of it next.
class Lines {
  static constexpr size_t kHuge = size_t{2} << 20;
  struct Free {
    size_t mapped;  // bytes, or 0 for memory of the heap
    void operator()(std::byte* p) const {
#ifdef MADV_HUGEPAGE
      if (mapped) {
        munmap(p, mapped);
        return;
      }
#endif
      std::free(p);
    }
  };

 public:
  static constexpr size_t kAlign = 64;

  Lines() : owner_(nullptr, Free{0}) {}
  explicit Lines(size_t bytes) : Lines() {
#ifdef MADV_HUGEPAGE
    if (bytes >= kHuge) {
      const size_t size = (bytes + kHuge - 1) / kHuge * kHuge, mapped = size + kHuge;  // room to align, never touched
      void* p = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (p == MAP_FAILED) return;
      owner_ = {static_cast<std::byte*>(p), Free{mapped}};
      data_ = owner_.get() + (kHuge - reinterpret_cast<uintptr_t>(p) % kHuge) % kHuge;
      size_ = size;
      madvise(data_, size_, MADV_HUGEPAGE);
      return;
    }
#endif
    const size_t size = (bytes + kAlign - 1) / kAlign * kAlign;
    owner_ = {static_cast<std::byte*>(std::aligned_alloc(kAlign, size)), Free{0}};
    data_ = owner_.get();
    size_ = data_ ? size : 0;
  }
  std::byte* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  std::unique_ptr<std::byte, Free> owner_;
  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

// The buffers of one call, from memory that stays with the calling thread: as much as its largest call took, up to
// most(), so that no call after it meets malloc or the first touch of a page.
class Buffers {
 public:
  Buffers() = default;
  Buffers(const Buffers&) = delete;
  ~Buffers() {
    if (taken_ > kept_.size() && taken_ <= most()) kept_ = Lines(taken_);
  }
  template <class T = float> T* take(int64_t n) {
    const size_t bytes = (static_cast<size_t>(n) * sizeof(T) + kAlign - 1) / kAlign * kAlign;
    taken_ += bytes;
    return static_cast<T*>(pool_.allocate(bytes, kAlign));
  }

 private:
  // 64 MiB, or 4 MiB for each processor: the tasks of one call have about 3 MiB each at 4096 columns.
  static size_t most() {
    static const size_t bytes = size_t{4 << 20} * std::max(16u, std::thread::hardware_concurrency());
    return bytes;
  }
  static constexpr size_t kAlign = Lines::kAlign;
  inline static thread_local Lines kept_;
  std::pmr::monotonic_buffer_resource pool_{kept_.data(), kept_.size()};
  size_t taken_ = 0;
};

// Whether x has a dtype that the kernels know, and the factors have it too or are fp32.
inline bool known_dtypes(Dtype x, Dtype adapter) {
  const bool known = x == Dtype::f32 || x == Dtype::f16 || x == Dtype::bf16;
  return known && (adapter == x || adapter == Dtype::f32);
}

// What is wrong with a call's numbers.
template <class Params> Status check(const Params& p) {
  if (!known_dtypes(p.dtype, p.adapter_dtype)) return Status::bad_dtype;
  const bool own_product =
      p.dtype == Dtype::f32 ? p.adapter_dtype == Dtype::f32 : p.dtype == Dtype::bf16 && features.bf16_dot;
  if (p.W && !own_product) return Status::bad_dtype;
  if constexpr (requires { p.dout_scale; })
    if ((p.out_scale && !own_product) || (p.add && p.dtype != Dtype::f32)) return Status::bad_dtype;
  return p.M < 0 || p.N < 1 || p.K < 1 || p.R < 1 ? Status::bad_shape : Status::ok;
}

inline int64_t item_size(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }
inline const char* at(const void* base, int64_t elements, Dtype dtype) {
  return static_cast<const char*>(base) + elements * item_size(dtype);
}
inline char* at(void* base, int64_t elements, Dtype dtype) {
  return static_cast<char*>(base) + elements * item_size(dtype);
}

struct Range {
  int64_t begin, end;
};

// Part i of n of [0, size), cut at multiples of `grain`.
INLINE Range part(int64_t size, int64_t grain, int64_t i, int64_t n) {
  const int64_t grains = (size + grain - 1) / grain;
  return {grains * i / n * grain, std::min(size, grains * (i + 1) / n * grain)};
}

// How many ranges of rows and of columns a product is cut into, a task each.
struct Split {
  int64_t by_rows, by_cols;
  int tasks() const { return static_cast<int>(by_rows * by_cols); }
  Range rows(int t, int64_t M, int64_t grain) const { return part(M, grain, t / by_cols, by_rows); }
  Range cols(int t, int64_t N, int64_t grain) const { return part(N, grain, t % by_cols, by_cols); }
};
// The split whose largest task is smallest, of so many strips of rows and panels of columns, a strip more for the
// packing of the panels, which every range of rows repeats; the one with more ranges of columns where two are level. So
// 24 threads take 32 panels as 3 x 8 and not as 1 x 16 tasks.
INLINE Split split_tasks(int64_t strips, int64_t panels, int64_t most_by_cols, int threads) {
  const auto largest = [](int64_t n, int64_t by) { return (n + by - 1) / by; };
  Split best{1, 1};
  int64_t least = (strips + 1) * panels;
  for (int64_t by_cols = std::min<int64_t>(threads, most_by_cols); by_cols >= 1; --by_cols) {
    const int64_t by_rows = std::clamp<int64_t>(strips, 1, threads / by_cols);
    const int64_t size = (largest(strips, by_rows) + 1) * largest(panels, by_cols);
    if (size < least) best = {by_rows, by_cols}, least = size;
  }
  return best;
}

// Threads worth waking (about 5 us) for so many multiplications.
inline int threads_worth(int64_t multiplications, int threads) {
  return static_cast<int>(std::min<int64_t>(threads, 1 + multiplications / (1 << 18)));
}

// The same for M rows of the low-rank products, at least one strip for each thread.
inline int threads_for(int64_t M, int64_t width, int64_t R, int threads) {
  return std::max(1, std::min(threads_worth(M * width * R, threads), static_cast<int>((M + kStrip - 1) / kStrip)));
}

// Rows of the largest block that a thread will see.
inline int64_t block_rows(int64_t M, int threads) {
  return std::min(kRows, round_up((M + threads - 1) / threads, kStrip));
}

// Calls first() and second(), side by side where there are threads.
template <class First, class Second> void both(int threads, const First& first, const Second& second) {
  if (threads > 1) return parallel(2, [&](int i) { i == 0 ? first() : second(); });
  first();
  second();
}

// Fills the two factors of a walk.
template <class Factor> void fill(int threads, const Factor& down, const Factor& thin) {
  both(down.needs_fill() && thin.needs_fill() ? threads : 1, [&] { down.fill(); }, [&] { thin.fill(); });
}

// Calls start(thread) once and then body(thread, first row, rows) with rows <= kRows for every block of the thread's
// run of strips.
template <class Start, class Body> void for_row_blocks(int64_t M, int threads, const Start& start, const Body& body) {
  const int64_t strips = (M + kStrip - 1) / kStrip;
  parallel(threads, [&](int t) {
    start(t);
    const int64_t begin = strips * t / threads * kStrip, end = std::min(M, strips * (t + 1) / threads * kStrip);
    for (int64_t m = begin; m < end; m += kRows) body(t, m, std::min(kRows, end - m));
  });
}

// What the threads add up for one output, a buffer each, zeroed by its thread; none where there is no output.
class Slabs {
 public:
  Slabs(bool wanted, int64_t n) : n_(wanted ? n : 0) {}
  void add(Buffers& buffers) {
    if (n_) slabs_.push_back(buffers.take(n_));
  }
  explicit operator bool() const { return n_; }
  float* operator[](int t) { return slabs_[static_cast<size_t>(t)]; }
  void clear(int t) {
    if (!slabs_.empty()) std::fill_n((*this)[t], n_, 0.0f);
  }
  // to[n] = factor * the sum in thread order of n elements from `begin`.
  void sum(int64_t begin, int64_t n, float factor, float* to) const {
    std::copy_n(slabs_[0] + begin, n, to);
    for (size_t t = 1; t < slabs_.size(); ++t)
      for (int64_t i = 0; i < n; ++i) to[i] += slabs_[t][begin + i];
    for (int64_t i = 0; i < n; ++i) to[i] *= factor;
  }
  // The sum in thread order, in thread 0's buffer.
  float* sum() {
    float* out = slabs_[0];
    for (size_t t = 1; t < slabs_.size(); ++t)
      for (int64_t i = 0; i < n_; ++i) out[i] += slabs_[t][i];
    return out;
  }

 private:
  int64_t n_;
  std::vector<float*> slabs_;
};

// dst[rows, cols] (contiguous, dtype) = slab[rows, cols (row stride ld)].
inline void store_slab(const float* slab, int64_t ld, void* dst, Dtype dtype, int64_t rows, int64_t cols) {
  if (ld == cols) return store_row(slab, dst, dtype, rows * cols);
  for (int64_t m = 0; m < rows; ++m) store_row(slab + m * ld, at(dst, m * cols, dtype), dtype, cols);
}

}  // namespace fused_lora::cpu
