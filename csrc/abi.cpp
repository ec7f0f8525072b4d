#include "abi.hpp"

#include <cstring>
#include <stdexcept>
#include <utility>
#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace batchnorm::abi {
namespace {

using Status = int32_t;  // 0, or torch has caught an exception of its own
using Handle = void*;

// Signatures: torch/csrc/inductor/aoti_torch/c/shim.h and torch/csrc/stable/c/shim.h.
struct Functions {
  Status (*get_dim)(Handle, int64_t*);
  Status (*get_sizes)(Handle, int64_t**);
  Status (*get_strides)(Handle, int64_t**);
  Status (*get_dtype)(Handle, int32_t*);
  Status (*get_device_type)(Handle, int32_t*);
  Status (*get_data_ptr)(Handle, void**);
  Status (*empty_strided)(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Handle*);
  Status (*copy)(Handle, Handle, int32_t);
  Status (*delete_tensor)(Handle);
  Status (*delete_value)(Value*);
  Status (*num_threads)(uint32_t*);
  Status (*new_library)(const char*, const char*, const char*, uint32_t, void**);
  Status (*implement)(void*, const char*, Kernel, uint64_t);
  int32_t (*cpu)();
  int32_t (*float32)();
  int32_t (*float64)();
  int32_t (*bfloat16)();
  int32_t (*float16)();
};

Functions torch;

constexpr uint64_t kVersion = (uint64_t{2} << 56) | (uint64_t{13} << 48);  // of the interface as it is used here

void check(Status status) {
  if (status != 0) throw std::runtime_error("batchnorm: torch could not do what a kernel on the CPU asked of it.");
}

int32_t code(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32: return torch.float32();
    case Dtype::float64: return torch.float64();
    case Dtype::bfloat16: return torch.bfloat16();
    case Dtype::float16: break;
  }
  return torch.float16();
}

}  // namespace

bool load(const char* path) {
#if defined(__unix__) || defined(__APPLE__)
  void* const library = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
  if (!library) return false;
  bool is_whole = true;
  const auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
    is_whole = is_whole && function;
  };
  find(torch.get_dim, "aoti_torch_get_dim");
  find(torch.get_sizes, "aoti_torch_get_sizes");
  find(torch.get_strides, "aoti_torch_get_strides");
  find(torch.get_dtype, "aoti_torch_get_dtype");
  find(torch.get_device_type, "aoti_torch_get_device_type");
  find(torch.get_data_ptr, "torch_get_mutable_data_ptr");
  find(torch.empty_strided, "aoti_torch_empty_strided");
  find(torch.copy, "aoti_torch_copy_");
  find(torch.delete_tensor, "aoti_torch_delete_tensor_object");
  find(torch.delete_value, "torch_delete_stable_ivalue");
  find(torch.num_threads, "torch_get_num_threads");
  find(torch.new_library, "aoti_torch_library_init_impl");
  find(torch.implement, "torch_library_impl");
  find(torch.cpu, "aoti_torch_device_type_cpu");
  find(torch.float32, "aoti_torch_dtype_float32");
  find(torch.float64, "aoti_torch_dtype_float64");
  find(torch.bfloat16, "aoti_torch_dtype_bfloat16");
  find(torch.float16, "aoti_torch_dtype_float16");
  return is_whole;
#else
  (void)path;
  return false;
#endif
}

bool register_kernel(const char* name, Kernel kernel) {
  static void* library = nullptr;  // never deleted: that would take the kernels away
  if (!library && torch.new_library("aten", "CPU", __FILE__, __LINE__, &library) != 0) return false;
  return torch.implement(library, name, kernel, kVersion) == 0;
}

int threads() {
  uint32_t number = 1;
  check(torch.num_threads(&number));
  return static_cast<int>(number);
}

Tensor::Tensor(Value value) : handle_(reinterpret_cast<Handle>(value)) {}

Tensor Tensor::optional(Value value) {
  if (!value) return {};
  Value* const inner = reinterpret_cast<Value*>(value);
  Tensor found(*inner);
  check(torch.delete_value(inner));
  return found;
}

Tensor Tensor::like(const Tensor& other) {
  int64_t ndim, *sizes, *strides;
  int32_t dtype;
  check(torch.get_dim(other.handle_, &ndim));
  check(torch.get_sizes(other.handle_, &sizes));
  check(torch.get_strides(other.handle_, &strides));
  check(torch.get_dtype(other.handle_, &dtype));
  Tensor made;
  check(torch.empty_strided(ndim, sizes, strides, dtype, torch.cpu(), 0, &made.handle_));
  return made;
}

Tensor Tensor::vector(int64_t length, Dtype dtype) {
  const int64_t one = 1;
  Tensor made;
  check(torch.empty_strided(1, &length, &one, code(dtype), torch.cpu(), 0, &made.handle_));
  return made;
}

Tensor& Tensor::operator=(Tensor&& other) noexcept {
  std::swap(handle_, other.handle_);
  return *this;
}

Tensor::~Tensor() {
  if (handle_) torch.delete_tensor(handle_);
}

TensorView Tensor::view() const {
  TensorView view;
  if (!handle_) return view;
  int64_t ndim, *sizes, *strides;
  int32_t dtype, device;
  check(torch.get_device_type(handle_, &device));
  check(torch.get_dim(handle_, &ndim));
  if (device != torch.cpu() || ndim > kMostDimensions)
    throw std::runtime_error("batchnorm: a kernel on the CPU got a tensor elsewhere, or of more than 16 dimensions.");
  check(torch.get_sizes(handle_, &sizes));
  check(torch.get_strides(handle_, &strides));
  check(torch.get_dtype(handle_, &dtype));
  check(torch.get_data_ptr(handle_, &view.data));
  view.ndim = static_cast<int>(ndim);
  std::memcpy(view.shape, sizes, static_cast<size_t>(ndim) * sizeof(int64_t));
  std::memcpy(view.strides, strides, static_cast<size_t>(ndim) * sizeof(int64_t));
  for (const Dtype known : {Dtype::float32, Dtype::float64, Dtype::bfloat16, Dtype::float16}) {
    if (dtype != code(known)) continue;
    view.type_code = known == Dtype::bfloat16 ? 4 : 2;
    view.type_bits = known == Dtype::float64 ? 64 : known == Dtype::float32 ? 32 : 16;
  }
  return view;
}

void Tensor::copy_from(const Tensor& other) { check(torch.copy(handle_, other.handle_, 0)); }

Value Tensor::release() { return reinterpret_cast<Value>(std::exchange(handle_, nullptr)); }

double number(Value value) {
  double found;
  std::memcpy(&found, &value, sizeof found);
  return found;
}

}  // namespace batchnorm::abi
