// The compiled CUDA kernels on a device for the first time, smallest thing first, without torch or Python: each rung
// adds one piece to the rung before it, in a process of its own with a time limit, so that a hang or an illegal access
// ends one rung.
//
//   bringup [--seconds 20] [RUNG...]     all rungs, or those named; exit status 1 if one is wrong, 2 for an argument
//
// Inputs are 0 and +-1, most of them 0, so that every sum is an integer that bf16 and fp16 hold: results are compared
// bit by bit with plain loops. Outputs are NaN before a launch, and each kernel runs twice in the same memory. For a wrong
// matrix a map is printed, a character for 64 x 64 elements: . all right, 1-9 so many tenths wrong, # all.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "rungs.h"

namespace {

using namespace bringup;

struct Rung {
  const char* name;
  const char* what;
  std::function<void(Report&)> run;
};

// Both tile widths unless said, tails in every direction, several tiles a cluster.
template <class Check>
void each(Report& report, std::vector<int64_t> ranks, const Check& check, std::vector<int> widths = {256, 128}) {
  for (const Dtype dtype : {Dtype::bf16, Dtype::f16})
    for (const int block_n : widths)
      for (const int64_t R : ranks)
        for (const Sizes s : {Sizes{129, 136, 72, R}, {300, 520, 328, R}, {600, 264, 136, R}, {1096, 648, 200, R}})
          check(report, Case{s, dtype, block_n});
}

using C = const Case&;

const std::vector<Rung> kRungs = {
    {"base", "left right alone",
     [](Report& all) { each(all, {0}, [](Report& r, C c) { gemm_forward(r, c, false, false); }); }},
    {"low", "+ low thin: more k-blocks; low is given",
     [](Report& all) { each(all, {12, 16, 64, 100}, [](Report& r, C c) { gemm_forward(r, c, false, false); }); }},
    {"one-launch", "+ low out of the same launch: flags, tile counter",
     [](Report& all) { each(all, {8, 16, 32, 64}, [](Report& r, C c) { gemm_forward(r, c, true, false); }); }},
    {"dx", "the backward's operand layout, dh out of the launch",
     [](Report& all) { each(all, {16, 32, 64}, [](Report& r, C c) { gemm_backward(r, c, false, false, false); }); }},
    {"dB", "+ dB by the fourth warpgroup",
     [](Report& all) { each(all, {16, 32, 64}, [](Report& r, C c) { gemm_backward(r, c, true, false, false); }); }},
    {"dA", "+ dA: x through the ring",
     [](Report& all) { each(all, {16, 32, 64}, [](Report& r, C c) { gemm_backward(r, c, true, true, false); }); }},
    {"masks", "+ dropout's mask in the backward",
     [](Report& all) { each(all, {16, 32, 64}, [](Report& r, C c) { gemm_backward(r, c, true, true, true); }); }},
    {"dropped-low", "the forward with dropout in one launch",
     [](Report& all) { each(all, {16, 32, 64}, [](Report& r, C c) { gemm_forward(r, c, true, true); }); }},
    {"low-warps", "the forward with dropout, low by the loader's idle warps",
     [](Report& all) { each(all, {16, 32}, [](Report& r, C c) { gemm_forward(r, c, true, true, true); }, {256}); }},
    {"halves", "low by two columns of tiles, half of K each",
     [](Report& all) {
       each(all, {16, 64}, [](Report& r, C c) {
         for (const bool dropout : {false, true}) {
           gemm_forward(r, c, true, dropout, c.block_n == 256 && c.sizes.R == 16, true);
           gemm_backward(r, c, true, true, dropout, true);
         }
       });
     }},
    {"small", "few rows, K split over a cluster", small_forward},
    {"shrink", "low = left down in a launch of its own", shrink_alone},
    {"wgrad", "dB and dbias in a launch of their own", wgrad_alone},
    {"drivers", "a whole forward and backward, fp32 adapters", drivers},
};

// Runs a rung in a child; what it found, or that it hung or died.
bool climb(const Rung& rung, int seconds) {
  std::printf("%-12s %s\n", rung.name, rung.what);
  std::fflush(stdout);
  const auto start = std::chrono::steady_clock::now();
  const pid_t child = fork();  // before this process has touched the device
  if (child == 0) {
    Report report;
    rung.run(report);
    std::printf("             %d results right, %d wrong\n", report.right, report.wrong);
    std::fflush(stdout);
    _exit(report.wrong ? 1 : 0);
  }
  int status = 0;
  const auto elapsed = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };
  while (waitpid(child, &status, WNOHANG) == 0) {
    if (elapsed() > seconds) {
      kill(child, SIGKILL);
      waitpid(child, &status, 0);
      std::printf("             HANGS: killed after %d s\n", seconds);
      return false;
    }
    usleep(20000);
  }
  if (WIFSIGNALED(status)) std::printf("             DIED of signal %d\n", WTERMSIG(status));
  const bool right = WIFEXITED(status) && WEXITSTATUS(status) == 0;
  std::printf("             %s, %.1f s\n", right ? "ok" : "WRONG", elapsed());
  return right;
}

}  // namespace

int main(int count, char** arguments) {
  int seconds = 20;
  std::vector<const Rung*> chosen;
  for (int i = 1; i < count; ++i) {
    const std::string word = arguments[i];
    if (word == "--seconds" && i + 1 < count && std::atoi(arguments[i + 1]) > 0) {
      seconds = std::atoi(arguments[++i]);
      continue;
    }
    const Rung* found = nullptr;
    for (const Rung& rung : kRungs)
      if (word == rung.name) found = &rung;
    if (!found) {
      std::fprintf(stderr, "an argument must be --seconds and a number, or among");
      for (const Rung& rung : kRungs) std::fprintf(stderr, " %s", rung.name);
      std::fprintf(stderr, "; got %s\n", word.c_str());
      return 2;
    }
    chosen.push_back(found);
  }
  if (chosen.empty())
    for (const Rung& rung : kRungs) chosen.push_back(&rung);
  int wrong = 0;
  for (const Rung* rung : chosen) wrong += !climb(*rung, seconds);
  std::printf("%zu rungs, %d not right\n", chosen.size(), wrong);
  return wrong ? 1 : 0;
}
