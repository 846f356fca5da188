// C ABI of the CPU backend (loaded by ivon_kernels/backends/cpu.py through ctypes; no torch, no Python).
//
// One call walks a list of tensors. All fields of the tensor table are 64 bits wide so that Python fills it by columns.
#pragma once

#include <cstdint>

#define IVON_CPU_ABI 4
#define IVON_CPU_MAX_DIMS 25

#if defined(__GNUC__)
#define IVON_EXPORT __attribute__((visibility("default")))
#else
#define IVON_EXPORT
#endif

extern "C" {

enum IvonDtype { IVON_FLOAT32 = 0, IVON_BFLOAT16 = 1, IVON_FLOAT16 = 2 };

// Strides of one tensor pair, in elements, when parameter or gradient is not contiguous in row-major order.
struct IvonLayout {
  int64_t dims;
  int64_t sizes[IVON_CPU_MAX_DIMS];
  int64_t param_strides[IVON_CPU_MAX_DIMS];
  int64_t grad_strides[IVON_CPU_MAX_DIMS];
};

// Which sample a tensor's kept noise is.
struct IvonNoiseTag {
  int64_t seed, step, sample, replica;
};

// State tensors are float32, contiguous, in the row-major order of the parameter's elements. The second part is filled
// in by every call, from the columns of IvonCall.
struct IvonTensor {
  float* mean;
  float* momentum;
  float* hess;
  float* grad_sum;    // sums over finished MC samples, or null
  float* second_sum;  // likewise: g * eps (price) or g * g (gradsq)
  float* noise;       // the last training sample's normals, kept so that the step need not draw them again, or null
  IvonNoiseTag* noise_tag;  // what `noise` holds; anything else is drawn again
  int64_t* step_count;      // finished updates; ivon_cpu_step adds one
  int64_t numel;
  int64_t index;  // parameter index of the noise
  int64_t row;    // the parameter group's row
  int64_t param_dtype;
  int64_t start;  // element i has the noise of index start + (i / run) * pitch + i % run
  int64_t run;    // at least 1; at least numel if all elements are neighbours
  int64_t pitch;

  void* param;
  const void* grad;
  const IvonLayout* layout;  // null: both contiguous
  int64_t grad_dtype;
  int64_t step;     // *step_count
  int64_t scalars;  // row of the resolved scalars
};

struct IvonCall {
  IvonTensor* tensors;
  int64_t count;
  const int64_t* params;  // columns: addresses of the parameters, ...
  const int64_t* grads;   // ... of their gradients (0: none), the gradients' dtypes, and layouts
  const int64_t* grad_dtypes;
  const int64_t* layouts;
  const void* rows;  // GroupRow (rows.h) of every parameter group
  uint64_t seed;
  int64_t step_override;  // >= 0: draw with this step in place of each tensor's own
  int64_t sample;
  int64_t replica;
  int64_t adopt;      // the weights hold the mean: take over what was edited from outside
  int64_t draw_next;  // ivon_cpu_step: leave sample 0 of the next step in the weights instead of the mean
  int64_t threads;
  const void* scalars;  // filled in: StepScalars of every distinct (row, step)
};

// The posterior of one LoRA matrix; both arrays are contiguous in row-major order.
struct IvonFactor {
  const float* mean;
  const float* inv_sigma;  // 1 / sigma; inf: no noise
  int64_t index;           // parameter index of the noise
  int64_t dtype;           // each sampled weight is rounded to it
};

// Several samples of one LoRA layer. x is [samples * tokens, in_features] and out [samples * tokens, out_features],
// both row-major contiguous with all tokens of a sample together; a is [rank, in_features], b is [out_features, rank].
struct IvonLora {
  void* out;
  const void* x;
  int64_t out_dtype;
  int64_t x_dtype;
  IvonFactor a;
  IvonFactor b;
  int64_t in_features;
  int64_t out_features;
  int64_t rank;
  int64_t tokens;          // of each sample
  const int64_t* samples;  // their numbers
  int64_t sample_count;
  uint64_t seed;
  int64_t step;
  double scaling;
  int64_t threads;
};

IVON_EXPORT int ivon_cpu_abi(void);
// The level in use: "avx512", "avx2", "baseline" or "neon".
IVON_EXPORT const char* ivon_cpu_simd(void);
// Use another level; 0 on success, -1 when it was not built or the processor lacks it.
IVON_EXPORT int ivon_cpu_set_simd(const char* level);
IVON_EXPORT int ivon_cpu_has_openmp(void);

IVON_EXPORT void ivon_cpu_normals(float* out, int64_t numel, uint64_t seed, int64_t step, int64_t sample,
                                  int64_t replica, int64_t param, int64_t start, int64_t threads);

// Weights <- mean + sigma eps.
IVON_EXPORT void ivon_cpu_sample(IvonCall* call);
// Weights <- mean.
IVON_EXPORT void ivon_cpu_restore(IvonCall* call);
// Adds the finished sample's gradient to grad_sum and second_sum.
IVON_EXPORT void ivon_cpu_accumulate(IvonCall* call);
// Smallest row whose gradient holds inf or nan, or -1.
IVON_EXPORT int64_t ivon_cpu_find_nonfinite(IvonCall* call);
// The update; weights <- new mean, or the next sample with draw_next.
IVON_EXPORT void ivon_cpu_step(IvonCall* call);

// out[s] += scaling (x[s] A_s^T) B_s^T, with the weights of each sample drawn on the way.
IVON_EXPORT void ivon_cpu_lora(const IvonLora* call);

}  // extern "C"
