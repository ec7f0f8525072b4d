// Mean and variance in float64 from the first addition on: the same to rounding in whatever tensors the values come.
//
// The other kernels sum in the dtype in which they compute, exact enough to normalise with. Here each value is widened
// first. A block of rows that stays in the second-level cache is gone through twice, for its means and for the squares
// about them, so that nothing cancels; the means are summed about a first value, as rounding at the size of a large mean
// would be the error of the whole. Blocks merge by Chan's rule, in an order that depends on the shape alone.
#pragma once

#include "../parallel.hpp"
#include "../tiling.hpp"
#include "moment.hpp"

namespace batchnorm {
namespace BATCHNORM_ISA {

typedef float HalfFloats __attribute__((vector_size(kVectorBytes / 2)));

// As many values as a register holds floats, in float64.
struct Pair {
  Doubles low, high;
};
constexpr int64_t kPair = 2 * kLanes<double>;

inline Pair pair_at(const double* p) { return {load_bytes<Doubles>(p), load_bytes<Doubles>(p + kLanes<double>)}; }
inline Pair pair_at(const float* p) {
  return {__builtin_convertvector(load_bytes<HalfFloats>(p), Doubles),
          __builtin_convertvector(load_bytes<HalfFloats>(p + kLanes<double>), Doubles)};
}
template <class T> inline Pair pair_at(const T* p) {
  const Floats v = Storage<T>::load(p);
  float lanes[kPair];
  store_bytes(lanes, v);
  return pair_at(lanes);
}

// The sum of f(x[i]) over a run; f takes a Doubles or a double.
template <class T, class F> inline double sum_of(const T* x, int64_t n, F f) {
  Doubles sums[4] = {};
  int64_t i = 0;
  for (; i + 2 * kPair <= n; i += 2 * kPair) {
    const Pair a = pair_at(x + i), b = pair_at(x + i + kPair);
    sums[0] += f(a.low);
    sums[1] += f(a.high);
    sums[2] += f(b.low);
    sums[3] += f(b.high);
  }
  if (i + kPair <= n) {
    const Pair a = pair_at(x + i);
    sums[0] += f(a.low);
    sums[1] += f(a.high);
    i += kPair;
  }
  double rest = 0;
  for (; i < n; ++i) rest += f(static_cast<double>(Storage<T>::widen(x[i])));
  return rest + total((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T> inline double sum_of_run(const T* x, int64_t n, double shift) {
  return sum_of(x, n, [shift](auto v) { return v - shift; });
}
template <class T> inline double squares_of_run(const T* x, int64_t n, double mean) {
  return sum_of(x, n, [mean](auto v) {
    const auto d = v - mean;
    return d * d;
  });
}

// out[j] += the sum of f(row[j], j) over four rows; f takes a Doubles and where its values begin, or a double.
template <class T, class F> inline void add_rows(double* out, const T* x, int64_t pitch, int rows, int64_t n, F f) {
  int64_t j = 0;
  for (; j + kPair <= n; j += kPair) {
    Doubles low = load_bytes<Doubles>(out + j), high = load_bytes<Doubles>(out + j + kLanes<double>);
    for (int r = 0; r < rows; ++r) {
      const Pair v = pair_at(x + r * pitch + j);
      low += f(v.low, j);
      high += f(v.high, j + kLanes<double>);
    }
    store_bytes(out + j, low);
    store_bytes(out + j + kLanes<double>, high);
  }
  for (; j < n; ++j)
    for (int r = 0; r < rows; ++r) out[j] += f(static_cast<double>(Storage<T>::widen(x[r * pitch + j])), j);
}

template <class T> inline double first_of(const T* x) { return static_cast<double>(Storage<T>::widen(*x)); }

inline Doubles values_at(const double* means, int64_t j, Doubles) { return load_bytes<Doubles>(means + j); }
inline double values_at(const double* means, int64_t j, double) { return means[j]; }

// Mean and sum of squared deviations of some channels, over `count` values of each.
struct Channels {
  double count;
  double *mean, *m2;

  void merge(int64_t channels, double other_count, const double* other_mean, const double* other_m2) {
    if (other_count == 0) return;
    const double all = count + other_count, share = other_count / all, weight = count * share;
    for (int64_t c = 0; c < channels; ++c) {
      const double gap = other_mean[c] - mean[c];
      mean[c] += gap * share;
      m2[c] += other_m2[c] + gap * gap * weight;
    }
    count = all;
  }
};

template <class T> class WideStats {
 public:
  explicit WideStats(const Call& call) : call_(call) {
    const int64_t bytes = call.N * call.C * call.L * bytes_of(call.dtype);
    const int64_t worth = bytes / kBytesPerThread + 1;
    is_planar_ = call.layout == Layout::planar;
    const int64_t rows = is_planar_ ? call.N : call.N * call.L;
    parts_ = least(kParts, least(rows, worth));
    // Few rows, as of one large image: their channels are shared out as well.
    slices_ = is_planar_ ? least(call.C, least(kParts, worth) / parts_) : 1;
    rows_ = rows;
  }

  void operator()() {
    const int64_t channels = call_.C;
    partials_ = static_cast<double*>(scratch(Arena::call, static_cast<size_t>(2 * channels * parts_) * sizeof(double)));
    for (int64_t i = 0; i < 2 * channels * parts_; ++i) partials_[i] = 0;
    run_tasks(parts_ * slices_, call_.threads, part, this);
    for (int64_t c = 0; c < channels; ++c) call_.mean[c] = call_.var[c] = 0;
    Channels whole{0, call_.mean, call_.var};
    for (int64_t p = 0; p < parts_; ++p) {
      const int64_t values = (first_row(p + 1) - first_row(p)) * (is_planar_ ? call_.L : 1);
      whole.merge(channels, static_cast<double>(values), mean_of(p), m2_of(p));
    }
    for (int64_t c = 0; c < channels; ++c) call_.var[c] /= whole.count;
  }

 private:
  static constexpr int64_t kBlockBytes = 128 << 10;
  static constexpr int64_t kRun = 4096;    // values of one channel that are gone through twice at once
  static constexpr int64_t kColumns = 64;  // fewer channels than this: several rows are taken as one

  static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
  int64_t first_row(int64_t part) const { return rows_ * part / parts_; }
  double* mean_of(int64_t part) const { return partials_ + 2 * call_.C * part; }
  double* m2_of(int64_t part) const { return mean_of(part) + call_.C; }
  const T* at(int64_t n, int64_t c) const {
    return static_cast<const T*>(call_.x.data) + n * call_.x.stride_n + c * call_.x.stride_c;
  }

  static void part(void* self, int64_t task, int64_t) {
    const WideStats& me = *static_cast<WideStats*>(self);
    const int64_t p = task / me.slices_, slice = task % me.slices_, channels = me.call_.C;
    if (!me.is_planar_) return me.matrix(p);
    me.planar(p, channels * slice / me.slices_, channels * (slice + 1) / me.slices_);
  }

  void planar(int64_t p, int64_t c0, int64_t c1) const {
    const int64_t run = call_.L, channels = c1 - c0;
    const int64_t rows = kBlockBytes / (channels * run * static_cast<int64_t>(sizeof(T))) + 1;
    auto* mean = static_cast<double*>(scratch(Arena::task, static_cast<size_t>(2 * channels) * sizeof(double)));
    Channels mine{0, mean_of(p) + c0, m2_of(p) + c0};
    for (int64_t n = first_row(p); n < first_row(p + 1); n += rows) {
      const int64_t end = least(n + rows, first_row(p + 1));
      const auto values = static_cast<double>((end - n) * run);
      if (run < kRun) {
        short_runs(n, end, c0, channels, mean);
      } else {
        long_runs(n, end, c0, channels, mean);
      }
      mine.merge(channels, values, mean, mean + channels);
    }
  }

  void short_runs(int64_t n0, int64_t n1, int64_t c0, int64_t channels, double* mean) const {
    double* m2 = mean + channels;
    for (int64_t c = 0; c < 2 * channels; ++c) mean[c] = 0;
    for (int64_t n = n0; n < n1; ++n)
      for (int64_t c = 0; c < channels; ++c) mean[c] += sum_of_run(at(n, c0 + c), call_.L, first_of(at(n0, c0 + c)));
    const double count = static_cast<double>((n1 - n0) * call_.L);
    for (int64_t c = 0; c < channels; ++c) mean[c] = first_of(at(n0, c0 + c)) + mean[c] / count;
    for (int64_t n = n0; n < n1; ++n)
      for (int64_t c = 0; c < channels; ++c) m2[c] += squares_of_run(at(n, c0 + c), call_.L, mean[c]);
  }

  void long_runs(int64_t n0, int64_t n1, int64_t c0, int64_t channels, double* mean) const {
    for (int64_t c = 0; c < channels; ++c) {
      Moment whole;
      for (int64_t n = n0; n < n1; ++n)
        for (int64_t l = 0; l < call_.L; l += kRun) {
          const T* x = at(n, c0 + c) + l;
          const int64_t length = least(kRun, call_.L - l);
          const double count = static_cast<double>(length), first = first_of(x);
          const double about = first + sum_of_run(x, length, first) / count;
          whole.merge({count, about, squares_of_run(x, length, about)});
        }
      mean[c] = whole.mean;
      mean[channels + c] = whole.m2;
    }
  }

  void matrix(int64_t p) const {
    const int64_t channels = call_.C, end = first_row(p + 1);
    const int64_t pitch = call_.x.stride_l;
    const int64_t fold = pitch == channels && channels < kColumns ? kColumns / channels : 1;
    int64_t n = first_row(p);
    const int64_t folded = (end - n) / fold;
    Channels mine{0, mean_of(p), m2_of(p)};
    columns(n, folded, fold, pitch, mine);
    n += folded * fold;
    if (n < end) columns(n, end - n, 1, pitch, mine);
  }

  // `rows` rows of fold * C columns, from row `start` of C on.
  void columns(int64_t start, int64_t rows, int64_t fold, int64_t pitch, Channels& mine) const {
    const int64_t channels = call_.C, width = fold * channels, stride = fold * pitch;
    const int64_t block = kBlockBytes / (width * static_cast<int64_t>(sizeof(T))) + 16;
    auto* mean = static_cast<double*>(scratch(Arena::task, static_cast<size_t>(3 * width) * sizeof(double)));
    double *m2 = mean + width, *first = m2 + width;
    const T* x = static_cast<const T*>(call_.x.data) + start * pitch;
    for (int64_t r = 0; r < rows; r += block, x += block * stride) {
      const int64_t number = least(block, rows - r);
      for (int64_t j = 0; j < 2 * width; ++j) mean[j] = 0;
      for (int64_t j = 0; j < width; ++j) first[j] = first_of(x + j);
      over_rows(mean, x, stride, number, width, [first](auto v, int64_t j) { return v - values_at(first, j, v); });
      for (int64_t j = 0; j < width; ++j) mean[j] = first[j] + mean[j] / static_cast<double>(number);
      over_rows(m2, x, stride, number, width, [mean](auto v, int64_t j) {
        const auto d = v - values_at(mean, j, v);
        return d * d;
      });
      for (int64_t k = 0; k < fold; ++k)
        mine.merge(channels, static_cast<double>(number), mean + k * channels, m2 + k * channels);
    }
  }

  template <class F> static void over_rows(double* out, const T* x, int64_t pitch, int64_t rows, int64_t n, F f) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) add_rows(out, x + r * pitch, pitch, 4, n, f);
    for (; r < rows; ++r) add_rows(out, x + r * pitch, pitch, 1, n, f);
  }

  const Call& call_;
  bool is_planar_;
  int64_t rows_, parts_, slices_;
  double* partials_ = nullptr;
};

// Writes call.mean and call.var, float64, of call.x; without a mask. No value at all must not come here.
inline void wide_stats(const Call& call) {
  switch (call.dtype) {
    case Dtype::float32: return WideStats<float>(call)();
    case Dtype::float64: return WideStats<double>(call)();
    case Dtype::bfloat16: return WideStats<bfloat16>(call)();
    case Dtype::float16: return WideStats<float16>(call)();
  }
}

}  // namespace BATCHNORM_ISA
}  // namespace batchnorm
