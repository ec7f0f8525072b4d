// Kernels on the runs of one channel, whose values lie side by side in memory.
#pragma once

#include "activation.hpp"
#include "moment.hpp"

namespace batchnorm {
namespace BATCHNORM_ISA {

// How a vector meets memory: whole, whole and past the caches, or its first lanes only.
struct Whole {};
struct Streamed {};
struct Part {
  int64_t count;
};

// Arguments that choose an instance of a generic lambda.
struct Yes { static constexpr bool value = true; };
struct No { static constexpr bool value = false; };

template <class T> inline Vector<Arithmetic<T>> take(const T* p, Whole) { return Storage<T>::load(p); }
template <class T> inline Vector<Arithmetic<T>> take(const T* p, Streamed) { return Storage<T>::load(p); }
template <class T> inline Vector<Arithmetic<T>> take(const T* p, Part part) { return load_part(p, part.count); }
template <class T, class V> inline void put(T* p, V v, Whole) { Storage<T>::store(p, v); }
template <class T, class V> inline void put(T* p, V v, Streamed) { Storage<T>::stream(p, v); }
template <class T, class V> inline void put(T* p, V v, Part part) { store_part(p, v, part.count); }

template <class T> constexpr int64_t kStreamBytes = kLanes<Arithmetic<T>> * static_cast<int64_t>(sizeof(T));

// Calls f(i, how) for the vectors of a run of n values; streamed stores start where `out` is aligned.
template <class T, class F> inline void over_run(const T* out, int64_t n, bool stream, F f) {
  constexpr int64_t lanes = kLanes<Arithmetic<T>>;
  int64_t i = 0;
  if (stream) {
    const int64_t off = reinterpret_cast<uintptr_t>(out) % kStreamBytes<T>;
    if (off) {
      const int64_t head = (kStreamBytes<T> - off) / static_cast<int64_t>(sizeof(T));
      i = head < n ? head : n;
      f(0, Part{i});
    }
#pragma GCC unroll 4
    for (; i + lanes <= n; i += lanes) f(i, Streamed{});
  } else {
#pragma GCC unroll 4
    for (; i + lanes <= n; i += lanes) f(i, Whole{});
  }
  if (i < n) f(i, Part{n - i});
}

// Rows of values; each operand has a pitch (distance of rows, in values) of its own.
template <class T> struct Matrix {
  T* data = nullptr;
  int64_t pitch = 0;
  T* row(int64_t r) const { return data ? data + r * pitch : nullptr; }
  Matrix at(int64_t r, int64_t column) const { return {data ? data + r * pitch + column : nullptr, pitch}; }
};

// What is done to the values of one channel.
template <class A> struct alignas(8) Coefficients {
  A mean;   // rounded to A
  A scale;  // weight / sqrt(var + eps)
  A shift;  // bias, and what rounding took from the mean: z = (x - mean) * scale + shift
  A by_x;   // backward: dx = dz * scale + (x - mean) * by_x + constant
  A constant;
};

// Four independent accumulators of each sum hide the latency of the additions. They have names of their own because an
// array would stay in memory.
template <class A> struct Sums {
  Vector<A> a{}, b{}, c{}, d{}, aa{}, bb{}, cc{}, dd{};
  double first_total() const { return total(a + b + c + d); }
  double second_total() const { return total(aa + bb + cc + dd); }
};

// Adds x - shift and its square, for `rows` runs of n values.
template <class T>
inline void add_values(Sums<Arithmetic<T>>& sums, Matrix<const T> runs, int64_t rows, int64_t n, Arithmetic<T> shift) {
  using A = Arithmetic<T>;
  constexpr int64_t lanes = kLanes<A>;
  const Vector<A> about = broadcast(shift);
  Sums<A> s = sums;  // in registers
  auto add = [&](Vector<A>& first, Vector<A>& second, Vector<A> d) {
    first += d;
    second += d * d;
  };
  for (int64_t r = 0; r < rows; ++r) {
    const T* x = runs.row(r);
    int64_t i = 0;
    for (; i + 4 * lanes <= n; i += 4 * lanes) {
      add(s.a, s.aa, Storage<T>::load(x + i) - about);
      add(s.b, s.bb, Storage<T>::load(x + i + lanes) - about);
      add(s.c, s.cc, Storage<T>::load(x + i + 2 * lanes) - about);
      add(s.d, s.dd, Storage<T>::load(x + i + 3 * lanes) - about);
    }
    if (i + lanes <= n) add(s.a, s.aa, Storage<T>::load(x + i) - about), i += lanes;
    if (i + lanes <= n) add(s.b, s.bb, Storage<T>::load(x + i) - about), i += lanes;
    if (i + lanes <= n) add(s.c, s.cc, Storage<T>::load(x + i) - about), i += lanes;
    if (i < n) add(s.d, s.dd, first_lanes<A>(n - i) ? load_part(x + i, n - i) - about : Vector<A>{});
  }
  sums = s;
}

// The same where the mask is not 0; what it leaves out may be anything. Returns how many counted.
template <class T>
inline int64_t add_masked_values(Sums<Arithmetic<T>>& sums, const T* x, const uint8_t* mask, int64_t n,
                                 Arithmetic<T> shift) {
  using A = Arithmetic<T>;
  typename Register<A>::Mask counted{};
  over_run(x, n, false, [&](int64_t i, auto how) {
    const auto counts = lanes_of<A>(mask + i, n - i < kLanes<A> ? n - i : kLanes<A>);
    const Vector<A> d = counts ? take(x + i, how) - broadcast(shift) : Vector<A>{};
    counted -= counts;
    sums.a += d;
    sums.aa += d * d;
  });
  return static_cast<int64_t>(total(counted));
}

// y = activation((x - mean) * scale + shift + residual), for `rows` runs of n values. `ahead` (values): how far on the runs
// lie that are read next, or 0. `fetches`: whether the output of the next row is fetched.
template <class T, Kind K>
inline void apply_rows(Matrix<T> y, Matrix<const T> x, Matrix<const T> residual, int64_t rows, int64_t n,
                       const Coefficients<Arithmetic<T>>& of, Activation which, bool stream, int64_t ahead,
                       bool fetches) {
  using V = Vector<Arithmetic<T>>;
  const V mean = broadcast(of.mean), scale = broadcast(of.scale), shift = broadcast(of.shift);
  auto run = [&](auto has_residual, auto prefetches, auto fetching) {
    for (int64_t r = 0; r < rows; ++r) {
      const T *px = x.row(r), *pr = residual.row(r);
      T* py = y.row(r);
      const int64_t next = r + 1 < rows ? y.pitch : 0;
      over_run(py, n, stream, [&](int64_t i, auto how) {
        if constexpr (prefetches.value) prefetch(px + ahead + i);
        if constexpr (fetching.value) prefetch(py + next + i);
        V z = (take(px + i, how) - mean) * scale + shift;
        if constexpr (has_residual.value) z += take(pr + i, how);
        put(py + i, activate<K>(z, which), how);
      });
    }
  };
  auto read = [&](auto has_residual, auto prefetches) {
    fetches ? run(has_residual, prefetches, Yes{}) : run(has_residual, prefetches, No{});
  };
  if (residual.data) ahead ? read(Yes{}, Yes{}) : read(Yes{}, No{});
  else ahead ? read(No{}, Yes{}) : read(No{}, No{});
}

// The same for runs of `length` values that lie side by side, as if they were one: no vector but the last is partial, and all
// are as aligned as the first. A vector that two runs share takes the coefficients of each where it applies, so that
// length must be no less than a vector's. `of`: by channel; the first run belongs to channel c.
template <class T, Kind K>
inline void apply_runs(T* y, const T* x, const T* residual, int64_t runs, int64_t length, int64_t c, int64_t channels,
                       const Coefficients<Arithmetic<T>>* of, Activation which, bool stream) {
  using A = Arithmetic<T>;
  using V = Vector<A>;
  constexpr int64_t lanes = kLanes<A>;
  typename Register<A>::Mask lane;
  for (int64_t k = 0; k < lanes; ++k) lane[k] = k;
  auto run = [&](auto has_residual, auto whole) {
    auto step = [&](int64_t i, V mean, V scale, V shift, auto how) {
      V z = (take(x + i, how) - mean) * scale + shift;
      if constexpr (has_residual.value) z += take(residual + i, how);
      put(y + i, activate<K>(z, which), how);
    };
    V mean = broadcast(of[c].mean), scale = broadcast(of[c].scale), shift = broadcast(of[c].shift);
    int64_t i = 0;
    for (int64_t end = length; end <= runs * length; end += length) {
      for (; i + lanes <= end; i += lanes) step(i, mean, scale, shift, whole);
      const bool is_last = end == runs * length;
      if (is_last && i < end) step(i, mean, scale, shift, Part{end - i});
      if (is_last) break;
      if (++c == channels) c = 0;
      const V next_mean = broadcast(of[c].mean), next_scale = broadcast(of[c].scale);
      const V next_shift = broadcast(of[c].shift);
      if (i < end) {
        const auto mine = lane < static_cast<decltype(lane[0] + 0)>(end - i);
        step(i, mine ? mean : next_mean, mine ? scale : next_scale, mine ? shift : next_shift, whole);
        i += lanes;
      }
      mean = next_mean, scale = next_scale, shift = next_shift;
    }
  };
  stream = stream && reinterpret_cast<uintptr_t>(y) % kStreamBytes<T> == 0;
  if (residual) stream ? run(Yes{}, Streamed{}) : run(Yes{}, Whole{});
  else stream ? run(No{}, Streamed{}) : run(No{}, Whole{});
}

// Adds dz and dz * (x - mean), for `rows` runs of n values.
template <class T, Kind K, bool HasResidual>
inline void add_gradients(Sums<Arithmetic<T>>& sums, Matrix<const T> dy, Matrix<const T> x, Matrix<const T> residual,
                          int64_t rows, int64_t n, const Coefficients<Arithmetic<T>>& of, Activation which) {
  using A = Arithmetic<T>;
  using V = Vector<A>;
  constexpr int64_t lanes = kLanes<A>;
  const V mean = broadcast(of.mean), scale = broadcast(of.scale), shift = broadcast(of.shift);
  Sums<A> s = sums;  // in registers
  for (int64_t r = 0; r < rows; ++r) {
    const T *pdy = dy.row(r), *px = x.row(r), *pr = residual.row(r);
    auto add = [&](V& first, V& second, int64_t i, auto how) {
      const V d = take(px + i, how) - mean;
      V dz = take(pdy + i, how);  // lanes beyond the end are 0, and add nothing
      if constexpr (K != Kind::none) {
        V z = d * scale + shift;
        if constexpr (HasResidual) z += take(pr + i, how);
        dz = before_activation<K>(dz, z, which);
      }
      first += dz;
      second += dz * d;
    };
    int64_t i = 0;
    for (; i + 4 * lanes <= n; i += 4 * lanes) {
      add(s.a, s.aa, i, Whole{});
      add(s.b, s.bb, i + lanes, Whole{});
      add(s.c, s.cc, i + 2 * lanes, Whole{});
      add(s.d, s.dd, i + 3 * lanes, Whole{});
    }
    if (i + lanes <= n) add(s.a, s.aa, i, Whole{}), i += lanes;
    if (i + lanes <= n) add(s.b, s.bb, i, Whole{}), i += lanes;
    if (i + lanes <= n) add(s.c, s.cc, i, Whole{}), i += lanes;
    if (i < n) add(s.d, s.dd, i, Part{n - i});
  }
  sums = s;
}

// dx = dz * scale + (x - mean) * by_x + constant, the last two where the mask counts; dresidual = dz. For `rows` runs of n
// values; `ahead` and `fetches` as in apply_rows.
template <class T, Kind K>
inline void gradient_rows(Matrix<T> dx, Matrix<T> dresidual, Matrix<const T> dy, Matrix<const T> x,
                          Matrix<const T> residual, Matrix<const uint8_t> mask, int64_t rows, int64_t n,
                          const Coefficients<Arithmetic<T>>& of, Activation which, bool is_estimated, bool stream,
                          int64_t ahead, bool fetches) {
  using A = Arithmetic<T>;
  using V = Vector<A>;
  const V mean = broadcast(of.mean), scale = broadcast(of.scale), shift = broadcast(of.shift);
  const V by_x = broadcast(of.by_x), constant = broadcast(of.constant);
  auto run = [&](auto reads_residual, auto estimated, auto masked, auto fetching) {
    for (int64_t r = 0; r < rows; ++r) {
      const T *pdy = dy.row(r), *px = x.row(r), *pr = residual.row(r);
      const uint8_t* counting = mask.row(r);
      T *pdx = dx.row(r), *pdr = dresidual.row(r);
      const bool is_last = r + 1 == rows;
      over_run(pdx ? pdx : pdr, n, stream, [&](int64_t i, auto how) {
        if (ahead) {
          prefetch(pdy + ahead + i);
          prefetch(px + ahead + i);
        }
        if constexpr (fetching.value) {
          if (pdx) prefetch(pdx + (is_last ? 0 : dx.pitch) + i);
          if (pdr) prefetch(pdr + (is_last ? 0 : dresidual.pitch) + i);
        }
        V dz = take(pdy + i, how), d{};
        if constexpr (K != Kind::none || estimated.value) d = take(px + i, how) - mean;
        if constexpr (K != Kind::none) {
          V z = d * scale + shift;
          if constexpr (reads_residual.value) z += take(pr + i, how);
          dz = before_activation<K>(dz, z, which);
        }
        if (pdr) put(pdr + i, dz, how);
        if (!pdx) return;
        V g = dz * scale;
        if constexpr (estimated.value) {
          V answer = d * by_x + constant;
          if constexpr (masked.value) {
            const int64_t left = n - i < kLanes<A> ? n - i : kLanes<A>;
            answer = lanes_of<A>(counting + i, left) ? answer : V{};
          }
          g += answer;
        }
        put(pdx + i, g, how);
      });
    }
  };
  const bool reads = residual.data && K != Kind::none;
  if (!is_estimated) reads ? run(Yes{}, No{}, No{}, No{}) : run(No{}, No{}, No{}, No{});
  else if (mask.data) reads ? run(Yes{}, Yes{}, Yes{}, No{}) : run(No{}, Yes{}, Yes{}, No{});
  else if (fetches) reads ? run(Yes{}, Yes{}, No{}, Yes{}) : run(No{}, Yes{}, No{}, Yes{});
  else reads ? run(Yes{}, Yes{}, No{}, No{}) : run(No{}, Yes{}, No{}, No{});
}

}  // namespace BATCHNORM_ISA
}  // namespace batchnorm
