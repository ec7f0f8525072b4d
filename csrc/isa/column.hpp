// Kernels on a matrix whose columns have coefficients of their own: channels-last activations, and the short runs of
// small feature maps with the coefficients spread out. Several rows at a time share what is loaded for a column.
#pragma once

#include "row.hpp"

namespace batchnorm {
namespace BATCHNORM_ISA {

// Coefficients by column; each array is 64-byte aligned and padded to whole vectors.
template <class A> struct ColumnCoefficients {
  A *mean = nullptr, *scale = nullptr, *shift = nullptr, *by_x = nullptr, *constant = nullptr;
  ColumnCoefficients from(int64_t column) const {
    return {mean + column, scale + column, shift + column, by_x + column, constant + column};
  }
};

template <class F> inline void over_columns(int64_t columns, int64_t lanes, F f) {
  int64_t j = 0;
  for (; j + lanes <= columns; j += lanes) f(j, Whole{});
  if (j < columns) f(j, Part{columns - j});
}

// Calls f(row, number) with groups of at most Rows rows; the number is a compile-time constant.
template <int Rows> struct Number {
  static constexpr int value = Rows;
};
template <int Rows, class F> inline void over_rows(int64_t rows, F f) {
  int64_t r = 0;
  for (; r + Rows <= rows; r += Rows) f(r, Number<Rows>{});
  for (; r < rows; ++r) f(r, Number<1>{});
}

// How whole vectors are written: past the caches, or not.
struct Stream {
  Streamed operator()(Whole) const { return {}; }
  Part operator()(Part part) const { return part; }
};
struct Store {
  Whole operator()(Whole) const { return {}; }
  Part operator()(Part part) const { return part; }
};

// Adds x - shift and its square to the sums of each column. `ahead` (values): how far to prefetch.
template <class T>
inline void add_value_columns(Matrix<const T> x, int64_t rows, int64_t columns, const Arithmetic<T>* shift,
                              Arithmetic<T>* first, Arithmetic<T>* second, int64_t ahead) {
  using A = Arithmetic<T>;
  using V = Vector<A>;
  over_rows<8>(rows, [&](int64_t r, auto number) {
    const T* p = x.row(r);
    over_columns(columns, kLanes<A>, [&](int64_t j, auto how) {
      const V about = load_bytes<V>(shift + j);
      V a = load_bytes<V>(first + j), b = load_bytes<V>(second + j);
#pragma GCC unroll 8
      for (int k = 0; k < number.value; ++k) {
        if (ahead) prefetch(p + k * x.pitch + j + ahead);
        const V d = take(p + k * x.pitch + j, how) - about;  // a partial vector spills into padding only
        a += d;
        b += d * d;
      }
      store_bytes(first + j, a);
      store_bytes(second + j, b);
    });
  });
}

// Calls run(how to write whole vectors, how many rows at a time, whether to fetch the output of the rows that come next:
// see fetches_output()). Whole rows go one by one: one stream to read and one to write is what the hardware prefetches best,
// and the coefficients come from the first-level cache. (Four at a time took 1.4 times as long where the output had to come
// into the caches first: Zen 4, 64x256x14x14 channels-last.) Parts of rows, as tiles have them, are too short for that, and
// go four at a time, which saves a fifth on 64x512x7x7 and, streamed, a tenth on 64x256x14x14. So does what lies in the
// second-level caches: there loading the coefficients costs (a tenth on 2048x100).
template <class F> inline void over_maps(bool stream, bool is_small, bool in_parts, F run) {
  if (stream) in_parts ? run(Stream{}, Number<4>{}, No{}) : run(Stream{}, Number<1>{}, No{});
  else if (is_small) run(Store{}, Number<4>{}, No{});
  else in_parts ? run(Store{}, Number<4>{}, Yes{}) : run(Store{}, Number<1>{}, No{});
}

// y = activation((x - mean) * scale + shift + residual). `ahead` (values): where the next tile lies, or 0.
template <class T, Kind K>
inline void apply_columns(Matrix<T> y, Matrix<const T> x, Matrix<const T> residual, int64_t rows, int64_t columns,
                          const ColumnCoefficients<Arithmetic<T>>& of, Activation which, bool stream, bool is_small,
                          int64_t ahead) {
  using A = Arithmetic<T>;
  using V = Vector<A>;
  over_maps(stream, is_small, columns < x.pitch, [&](auto streamed, auto together, auto fetches) {
    over_rows<together.value>(rows, [&](int64_t r, auto number) {
      const T *px = x.row(r), *pr = residual.row(r);
      T* py = y.row(r);
      over_columns(columns, kLanes<A>, [&](int64_t j, auto how) {
        const V mean = load_bytes<V>(of.mean + j), scale = load_bytes<V>(of.scale + j);
        const V shift = load_bytes<V>(of.shift + j);
#pragma GCC unroll 4
        for (int k = 0; k < number.value; ++k) {
          if (ahead) prefetch(px + k * x.pitch + j + ahead);
          if constexpr (fetches.value) prefetch(py + (k + number.value) * y.pitch + j);
          V z = (take(px + k * x.pitch + j, how) - mean) * scale + shift;
          if (pr) z += take(pr + k * residual.pitch + j, how);
          put(py + k * y.pitch + j, activate<K>(z, which), streamed(how));
        }
      });
    });
  });
}

// Adds dz and dz * (x - mean) to the sums of each column. `ahead` (values): how far to prefetch. A small dy was written just
// before and is in the caches still, but x comes from the forward pass. (An inverted-residual network, 8 images: the
// whole backward of its layers in 0.8 to 0.9 of the time.)
template <class T, Kind K>
inline void add_gradient_columns(Matrix<const T> dy, Matrix<const T> x, Matrix<const T> residual, int64_t rows,
                                 int64_t columns, const ColumnCoefficients<Arithmetic<T>>& of, Activation which,
                                 Arithmetic<T>* first, Arithmetic<T>* second, bool is_small, int64_t ahead) {
  using A = Arithmetic<T>;
  using V = Vector<A>;
  over_rows<4>(rows, [&](int64_t r, auto number) {
    const T *pdy = dy.row(r), *px = x.row(r), *pr = residual.row(r);
    over_columns(columns, kLanes<A>, [&](int64_t j, auto how) {
      const V mean = load_bytes<V>(of.mean + j), scale = load_bytes<V>(of.scale + j);
      const V shift = load_bytes<V>(of.shift + j);
      V a = load_bytes<V>(first + j), b = load_bytes<V>(second + j);
#pragma GCC unroll 4
      for (int k = 0; k < number.value; ++k) {
        prefetch(px + k * x.pitch + j + ahead);
        if (!is_small) prefetch(pdy + k * dy.pitch + j + ahead);
        const V d = take(px + k * x.pitch + j, how) - mean;
        V dz = take(pdy + k * dy.pitch + j, how);
        if constexpr (K != Kind::none) {
          V z = d * scale + shift;
          if (pr) z += take(pr + k * residual.pitch + j, how);
          dz = before_activation<K>(dz, z, which);
        }
        a += dz;
        b += dz * d;
      }
      store_bytes(first + j, a);
      store_bytes(second + j, b);
    });
  });
}

// dx = dz * scale + (x - mean) * by_x + constant (the last two only where is_estimated); dresidual = dz.
template <class T, Kind K>
inline void gradient_columns(Matrix<T> dx, Matrix<T> dresidual, Matrix<const T> dy, Matrix<const T> x,
                             Matrix<const T> residual, int64_t rows, int64_t columns,
                             const ColumnCoefficients<Arithmetic<T>>& of, Activation which, bool is_estimated,
                             bool stream, bool is_small, int64_t ahead) {
  using A = Arithmetic<T>;
  using V = Vector<A>;
  over_maps(stream, is_small, columns < x.pitch, [&](auto streamed, auto together, auto fetches) {
    over_rows<together.value>(rows, [&](int64_t r, auto number) {
      const T *pdy = dy.row(r), *px = x.row(r), *pr = residual.row(r);
      T *pdx = dx.row(r), *pdr = dresidual.row(r);
      over_columns(columns, kLanes<A>, [&](int64_t j, auto how) {
        const V mean = load_bytes<V>(of.mean + j), scale = load_bytes<V>(of.scale + j);
        const V shift = load_bytes<V>(of.shift + j);
        const V by_x = load_bytes<V>(of.by_x + j), constant = load_bytes<V>(of.constant + j);
#pragma GCC unroll 4
        for (int k = 0; k < number.value; ++k) {
          if (ahead) {
            prefetch(px + k * x.pitch + j + ahead);
            prefetch(pdy + k * dy.pitch + j + ahead);
          }
          if constexpr (fetches.value) {
            if (pdx) prefetch(pdx + (k + number.value) * dx.pitch + j);
            if (pdr) prefetch(pdr + (k + number.value) * dresidual.pitch + j);
          }
          V dz = take(pdy + k * dy.pitch + j, how), d{};
          if (K != Kind::none || is_estimated) d = take(px + k * x.pitch + j, how) - mean;
          if constexpr (K != Kind::none) {
            V z = d * scale + shift;
            if (pr) z += take(pr + k * residual.pitch + j, how);
            dz = before_activation<K>(dz, z, which);
          }
          if (pdr) put(pdr + k * dresidual.pitch + j, dz, streamed(how));
          if (!pdx) continue;
          V g = dz * scale;
          if (is_estimated) g += d * by_x + constant;
          put(pdx + k * dx.pitch + j, g, streamed(how));
        }
      });
    });
  });
}

}  // namespace BATCHNORM_ISA
}  // namespace batchnorm
