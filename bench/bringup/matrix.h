// Matrices of small integers on the host and on the device, and their comparison.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/kernels.h"

namespace bringup {

using fused_lora::Dtype;
using fused_lora::Status;

struct Report {
  int right = 0, wrong = 0;
};

// A host matrix of integers.
struct Matrix {
  int64_t rows, cols;
  std::vector<float> values;

  Matrix(int64_t rows, int64_t cols) : rows(rows), cols(cols), values(static_cast<size_t>(rows * cols)) {}
  // 0 three times in four, else +-1; the same for the same seed.
  static Matrix random(int64_t rows, int64_t cols, uint32_t seed);
  float& at(int64_t r, int64_t c) { return values[static_cast<size_t>(r * cols + c)]; }
  float at(int64_t r, int64_t c) const { return values[static_cast<size_t>(r * cols + c)]; }
  Matrix transposed() const;
  // This times the other, in fp32: exact for integers.
  Matrix times(const Matrix& other) const;
  Matrix plus(const Matrix& other) const;
  // What dropout keeps, times its factor.
  Matrix dropped(int64_t seed, uint32_t threshold) const;
};

// A matrix on the device, in dtype or fp32, its rows `ld` elements apart.
class Device {
 public:
  // NaN in every element.
  Device(int64_t rows, int64_t cols, Dtype dtype, int64_t ld = 0);
  Device(const Matrix& m, Dtype dtype, int64_t ld = 0);
  Device(const Device&) = delete;
  ~Device();

  // All bits one: NaN in each dtype.
  void poison();
  void clear();
  Matrix read() const;
  void* get() const { return data_; }
  float* floats() const { return static_cast<float*>(data_); }
  int* ints() const { return static_cast<int*>(data_); }
  int64_t ld() const { return ld_; }

 private:
  size_t size() const { return dtype_ == Dtype::f32 ? 4 : 2; }
  int64_t rows_, cols_, ld_;
  Dtype dtype_;
  size_t bytes_;
  void* data_ = nullptr;
};

// Prints what failed and ends the process: what comes after a failed call means nothing.
void must(Status status, const char* what);
// The same for all that was launched.
void finish(const char* what);
int multiprocessors();

// One output against what it must be; a map of the wrong places.
void compare(Report& report, const std::string& title, const Matrix& got, const Matrix& want);

}  // namespace bringup
