// Four consecutive elements of a tensor of any dtype and layout, in registers.
#pragma once

#include "arguments.h"

#if defined(__CUDACC__)
#define IVON_UNROLL _Pragma("unroll")
#else
#define IVON_UNROLL _Pragma("GCC unroll 4")
#endif

namespace ivon {
namespace IVON_ISA {

struct Quad {
  float v[4];
};

#if defined(__CUDA_ARCH__)
using Float4 = float4;
using Half4 = uint2;
// Streaming: nothing reads a tensor's state or gradient again before the next step.
template <class T>
IVON_FN T load_streaming(const T* from) {
  return __ldcs(from);
}
// What the check reads the step reads next.
template <class T>
IVON_FN T load_again(const T* from) {
  return __ldcg(from);
}
template <class T>
IVON_FN void store_streaming(T* to, T value) {
  __stcs(to, value);
}
// The weights are what the next forward pass reads.
template <class T>
IVON_FN void store_kept(T* to, T value) {
  __stwb(to, value);
}
#else
struct alignas(16) Float4 {
  float x, y, z, w;
};
struct alignas(8) Half4 {
  uint32_t x, y;
};
template <class T>
IVON_FN T load_streaming(const T* from) {
  return *from;
}
template <class T>
IVON_FN T load_again(const T* from) {
  return *from;
}
template <class T>
IVON_FN void store_streaming(T* to, T value) {
  *to = value;
}
template <class T>
IVON_FN void store_kept(T* to, T value) {
  *to = value;
}
#endif

// State: always aligned, and padded, so that reading past the last element is fine.
IVON_FN Quad load_state(const float* state, int64_t at) {
  const Float4 x = load_streaming(reinterpret_cast<const Float4*>(state + at));
  return {{x.x, x.y, x.z, x.w}};
}

IVON_FN void store_state(float* state, int64_t at, int n, const Quad& q) {
  if (n == 4) {
    store_streaming(reinterpret_cast<Float4*>(state + at), Float4{q.v[0], q.v[1], q.v[2], q.v[3]});
    return;
  }
  IVON_UNROLL
  for (int i = 0; i < 3; ++i) {
    if (i < n) store_streaming(state + at + i, q.v[i]);
  }
}

IVON_FN bool all_set(uint32_t word, uint32_t bits) { return (word & bits) == bits; }
IVON_FN bool all_set(float x, uint32_t bits) { return all_set(static_cast<uint32_t>(Lane<float>::bits(x)), bits); }

// Whether one of four elements is inf or nan: all bits of its exponent are set.
IVON_FN bool nonfinite(const Float4& q, uint32_t exponent) {
  return all_set(q.x, exponent) | all_set(q.y, exponent) | all_set(q.z, exponent) | all_set(q.w, exponent);
}

IVON_FN bool nonfinite(const Half4& q, uint32_t low) {
  const uint32_t high = low << 16;
  return all_set(q.x, low) | all_set(q.x, high) | all_set(q.y, low) | all_set(q.y, high);
}

// Storage offset of an element under strides.
IVON_FN int64_t strided_offset(const IvonLayout& layout, const int64_t* strides, int64_t element) {
  int64_t offset = 0;
  if (element >> 32 == 0) {  // 64-bit division costs several times as much
    uint32_t rest = static_cast<uint32_t>(element);
    for (int64_t d = layout.dims - 1; d > 0; --d) {
      const uint32_t size = static_cast<uint32_t>(layout.sizes[d]);
      offset += static_cast<int64_t>(rest % size) * strides[d];
      rest /= size;
    }
    return offset + static_cast<int64_t>(rest) * strides[0];
  }
  for (int64_t d = layout.dims - 1; d > 0; --d) {
    offset += element % layout.sizes[d] * strides[d];
    element /= layout.sizes[d];
  }
  return offset + element * strides[0];
}

// A parameter or gradient and how to reach its elements.
struct Operand {
  void* base;
  int64_t dtype;
  bool vector;               // contiguous and aligned
  const IvonLayout* layout;  // null: contiguous
  const int64_t* strides;

  IVON_FN int64_t place(int64_t element) const {
    return layout == nullptr ? element : strided_offset(*layout, strides, element);
  }
};

IVON_FN Operand param_of(const TensorRecord& t) {
  return {t.param, t.param_dtype(), t.has(kParamVector), t.layout, t.layout ? t.layout->param_strides : nullptr};
}

IVON_FN Operand grad_of(const TensorRecord& t) {
  return {const_cast<void*>(t.grad), t.grad_dtype(), t.has(kGradVector), t.layout,
          t.layout ? t.layout->grad_strides : nullptr};
}

IVON_FN float low_half(uint32_t pair, int64_t dtype) { return to_float(static_cast<uint16_t>(pair & 0xffff), dtype); }
IVON_FN float high_half(uint32_t pair, int64_t dtype) { return to_float(static_cast<uint16_t>(pair >> 16), dtype); }
IVON_FN uint32_t half_pair(float low, float high, int64_t dtype) {
  return from_float(low, dtype) | static_cast<uint32_t>(from_float(high, dtype)) << 16;
}

// n elements from `at`; zeros after them.
IVON_FN Quad load(const Operand& from, int64_t at, int n) {
  if (from.vector && n == 4) {
    if (from.dtype == IVON_FLOAT32) return load_state(static_cast<const float*>(from.base), at);
    const uint16_t* base = static_cast<const uint16_t*>(from.base);
    const Half4 x = load_streaming(reinterpret_cast<const Half4*>(base + at));
    return {
        {low_half(x.x, from.dtype), high_half(x.x, from.dtype), low_half(x.y, from.dtype), high_half(x.y, from.dtype)}};
  }
  Quad q{};
  IVON_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (i >= n) continue;
    const int64_t place = from.place(at + i);
    q.v[i] = from.dtype == IVON_FLOAT32
                 ? load_streaming(static_cast<const float*>(from.base) + place)
                 : to_float(load_streaming(static_cast<const uint16_t*>(from.base) + place), from.dtype);
  }
  return q;
}

IVON_FN void store(const Operand& to, int64_t at, int n, const Quad& q) {
  if (to.vector && n == 4) {
    if (to.dtype == IVON_FLOAT32) {
      Float4* quads = reinterpret_cast<Float4*>(static_cast<float*>(to.base) + at);
      store_kept(quads, Float4{q.v[0], q.v[1], q.v[2], q.v[3]});
    } else {
      Half4* quads = reinterpret_cast<Half4*>(static_cast<uint16_t*>(to.base) + at);
      store_kept(quads, Half4{half_pair(q.v[0], q.v[1], to.dtype), half_pair(q.v[2], q.v[3], to.dtype)});
    }
    return;
  }
  IVON_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (i >= n) continue;
    const int64_t place = to.place(at + i);
    if (to.dtype == IVON_FLOAT32) {
      store_kept(static_cast<float*>(to.base) + place, q.v[i]);
    } else {
      store_kept(static_cast<uint16_t*>(to.base) + place, from_float(q.v[i], to.dtype));
    }
  }
}

}  // namespace IVON_ISA
}  // namespace ivon
