// Threads for the CPU kernels: torch's own OpenMP pool, found at run time.
//
// A second OpenMP runtime beside torch's would fight it for the cores: its idle workers spin for milliseconds after each region. So nothing
// here links OpenMP. GOMP_parallel, the entry point that gcc's `#pragma omp parallel` calls, is looked up among the libraries already
// loaded (torch brings libgomp or libiomp5, both export it); where there is none, the work runs on the calling thread.
#pragma once

#include <dlfcn.h>

#include <atomic>

namespace fused_lora::cpu {

// Calls body(i) for i = 0 .. n - 1, each once, on up to n threads. body must not throw.
template <class Body> void parallel(int n, const Body& body) {
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  static const auto gomp_parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  if (n <= 1 || !gomp_parallel) {
    for (int i = 0; i < n; ++i) body(i);
    return;
  }
  struct Shared {
    const Body& body;
    int n;
    std::atomic<int> next{0};
  } shared{body, n};
  // The runtime may grant fewer threads than asked for; drawing indices keeps that correct.
  const auto work = [](void* data) {
    auto& s = *static_cast<Shared*>(data);
    for (int i = s.next++; i < s.n; i = s.next++) s.body(i);
  };
  gomp_parallel(work, &shared, static_cast<unsigned>(n), 0);
}

}  // namespace fused_lora::cpu
