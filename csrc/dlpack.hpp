// The parts of DLPack 1.3 that reading a tensor without copying its description needs, and handing one out.
// Layout of the structures: dlpack.h, DMLC, Apache License 2.0. https://github.com/dmlc/dlpack
#pragma once

#include <cstdint>

namespace batchnorm::dlpack {

struct Tensor {
  void* data;
  int32_t device_type;  // 1 is the CPU
  int32_t device_id;
  int32_t ndim;
  uint8_t type_code;  // 0 int, 1 unsigned, 2 float, 4 bfloat16, 6 bool
  uint8_t type_bits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

// What a capsule named "dltensor" holds.
struct ManagedTensor {
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};

struct ExchangeApi {
  struct Header {
    uint32_t major, minor;
    Header* previous;
  } header;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  int (*tensor_from_py_object)(void* py_object, Tensor* out);  // 0, or -1 with a Python error set
  void* current_work_stream;
};

}  // namespace batchnorm::dlpack
