// Philox4x32-10 (Salmon et al., SC 2011), checked against the Random123 known answers.
//
// Words travel in the low halves of 64-bit lanes: the widening multiply then needs no shuffling, and whatever is in
// the high halves is ignored by the next multiply.
#pragma once

#include "lane.h"

namespace ivon {
namespace IVON_ISA {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u;
constexpr uint32_t kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// The four words of one block per lane; only the low 32 bits of each are defined on return.
template <class F>
struct PhiloxBlock {
  typename Lane<F>::Word w0, w1, w2, w3;
};

// The key of each round: seed + round * Weyl constant.
struct RoundKeys {
  uint32_t key0, key1;
  IVON_FN uint64_t first(int round) const { return key0 + static_cast<uint32_t>(round) * kPhiloxW0; }
  IVON_FN uint64_t second(int round) const { return key1 + static_cast<uint32_t>(round) * kPhiloxW1; }
};

template <class F, class Keys>
IVON_FN void philox4x32(PhiloxBlock<F>& c, const Keys& keys) {
  using L = Lane<F>;
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const typename L::Word p0 = L::mul_wide(c.w0, kPhiloxM0);
    const typename L::Word p1 = L::mul_wide(c.w2, kPhiloxM1);
    c.w0 = (p1 >> 32) ^ c.w1 ^ keys.first(round);
    c.w1 = p1;
    c.w2 = (p0 >> 32) ^ c.w3 ^ keys.second(round);
    c.w3 = p0;
  }
}

// Which stream of normals: everything a normal depends on except the element index (see ivon_kernels/noise.py).
struct NoiseStream {
  RoundKeys seed;
  uint32_t param;  // parameter index, 24 bits
  uint32_t step;
  uint64_t sample_replica;  // see noise_of
};

// The last word of the counters: MC sample in the low, replica in the high 16 bits. Above it what turns the signs of
// all normals over: those of sample 2^16 + k are minus those of sample k, and the top two bits of an angle's word are
// signs.
IVON_FN uint64_t noise_of(int64_t sample, int64_t replica) {
  const uint64_t signs = (sample >> 16 & 1) != 0 ? 0xC0000000u : 0u;
  return signs << 32 | static_cast<uint32_t>((sample & 0xffff) | replica << 16);
}
IVON_FN uint32_t signs_of(uint64_t sample_replica) { return static_cast<uint32_t>(sample_replica >> 32); }

// Counter word 1 of block `block`: the block's bits 32..39 below the parameter index.
IVON_FN uint32_t counter_word1(const NoiseStream& s, uint64_t block) {
  return static_cast<uint32_t>(block >> 32) | (s.param << 8);
}

}  // namespace IVON_ISA
}  // namespace ivon
