// What a whole pass asks of its tensors before anything is done, whoever hands them in.
#pragma once

#include "call.hpp"
#include "tensor.hpp"

namespace batchnorm {

// Thrown where something is wrong or rare; then nothing was done.
struct NotOrdinary {};

void expect(bool holds);

// weight or bias for x; none where the view is of nothing.
Parameter parameter(const TensorView& view, const TensorView& x);
// (C,), float32 or float64.
Parameter statistic(const TensorView& view, int64_t channels);
// The gradient of weight or bias: as `statistic`, or bfloat16.
Parameter gradient(const TensorView& view, int64_t channels);
void copy(const Parameter& from, int64_t channels, double* to);
void copy(const double* from, int64_t channels, const Parameter& to);

// Contiguous, or channels-last: what torch's own layers return. An axis of one position may have any stride.
bool has_memory_format(const TensorView& view);

// Of one shape and dtype, and in a layout that the core reads both in.
bool lie_alike(const TensorView& x, const TensorView& other);

// Everything but the statistics of a call whose operands are `views`, x (N, C, ...) first.
void prepare(Call& call, const TensorView* const* views, Operand* const* operands, int number, const TensorView& weight,
             const TensorView& bias, Activation activation, double eps, int threads);

}  // namespace batchnorm
