// Mean and sum of squared deviations in float64, and Chan's rule, which merges them.
//
// Values are summed in the arithmetic dtype about a shift near the mean, in blocks short enough that a float sum is
// exact to a few units, and each block is merged into float64. A block whose shift turns out to lie far from its mean
// is summed again about the mean: nothing cancels, whatever the data (a padded border, an outlier in front).
#pragma once

#include "simd.hpp"

namespace batchnorm {
namespace BATCHNORM_ISA {

struct Moment {
  double count = 0, mean = 0, m2 = 0;

  // From sums of (x - shift) and (x - shift)^2.
  static Moment of_sums(double count, double shift, double first, double second) {
    if (count == 0) return {};
    const double offset = first / count;
    const double m2 = second - first * offset;
    return {count, shift + offset, m2 < 0 ? 0 : m2};
  }

  // Whether the shift lay more than two standard deviations off.
  bool is_cancelled(double shift) const {
    const double offset = mean - shift;
    return offset * offset * count > 4 * m2;
  }

  void merge(const Moment& other) {
    if (other.count == 0) return;
    if (count == 0) {
      *this = other;
      return;
    }
    const double all = count + other.count, share = other.count / all, gap = other.mean - mean;
    mean += gap * share;
    m2 += other.m2 + gap * gap * count * share;
    count = all;
  }

  double var() const { return count > 0 ? m2 / count : 0; }
};

}  // namespace BATCHNORM_ISA
}  // namespace batchnorm
