#include "cache.hpp"

#include <cstdio>
#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace batchnorm {
namespace {

// Linux' sysfs tells what one core sees; sysconf adds up the slices of all sockets on some virtual machines.
int64_t from_sysfs(int level) {
  for (int index = 0; index < 8; ++index) {
    char path[96];
    int found = 0;
    std::snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/level", index);
    if (FILE* file = std::fopen(path, "r")) {
      if (std::fscanf(file, "%d", &found) != 1) found = 0;
      std::fclose(file);
    }
    if (found != level) continue;
    std::snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/size", index);
    long size = 0;
    char unit = 0;
    if (FILE* file = std::fopen(path, "r")) {
      if (std::fscanf(file, "%ld%c", &size, &unit) < 1) size = 0;
      std::fclose(file);
    }
    if (size > 0) return size * (unit == 'M' ? 1 << 20 : unit == 'K' ? 1 << 10 : 1);
  }
  return 0;
}

int64_t detected(int level, int64_t fallback, int64_t least, int64_t most) {
  int64_t bytes = from_sysfs(level);
#if defined(__APPLE__)
  size_t length = sizeof bytes;
  const char* name = level == 2 ? "hw.perflevel0.l2cachesize" : "hw.l3cachesize";
  if (sysctlbyname(name, &bytes, &length, nullptr, 0) != 0) bytes = 0;
#endif
  if (bytes <= 0) return fallback;
  return bytes < least ? least : bytes > most ? most : bytes;
}

}  // namespace

int64_t level2_bytes() {
  static const int64_t bytes = detected(2, 1 << 20, 256 << 10, 4 << 20);
  return bytes;
}

int64_t level3_bytes() {
  static const int64_t bytes = detected(3, 32 << 20, 2 << 20, int64_t{256} << 20);
  return bytes;
}

}  // namespace batchnorm
