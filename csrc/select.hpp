// Which instruction set the core runs with.
#pragma once

#include "call.hpp"

namespace batchnorm {

// The instruction sets that this binary has and this machine can run, the widest first; ends with null.
const Kernels* const* usable_kernels();

// The one in use: the widest, or the one that was chosen.
const Kernels& kernels();

// Chooses by name ("avx512", "avx2", "plain"); false where there is none of that name here.
bool choose_kernels(const char* name);

}  // namespace batchnorm
