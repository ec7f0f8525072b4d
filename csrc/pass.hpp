// A whole pass in the common case, in one call from Python: what is right and ordinary is found out here, within a fraction
// of a microsecond, and everything else is left to the checks and the slower ways in Python.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <vector>

#include "call.hpp"

namespace batchnorm {

// What backward needs to know of a forward pass besides its tensors.
struct Pass {
  std::vector<double> statistics;  // mean, then biased variance: (2, C)
  int64_t count = 0;               // values of a channel
  double eps = 0;
  Activation activation = Activation::none;
  bool is_estimated = false;  // from x itself; else they were given
  bool is_taken = true;       // false where the running statistics stay, because the batch is not finite

  int64_t channels() const { return static_cast<int64_t>(statistics.size()) / 2; }
  double* mean() { return statistics.data(); }
  double* var() { return statistics.data() + channels(); }
  // Copies mean and variance into two (C,) float64 tensors.
  void write(nanobind::handle mean, nanobind::handle var);
};

// All of these return None, with nothing done, unless all is ordinary: plain float tensors x (N, C, ...) in the CPU's memory,
// an output that is contiguous or channels-last, operands of fitting shapes and dtypes. An x or dy in a layout that the core
// does not know is copied; a residual is not.

// Training: (y, Pass); y from x with its own statistics, which also enter the running ones. More than one value a
// channel; `features` channels, or any number with -1. mean, var: (C,), float32 or float64, written, or None.
// running_mean, running_var, tracked, momentum: as in running.hpp, or None.
nanobind::object train(nanobind::handle x, nanobind::handle weight, nanobind::handle bias, nanobind::handle residual,
                       double eps, int activation, int64_t features, int threads, nanobind::handle mean,
                       nanobind::handle var, nanobind::handle running_mean, nanobind::handle running_var,
                       nanobind::handle tracked, double momentum);

// Training of a small input, (y, Pass or None, whether the batch was taken); y is a node of autograd's graph, by the operator that
// node.hpp has given its kernels. With a Pass the caller has to make the node: y is its output, and the graph of its own
// would be inexact. None as well where x is not small, or what asks for gradients is not x.
nanobind::object train_in_graph(nanobind::handle x, nanobind::handle weight, nanobind::handle bias, double eps,
                                int64_t features, nanobind::handle running_mean, nanobind::handle running_var,
                                nanobind::handle tracked, double momentum);

// Inference: (y, Pass); y from x with mean and var, (C,), float32 or float64. `out`, or None: where y is written; may be x.
nanobind::object infer(nanobind::handle x, nanobind::handle weight, nanobind::handle bias, nanobind::handle residual,
                       double eps, int activation, int64_t features, int threads, nanobind::handle mean,
                       nanobind::handle var, nanobind::handle out);

// The gradients of x, weight, bias and residual, those that are wanted, and None twice for what has no gradient. Without an activation
// the residual is None, as it plays no part, and its gradient is dy.
nanobind::object differentiate(Pass& pass, nanobind::handle dy, nanobind::handle x, nanobind::handle weight,
                               nanobind::handle bias, nanobind::handle residual, nanobind::tuple wanted, int threads);

}  // namespace batchnorm
