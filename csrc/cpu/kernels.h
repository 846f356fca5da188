// What each SIMD level provides: the operations on one chunk of one tensor, and LoRA's products for one share of
// tokens.
#pragma once

#include "ivon_cpu.h"

namespace ivon {

// Small enough that a chunk's five streams stay in the L1 cache, large enough to hide the bookkeeping.
constexpr int64_t kChunk = 256;

// Whether the call's samples are kept: those of training, where there is room.
inline bool keeps_noise(const IvonTensor& t, const IvonCall& call) {
  return t.noise != nullptr && call.step_override < 0;
}

inline IvonNoiseTag noise_tag(const IvonCall& call, int64_t step, int64_t sample) {
  return {static_cast<int64_t>(call.seed), step, sample, call.replica};
}

// Whether the kept noise is that of the call's sample.
inline bool holds_noise(const IvonTensor& t, const IvonCall& call) {
  if (!keeps_noise(t, call)) return false;
  const IvonNoiseTag wanted = noise_tag(call, t.step, call.sample);
  return __builtin_memcmp(t.noise_tag, &wanted, sizeof wanted) == 0;
}

struct LoraScratch;  // lora.h

struct Kernels {
  const char* name;
  void (*normals)(float* out, int64_t numel, const IvonCall& call, int64_t step, int64_t param, int64_t start);
  void (*sample)(const IvonTensor& tensor, const IvonCall& call, int64_t begin, int64_t n);
  void (*restore)(const IvonTensor& tensor, int64_t begin, int64_t n);
  void (*accumulate)(const IvonTensor& tensor, const IvonCall& call, int64_t begin, int64_t n);
  bool (*nonfinite)(const IvonTensor& tensor, int64_t begin, int64_t n);
  void (*step)(const IvonTensor& tensor, const IvonCall& call, int64_t begin, int64_t n);
  void (*lora)(const IvonLora& call, int64_t position, int64_t begin, int64_t n, const LoraScratch& scratch);
};

namespace avx512 {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace baseline {
extern const Kernels kKernels;
}
namespace neon {
extern const Kernels kKernels;
}

}  // namespace ivon
