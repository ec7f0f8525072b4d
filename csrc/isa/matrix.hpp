// Activations as a matrix whose columns belong to channels: channels-last ones and (M, C), and planar ones with short
// runs. Which thread works on which rows or columns.
//
// Tiles: where runs are short (7x7, 14x14) a task is a group of channels over all rows, small enough that both passes
// find it in the cache. Otherwise a task is a range of rows: each gives partial statistics, which are merged in a fixed
// order; the second pass starts with the rows that were read last.
#pragma once

#include "../parallel.hpp"
#include "../tiling.hpp"
#include "channel.hpp"
#include "column.hpp"

namespace batchnorm {
namespace BATCHNORM_ISA {

// Column j belongs to channel first_channel + j / run % channels.
struct Grid {
  int64_t rows = 0, columns = 0;
  int64_t tail_columns = 0;  // columns of one more row, where rows of a small C are folded and some are left over
  int64_t channels = 0, run = 1, first_channel = 0, first_column = 0;
};

// How many values ahead of a matrix's row to prefetch, where `together` rows are worked on at once.
template <class T> inline int64_t ahead_of(Matrix<const T> x, int64_t together) {
  const int64_t least = kPrefetchBytes / static_cast<int64_t>(sizeof(T)), group = x.pitch * together;
  return group > least ? group : least;
}

inline int64_t padded(int64_t columns) { return (columns + 15) / 16 * 16; }

// Arrays by channel to arrays by column.
template <class A> inline void spread(A* by_column, const A* by_channel, const Grid& grid) {
  if (grid.run == 1) {
    for (int64_t j = 0; j < grid.columns; j += grid.channels)
      for (int64_t c = 0; c < grid.channels; ++c) by_column[j + c] = by_channel[c];
  } else {
    // Whole vectors: the last one of a channel writes on into the next ones' columns, whose turn comes then.
    constexpr int64_t lanes = kLanes<A>;
    const int64_t run = grid.run, whole = (run + lanes - 1) / lanes * lanes;
    int64_t c = 0;
    for (; c * run + whole <= grid.columns; ++c)
      for (int64_t l = 0; l < run; l += lanes) store_bytes(by_column + c * run + l, broadcast(by_channel[c]));
    for (; c < grid.channels; ++c)
      for (int64_t l = 0; l < run; ++l) by_column[c * run + l] = by_channel[c];
  }
  for (int64_t j = grid.columns; j < padded(grid.columns); ++j) by_column[j] = 0;
}

// Adds sums by column to sums by channel.
template <class A> inline void gather(double* by_channel, const A* by_column, int64_t columns, const Grid& grid) {
  if (grid.run == 1) {
    for (int64_t j = 0; j < columns; j += grid.channels)
      for (int64_t c = 0; c < grid.channels; ++c) by_channel[c] += static_cast<double>(by_column[j + c]);
  } else {
    for (int64_t c = 0; c < grid.channels; ++c) {
      const A* own = by_column + c * grid.run;
      double sums[8] = {};  // one vector; one sum would wait for its own last addition
      int64_t l = 0;
      for (; l + 8 <= grid.run; l += 8)
        for (int k = 0; k < 8; ++k) sums[k] += static_cast<double>(own[l + k]);
      for (; l < grid.run; ++l) sums[l % 8] += static_cast<double>(own[l]);
      by_channel[c] += ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    }
  }
}

template <class T> inline void clear(T* values, int64_t number) {
  memset(values, 0, static_cast<size_t>(number) * sizeof(T));
}

template <class A> inline ColumnCoefficients<A> cut_coefficients(Cutter& from, int64_t columns) {
  ColumnCoefficients<A> of;
  for (A** array : {&of.mean, &of.scale, &of.shift, &of.by_x, &of.constant}) *array = from.cut<A>(padded(columns));
  return of;
}

// By column, for the channels of the grid; with the `answers` to the statistics once the sums are known that these need.
template <class A>
inline void fill_coefficients(const Call& call, const Grid& grid, const ChannelValues& channels, bool answers,
                              const ColumnCoefficients<A>& of, Cutter room) {
  const ColumnCoefficients<A> by_channel =
      grid.columns == grid.channels ? of : cut_coefficients<A>(room, grid.channels);
  const double *__restrict mean = call.mean + grid.first_channel, *__restrict weight = channels.weight;
  const double *__restrict bias = channels.bias, *__restrict inverse_std = channels.inverse_std;
  A *__restrict means = by_channel.mean, *__restrict scales = by_channel.scale, *__restrict shifts = by_channel.shift;
  for (int64_t c = 0; c < grid.channels; ++c) {
    const Coefficients<A> mine = coefficients<A>(mean[c], weight[c], bias[c], inverse_std[c]);
    means[c] = mine.mean;
    scales[c] = mine.scale;
    shifts[c] = mine.shift;
  }
  if (answers && answers_to_statistics(call)) {
    const double *__restrict dz = call.sum_dz + grid.first_channel;
    const double *__restrict dz_xhat = call.sum_dz_xhat + grid.first_channel;
    A *__restrict by_x = by_channel.by_x, *__restrict constants = by_channel.constant;
    const double inverse_count = 1 / static_cast<double>(call.count);
    for (int64_t c = 0; c < grid.channels; ++c) {
      Coefficients<A> mine{};
      answer_to_statistics(mine, mean[c], weight[c], inverse_std[c], dz[c], dz_xhat[c], inverse_count);
      by_x[c] = mine.by_x;
      constants[c] = mine.constant;
    }
  } else if (answers) {
    clear(by_channel.by_x, grid.channels);
    clear(by_channel.constant, grid.channels);
  }
  if (by_channel.mean == of.mean) return;
  spread(of.mean, by_channel.mean, grid);
  spread(of.scale, by_channel.scale, grid);
  spread(of.shift, by_channel.shift, grid);
  if (!answers) return;
  spread(of.by_x, by_channel.by_x, grid);
  spread(of.constant, by_channel.constant, grid);
}

template <class T> inline Matrix<T> matrix(const Operand& operand, Layout layout, const Grid& grid, int64_t fold) {
  const int64_t pitch = layout == Layout::planar ? operand.stride_n : operand.stride_l * fold;
  return Matrix<T>{static_cast<T*>(operand.data), pitch}.at(0, grid.first_column);
}

// Runs f(row, rows, counts) over stretches of rows that the mask treats alike; without a mask there is one.
template <class F> inline void over_stretches(const uint8_t* mask, int64_t r0, int64_t r1, F f) {
  if (!mask) {
    if (r0 < r1) f(r0, r1 - r0, true);
    return;
  }
  for (int64_t r = r0; r < r1;) {
    int64_t end = r + 1;
    while (end < r1 && !mask[end] == !mask[r]) ++end;
    f(r, end - r, mask[r] != 0);
    r = end;
  }
}

template <class T, Kind K> struct MatrixForward {
  using A = Arithmetic<T>;
  static constexpr bool kIsBackward = false;
  const Call& call;
  int64_t fold;   // rows of the tensor that make one row of the grid
  bool is_small;  // lies in the second-level caches

  static size_t task_bytes(const Grid& g) {
    return static_cast<size_t>(padded(g.columns)) * sizeof(A) * 3 + static_cast<size_t>(g.channels) * 24 + 1024;
  }

  // first: means, second: sums of squared deviations, by channel; returns the number of values of each channel.
  double reduce(const Grid& grid, int64_t r0, int64_t r1, bool with_tail, const ColumnCoefficients<A>&, double* first,
                double* second, Cutter room) const {
    Work work{room.cut<A>(padded(grid.columns)), room.cut<A>(padded(grid.columns)), room.cut<A>(padded(grid.columns)),
              room.cut<A>(grid.channels), room.cut<double>(grid.channels), room.cut<double>(grid.channels)};
    clear(first, grid.channels);
    clear(second, grid.channels);
    const Matrix<const T> x = matrix<const T>(call.x, call.layout, grid, fold);
    double count = 0;
    auto add = [&](int64_t r, int64_t rows, int64_t columns) {
      if (count == 0) first_shift(grid, x.at(r, 0), rows, columns, work);
      const double added = static_cast<double>(rows * (columns / grid.channels));
      about(grid, x.at(r, 0), rows, columns, work);
      if (is_cancelled(grid, added, work)) about(grid, x.at(r, 0), rows, columns, work);
      merge(grid, count, added, first, second, work);
      count += added;
    };
    over_stretches(call.mask, r0, r1, [&](int64_t r, int64_t rows, bool counts) {
      if (!counts) return;
      for (int64_t k = 0; k < rows; k += kBlockRows)
        add(r + k, rows - k < kBlockRows ? rows - k : kBlockRows, grid.columns);
    });
    if (with_tail && grid.tail_columns) add(grid.rows, 1, grid.tail_columns);
    return count;
  }

  struct Work {
    A *shift, *first, *second;  // by column
    A* channel_shift;
    double *channel_first, *channel_second;
  };

  void about(const Grid& grid, Matrix<const T> x, int64_t rows, int64_t columns, Work& work) const {
    spread(work.shift, work.channel_shift, grid);
    sum(grid, x, rows, columns, work);
  }

  void sum(const Grid& grid, Matrix<const T> x, int64_t rows, int64_t columns, Work& work) const {
    clear(work.first, padded(columns));
    clear(work.second, padded(columns));
    for (int64_t j = 0; j < columns; j += kColumnBlock) {
      const int64_t width = columns - j < kColumnBlock ? columns - j : kColumnBlock;
      add_value_columns<T>(x.at(0, j), rows, width, work.shift + j, work.first + j, work.second + j,
                           is_small ? 0 : ahead_of(x, 8));
    }
    clear(work.channel_first, grid.channels);
    clear(work.channel_second, grid.channels);
    gather(work.channel_first, work.first, columns, grid);
    gather(work.channel_second, work.second, columns, grid);
  }

  // The mean of the first rows: near enough to the mean as a rule.
  void first_shift(const Grid& grid, Matrix<const T> x, int64_t rows, int64_t columns, Work& work) const {
    const int64_t in_a_row = columns / grid.channels, enough = (kShiftValues + in_a_row - 1) / in_a_row;
    rows = rows < enough ? rows : enough;
    clear(work.shift, padded(grid.columns));
    sum(grid, x, rows, columns, work);
    const double count = static_cast<double>(rows * in_a_row);
    for (int64_t c = 0; c < grid.channels; ++c)
      work.channel_shift[c] = static_cast<A>(work.channel_first[c] / count);
  }

  // Sets the shift of such channels to the mean that was found.
  bool is_cancelled(const Grid& grid, double count, Work& work) const {
    const double share = 1 / count;
    int64_t found = 0;
    for (int64_t c = 0; c < grid.channels; ++c) {
      const double offset = work.channel_first[c] * share, square = offset * offset * count;
      found += square > 4 * (work.channel_second[c] - square);
    }
    if (!found) return false;
    for (int64_t c = 0; c < grid.channels; ++c)
      work.channel_shift[c] = static_cast<A>(static_cast<double>(work.channel_shift[c]) + work.channel_first[c] * share);
    return true;
  }

  // Chan's rule, all channels at once: their counts are the same.
  void merge(const Grid& grid, double count, double added, double* mean, double* m2, Work& work) const {
    const double inverse = 1 / added, share = added / (count + added), cross = count * share;
    for (int64_t c = 0; c < grid.channels; ++c) {
      const double offset = work.channel_first[c] * inverse;
      const double squares = work.channel_second[c] - offset * work.channel_first[c];
      const double gap = static_cast<double>(work.channel_shift[c]) + offset - mean[c];
      mean[c] += gap * share;
      m2[c] += (squares < 0 ? 0 : squares) + gap * gap * cross;
      work.channel_shift[c] = static_cast<A>(mean[c]);
    }
  }

  void merge_parts(int64_t channels, double& count, double* first, double* second, double added, const double* means,
                   const double* squares) const {
    if (added == 0) return;
    const double share = added / (count + added), cross = count * share;
    for (int64_t c = 0; c < channels; ++c) {
      const double gap = means[c] - first[c];
      first[c] += gap * share;
      second[c] += squares[c] + gap * gap * cross;
    }
    count += added;
  }

  void finish(const Grid& grid, const ChannelValues&, double count, const double* first, const double* second) const {
    for (int64_t c = 0; c < grid.channels; ++c) {
      call.mean[grid.first_channel + c] = first[c];
      call.var[grid.first_channel + c] = count > 0 ? second[c] / count : 0;
    }
  }

  void map(const Grid& grid, int64_t r0, int64_t r1, bool with_tail, const ColumnCoefficients<A>& of, bool stream,
           int64_t ahead) const {
    const Matrix<const T> x = matrix<const T>(call.x, call.layout, grid, fold);
    const Matrix<const T> residual = matrix<const T>(call.residual, call.layout, grid, fold);
    const Matrix<T> y = matrix<T>(call.y, call.layout, grid, fold);
    auto apply = [&](int64_t r, int64_t rows, int64_t columns) {
      for (int64_t j = 0; j < columns; j += kColumnBlock) {
        const int64_t width = columns - j < kColumnBlock ? columns - j : kColumnBlock;
        apply_columns<T, K>(y.at(r, j), x.at(r, j), residual.at(r, j), rows, width, of.from(j), call.activation,
                            stream, is_small, ahead);
      }
    };
    if (with_tail && grid.tail_columns) apply(grid.rows, 1, grid.tail_columns);
    apply(r0, r1 - r0, grid.columns);
    if (stream) finish_streams();
  }
};

template <class T, Kind K> struct MatrixBackward {
  using A = Arithmetic<T>;
  static constexpr bool kIsBackward = true;
  const Call& call;
  int64_t fold;
  bool is_small;

  static size_t task_bytes(const Grid& g) { return static_cast<size_t>(padded(g.columns)) * sizeof(A) * 2 + 1024; }

  double reduce(const Grid& grid, int64_t r0, int64_t r1, bool with_tail, const ColumnCoefficients<A>& of,
                double* first, double* second, Cutter room) const {
    A *by_column = room.cut<A>(padded(grid.columns)), *products = room.cut<A>(padded(grid.columns));
    clear(first, grid.channels);
    clear(second, grid.channels);
    const Matrix<const T> dy = matrix<const T>(call.dy, call.layout, grid, fold);
    const Matrix<const T> x = matrix<const T>(call.x, call.layout, grid, fold);
    const Matrix<const T> residual = matrix<const T>(call.residual, call.layout, grid, fold);
    auto add = [&](int64_t r, int64_t rows, int64_t columns) {
      clear(by_column, padded(columns));
      clear(products, padded(columns));
      for (int64_t j = 0; j < columns; j += kColumnBlock) {
        const int64_t width = columns - j < kColumnBlock ? columns - j : kColumnBlock;
        add_gradient_columns<T, K>(dy.at(r, j), x.at(r, j), residual.at(r, j), rows, width, of.from(j),
                                   call.activation, by_column + j, products + j, is_small, ahead_of(x, 4));
      }
      gather(first, by_column, columns, grid);
      gather(second, products, columns, grid);
    };
    for (int64_t r = r0; r < r1; r += kBlockRows) add(r, r1 - r < kBlockRows ? r1 - r : kBlockRows, grid.columns);
    if (with_tail && grid.tail_columns) add(grid.rows, 1, grid.tail_columns);
    return 1;
  }

  void merge_parts(int64_t channels, double&, double* first, double* second, double, const double* more_first,
                   const double* more_second) const {
    for (int64_t c = 0; c < channels; ++c) {
      first[c] += more_first[c];
      second[c] += more_second[c];
    }
  }

  void finish(const Grid& grid, const ChannelValues& channels, double, const double* __restrict first,
              const double* __restrict second) const {
    const double *__restrict mean = call.mean + grid.first_channel, *__restrict inverse_std = channels.inverse_std;
    double *__restrict dz = call.sum_dz + grid.first_channel;
    double *__restrict dz_xhat = call.sum_dz_xhat + grid.first_channel;
    for (int64_t c = 0; c < grid.channels; ++c) {
      dz[c] = first[c];
      dz_xhat[c] = sum_dz_xhat<A>(mean[c], inverse_std[c], first[c], second[c]);
    }
  }

  void map(const Grid& grid, int64_t r0, int64_t r1, bool with_tail, const ColumnCoefficients<A>& of, bool stream,
           int64_t ahead) const {
    const Matrix<const T> dy = matrix<const T>(call.dy, call.layout, grid, fold);
    const Matrix<const T> x = matrix<const T>(call.x, call.layout, grid, fold);
    const Matrix<const T> residual = matrix<const T>(call.residual, call.layout, grid, fold);
    const Matrix<T> dx = matrix<T>(call.dx, call.layout, grid, fold);
    const Matrix<T> dresidual = matrix<T>(call.dresidual, call.layout, grid, fold);
    auto apply = [&](int64_t r, int64_t rows, int64_t columns, bool answers) {
      for (int64_t j = 0; j < columns; j += kColumnBlock) {
        const int64_t width = columns - j < kColumnBlock ? columns - j : kColumnBlock;
        gradient_columns<T, K>(dx.at(r, j), dresidual.at(r, j), dy.at(r, j), x.at(r, j), residual.at(r, j), rows,
                               width, of.from(j), call.activation, answers, stream, is_small, ahead);
      }
    };
    if (with_tail && grid.tail_columns) apply(grid.rows, 1, grid.tail_columns, call.is_estimated);
    over_stretches(call.mask, r0, r1, [&](int64_t r, int64_t rows, bool counts) {
      apply(r, rows, grid.columns, counts && call.is_estimated);
    });
    if (stream) finish_streams();
  }
};

template <class Pass> class MatrixRun {
 public:
  using A = typename Pass::A;

  MatrixRun(const Call& call, int tensors, bool stream) : call_(call), pass_{call, 1, false} {
    const int64_t size = bytes_of(call.dtype);
    const int64_t bytes = call.N * call.C * call.L * size * tensors;
    threads_ = useful_threads(call.threads, bytes);
    pass_.is_small = is_small(bytes, threads_);
    whole_.channels = call.C;
    if (call.layout == Layout::planar) {
      whole_.rows = call.N;
      whole_.columns = call.C * call.L;
      whole_.run = call.L;
    } else {
      fold_rows();
    }
    stream_ = stream && rows_are_aligned(call.y) && rows_are_aligned(call.dx) && rows_are_aligned(call.dresidual);
    parts_ = parts_of(whole_.rows, bytes, threads_);
    map_rows_ = map_rows(whole_.rows, whole_.columns * size, threads_);
    tile_channels(size, tensors);
  }

  void operator()() {
    if (group_) {
      run_tasks((call_.C + group_ - 1) / group_, threads_, tile, this);
      return;
    }
    Cutter room(scratch(Arena::call, call_bytes()));
    of_ = cut_coefficients<A>(room, whole_.columns);
    channels_ = ChannelValues(room, call_.C);
    first_ = room.cut<double>(parts_ * call_.C);
    second_ = room.cut<double>(parts_ * call_.C);
    counts_ = room.cut<double>(parts_);
    spare_ = room.cut<A>(5 * padded(call_.C) + 80);
    // Before forward's first pass there are no statistics yet.
    if (Pass::kIsBackward) channels_.load(call_, 0, call_.C);
    if (call_.reduces) reduce();
    if (!call_.maps) return;
    if (!Pass::kIsBackward) channels_.load(call_, 0, call_.C);
    fill_coefficients(call_, whole_, channels_, Pass::kIsBackward, of_, Cutter(spare_));
    run_tasks(map_tasks(), threads_, map_part, this, call_.reduces ? From::back : From::front);
  }

 private:
  // Rows of a small C are folded into one, so that columns fill vectors; what is left over is the tail.
  void fold_rows() {
    const int64_t rows = call_.N * call_.L;
    int64_t fold = 1;
    if (is_dense(call_.x) && is_dense(call_.residual) && is_dense(call_.y) && is_dense(call_.dy) &&
        is_dense(call_.dx) && is_dense(call_.dresidual) && !call_.mask && call_.C < 256) {
      while (fold < 32 && (fold * call_.C) % 32) ++fold;
      while (fold * call_.C < 256) fold *= 2;
      if (rows / fold < 8) fold = 1;
    }
    pass_.fold = fold;
    whole_.rows = rows / fold;
    whole_.columns = fold * call_.C;
    whole_.tail_columns = rows % fold * call_.C;
  }
  bool is_dense(const Operand& operand) const { return !operand.data || operand.stride_l == call_.C; }

  bool rows_are_aligned(const Operand& out) const {
    if (!out.data) return true;
    const int64_t pitch = call_.layout == Layout::planar ? out.stride_n : out.stride_l * pass_.fold;
    return reinterpret_cast<uintptr_t>(out.data) % 64 == 0 && pitch * bytes_of(call_.dtype) % 64 == 0;
  }

  // Channels of a tile, where the first pass is asked for and the channels suffice for all threads; or none.
  void tile_channels(int64_t size, int tensors) {
    if (call_.layout != Layout::planar || !call_.reduces) return;
    const int64_t channel_bytes = call_.N * call_.L * size;
    const int64_t unit = runs_of_lines(call_.L * size);
    int64_t group = tile_bytes(tensors) / channel_bytes;
    const bool is_one = threads_ == 1 && whole_.columns <= kTileColumns;
    const int64_t fair = is_one ? call_.C : call_.C / (4 * threads_);
    group = group < fair ? group : fair;
    group = group < unit ? unit : group / unit * unit;
    if (channel_bytes * group > 2 * tile_bytes(tensors) || call_.C < group * threads_) return;
    group_ = group;
  }

  static void tile(void* self, int64_t index, int64_t next) {
    const MatrixRun& run = *static_cast<MatrixRun*>(self);
    const Call& call = run.call_;
    Grid grid;
    grid.first_channel = index * run.group_;
    grid.channels = call.C - grid.first_channel < run.group_ ? call.C - grid.first_channel : run.group_;
    grid.rows = call.N;
    grid.columns = grid.channels * call.L;
    grid.run = call.L;
    grid.first_column = grid.first_channel * call.L;
    const size_t own = static_cast<size_t>(padded(grid.columns)) * sizeof(A) * 5 +
                       static_cast<size_t>(grid.channels) * (40 + 5 * sizeof(A)) + 2048;
    Cutter room(scratch(Arena::task, own + Pass::task_bytes(grid)));
    const ColumnCoefficients<A> of = cut_coefficients<A>(room, grid.columns);
    const ChannelValues channels(room, grid.channels);
    double *first = room.cut<double>(grid.channels), *second = room.cut<double>(grid.channels);
    if (Pass::kIsBackward) {
      channels.load(call, grid.first_channel, grid.channels);
      fill_coefficients(call, grid, channels, false, of, room);
    }
    const double count = run.pass_.reduce(grid, 0, grid.rows, false, of, first, second, room);
    run.pass_.finish(grid, channels, count, first, second);
    if (!call.maps) return;
    if (!Pass::kIsBackward) channels.load(call, grid.first_channel, grid.channels);
    fill_coefficients(call, grid, channels, Pass::kIsBackward, of, room);
    const int64_t ahead = next < 0 ? 0 : (next - index) * run.group_ * call.L;
    run.pass_.map(grid, 0, grid.rows, false, of, run.stream_, ahead);
  }

  void reduce() {
    if (Pass::kIsBackward) fill_coefficients(call_, whole_, channels_, false, of_, Cutter(spare_));
    run_tasks(parts_, threads_, reduce_part, this);
    double count = counts_[0];
    for (int64_t p = 1; p < parts_; ++p)
      pass_.merge_parts(call_.C, count, first_, second_, counts_[p], first_ + p * call_.C, second_ + p * call_.C);
    pass_.finish(whole_, channels_, count, first_, second_);
  }

  static void reduce_part(void* self, int64_t p, int64_t) {
    const MatrixRun& run = *static_cast<MatrixRun*>(self);
    const int64_t each = (run.whole_.rows + run.parts_ - 1) / run.parts_;
    const int64_t r0 = p * each < run.whole_.rows ? p * each : run.whole_.rows;
    const int64_t r1 = r0 + each < run.whole_.rows ? r0 + each : run.whole_.rows;
    Cutter room(scratch(Arena::task, Pass::task_bytes(run.whole_)));
    run.counts_[p] = run.pass_.reduce(run.whole_, r0, r1, p == run.parts_ - 1, run.of_, run.first_ + p * run.call_.C,
                                      run.second_ + p * run.call_.C, room);
  }

  int64_t map_tasks() const {
    const int64_t tasks = (whole_.rows + map_rows_ - 1) / map_rows_;
    return tasks < 1 ? 1 : tasks;
  }

  static void map_part(void* self, int64_t i, int64_t) {
    const MatrixRun& run = *static_cast<MatrixRun*>(self);
    const int64_t last = run.map_tasks() - 1, r0 = i * run.map_rows_;
    const int64_t r1 = r0 + run.map_rows_ < run.whole_.rows ? r0 + run.map_rows_ : run.whole_.rows;
    run.pass_.map(run.whole_, r0, r1, i == last, run.of_, run.stream_, 0);
  }

  size_t call_bytes() const {
    return static_cast<size_t>(padded(whole_.columns)) * sizeof(A) * 5 +
           static_cast<size_t>(parts_ * call_.C + parts_) * 16 + static_cast<size_t>(call_.C) * 24 +
           static_cast<size_t>(padded(call_.C)) * sizeof(A) * 5 + 4096;
  }

  const Call& call_;
  Pass pass_;
  Grid whole_;
  int threads_ = 1;
  bool stream_ = false;
  int64_t parts_ = 1, map_rows_ = 1, group_ = 0;
  ColumnCoefficients<A> of_;
  ChannelValues channels_;
  double *first_ = nullptr, *second_ = nullptr, *counts_ = nullptr;  // by part and channel
  A* spare_ = nullptr;
};

}  // namespace BATCHNORM_ISA
}  // namespace batchnorm
