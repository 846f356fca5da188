// The kernels, and in the emulator (IVON_EMULATE) the loops over blocks and threads that stand for them.
#pragma once

#include "operations.h"

#if defined(IVON_EMULATE)
#include <functional>
#include <vector>

using cudaError_t = int;
using cudaStream_t = void*;
constexpr int cudaSuccess = 0;
#else
#include <cuda_runtime.h>
#endif

namespace ivon {
namespace IVON_ISA {

// Tells the host, or counts in silence, that the step was skipped; forgets what the checks found.
IVON_FN void conclude(const CallHeader& call, bool skip) {
  int64_t* control = call.control;
  control[kDone] = 0;
  if (!call.final) return;
  if (skip && call.report) {
    volatile int64_t* mailbox = call.mailbox;
    mailbox[1] = control[kBad];
#if defined(__CUDA_ARCH__)
    __threadfence_system();
#endif
    mailbox[0] = mailbox[0] + 1;
  } else if (skip) {
    control[kSkipped] += 1;
  }
  control[kBad] = kNothingBad;
}

#if !defined(IVON_EMULATE)

__device__ inline void note_bad(int64_t* bad, int64_t index) {
  if (*static_cast<volatile int64_t*>(bad) <= index) return;  // many threads may find the same: one atomic is enough
  atomicMin(reinterpret_cast<long long*>(bad), static_cast<long long>(index));
}

// Whether this block is the last of its launch to get here. All that the others wrote and read is then done.
__device__ inline bool arrive_last(int64_t* done, uint32_t blocks) {
  __threadfence();
  const unsigned long long before = atomicAdd(reinterpret_cast<unsigned long long*>(done), 1ull);
  __threadfence();
  return before == blocks - 1;
}

template <Operation kOperation, class Args>
__global__ void __launch_bounds__(kThreads, kResidentBlocks) kernel(const __grid_constant__ Args args) {
  __shared__ typename Args::Context context;
  __shared__ bool last;
  if (threadIdx.x == 0) prepare<kOperation>(args, blockIdx.x, context);
  __syncthreads();
  const bool found = work<kOperation>(args.call, context, threadIdx.x);
  if (kOperation == kCheck && found) note_bad(&args.call.control[kBad], context.tensor.index());
  if (kOperation != kStep) return;
  __syncthreads();
  if (threadIdx.x == 0) last = arrive_last(&args.call.control[kDone], gridDim.x);
  __syncthreads();
  if (!last) return;
  count_steps(args, context.skip, threadIdx.x);
  if (threadIdx.x == 0) conclude(args.call, context.skip);
}

__global__ void __launch_bounds__(kThreads)
    normals_kernel(float* out, int64_t numel, const __grid_constant__ KeyTable keys, uint32_t step,
                   uint64_t sample_replica, uint32_t param, int64_t start) {
  const int64_t first = start / 4;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t b = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; (first + b) * 4 < start + numel;
       b += stride) {
    Quad eps;
    normal_quad(first + b, keys, param, step, sample_replica, eps);
    IVON_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int64_t element = (first + b) * 4 + i - start;
      if (element >= 0 && element < numel) out[element] = eps.v[i];
    }
  }
}

inline cudaError_t launch_kernel(const void* kernel, uint32_t blocks, void** arguments, cudaStream_t stream) {
  const cudaError_t error = cudaLaunchKernel(kernel, dim3(blocks), dim3(kThreads), arguments, 0, stream);
  const cudaError_t last = cudaGetLastError();  // also clears it
  return error != cudaSuccess ? error : last;
}

template <Operation kOperation, class Args>
cudaError_t launch_operation(const Args& args, uint32_t blocks, cudaStream_t stream) {
  void* arguments[] = {const_cast<Args*>(&args)};
  return launch_kernel(reinterpret_cast<const void*>(kernel<kOperation, Args>), blocks, arguments, stream);
}

#else

// Stands for a graph: launches that come while it is on do not run but are kept, with their arguments by value.
struct Recorder {
  bool on = false;
  std::vector<std::function<void()> > launches;
};
inline Recorder recorder;

template <Operation kOperation, class Args>
void run_blocks(const Args& args, uint32_t blocks) {
  for (uint32_t block = 0; block < blocks; ++block) {
    typename Args::Context context{};
    prepare<kOperation>(args, block, context);
    for (uint32_t thread = 0; thread < kThreads; ++thread) {
      const bool found = work<kOperation>(args.call, context, thread);
      int64_t& bad = args.call.control[kBad];
      if (kOperation == kCheck && found && context.tensor.index() < bad) bad = context.tensor.index();
    }
    if (kOperation != kStep || ++args.call.control[kDone] != blocks) continue;
    for (uint32_t thread = 0; thread < kThreads; ++thread) count_steps(args, context.skip, thread);
    conclude(args.call, context.skip);
  }
}

template <Operation kOperation, class Args>
cudaError_t launch_operation(const Args& args, uint32_t blocks, cudaStream_t) {
  if (recorder.on) {
    recorder.launches.push_back([args, blocks] { run_blocks<kOperation>(args, blocks); });
  } else {
    run_blocks<kOperation>(args, blocks);
  }
  return cudaSuccess;
}

#endif

}  // namespace IVON_ISA
}  // namespace ivon
