// The operations, as one thread of one block performs them. Compiled by nvcc for the device and by a C++ compiler for
// the emulator: the difference is in kernels.h alone.
#pragma once

#include "elements.h"

namespace ivon {
namespace IVON_ISA {

// What the threads of a block share; one of them finds it out, because the bias correction takes double precision,
// which most GPUs have little of.
struct BlockContext {
  TensorRecord tensor;
  int64_t begin;        // first element of the block's chunk
  int64_t noise_block;  // Philox block of that element
  uint32_t step;        // finished updates
  uint32_t noise_step;
  bool skip;
  StepScalars scalars;
};

// Where the chunk's elements are in the unsharded tensor: element begin + i at index first + i + gap * gaps before it.
struct GatheredContext : BlockContext {
  int64_t first, gap;
  uint32_t left, run;  // elements before the first gap, and between gaps; enough, where there are more than a chunk has
  bool aligned;        // four elements have one Philox block
};

IVON_FN bool skips(const CallHeader& call) {
  const int64_t bad = call.control[kBad];
  const float found_inf = call.found_inf != nullptr ? *call.found_inf : 0.0f;
  return (bad != kNothingBad) | (found_inf != 0.0f);  // both loads at once
}

// The tensor of a block: the last one whose first block is not after it. Empty tensors share their first block with the
// tensor after them, and so are never found while there is one.
template <class Args>
IVON_FN uint32_t find_tensor(const Args& args, uint32_t block) {
  uint32_t low = 0, high = args.call.count;
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    if (args.first_block[middle] <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

template <class Args>
IVON_FN void find_noise(const Args&, uint32_t, BlockContext& c) {
  c.noise_block = (c.tensor.start + c.begin) / 4;
}

IVON_FN void find_noise(const GatheredArguments& args, uint32_t which, GatheredContext& c) {
  const int64_t run = args.runs[which].run, pitch = args.runs[which].pitch, left = run - c.begin % run;
  c.gap = pitch - run;
  c.first = c.tensor.start + c.begin + c.begin / run * c.gap;
  c.left = static_cast<uint32_t>(left < kLargestChunk ? left : kLargestChunk);
  c.run = static_cast<uint32_t>(run < kLargestChunk ? run : kLargestChunk);
  c.aligned = (c.tensor.start | run | pitch) % 4 == 0;
}

template <Operation kOperation, class Args>
IVON_FN void prepare(const Args& args, uint32_t block, typename Args::Context& c) {
  const CallHeader& call = args.call;
  const bool skip = kOperation == kStep && skips(call);  // first: its loads are on their way during the search
  const uint32_t which = find_tensor(args, block);
  c.tensor = args.tensors[which];
  c.begin = (static_cast<int64_t>(c.tensor.first_chunk) + block - args.first_block[which]) * call.chunk();
  c.skip = skip;
  if (kOperation == kRestore || kOperation == kCheck) return;
  find_noise(args, which, c);
  const int64_t step = call.steps[c.tensor.position];
  c.step = static_cast<uint32_t>(step);
  c.noise_step = static_cast<uint32_t>(call.step_override >= 0 ? call.step_override : step);
  const GroupRow& row = args.rows[c.tensor.row];
  if (kOperation == kStep) {
    c.scalars = resolve(row, step, call.grad_scale);
  } else {
    c.scalars = row.scalars;
  }
}

IVON_FN void normal_quad(uint64_t block, const KeyTable& keys, uint32_t param, uint32_t step, uint64_t sample_replica,
                         Quad& eps) {
  const NoiseStream stream{{}, param, step, sample_replica};
  PhiloxBlock<float> b{block, counter_word1(stream, block), step, sample_replica};
  philox4x32<float>(b, keys);
  const uint32_t signs = signs_of(sample_replica);
  box_muller<float>(static_cast<int32_t>(b.w0), static_cast<int32_t>(b.w1 ^ signs), eps.v[0], eps.v[1]);
  box_muller<float>(static_cast<int32_t>(b.w2), static_cast<int32_t>(b.w3 ^ signs), eps.v[2], eps.v[3]);
}

// The normals of elements at .. at + 4 of the block's tensor.
IVON_FN void normal_quad(const CallHeader& call, const BlockContext& c, int64_t at, uint32_t step,
                         uint64_t sample_replica, Quad& eps) {
  const uint64_t block = static_cast<uint64_t>(c.noise_block) + static_cast<uint32_t>(at - c.begin) / 4;
  normal_quad(block, call.keys, c.tensor.index(), step, sample_replica, eps);
}

IVON_FN uint64_t unsharded_index(const GatheredContext& c, uint32_t element) {
  const uint32_t gaps = element < c.left ? 0 : 1 + (element - c.left) / c.run;
  return static_cast<uint64_t>(c.first + element + gaps * c.gap);
}

IVON_FN float normal_at(uint64_t index, const KeyTable& keys, uint32_t param, uint32_t step, uint64_t sample_replica) {
  const NoiseStream stream{{}, param, step, sample_replica};
  PhiloxBlock<float> b{index / 4, counter_word1(stream, index / 4), step, sample_replica};
  philox4x32<float>(b, keys);
  const bool second = (index & 2) != 0;
  const uint64_t angle = (second ? b.w3 : b.w1) ^ signs_of(sample_replica);
  float z0, z1;
  box_muller<float>(static_cast<int32_t>(second ? b.w2 : b.w0), static_cast<int32_t>(angle), z0, z1);
  return (index & 1) != 0 ? z1 : z0;
}

IVON_FN void normal_quad(const CallHeader& call, const GatheredContext& c, int64_t at, uint32_t step,
                         uint64_t sample_replica, Quad& eps) {
  const uint32_t element = static_cast<uint32_t>(at - c.begin), param = c.tensor.index();
  if (c.aligned) {
    normal_quad(unsharded_index(c, element) / 4, call.keys, param, step, sample_replica, eps);
    return;
  }
  eps = Quad{};
#if defined(__CUDACC__)
#pragma unroll 1  // four copies of the generator would take the registers of the aligned path
#endif
  for (uint32_t i = 0; i < 4; ++i) {  // the quad moves on by one: with a variable index it would be in memory
    const float z = normal_at(unsharded_index(c, element + i), call.keys, param, step, sample_replica);
    eps = {{eps.v[1], eps.v[2], eps.v[3], z}};
  }
}

// Takes weights that differ from the mean over as the new mean; true if there are any.
IVON_FN bool adopt_edits(const Operand& param, int64_t at, int n, Quad& mean) {
  const Quad weights = load(param, at, n);
  bool edited = false;
  IVON_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (i >= n || weights.v[i] == round_trip(mean.v[i], param.dtype)) continue;
    mean.v[i] = weights.v[i];
    edited = true;
  }
  return edited;
}

IVON_FN void draw_quad(const Quad& mean, const Quad& hess, const StepScalars& k, Quad& eps) {
  IVON_UNROLL
  for (int i = 0; i < 4; ++i) eps.v[i] = draw<float>(mean.v[i], hess.v[i], eps.v[i], k);
}

template <class Context>
IVON_FN void sample_quad(const CallHeader& call, const Context& c, int64_t at, int n) {
  const int64_t state = c.tensor.offset + at;
  Quad mean = load_state(call.mean, state), eps;
  const Quad hess = load_state(call.hess, state);
  const Operand param = param_of(c.tensor);
  if (call.adopt && adopt_edits(param, at, n, mean)) store_state(call.mean, state, n, mean);
  normal_quad(call, c, at, c.noise_step, call.sample_replica, eps);
  draw_quad(mean, hess, c.scalars, eps);
  store(param, at, n, eps);
}

// The whole chunk of a block, in memory order and aligned. There is nothing to do while the loads are on their way, so
// that all of a thread's are.
template <class Vector>
IVON_FN bool nonfinite_chunk(const BlockContext& c, uint32_t thread, uint32_t exponent) {
  const Vector* from = static_cast<const Vector*>(c.tensor.grad) + c.begin / 4 + thread;
  Vector quads[kMostQuads];
  IVON_UNROLL
  for (uint32_t i = 0; i < kMostQuads; ++i) quads[i] = load_again(from + i * kThreads);
  bool found = false;
  IVON_UNROLL
  for (uint32_t i = 0; i < kMostQuads; ++i) found |= nonfinite(quads[i], exponent);
  return found;
}

IVON_FN bool nonfinite_quad(const BlockContext& c, int64_t at, int n) {
  const Quad grad = load(grad_of(c.tensor), at, n);
  bool found = false;
  IVON_UNROLL
  for (int i = 0; i < 4; ++i) found |= (Lane<float>::bits(grad.v[i]) & 0x7f800000) == 0x7f800000;
  return found;
}

// Gradient and Hessian statistic of the sample; a gradient that is missing counts as 0.
template <class Context>
IVON_FN void load_statistics(const CallHeader& call, const Context& c, int64_t at, int n, Quad& grad, Quad& second) {
  grad = c.tensor.grad != nullptr ? load(grad_of(c.tensor), at, n) : Quad{};
  Quad factor = grad;
  if (c.scalars.gradsq == 0.0f) normal_quad(call, c, at, c.noise_step, call.sample_replica, factor);
  IVON_UNROLL
  for (int i = 0; i < 4; ++i) second.v[i] = grad.v[i] * factor.v[i];
}

IVON_FN void add_state(const float* state, int64_t at, Quad& q) {
  const Quad sum = load_state(state, at);
  IVON_UNROLL
  for (int i = 0; i < 4; ++i) q.v[i] = sum.v[i] + q.v[i];
}

template <class Context>
IVON_FN void accumulate_quad(const CallHeader& call, const Context& c, int64_t at, int n) {
  const int64_t state = c.tensor.offset + at;
  Quad grad, second;
  load_statistics(call, c, at, n, grad, second);
  add_state(call.grad_sum, state, grad);
  add_state(call.second_sum, state, second);
  store_state(call.grad_sum, state, n, grad);
  store_state(call.second_sum, state, n, second);
}

template <class Context>
IVON_FN void update_quad(const CallHeader& call, const Context& c, int64_t at, int n, Quad& mean, Quad& hess) {
  const int64_t state = c.tensor.offset + at;
  const StepScalars& k = c.scalars;
  Quad momentum = load_state(call.momentum, state), grad, second;
  load_statistics(call, c, at, n, grad, second);
  if (c.tensor.has(kSummed)) {
    add_state(call.grad_sum, state, grad);
    add_state(call.second_sum, state, second);
  }
  if (call.adopt) adopt_edits(param_of(c.tensor), at, n, mean);
  if (k.gradsq != 0.0f) {
    IVON_UNROLL
    for (int i = 0; i < 4; ++i) {
      update<float, true>(grad.v[i], second.v[i], mean.v[i], momentum.v[i], hess.v[i], k);
    }
  } else {
    IVON_UNROLL
    for (int i = 0; i < 4; ++i) {
      update<float, false>(grad.v[i], second.v[i], mean.v[i], momentum.v[i], hess.v[i], k);
    }
  }
  store_state(call.mean, state, n, mean);
  store_state(call.momentum, state, n, momentum);
  store_state(call.hess, state, n, hess);
}

template <class Context>
IVON_FN void step_quad(const CallHeader& call, const Context& c, int64_t at, int n) {
  if (c.skip && call.adopt && !call.draw_next) return;  // the weights hold the mean already
  const int64_t state = c.tensor.offset + at;
  Quad mean = load_state(call.mean, state), hess = load_state(call.hess, state);
  if (!c.skip) update_quad(call, c, at, n, mean, hess);
  if (call.draw_next) {
    Quad eps;
    normal_quad(call, c, at, c.skip ? c.step : c.step + 1, call.sample_replica & 0xffff0000u, eps);
    draw_quad(mean, hess, c.scalars, eps);
    mean = eps;
  }
  store(param_of(c.tensor), at, n, mean);
}

// All that one thread of a block does; true if it met inf or nan (kCheck).
template <Operation kOperation, class Context>
IVON_FN bool work(const CallHeader& call, const Context& c, uint32_t thread) {
  bool found = false;
  if (kOperation == kCheck && c.tensor.has(kGradVector) && c.begin + kLargestChunk <= c.tensor.numel) {
    const int64_t dtype = c.tensor.grad_dtype();
    if (dtype == IVON_FLOAT32) return nonfinite_chunk<Float4>(c, thread, 0x7f800000u);
    return nonfinite_chunk<Half4>(c, thread, dtype == IVON_BFLOAT16 ? 0x7f80u : 0x7c00u);
  }
#if defined(__CUDACC__)
#pragma unroll 1
#endif
  for (uint32_t quad = 0; quad < call.quads; ++quad) {
    const int64_t at = c.begin + (quad * kThreads + thread) * 4;
    const int64_t left = c.tensor.numel - at;
    if (left <= 0) break;
    const int n = left < 4 ? static_cast<int>(left) : 4;
    if (kOperation == kSample) sample_quad(call, c, at, n);
    if (kOperation == kRestore) store(param_of(c.tensor), at, n, load_state(call.mean, c.tensor.offset + at));
    if (kOperation == kCheck) found |= nonfinite_quad(c, at, n);
    if (kOperation == kAccumulate) accumulate_quad(call, c, at, n);
    if (kOperation == kStep) step_quad(call, c, at, n);
  }
  return found;
}

// What the last block of a step's launch does when all others are done: thread `thread` of its kThreads.
template <class Args>
IVON_FN void count_steps(const Args& args, bool skip, uint32_t thread) {
  if (skip) return;
  for (uint32_t i = thread; i < args.call.count; i += kThreads) {
    if (args.tensors[i].has(kCounted)) args.call.steps[args.tensors[i].position] += 1;
  }
}

}  // namespace IVON_ISA
}  // namespace ivon
