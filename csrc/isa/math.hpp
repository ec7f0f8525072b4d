// exp, erf and tanh of vectors: polynomials for float (errors of one or two units in the last place), the C library
// lane by lane for double.
#pragma once

#include <math.h>

#include "simd.hpp"

namespace batchnorm {
namespace BATCHNORM_ISA {

template <double (*F)(double)> inline Doubles by_lane(Doubles v) {
  for (int i = 0; i < kLanes<double>; ++i) v[i] = F(v[i]);
  return v;
}
inline Doubles exponential(Doubles v) { return by_lane<::exp>(v); }
inline Doubles error_function(Doubles v) { return by_lane<::erf>(v); }
inline Doubles hyperbolic_tangent(Doubles v) { return by_lane<::tanh>(v); }

inline Floats magnitude(Floats v) { return (Floats)((Words)v & 0x7fffffffu); }
inline Floats with_sign_of(Floats size, Floats sign) {
  return (Floats)(((Words)size & 0x7fffffffu) | ((Words)sign & 0x80000000u));
}

// Cephes' expf: x = n ln 2 + r, exp(r) by a polynomial, times 2^n.
inline Floats exponential(Floats x) {
  Floats clamped = x > 88.3762626647949f ? broadcast(88.3762626647949f) : x;
  clamped = clamped < -87.3365447f ? broadcast(-87.3365447f) : clamped;
  const Floats magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Floats n = (clamped * 1.44269504088896341f + magic) - magic;
  Floats r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Floats p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Ints power = (__builtin_convertvector(n == n ? n : Floats{}, Ints) + 127) << 23;
  Floats y = p * (Floats)power;
  y = x > 88.7228394f ? broadcast(__builtin_inff()) : y;
  return x < -103.97208f ? Floats{} : y;
}

// N. Juffa's erff: a polynomial near 0, 1 - exp(polynomial) beyond.
inline Floats error_function(Floats a) {
  const Floats t = magnitude(a), s = a * a;
  Floats far = t * -1.72853470e-5f + 3.83197126e-4f;
  const Floats u = t * -3.88396438e-3f + 2.42546219e-2f;
  far = far * s + u;
  far = far * t - 1.06777877e-1f;
  far = far * t - 6.34846687e-1f;
  far = far * t - 1.28717512e-1f;
  far = far * t - t;
  far = with_sign_of(1.0f - exponential(far), a);
  far = t > 4.0f ? with_sign_of(broadcast(1.0f), a) : far;  // the polynomial holds up to there
  Floats near = s * -5.96761703e-4f + 4.99119423e-3f;
  near = near * s - 2.67681349e-2f;
  near = near * s + 1.12819925e-1f;
  near = near * s - 3.76125336e-1f;
  near = near * s + 1.28379166e-1f;
  near = near * a + a;
  return t > 0.927734375f ? far : near;
}

// Cephes' tanhf: a polynomial near 0, 1 - 2 / (exp(2 t) + 1) beyond.
inline Floats hyperbolic_tangent(Floats x) {
  const Floats t = magnitude(x), s = x * x;
  const Floats far = with_sign_of(1.0f - 2.0f / (exponential(t + t) + 1.0f), x);
  Floats near = s * -5.70498872745e-3f + 2.06390887954e-2f;
  near = near * s - 5.37397155531e-2f;
  near = near * s + 1.33314422036e-1f;
  near = near * s - 3.33332819422e-1f;
  near = near * s * x + x;
  return t > 0.625f ? far : near;  // NaN goes the way of `near`
}

}  // namespace BATCHNORM_ISA
}  // namespace batchnorm
