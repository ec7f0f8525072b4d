#include "select.hpp"

#include <atomic>
#include <cstring>

namespace batchnorm {

namespace plain { extern const Kernels kernels; }
#if defined(BATCHNORM_X86)
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
#endif
#if defined(BATCHNORM_AVX512BF16)
namespace avx512bf16 { extern const Kernels kernels; }
#endif

namespace {

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels* const* usable_kernels() {
  static const Kernels* found[5] = {};
  static const bool is_filled = [] {
    int n = 0;
#if defined(BATCHNORM_X86)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if defined(BATCHNORM_AVX512BF16)
    if (has_avx512 && __builtin_cpu_supports("avx512bf16")) found[n++] = &avx512bf16::kernels;
#endif
    if (has_avx512) found[n++] = &avx512::kernels;
    if (has_avx2) found[n++] = &avx2::kernels;
#endif
    found[n++] = &plain::kernels;
    return true;
  }();
  (void)is_filled;
  return found;
}

const Kernels& kernels() {
  const Kernels* now = chosen.load(std::memory_order_relaxed);
  return now ? *now : *usable_kernels()[0];
}

bool choose_kernels(const char* name) {
  for (const Kernels* const* k = usable_kernels(); *k; ++k) {
    if (std::strcmp((*k)->name, name) != 0) continue;
    chosen.store(*k, std::memory_order_relaxed);
    return true;
  }
  return false;
}

}  // namespace batchnorm
