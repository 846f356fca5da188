// The chunk operations. Compiled once per SIMD level with IVON_ISA and IVON_VEC_BYTES set; results do not depend on it.
#include "kernels.h"

#include <initializer_list>

#include "lora.h"
#include "normals.h"
#include "simd.h"
#include "staging.h"

namespace ivon {
namespace IVON_ISA {
namespace {

NoiseStream make_stream(uint64_t seed, int64_t step, int64_t sample, int64_t replica, int64_t param) {
  return {{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
          static_cast<uint32_t>(param),
          static_cast<uint32_t>(step),
          noise_of(sample, replica)};
}

NoiseStream make_stream(const IvonCall& call, int64_t step, int64_t param) {
  return make_stream(call.seed, call.step_override >= 0 ? call.step_override : step, call.sample, call.replica, param);
}

// A shard's elements begin .. begin + n, where start, run and pitch are multiples of 4: the four normals of a block
// stay together, and the lanes of a group take whatever blocks come next.
void aligned_shard_normals(float* out, int64_t n, const NoiseStream& s, const IvonTensor& t, int64_t begin,
                           const Streams& streams) {
  const VectorKeys keys(s.seed);
  const int64_t run = t.run / 4, step_over = (t.pitch - t.run) / 4 + 1;
  uint64_t block = static_cast<uint64_t>(t.start + begin / t.run * t.pitch + begin % t.run) / 4;
  int64_t left = run - begin % t.run / 4;  // blocks until the next gap
  alignas(64) uint64_t blocks[kChunk / 4];
  for (int64_t first = 0; first < (n + 3) / 4; first += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const int64_t lane = i % (kLanes / 4) * 4 + i / (kLanes / 4);  // see block_offsets
      blocks[first + lane % 2 * (kLanes / 2) + lane / 2] = block;
      const bool last = --left == 0;
      block += last ? step_over : 1, left = last ? run : left;
    }
  }
  const int64_t groups = n / kGroup;
  for (int64_t i = 0; i < groups; ++i) {
    streams.prefetch_group(i);
    word_group(out + i * kGroup, s, keys, blocks + i * kLanes);
  }
  for (int64_t i = 0; i < groups; ++i) normal_group(out + i * kGroup);
  if (n % kGroup == 0) return;
  alignas(64) float group[kGroup];
  word_group(group, s, keys, blocks + groups * kLanes);
  normal_group(group);
  __builtin_memcpy(out + groups * kGroup, group, static_cast<size_t>(n % kGroup) * sizeof(float));
}

// The normals of elements begin .. begin + n of a tensor, whole or a shard.
void tensor_normals(float* out, int64_t n, const NoiseStream& s, const IvonTensor& t, int64_t begin,
                    const Streams& streams = {}) {
  if (t.run >= t.numel) return normals(out, n, s, t.start + begin, streams);
  if ((t.start | t.run | t.pitch) % 4 == 0) return aligned_shard_normals(out, n, s, t, begin, streams);
  int64_t in_run = begin % t.run, index = t.start + begin / t.run * t.pitch + in_run;
  while (n > 0) {
    const int64_t rest = t.run - in_run < n ? t.run - in_run : n;
    if (rest >= kGroup) {
      normals(out, rest, s, index);
    } else {
      for (int64_t i = 0; i < rest;) {
        float four[4];
        normal_block(four, s, static_cast<uint64_t>(index + i) / 4);
        for (int64_t j = (index + i) % 4; j < 4 && i < rest; ++i, ++j) out[i] = four[j];
      }
    }
    out += rest, n -= rest, index += rest + t.pitch - t.run, in_run = 0;
  }
}

void normals_entry(float* out, int64_t n, const IvonCall& call, int64_t step, int64_t param, int64_t start) {
  normals(out, n, make_stream(call, step, param), start);
}

template <int64_t kDtype>
void adopt_edits(const float* weights, float* mean, int64_t n) {
  int32_t edited = 0;
  for (int64_t i = 0; i < n; ++i) edited |= weights[i] != round_trip(mean[i], kDtype);
  if (edited == 0) return;
  for (int64_t i = 0; i < n; ++i) {
    if (weights[i] != round_trip(mean[i], kDtype)) mean[i] = weights[i];
  }
}

// The weights hold the mean; where they differ from it, somebody edited them: that is the new mean.
void adopt_edits(const IvonTensor& t, int64_t begin, int64_t n) {
  float* mean = t.mean + begin;
  if (t.layout == nullptr && holds_rounded(t, begin, n, mean)) return;
  float buffer[kChunk];
  const float* weights = read_param(t, begin, n, buffer);
  if (t.param_dtype == IVON_BFLOAT16) return adopt_edits<IVON_BFLOAT16>(weights, mean, n);
  if (t.param_dtype == IVON_FLOAT16) return adopt_edits<IVON_FLOAT16>(weights, mean, n);
  adopt_edits<IVON_FLOAT32>(weights, mean, n);
}

const StepScalars& scalars_of(const IvonTensor& t, const IvonCall& call) {
  return static_cast<const StepScalars*>(call.scalars)[t.scalars];
}

// Weights <- mean + sigma eps.
void draw_chunk(const IvonTensor& t, const float* eps, const StepScalars& k, int64_t begin, int64_t n) {
  float buffer[kChunk];
  const float *mean = t.mean + begin, *hess = t.hess + begin;
  float* out = param_target(t, begin, buffer);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, draw<VFloat>(load(mean + i), load(hess + i), load(eps + i), k));
  for (; i < n; ++i) out[i] = draw<float>(mean[i], hess[i], eps[i], k);
  write_param(t, begin, n, out);
}

// The normals of the call's sample: kept since the weights were sampled, or drawn into `buffer`.
const float* sample_noise(const IvonTensor& t, const IvonCall& call, int64_t begin, int64_t n, float* buffer,
                          Streams streams) {
  if (holds_noise(t, call)) return t.noise + begin;
  tensor_normals(buffer, n, make_stream(call, t.step, t.index), t, begin, streams);
  return buffer;
}

void sample(const IvonTensor& t, const IvonCall& call, int64_t begin, int64_t n) {
  alignas(64) float buffer[kChunk];
  float* eps = keeps_noise(t, call) ? t.noise + begin : buffer;
  Streams streams;
  streams.add(t.mean + begin);
  streams.add(t.hess + begin);
  if (is_plain_float(t)) streams.add(static_cast<float*>(t.param) + begin);
  tensor_normals(eps, n, make_stream(call, t.step, t.index), t, begin, streams);
  if (call.adopt) adopt_edits(t, begin, n);
  draw_chunk(t, eps, scalars_of(t, call), begin, n);
}

void restore(const IvonTensor& t, int64_t begin, int64_t n) { write_param(t, begin, n, t.mean + begin); }

void accumulate(const IvonTensor& t, const IvonCall& call, int64_t begin, int64_t n) {
  const bool gradsq = scalars_of(t, call).gradsq != 0.0f;
  alignas(64) float eps[kChunk];
  float buffer[kChunk];
  const float* grad = read_grad(t, begin, n, buffer);
  const float* factor = gradsq ? grad : sample_noise(t, call, begin, n, eps, {});
  float *grad_sum = t.grad_sum + begin, *second_sum = t.second_sum + begin;
  for (int64_t i = 0; i < n; ++i) {
    grad_sum[i] += grad[i];
    second_sum[i] += grad[i] * factor[i];
  }
}

bool nonfinite(const IvonTensor& t, int64_t begin, int64_t n) {
  float buffer[kChunk];
  const float* grad = read_grad(t, begin, n, buffer);
  int32_t found = 0;
  for (int64_t i = 0; i < n; ++i) {
    int32_t bits;
    __builtin_memcpy(&bits, grad + i, sizeof bits);
    found |= (bits & 0x7f800000) == 0x7f800000;
  }
  return found != 0;
}

struct StepPointers {
  const float *grad, *eps, *grad_sum, *second_sum;
  float *mean, *momentum, *hess;
};

template <class F, bool kGradSq>
IVON_FN void step_lanes(const StepPointers& p, int64_t i, const StepScalars& k) {
  const auto get = [i](const float* from) {
    F x;
    __builtin_memcpy(&x, from + i, sizeof x);
    return x;
  };
  F grad = get(p.grad);
  F second = kGradSq ? grad * grad : grad * get(p.eps);
  if (p.grad_sum != nullptr) {
    grad = get(p.grad_sum) + grad;
    second = get(p.second_sum) + second;
  }
  F mean = get(p.mean), momentum = get(p.momentum), hess = get(p.hess);
  update<F, kGradSq>(grad, second, mean, momentum, hess, k);
  __builtin_memcpy(p.mean + i, &mean, sizeof mean);
  __builtin_memcpy(p.momentum + i, &momentum, sizeof momentum);
  __builtin_memcpy(p.hess + i, &hess, sizeof hess);
}

template <bool kGradSq>
void step_loop(const StepPointers& p, int64_t n, const StepScalars& k) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) step_lanes<VFloat, kGradSq>(p, i, k);
  for (; i < n; ++i) step_lanes<float, kGradSq>(p, i, k);
}

void step(const IvonTensor& t, const IvonCall& call, int64_t begin, int64_t n) {
  const StepScalars& k = scalars_of(t, call);
  const bool gradsq = k.gradsq != 0.0f;
  alignas(64) float buffer[kChunk], eps_buffer[kChunk];
  Streams streams;
  for (const float* state : {t.mean, t.momentum, t.hess}) streams.add(state + begin);
  if (is_plain_float(t)) streams.add(static_cast<float*>(t.param) + begin);
  if (t.grad_dtype == IVON_FLOAT32 && t.layout == nullptr && t.grad != nullptr) {
    streams.add(static_cast<const float*>(t.grad) + begin);
  }
  const float* eps = gradsq ? nullptr : sample_noise(t, call, begin, n, eps_buffer, streams);
  if (call.adopt) adopt_edits(t, begin, n);
  const StepPointers p{read_grad(t, begin, n, buffer),
                       eps,
                       t.grad_sum ? t.grad_sum + begin : nullptr,
                       t.grad_sum ? t.second_sum + begin : nullptr,
                       t.mean + begin,
                       t.momentum + begin,
                       t.hess + begin};
  if (gradsq) {
    step_loop<true>(p, n, k);
  } else {
    step_loop<false>(p, n, k);
  }
  if (!call.draw_next) {
    restore(t, begin, n);
    return;
  }
  NoiseStream next = make_stream(call, t.step + 1, t.index);
  next.sample_replica = noise_of(0, call.replica);
  float* next_eps = keeps_noise(t, call) ? t.noise + begin : eps_buffer;
  tensor_normals(next_eps, n, next, t, begin);
  draw_chunk(t, next_eps, k, begin, n);
}

template <int64_t kDtype>
void round_all(float* weights, int64_t n) {
  for (int64_t i = 0; i < n; ++i) weights[i] = round_trip(weights[i], kDtype);
}

}  // namespace

void draw_weights(float* out, const IvonLora& call, const IvonFactor& factor, int64_t sample, int64_t begin,
                  int64_t n) {
  const NoiseStream stream = make_stream(call.seed, call.step, sample, 0, factor.index);
  alignas(64) float eps[kChunk];
  for (int64_t first = 0; first < n; first += kChunk) {
    const int64_t count = n - first < kChunk ? n - first : kChunk;
    const float *mean = factor.mean + begin + first, *inv_sigma = factor.inv_sigma + begin + first;
    float* to = out + first;
    normals(eps, count, stream, begin + first);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      store(to + i, draw<VFloat>(load(mean + i), load(inv_sigma + i), load(eps + i)));
    }
    for (; i < count; ++i) to[i] = draw<float>(mean[i], inv_sigma[i], eps[i]);
    if (factor.dtype == IVON_BFLOAT16) round_all<IVON_BFLOAT16>(to, count);
    if (factor.dtype == IVON_FLOAT16) round_all<IVON_FLOAT16>(to, count);
  }
}

const Kernels kKernels = {
#define IVON_STRING_(x) #x
#define IVON_STRING(x) IVON_STRING_(x)
    IVON_STRING(IVON_ISA), normals_entry, sample, restore, accumulate, nonfinite, step, lora,
};

}  // namespace IVON_ISA
}  // namespace ivon
