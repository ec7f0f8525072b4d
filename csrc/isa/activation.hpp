// The activations and their derivatives.
#pragma once

#include "../call.hpp"
#include "math.hpp"

namespace batchnorm {
namespace BATCHNORM_ISA {

// The kinds that kernels are compiled for. All but ReLU share an instance that calls a function for each vector: their
// arithmetic hides the call, and the binary stays small.
enum class Kind { none, relu, other };

inline Kind kind_of(Activation activation) {
  return activation == Activation::none ? Kind::none : activation == Activation::relu ? Kind::relu : Kind::other;
}

constexpr double kSlope = 0.01;  // of leaky_relu, torch's default

template <class V> using Lane = decltype(V{}[0] + 0);

// Comparisons are written so that NaN passes, as in torch.
template <class V> __attribute__((noinline)) V activate_other(V z, Activation which) {
  using A = Lane<V>;
  switch (which) {
    case Activation::leaky_relu: return z > 0 ? z : z * static_cast<A>(kSlope);
    case Activation::silu: return z / (1 + exponential(-z));
    case Activation::sigmoid: return 1 / (1 + exponential(-z));
    case Activation::tanh: return hyperbolic_tangent(z);
    default: return z * static_cast<A>(0.5) * (1 + error_function(z * static_cast<A>(0.70710678118654752440)));
  }
}

template <class V> __attribute__((noinline)) V before_other(V dy, V z, Activation which) {
  using A = Lane<V>;
  switch (which) {
    case Activation::leaky_relu: return z > 0 ? dy : dy * static_cast<A>(kSlope);
    case Activation::silu: {
      const V s = 1 / (1 + exponential(-z));
      return dy * s * (1 + z * (1 - s));
    }
    case Activation::sigmoid: {
      const V s = 1 / (1 + exponential(-z));
      return dy * s * (1 - s);
    }
    case Activation::tanh: {
      const V t = hyperbolic_tangent(z);
      return dy * (1 - t * t);
    }
    default: {
      const V cdf = static_cast<A>(0.5) * (1 + error_function(z * static_cast<A>(0.70710678118654752440)));
      const V pdf = exponential(z * z * static_cast<A>(-0.5)) * static_cast<A>(0.39894228040143267794);
      return dy * (cdf + z * pdf);
    }
  }
}

template <Kind K, class V> inline V activate(V z, Activation which) {
  if constexpr (K == Kind::none) return z;
  else if constexpr (K == Kind::relu) return z <= 0 ? V{} : z;
  else return activate_other(z, which);
}

// dy * activation'(z)
template <Kind K, class V> inline V before_activation(V dy, V z, Activation which) {
  if constexpr (K == Kind::none) return dy;
  else if constexpr (K == Kind::relu) return z <= 0 ? V{} : dy;
  else return before_other(dy, z, which);
}

}  // namespace BATCHNORM_ISA
}  // namespace batchnorm
