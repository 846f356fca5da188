// What a lane type must offer so that philox.h and ivon_math.h compile for it.
//
// The mathematics is written once, as templates over F: `float` here (scalar CPU code and CUDA threads), a SIMD
// register of floats in cpu/simd.h. Every operation is an individually rounded IEEE-754 float32 operation, so all
// lane types, widths and devices give the same bits. Compile with contraction off (-ffp-contract=off, --fmad=false).
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define IVON_FN __host__ __device__ __forceinline__
#else
#define IVON_FN inline __attribute__((always_inline))
#endif

// Each SIMD level is its own namespace: code compiled for AVX-512 must never be merged with the baseline's.
#if !defined(IVON_ISA)
#define IVON_ISA scalar
#endif

namespace ivon {
namespace IVON_ISA {

// Lane<F>::Word holds 64-bit words, one Philox word in the low half of each; Lane<F>::Int holds 32-bit integers.
template <class F>
struct Lane;

template <>
struct Lane<float> {
  using Word = uint64_t;
  using Int = int32_t;

  // Product of the low 32 bits of `word` with `factor`, all 64 bits of it.
  static IVON_FN Word mul_wide(Word word, uint32_t factor) { return (word & 0xffffffffu) * factor; }

#if defined(__CUDA_ARCH__)
  static IVON_FN float sqrt(float x) { return __fsqrt_rn(x); }
  static IVON_FN Int bits(float x) { return __float_as_int(x); }
  static IVON_FN float from_bits(Int x) { return __int_as_float(x); }
#else
  static IVON_FN float sqrt(float x) { return __builtin_sqrtf(x); }
  static IVON_FN Int bits(float x) {
    Int y;
    __builtin_memcpy(&y, &x, sizeof y);
    return y;
  }
  static IVON_FN float from_bits(Int x) {
    float y;
    __builtin_memcpy(&y, &x, sizeof y);
    return y;
  }
#endif
  static IVON_FN float convert(Int x) { return static_cast<float>(x); }
  static IVON_FN Int shift_left(Int x, int by) { return static_cast<Int>(static_cast<uint32_t>(x) << by); }
  static IVON_FN Int shift_right_logical(Int x, int by) { return static_cast<Int>(static_cast<uint32_t>(x) >> by); }
  static IVON_FN float splat(float x) { return x; }
};

}  // namespace IVON_ISA
}  // namespace ivon
