// Runs of normals by SIMD: philox.h and ivon_math.h over whole groups of lanes, elements in order.
#pragma once

#include <cstddef>

#include "../ivon_math.h"
#include "kernels.h"
#include "simd.h"

namespace ivon {
namespace IVON_ISA {
namespace {

constexpr int kGroup = 4 * kLanes;  // normals of one SIMD group: kLanes Philox blocks

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
  const VWord w2 = VWord{} + s.step, w3 = VWord{} + static_cast<uint32_t>(s.sample_replica);
  const VInt signs = VInt{} + static_cast<int32_t>(signs_of(s.sample_replica));
  PhiloxBlock<VFloat> even{even0, even1, w2, w3};
  PhiloxBlock<VFloat> odd{odd0, odd1, w2, w3};
  philox4x32<VFloat>(even, keys);
  philox4x32<VFloat>(odd, keys);
  store(out, (VFloat)interleave(even.w0, odd.w0));
  store(out + kLanes, (VFloat)(interleave(even.w1, odd.w1) ^ signs));
  store(out + 2 * kLanes, (VFloat)interleave(even.w2, odd.w2));
  store(out + 3 * kLanes, (VFloat)(interleave(even.w3, odd.w3) ^ signs));
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
  const uint32_t signs = signs_of(s.sample_replica);
  box_muller<float>(static_cast<int32_t>(b.w0), static_cast<int32_t>(b.w1 ^ signs), out[0], out[1]);
  box_muller<float>(static_cast<int32_t>(b.w2), static_cast<int32_t>(b.w3 ^ signs), out[2], out[3]);
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

}  // namespace
}  // namespace IVON_ISA
}  // namespace ivon
