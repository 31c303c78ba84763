// Runs CUDA kernels of csrc/cuda on the host, one thread after the other: the part of the CUDA runtime that they use.
// Every lane of a warp is a fiber; a shuffle writes the lane's value and lets the other lanes run up to theirs. With
// this header and those beside it in place of the toolkit's, a .cu file is C++.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

using cudaStream_t = void*;
enum cudaError_t : int { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream = nullptr;
};

struct alignas(16) [[gnu::may_alias]] uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) [[gnu::may_alias]] float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline thread_local dim3 blockIdx, threadIdx;

namespace cuda_on_host {

constexpr int WARP = 32;
constexpr size_t STACK = 1 << 16;

struct Warp {
  ucontext_t fibers[WARP];
  jmp_buf scheduler, lanes[WARP];
  bool started[WARP] = {}, finished[WARP];
  int lane;
  float slots[2][WARP];  // a lane may reach its next shuffle before the last one has read this one's values
  int shuffles[WARP];
  void (*body)(void*);
  void* context;
  std::unique_ptr<char[]> stacks{new char[WARP * STACK]};
};

inline thread_local Warp warp;

// Back to the scheduler, until it resumes this lane. Jumps, unlike swapcontext, ask nothing of the operating system.
[[gnu::noinline]] inline void suspend() {
  if (_setjmp(warp.lanes[warp.lane]) == 0) _longjmp(warp.scheduler, 1);
}

// A fiber serves its lane in one warp after the other.
inline void run_lane() {
  for (;;) {
    warp.body(warp.context);
    warp.finished[warp.lane] = true;
    suspend();
  }
}

[[gnu::noinline]] inline void resume(int lane) {
  Warp& w = warp;
  w.lane = lane;
  if (_setjmp(w.scheduler) != 0) return;
  if (w.started[lane]) _longjmp(w.lanes[lane], 1);
  w.started[lane] = true;
  getcontext(&w.fibers[lane]);
  w.fibers[lane].uc_stack.ss_sp = w.stacks.get() + lane * STACK;
  w.fibers[lane].uc_stack.ss_size = STACK;
  w.fibers[lane].uc_link = nullptr;
  makecontext(&w.fibers[lane], run_lane, 0);
  setcontext(&w.fibers[lane]);
}

inline void run_warp(unsigned first_thread) {
  Warp& w = warp;
  for (int lane = 0; lane < WARP; ++lane) w.finished[lane] = false, w.shuffles[lane] = 0;
  for (bool running = true; running;) {
    running = false;
    int shuffles = -1;
    for (int lane = 0; lane < WARP; ++lane) {
      if (w.finished[lane]) continue;
      threadIdx.x = first_thread + lane;
      resume(lane);
      if (w.finished[lane]) continue;
      running = true;
      // All lanes of a full mask must meet in the same shuffle.
      if (shuffles >= 0 && shuffles != w.shuffles[lane]) std::abort();
      shuffles = w.shuffles[lane];
    }
    for (int lane = 0; running && lane < WARP; ++lane)
      if (w.finished[lane]) std::abort();
  }
}

}  // namespace cuda_on_host

inline float __shfl_xor_sync(unsigned mask, float value, int apart) {
  using namespace cuda_on_host;
  Warp& w = warp;
  if (mask != 0xffffffffu) std::abort();
  const int lane = w.lane, turn = w.shuffles[lane]++ % 2;
  w.slots[turn][lane] = value;
  suspend();
  return w.slots[turn][lane ^ apart];
}

template <class... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Parameters... arguments) {
  auto body = [&] { kernel(arguments...); };
  using Body = decltype(body);
  cuda_on_host::warp.body = [](void* context) { (*static_cast<Body*>(context))(); };
  cuda_on_host::warp.context = &body;
  for (blockIdx.y = 0; blockIdx.y < config->gridDim.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < config->gridDim.x; ++blockIdx.x)
      for (unsigned thread = 0; thread < config->blockDim.x; thread += cuda_on_host::WARP)
        cuda_on_host::run_warp(thread);
  return cudaSuccess;
}
