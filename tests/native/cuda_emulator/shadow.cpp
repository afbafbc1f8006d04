// The emulated GPU's shadow of ordinary stores: which words the asynchronous proxy (TMA, wgmma) may not see yet, because
// no fence.proxy.async of the storing thread has followed.
//
// The kernels are compiled with the stores instrumented as for the kernel address sanitizer (emulated_cuda.py), whose
// functions these are. A word is 4 bytes.
#include <algorithm>
#include <cstring>
#include <unordered_map>
#include <utility>

#include "device.h"

namespace emulator {
namespace {

constexpr size_t kStackBytes = 64 * 1024;
std::unordered_map<uintptr_t, const Thread*> global;   // words of global memory, by address / 4
std::vector<std::pair<uintptr_t, uintptr_t>> watched;  // first and past the last word of what a launch has maps of

}  // namespace

void stored(Thread& by, const void* at, size_t bytes) {
  const auto* const p = static_cast<const uint8_t*>(at);
  if (p >= by.stack && p < by.stack + kStackBytes) return;
  const ptrdiff_t offset = p - by.block->smem;
  const auto writer = static_cast<uint16_t>(by.index + 1);
  if (offset >= 0 && offset < by.block->smem_bytes) {
    for (auto word = static_cast<uint32_t>(offset / 4); word <= (offset + bytes - 1) / 4; ++word)
      if (by.block->writers[word] != writer) {
        by.block->writers[word] = writer;
        by.stored_shared.push_back(word);
      }
    return;
  }
  const auto address = reinterpret_cast<uintptr_t>(p);
  for (const auto& [first, end] : watched)
    for (uintptr_t word = std::max(address / 4, first); word < std::min((address + bytes + 3) / 4, end); ++word) {
      global[word] = &by;
      by.stored_global.push_back(word);
    }
}

void fence_shared(Thread& by) {
  for (const uint32_t word : by.stored_shared)
    if (by.block->writers[word] == by.index + 1) by.block->writers[word] = 0;
  by.stored_shared.clear();
}

void fence_global(Thread& by) {
  for (const uintptr_t word : by.stored_global) {
    const auto found = global.find(word);
    if (found != global.end() && found->second == &by) global.erase(found);
  }
  by.stored_global.clear();
  by.saw_flag = false;
}

void asynchronous_shared(const Block& block, uint32_t offset, int64_t bytes, const char* what) {
  for (uint32_t word = offset / 4; word <= (offset + bytes - 1) / 4; ++word)
    if (block.writers[word])
      fail("%s at %u of shared memory, where thread %d has stored without fence.proxy.async", what, word * 4,
           block.writers[word] - 1);
}

void asynchronous_global(const void* at, int64_t bytes, const char* what) {
  const auto address = reinterpret_cast<uintptr_t>(at);
  for (uintptr_t word = address / 4; !global.empty() && word < (address + bytes + 3) / 4; ++word)
    if (global.count(word)) fail("%s of global memory that was stored without fence.proxy.async", what);
}

void forget_global() {
  global.clear();
  watched.clear();
}

void watch(const CUtensorMap& map) {
  int64_t fields[4];  // data, rows, columns, row stride in elements, as encode() writes them
  std::memcpy(fields, &map, sizeof fields);
  const auto first = static_cast<uintptr_t>(fields[0]) / 4;
  const std::pair<uintptr_t, uintptr_t> words{first, first + (((fields[1] - 1) * fields[3] + fields[2]) * 2 + 3) / 4};
  if (std::find(watched.begin(), watched.end(), words) == watched.end()) watched.push_back(words);
}

}  // namespace emulator

extern "C" {
void __asan_storeN_noabort(void* at, size_t bytes) {
  if (emulator::running()) emulator::stored(emulator::self(), at, bytes);
}
void __asan_store1_noabort(void* at) { __asan_storeN_noabort(at, 1); }
void __asan_store2_noabort(void* at) { __asan_storeN_noabort(at, 2); }
void __asan_store4_noabort(void* at) { __asan_storeN_noabort(at, 4); }
void __asan_store8_noabort(void* at) { __asan_storeN_noabort(at, 8); }
void __asan_store16_noabort(void* at) { __asan_storeN_noabort(at, 16); }
void __asan_handle_no_return() {}
}
