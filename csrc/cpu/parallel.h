// Threads for the CPU kernels: torch's own OpenMP pool, found at run time.
//
// A second OpenMP runtime beside torch's would fight it for the cores: its idle workers spin for milliseconds after
// each region. So nothing here links OpenMP. GOMP_parallel, the entry point that gcc's `#pragma omp parallel` calls, is
// looked up among the libraries already loaded (torch brings libgomp or libiomp5, both export it); where there is none,
// the work runs on the calling thread.
#pragma once

#include <dlfcn.h>

namespace fused_lora::cpu {

// Calls body(i) for i = 0 .. n - 1, each once, on up to n threads. body must not throw.
//
// Thread t takes i = t: the one whose GEMM has just written (about) the same rows of y and so has them in its cache.
// Indices drawn at random cost the update a quarter more time (512 x 1024 x 1024 on 2 cores, EPYC 9005, 2026-11-24).
template <class Body> void parallel(int n, const Body& body) {
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  using Number = int (*)();
  static const auto gomp_parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  static const auto thread_num = reinterpret_cast<Number>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
  static const auto num_threads = reinterpret_cast<Number>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
  if (n <= 1 || !gomp_parallel || !thread_num || !num_threads) {
    for (int i = 0; i < n; ++i) body(i);
    return;
  }
  struct Shared {
    const Body& body;
    int n;
  } shared{body, n};
  const auto work = [](void* data) {  // the runtime may grant fewer threads than asked for
    const auto& s = *static_cast<const Shared*>(data);
    for (int i = thread_num(); i < s.n; i += num_threads()) s.body(i);
  };
  gomp_parallel(work, &shared, static_cast<unsigned>(n), 0);
}

}  // namespace fused_lora::cpu
