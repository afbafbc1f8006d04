// Matrices of small integers on the host and on the device, and their comparison.
#include "matrix.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "philox.h"

namespace bringup {

using namespace fused_lora;

namespace {

// Ends the process: what comes after a failed call means nothing.
void must(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("             %s: %s, %s\n", what, cudaGetErrorName(error), cudaGetErrorString(error));
  std::fflush(stdout);
  std::_Exit(1);
}

uint16_t encode(float value, Dtype dtype) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (dtype == Dtype::bf16) return static_cast<uint16_t>(bits >> 16);
  const uint32_t exponent = bits >> 23 & 0xff;
  return static_cast<uint16_t>(bits >> 16 & 0x8000) |
         static_cast<uint16_t>(exponent ? (exponent - 112) << 10 | (bits >> 13 & 0x3ff) : 0);
}
float decode(uint16_t half, Dtype dtype) {
  uint32_t bits = uint32_t{half} << 16;
  if (dtype == Dtype::f16) {
    const uint32_t exponent = half >> 10 & 0x1f, fraction = half & 0x3ff;
    if (exponent == 0) return (half & 0x8000 ? -1.0f : 1.0f) * std::ldexp(static_cast<float>(fraction), -24);
    bits = (half & 0x8000u) << 16 | (exponent == 31 ? 0xffu : exponent + 112) << 23 | fraction << 13;
  }
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

}  // namespace

void must(Status status, const char* what) {
  if (status == Status::ok) return;
  std::printf("             %s: %s (%s)\n", what, message(status), cuda_failure());
  std::fflush(stdout);
  std::_Exit(1);
}

void finish(const char* what) { must(cudaDeviceSynchronize(), what); }

int multiprocessors() {
  int sms = 0;
  must(use_device(0, &sms), "use_device");
  return sms;
}

Matrix Matrix::random(int64_t rows, int64_t cols, uint32_t seed) {
  Matrix m(rows, cols);
  uint64_t state = seed * 0x9E3779B97F4A7C15u + 1;
  for (float& value : m.values) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const uint64_t draw = state >> 60;
    value = draw < 2 ? 1.0f : draw < 4 ? -1.0f : 0.0f;
  }
  return m;
}

Matrix Matrix::transposed() const {
  Matrix m(cols, rows);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) m.at(c, r) = at(r, c);
  return m;
}

Matrix Matrix::times(const Matrix& other) const {
  Matrix m(rows, other.cols);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < cols; ++k)
      if (const float left = at(r, k); left != 0.0f)
        for (int64_t c = 0; c < other.cols; ++c) m.at(r, c) += left * other.at(k, c);
  return m;
}

Matrix Matrix::plus(const Matrix& other) const {
  Matrix m = *this;
  for (size_t i = 0; i < values.size(); ++i) m.values[i] += other.values[i];
  return m;
}

Matrix Matrix::dropped(int64_t seed, uint32_t threshold) const {
  Matrix m = *this;
  const float factor = Dropout{nullptr, threshold}.scale();
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; c += 8) {
      const Philox draws(static_cast<uint64_t>(seed), static_cast<uint32_t>(r), static_cast<uint32_t>(c / 8));
      for (int64_t j = c; j < std::min(c + 8, cols); ++j)
        m.at(r, j) *= draws.draw(static_cast<int>(j - c)) >= threshold ? factor : 0.0f;
    }
  return m;
}

Device::Device(int64_t rows, int64_t cols, Dtype dtype, int64_t ld)
    : rows_(rows),
      cols_(cols),
      ld_(ld ? ld : cols),
      dtype_(dtype),
      bytes_(static_cast<size_t>(rows * ld_) * size()) {
  must(cudaMalloc(&data_, bytes_ ? bytes_ : 16), "cudaMalloc");
  poison();
}

Device::Device(const Matrix& m, Dtype dtype, int64_t ld) : Device(m.rows, m.cols, dtype, ld) {
  std::vector<uint8_t> host(bytes_, 0);
  for (int64_t r = 0; r < rows_; ++r)
    for (int64_t c = 0; c < cols_; ++c) {
      const float value = m.at(r, c);
      uint8_t* const to = host.data() + static_cast<size_t>(r * ld_ + c) * size();
      const uint16_t half = dtype == Dtype::f32 ? uint16_t{0} : encode(value, dtype);
      if (dtype == Dtype::f32) std::memcpy(to, &value, 4);
      else std::memcpy(to, &half, 2);
    }
  must(cudaMemcpy(data_, host.data(), bytes_, cudaMemcpyHostToDevice), "cudaMemcpy");
}
Device::~Device() { cudaFree(data_); }

void Device::poison() { must(cudaMemset(data_, 0xff, bytes_), "cudaMemset"); }
void Device::clear() { must(cudaMemset(data_, 0, bytes_), "cudaMemset"); }
Matrix Device::read() const {
  std::vector<uint8_t> host(bytes_);
  must(cudaMemcpy(host.data(), data_, bytes_, cudaMemcpyDeviceToHost), "cudaMemcpy");
  Matrix m(rows_, cols_);
  for (int64_t r = 0; r < rows_; ++r)
    for (int64_t c = 0; c < cols_; ++c) {
      const uint8_t* const from = host.data() + static_cast<size_t>(r * ld_ + c) * size();
      uint16_t half;
      std::memcpy(&half, from, 2);
      if (dtype_ == Dtype::f32) std::memcpy(&m.at(r, c), from, 4);
      else m.at(r, c) = decode(half, dtype_);
    }
  return m;
}

// One output against what it must be; a map of the wrong places.
void compare(Report& report, const std::string& title, const Matrix& got, const Matrix& want) {
  int64_t wrong = 0;
  for (size_t i = 0; i < want.values.size(); ++i) wrong += !(got.values[i] == want.values[i]);
  if (!wrong) {
    ++report.right;
    return;
  }
  ++report.wrong;
  if (report.wrong > 4) return;  // the pattern is seen by then
  std::printf("             %s: %lld of %zu elements wrong\n", title.c_str(), static_cast<long long>(wrong),
              want.values.size());
  for (int64_t row = 0; row < want.rows && row < 64 * 24; row += 64) {
    std::string line;
    for (int64_t col = 0; col < want.cols && col < 64 * 96; col += 64) {
      int64_t bad = 0, all = 0;
      for (int64_t r = row; r < std::min(row + 64, want.rows); ++r)
        for (int64_t c = col; c < std::min(col + 64, want.cols); ++c, ++all) bad += !(got.at(r, c) == want.at(r, c));
      line += bad == 0 ? '.' : bad == all ? '#' : static_cast<char>('0' + std::max<int64_t>(1, 10 * bad / all));
    }
    std::printf("             %s\n", line.c_str());
  }
  for (size_t i = 0, shown = 0; i < want.values.size() && shown < 4; ++i)
    if (!(got.values[i] == want.values[i]))
      std::printf("             [%zu, %zu] is %g, must be %g\n", i / static_cast<size_t>(want.cols),
                  i % static_cast<size_t>(want.cols), got.values[i], want.values[i]),
          ++shown;
}

}  // namespace bringup
