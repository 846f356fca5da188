// The chunk operations. Compiled once per SIMD level with IVON_ISA and IVON_VEC_BYTES set; results do not depend on it.
#include "kernels.h"

#include <cstddef>
#include <initializer_list>

#include "../ivon_math.h"
#include "simd.h"
#include "staging.h"

namespace ivon {
namespace IVON_ISA {
namespace {

constexpr int kGroup = 4 * kLanes;  // normals of one SIMD group: kLanes Philox blocks

NoiseStream make_stream(const IvonCall& call, int64_t step, int64_t param) {
  return {{static_cast<uint32_t>(call.seed), static_cast<uint32_t>(call.seed >> 32)},
          static_cast<uint32_t>(param),
          static_cast<uint32_t>(call.step_override >= 0 ? call.step_override : step),
          static_cast<uint32_t>(call.sample | call.replica << 16)};
}

// Lane 4g + r computes block r * (kLanes / 4) + g, so that the 4x4 transposes below leave elements in order.
// `parity` 0 (1) gives the blocks of the even (odd) lanes, in the 64-bit lanes of one word vector.
VWord block_offsets(int parity) {
  VWord offsets{};
  for (int i = 0; i < kLanes / 2; ++i) {
    const int lane = 2 * i + parity;
    offsets[i] = static_cast<uint64_t>((lane % 4) * (kLanes / 4) + lane / 4);
  }
  return offsets;
}

// The low halves of two word vectors, interleaved into one vector of 32-bit integers.
IVON_FN VInt interleave(VWord even, VWord odd) { return (VInt)((even & 0xffffffffu) | (odd << 32)); }

// The round keys in every lane, laid out in memory once per chunk: 20 registers are not to be had.
struct VectorKeys {
  explicit VectorKeys(const RoundKeys& seed) {
    for (int round = 0; round < kPhiloxRounds; ++round) {
      firsts[round] = VWord{} + seed.first(round);
      seconds[round] = VWord{} + seed.second(round);
    }
  }
  IVON_FN VWord first(int round) const { return firsts[round]; }
  IVON_FN VWord second(int round) const { return seconds[round]; }

  VWord firsts[kPhiloxRounds], seconds[kPhiloxRounds];
};

// The words of the blocks whose first two counter words are given for the even and the odd lanes: w0 of every lane,
// then w1, w2, w3.
IVON_FN void word_group(float* out, const NoiseStream& s, const VectorKeys& keys, VWord even0, VWord even1, VWord odd0,
                        VWord odd1) {
  const VWord w2 = VWord{} + s.step, w3 = VWord{} + s.sample_replica;
  PhiloxBlock<VFloat> even{even0, even1, w2, w3};
  PhiloxBlock<VFloat> odd{odd0, odd1, w2, w3};
  philox4x32<VFloat>(even, keys);
  philox4x32<VFloat>(odd, keys);
  store(out, (VFloat)interleave(even.w0, odd.w0));
  store(out + kLanes, (VFloat)interleave(even.w1, odd.w1));
  store(out + 2 * kLanes, (VFloat)interleave(even.w2, odd.w2));
  store(out + 3 * kLanes, (VFloat)interleave(even.w3, odd.w3));
}

// The words of kLanes consecutive blocks, none of which crosses a multiple of 2^32.
IVON_FN void word_group(float* out, const NoiseStream& s, const VectorKeys& keys, uint64_t block) {
  const VWord w1 = VWord{} + counter_word1(s, block);
  word_group(out, s, keys, block_offsets(0) + block, w1, block_offsets(1) + block, w1);
}

// The words of kLanes blocks, given in the order of their lanes: even lanes first.
IVON_FN void word_group(float* out, const NoiseStream& s, const VectorKeys& keys, const uint64_t* blocks) {
  VWord even, odd;
  __builtin_memcpy(&even, blocks, sizeof even);
  __builtin_memcpy(&odd, blocks + kLanes / 2, sizeof odd);
  const uint64_t param = counter_word1(s, 0);
  word_group(out, s, keys, even, even >> 32 | param, odd, odd >> 32 | param);
}

// The words of a group to its normals, in place and in order.
IVON_FN void normal_group(float* out) {
  VFloat z0, z1, z2, z3;
  box_muller<VFloat>((VInt)load(out), (VInt)load(out + kLanes), z0, z1);
  box_muller<VFloat>((VInt)load(out + 2 * kLanes), (VInt)load(out + 3 * kLanes), z2, z3);
  const VFloat a = zip_low32(z0, z1), b = zip_high32(z0, z1), c = zip_low32(z2, z3), d = zip_high32(z2, z3);
  store(out, zip_low64(a, c));
  store(out + kLanes, zip_high64(a, c));
  store(out + 2 * kLanes, zip_low64(b, d));
  store(out + 3 * kLanes, zip_high64(b, d));
}

// The memory that a chunk's update will touch. Fetched while its noise is computed: the noise costs about as much time
// as the memory traffic, and the processor overlaps the two only when told.
class Streams {
 public:
  IVON_FN void add(const void* chunk) { at_[count_++] = static_cast<const char*>(chunk); }
  IVON_FN void prefetch_group(int64_t group) const {
    constexpr int64_t kBytes = kGroup * sizeof(float), kLine = 64;
    for (int s = 0; s < count_; ++s) {
      for (int64_t line = 0; line < kBytes; line += kLine) __builtin_prefetch(at_[s] + group * kBytes + line, 1);
    }
  }

 private:
  const char* at_[8];
  int count_ = 0;
};

// In two passes: their chains of dependent operations are too long for the processor to overlap them otherwise.
IVON_FN void normal_groups(float* out, int64_t groups, const NoiseStream& s, const VectorKeys& keys, uint64_t block,
                           const Streams& streams = {}) {
  for (int64_t i = 0; i < groups; ++i) {
    streams.prefetch_group(i);
    word_group(out + i * kGroup, s, keys, block + i * kLanes);
  }
  for (int64_t i = 0; i < groups; ++i) normal_group(out + i * kGroup);
}

void normal_block(float* out, const NoiseStream& s, uint64_t block) {
  PhiloxBlock<float> b{block, counter_word1(s, block), s.step, s.sample_replica};
  philox4x32<float>(b, s.seed);
  box_muller<float>(static_cast<int32_t>(b.w0), static_cast<int32_t>(b.w1), out[0], out[1]);
  box_muller<float>(static_cast<int32_t>(b.w2), static_cast<int32_t>(b.w3), out[2], out[3]);
}

// Elements start .. start + n of the stream, n <= kChunk.
void normals(float* out, int64_t n, const NoiseStream& s, int64_t start, const Streams& streams = {}) {
  uint64_t block = static_cast<uint64_t>(start) / 4;
  int64_t skip = start % 4;
  alignas(64) float group[kGroup];
  const VectorKeys keys(s.seed);
  while (n > 0) {
    const bool crosses = (block >> 32) != ((block + kChunk / 4) >> 32);
    if (skip == 0 && n >= kGroup && !crosses) {
      const int64_t groups = n / kGroup;
      normal_groups(out, groups, s, keys, block, streams);
      out += groups * kGroup, n -= groups * kGroup, block += groups * kLanes;
      continue;
    }
    int64_t made = kGroup;
    if (crosses) {
      normal_block(group, s, block++);
      made = 4;
    } else {
      normal_groups(group, 1, s, keys, block);
      block += kLanes;
    }
    const int64_t take = n < made - skip ? n : made - skip;
    __builtin_memcpy(out, group + skip, static_cast<size_t>(take) * sizeof(float));
    out += take, n -= take, skip = 0;
  }
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

// The weights hold the mean; where they differ from it, somebody edited them: that is the new mean.
void adopt_edits(const IvonTensor& t, int64_t begin, int64_t n) {
  float buffer[kChunk];
  const float* weights = read_param(t, begin, n, buffer);
  float* mean = t.mean + begin;
  bool edited = false;
  if (t.param_dtype == IVON_FLOAT32) {
    edited = __builtin_memcmp(weights, mean, static_cast<size_t>(n) * sizeof(float)) != 0;
  } else {
    for (int64_t i = 0; i < n; ++i) edited |= weights[i] != round_trip(mean[i], t.param_dtype);
  }
  if (!edited) return;
  for (int64_t i = 0; i < n; ++i) {
    if (weights[i] != round_trip(mean[i], t.param_dtype)) mean[i] = weights[i];
  }
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
  next.sample_replica = static_cast<uint32_t>(call.replica << 16);
  float* next_eps = keeps_noise(t, call) ? t.noise + begin : eps_buffer;
  tensor_normals(next_eps, n, next, t, begin);
  draw_chunk(t, next_eps, k, begin, n);
}

}  // namespace

const Kernels kKernels = {
#define IVON_STRING_(x) #x
#define IVON_STRING(x) IVON_STRING_(x)
    IVON_STRING(IVON_ISA), normals_entry, sample, restore, accumulate, nonfinite, step,
};

}  // namespace IVON_ISA
}  // namespace ivon
