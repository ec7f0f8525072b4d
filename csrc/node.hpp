// A training pass as a node of autograd's graph without Python: for small inputs, where a node in Python costs more than
// the arithmetic. Torch has such a node in C++ for an operator that has no kernel for the CPU, aten::cudnn_batch_norm. Here
// it gets one, forward and backward.
#pragma once

namespace batchnorm {

// Registers the kernels, `library` being torch's own; false where this version of torch cannot take them.
bool install_node(const char* library);

}  // namespace batchnorm
