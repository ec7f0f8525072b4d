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

// Training: y from x with its own statistics, which also enter the running ones. None, and nothing done, unless all is
// ordinary: float x (N, C, ...) with a layout that the core knows and more than one value a channel, `features` channels
// (-1: any number), y contiguous or channels-last, operands of fitting shapes and dtypes.
// mean, var: (C,) float64, written, or None. running_mean, running_var, tracked: as in running.hpp, or None.
nanobind::object train(nanobind::handle x, nanobind::handle y, nanobind::handle residual, nanobind::handle weight,
                       nanobind::handle bias, nanobind::handle mean, nanobind::handle var,
                       nanobind::handle running_mean, nanobind::handle running_var, nanobind::handle tracked,
                       double momentum, double eps, int activation, int64_t features, int threads);

// Inference: y from x with mean and var, (C,) float32 or float64; else as `train`. y may be x.
nanobind::object infer(nanobind::handle x, nanobind::handle y, nanobind::handle residual, nanobind::handle weight,
                       nanobind::handle bias, nanobind::handle mean, nanobind::handle var, double eps, int activation,
                       int64_t features, int threads);

// The gradients, as far as there is room for them: dx and dresidual like x, dweight and dbias (C,) float32 or float64.
// False, and nothing done, unless all is ordinary. The residual is read only where there is an activation.
bool differentiate(Pass& pass, nanobind::handle dy, nanobind::handle x, nanobind::handle residual,
                   nanobind::handle weight, nanobind::handle bias, nanobind::handle dx, nanobind::handle dresidual,
                   nanobind::handle dweight, nanobind::handle dbias, int threads);

}  // namespace batchnorm
