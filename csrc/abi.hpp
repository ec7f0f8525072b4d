// Tensors of torch's stable C interface, which needs no Python: its functions are found in the library that torch has
// loaded, and declared here, so that the build needs no headers of torch.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "tensor.hpp"

namespace batchnorm::abi {

// Finds the functions in torch's library, `path`; false where they are not there: torch before 2.13, or no dlopen.
bool load(const char* path);

using Value = uint64_t;  // an argument or result of an operator: a number, or a pointer to what is owned
using Kernel = void (*)(Value* stack, uint64_t arguments, uint64_t results);

// Gives an operator of torch its kernel for the CPU; false where torch refuses.
bool register_kernel(const char* name, Kernel kernel);

int threads();  // torch.get_num_threads()

// One tensor, owned.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(Value value);           // takes over an argument
  static Tensor optional(Value value);    // likewise, of what may be None
  static Tensor like(const Tensor& other);
  static Tensor vector(int64_t length, Dtype dtype);
  Tensor(Tensor&& other) noexcept : handle_(other.handle_) { other.handle_ = nullptr; }
  Tensor& operator=(Tensor&& other) noexcept;
  ~Tensor();

  TensorView view() const;  // of nothing where it is None
  void copy_from(const Tensor& other);
  Value release();          // as a result

 private:
  void* handle_ = nullptr;
};

double number(Value value);

}  // namespace batchnorm::abi
