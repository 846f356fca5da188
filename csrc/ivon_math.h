// The IVON arithmetic, once for every compiled backend. ivon_kernels/backends/reference.py states the algorithm and
// uses the same operations in the same order; results are equal bit for bit.
#pragma once

#include "philox.h"

namespace ivon {
namespace IVON_ISA {

// Two independent standard normals from two 32-bit words (Box-Muller).
//
// Radius: u = (2 (w >> 9) + 1) 2^-24 is exact and in (0, 1); u = m 2^e with m in [sqrt(1/2), sqrt(2)), and
// -2 ln u = e (-2 ln 2) + f Q(f) with f = m - 1, so that precision is kept as u -> 1.
// Angle: (pi/2) (t + 1/2) in the first quadrant, t in (-1/2, 1/2) an odd multiple of 2^-25 from the low 30 bits; its
// cosine and sine are C(t) -+ S(t) with C, S = (cos, sin)(pi t / 2) / sqrt(2). The top two bits are the two signs.
// Q, C and S are minimax polynomials (error below 6e-8), evaluated by Horner's rule without fma; Q by its even and odd
// parts, which halves the longest chain of dependent operations.
template <class F>
IVON_FN void box_muller(typename Lane<F>::Int radius_word, typename Lane<F>::Int angle_word, F& z0, F& z1) {
  using L = Lane<F>;
  using I = typename L::Int;

  const F u = L::convert(L::shift_right_logical(radius_word, 8) | 1);  // u 2^24
  const I x = L::bits(u) - (0x3f3504f3 + (24 << 23));                  // sqrt(1/2) 2^24
  const F e = L::convert(x >> 23);
  const F f = L::from_bits((x & 0x007fffff) + 0x3f3504f3) - 1.0f;
  const F f2 = f * f;
  F even = f2 * -0.17444715f + -0.29904532f;
  F odd = f2 * 0.2873369f + 0.33124787f;
  even = even * f2 + -0.39913666f;
  odd = odd * f2 + 0.5000415f;
  even = even * f2 + -0.66668373f;
  odd = odd * f2 + 0.99999976f;
  even = even * f2 + -2.0f;
  const F q = odd * f + even;
  const F r = L::sqrt(e * -1.3862944f + q * f);

  const F t = L::convert((L::shift_left(angle_word, 2) >> 7) | 1) * 0x1p-25f;
  const F t2 = t * t;
  F sine = t2 * -0.0032542306f + 0.05634243f;
  sine = sine * t2 + -0.45676515f;
  sine = (sine * t2 + 1.1107208f) * t;
  F cosine = t2 * -0.014430884f + 0.17932132f;
  cosine = cosine * t2 + -0.8723555f;
  cosine = cosine * t2 + 0.70710677f;
  z0 = L::from_bits(L::bits(r * (cosine - sine)) ^ (angle_word & INT32_MIN));
  z1 = L::from_bits(L::bits(r * (cosine + sine)) ^ (L::shift_left(angle_word, 1) & INT32_MIN));
}

// Everything of one step that does not depend on the element: computed on the host in double, rounded once.
struct StepScalars {
  float ess;
  float weight_decay;
  float beta1;
  float one_minus_beta1;
  float one_minus_beta2;
  float inv_debias;    // 1 / (1 - beta1^t), or 1
  float lr;            // times (hess_init + weight_decay) with rescale_lr
  float clip_radius;   // may be inf
  float hess_floor;    // smallest hess kept: weight_decay + hess_floor > 0 in float32
  float hess_ceiling;  // largest hess kept: ess * hess stays finite in float32
  float grad_scale;    // 1 / (AMP scale * MC samples)
  float second_scale;  // the same for the Hessian statistic: price g*eps, gradsq g*g
  float gradsq;        // 0: price, 1: gradsq
};

// 1 / sigma = sqrt(ess (hess + weight_decay)).
template <class F>
IVON_FN F inv_sigma(F hess, const StepScalars& k) {
  return Lane<F>::sqrt((hess + k.weight_decay) * k.ess);
}

// theta = mean + sigma eps.
template <class F>
IVON_FN F draw(F mean, F inv_sigma, F eps) {
  return mean + eps / inv_sigma;
}
template <class F>
IVON_FN F draw(F mean, F hess, F eps, const StepScalars& k) {
  return draw(mean, inv_sigma(hess, k), eps);
}

// One element of the update. `grad` and `second` are sums over the MC samples, before scaling.
template <class F, bool kGradSq>
IVON_FN void update(F grad, F second, F& mean, F& momentum, F& hess, const StepScalars& k) {
  grad = grad * k.grad_scale;
  second = second * k.second_scale;
  const F precision = hess + k.weight_decay;
  const F hess_estimate = kGradSq ? second * k.ess : second * Lane<F>::sqrt(precision * k.ess);
  momentum = momentum * k.beta1 + grad * k.one_minus_beta1;
  const F delta = (hess_estimate - hess) * k.one_minus_beta2;
  hess = hess + (delta + (delta * 0.5f) * (delta / precision));
  const F floor = Lane<F>::splat(k.hess_floor);
  hess = hess < floor ? floor : hess;  // NaN stays NaN: nothing is hidden
  const F ceiling = Lane<F>::splat(k.hess_ceiling);
  hess = hess > ceiling ? ceiling : hess;
  F direction = (momentum * k.inv_debias + mean * k.weight_decay) / (hess + k.weight_decay);
  const F clip = Lane<F>::splat(k.clip_radius);
  direction = direction > clip ? clip : direction;
  direction = direction < -clip ? -clip : direction;
  mean = mean - direction * k.lr;
}

}  // namespace IVON_ISA
}  // namespace ivon
