// Python tensors as pointers, sizes and strides.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

#include "call.hpp"

namespace batchnorm {

constexpr int kMostDimensions = 16;

// One tensor in the memory of the CPU. data is null for None.
struct TensorView {
  void* data = nullptr;
  int ndim = 0;
  uint8_t type_code = 0, type_bits = 0;  // DLPack's
  int64_t shape[kMostDimensions] = {};
  int64_t strides[kMostDimensions] = {};  // in values

  bool is_bool() const { return (type_code == 6 || type_code == 1) && type_bits == 8; }
  bool is_float() const { return type_code == 2 || type_code == 4; }
  bool is_int64() const { return type_code == 0 && type_bits == 64; }
  Dtype dtype() const;  // of a float tensor
  bool is_contiguous() const;  // the strides of axes of one position, too, are those of torch.empty(shape)
};

// `capsule` is torch.Tensor.__dlpack_c_exchange_api__; without it tensors are read by their Python attributes.
void set_exchange_api(nanobind::handle capsule);
bool has_exchange_api();

// Raises TypeError for what is neither None nor a CPU tensor.
TensorView view_of(nanobind::handle tensor);

// Sets N, C, L, layout, and the operands, in the same order as the views, from shapes (N, C, ...). False where the
// operands have no layout in common that the core knows; the caller then makes them contiguous.
bool set_layout(Call& call, const TensorView* const* views, Operand* const* operands, int number);

}  // namespace batchnorm
