// C ABI of the CUDA backend (loaded by ivon_kernels/backends/cuda.py through ctypes; no torch, no Python).
//
// One call runs one operation on a list of tensors whose state lies in one arena, in as few launches as the kernel
// arguments allow. Nothing is copied to the device: all that a launch needs to know travels in its arguments, so that a
// captured graph holds it too. Fields are 64 bits wide so that Python fills them by columns.
#pragma once

#include <cstdint>

#define IVON_CUDA_ABI 2

#if defined(__GNUC__)
#define IVON_EXPORT __attribute__((visibility("default")))
#else
#define IVON_EXPORT
#endif

extern "C" {

// What does not change between calls. State is float32, contiguous in the row-major order of the parameter's elements,
// at `offset` elements (a multiple of 16) in the arena, and padded to a multiple of 4 elements.
struct IvonCudaTensor {
  int64_t slot;  // its entry in the columns params, grads, grad_dtypes, layouts and summed of the call
  int64_t offset;
  int64_t numel;
  int64_t index;     // parameter index of the noise
  int64_t position;  // of its step count in `steps`
  int64_t row;       // of the table of GroupRow (../rows.h)
  int64_t param_dtype;
  int64_t start;  // element i has the noise of index start + (i / run) * pitch + i % run
  int64_t run;    // at least 1; at least numel if all elements are neighbours
  int64_t pitch;
};

// Addresses are the device's, except where a host's are meant.
struct IvonCudaCall {
  // What changes with every call. Python writes it in one go.
  void* stream;
  uint64_t seed;
  int64_t step_override;  // >= 0: draw with this step in place of each tensor's own
  int64_t sample;
  int64_t replica;
  int64_t adopt;      // the weights hold the mean: take over what was edited from outside
  int64_t draw_next;  // step: leave sample 0 of the next step in the weights instead of the mean
  int64_t final;      // step: the last call of this step on this device
  int64_t report;     // step: tell the host of a skipped step
  const float* found_inf;
  const float* grad_scale;
  const void* rows;  // host: rows of GroupRow
  // What changes seldom.
  const int64_t* params;       // host: by slot
  const int64_t* grads;        // host: by slot; 0: none
  const int64_t* grad_dtypes;  // host: by slot
  const int64_t* layouts;      // host: by slot, device addresses of IvonLayout (../cpu/ivon_cpu.h); 0: both contiguous
  const uint8_t* summed;       // host: by slot, whether the sums are in use; null: they are not
  float* grad_sum;
  float* second_sum;
  float* mean;
  float* momentum;
  float* hess;
  int64_t* steps;
  int64_t* control;  // see ivon_kernels/backends/device.py
  int64_t* mailbox;  // host memory that the device writes to
  const IvonCudaTensor* tensors;
  int64_t count;
  int64_t device;  // becomes the current one of this library, and stays that
};

IVON_EXPORT int ivon_cuda_abi(void);
// Whether this library was compiled without CUDA, to run on tensors of the CPU: for tests.
IVON_EXPORT int ivon_cuda_emulated(void);
// The CUDA version of the library and the newest that the driver has, as 1000 * major + 10 * minor; 0: no driver.
IVON_EXPORT void ivon_cuda_versions(int64_t* library, int64_t* driver);
// Loads the kernels onto a device, so that the first launch may come in a stream capture.
IVON_EXPORT int ivon_cuda_load(int64_t device);
IVON_EXPORT const char* ivon_cuda_error_string(int code);

// All return 0 or a cudaError_t. None of them waits for the device.
IVON_EXPORT int ivon_cuda_sample(const IvonCudaCall* call);
IVON_EXPORT int ivon_cuda_restore(const IvonCudaCall* call);
IVON_EXPORT int ivon_cuda_check(const IvonCudaCall* call);
IVON_EXPORT int ivon_cuda_accumulate(const IvonCudaCall* call);
IVON_EXPORT int ivon_cuda_step(const IvonCudaCall* call);
// Elements start .. start + numel of one noise stream, for tests.
IVON_EXPORT int ivon_cuda_normals(float* out, int64_t numel, uint64_t seed, int64_t step, int64_t sample,
                                  int64_t replica, int64_t param, int64_t start, int64_t device, void* stream);

// For tests and benchmarks, in the whole process. Limits of one launch; 0 gives back the device's own.
IVON_EXPORT void ivon_cuda_set_limits(int64_t tensors, int64_t rows, int64_t blocks);
// 1: pack the arguments, count the launches, launch nothing.
IVON_EXPORT void ivon_cuda_set_stub(int on);
IVON_EXPORT int64_t ivon_cuda_launches(void);
#if defined(IVON_EMULATE)
// A captured graph, without a GPU. 1: keep the launches that follow, run none of them; 0: run launches again.
IVON_EXPORT void ivon_cuda_record(int on);
// Runs the kept launches.
IVON_EXPORT void ivon_cuda_replay(void);
#endif

}  // extern "C"
