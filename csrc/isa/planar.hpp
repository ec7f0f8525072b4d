// Planar activations (NCHW and the like) with long runs, or few of them: which thread works on which positions of which channel.
//
// Fused: a task is a whole channel; both passes follow each other while it is in the cache, and the second one
// prefetches the next channel. Split, where channels are few or huge, and where one half alone is asked for: a task is
// a piece of a channel, the pieces' results are merged in a fixed order, and the second pass goes through the pieces
// from the back, because what was read last is still in the cache.
#pragma once

#include "../parallel.hpp"
#include "../tiling.hpp"
#include "channel.hpp"

namespace batchnorm {
namespace BATCHNORM_ISA {

// Positions of one channel: rows n0 .. n1, from l0 to l1 in each.
struct Piece {
  int64_t c, n0, n1, l0, l1;
};

// The pieces of a tensor, numbered as they lie in memory.
struct Pieces {
  const Call& call;
  int64_t rows, run, row_parts, run_parts;

  explicit Pieces(const Call& call) : call(call) {
    run = call.L < kMostPiece ? call.L : kMostPiece;
    rows = call.L < kLeastPiece ? (kLeastPiece + call.L - 1) / call.L : 1;
    row_parts = (call.N + rows - 1) / rows;
    run_parts = (call.L + run - 1) / run;
  }
  int64_t number() const { return row_parts * call.C * run_parts; }
  int64_t index(int64_t row_part, int64_t c, int64_t run_part) const {
    return (row_part * call.C + c) * run_parts + run_part;
  }
  Piece operator[](int64_t i) const {
    const int64_t l = i % run_parts * run, n = i / run_parts / call.C * rows;
    return {i / run_parts % call.C, n, n + rows < call.N ? n + rows : call.N, l, l + run < call.L ? l + run : call.L};
  }
};

// The runs of a channel from sample n and position l on.
template <class T> inline Matrix<T> at(const Operand& operand, int64_t n, int64_t c, int64_t l) {
  if (!operand.data) return {};
  return {static_cast<T*>(operand.data) + n * operand.stride_n + c * operand.stride_c + l, operand.stride_n};
}
inline Matrix<const uint8_t> mask_at(const Call& call, int64_t n, int64_t l) {
  return {call.mask ? call.mask + n * call.L + l : nullptr, call.L};
}

// Whether the runs of an operand lie side by side.
inline bool is_dense(const Operand& operand, const Call& call) {
  return !operand.data || (operand.stride_c == call.L && operand.stride_n == call.C * call.L);
}

template <class T, Kind K> struct PlanarForward {
  using A = Arithmetic<T>;
  static constexpr bool kIsBackward = false;
  using Partial = Moment;
  const Call& call;
  Coefficients<A>* of;  // by channel
  ChannelValues channels;  // none: their statistics are not known yet
  bool stream;
  bool fetches;  // the output of a channel's next run

  Moment reduce(const Piece& piece) const {
    Moment whole;
    const int64_t run = piece.l1 - piece.l0;
    const int64_t rows = run < kBlockValues ? kBlockValues / run : 1;
    A shift = first_shift(piece);
    for (int64_t n = piece.n0; n < piece.n1; n += rows) {
      const int64_t end = n + rows < piece.n1 ? n + rows : piece.n1;
      for (int64_t l = piece.l0; l < piece.l1; l += kBlockValues) {
        const Piece block{piece.c, n, end, l, l + kBlockValues < piece.l1 ? l + kBlockValues : piece.l1};
        Moment moment = about(block, shift);
        if (moment.is_cancelled(shift)) moment = about(block, static_cast<A>(moment.mean));
        whole.merge(moment);
        if (whole.count > 0) shift = static_cast<A>(whole.mean);
      }
    }
    return whole;
  }

  Moment about(const Piece& block, A shift) const {
    Sums<A> sums;
    int64_t count = 0;
    const int64_t run = block.l1 - block.l0;
    const int64_t rows = block.n1 - block.n0;
    const Matrix<const T> x = at<const T>(call.x, block.n0, block.c, block.l0);
    if (call.mask) {
      const Matrix<const uint8_t> mask = mask_at(call, block.n0, block.l0);
      for (int64_t r = 0; r < rows; ++r) count += add_masked_values(sums, x.row(r), mask.row(r), run, shift);
    } else {
      add_values(sums, x, rows, run, shift);
      count = rows * run;
    }
    return Moment::of_sums(static_cast<double>(count), shift, sums.first_total(), sums.second_total());
  }

  // The mean of the first values that count: near enough to the mean as a rule.
  A first_shift(const Piece& piece) const {
    double sum = 0;
    int64_t count = 0;
    for (int64_t n = piece.n0; n < piece.n1 && count < 16; ++n) {
      const T* x = at<const T>(call.x, n, piece.c, 0).data;
      const uint8_t* mask = mask_at(call, n, 0).data;
      for (int64_t l = piece.l0; l < piece.l1 && count < 16; ++l) {
        if (mask && !mask[l]) continue;
        sum += Storage<T>::widen(x[l]);
        ++count;
      }
    }
    return static_cast<A>(count ? sum / static_cast<double>(count) : 0);
  }

  void finish(int64_t c, const Moment& moment) const {
    call.mean[c] = moment.mean;
    call.var[c] = moment.var();
  }
  void prepare(int64_t c) const { of[c] = coefficients<A>(call, c); }

  // `ahead`: where the values are that come next, counted from these, or 0.
  void map(const Piece& piece, int64_t ahead) const {
    const auto [c, n, end, l, l1] = piece;
    apply_rows<T, K>(at<T>(call.y, n, c, l), at<const T>(call.x, n, c, l), at<const T>(call.residual, n, c, l), end - n,
                     l1 - l, of[c], call.activation, stream, ahead, fetches);
  }

  // Runs r .. end of all runs of the tensor.
  void map_runs(int64_t r, int64_t end) const {
    const int64_t n = r / call.C, c = r % call.C;
    if (are_dense_ && call.L >= kLanes<A>) {
      apply_runs<T, K>(at<T>(call.y, n, c, 0).data, at<const T>(call.x, n, c, 0).data,
                       at<const T>(call.residual, n, c, 0).data, end - r, call.L, c, call.C, of, call.activation, stream);
      return;
    }
    for (; r < end; ++r) map({r % call.C, r / call.C, r / call.C + 1, 0, call.L}, 0);
  }

  const bool are_dense_ = is_dense(call.x, call) && is_dense(call.y, call) && is_dense(call.residual, call);
};

template <class T, Kind K> struct PlanarBackward {
  using A = Arithmetic<T>;
  static constexpr bool kIsBackward = true;
  struct Partial {
    double first = 0, second = 0;
    void merge(const Partial& other) {
      first += other.first;
      second += other.second;
    }
  };
  const Call& call;
  Coefficients<A>* of;
  ChannelValues channels;
  bool stream;
  bool fetches;  // the output of a channel's next run

  Partial reduce(const Piece& piece) const {
    Partial whole;
    const Coefficients<A> mine = without_answer(piece.c);
    const int64_t run = piece.l1 - piece.l0;
    const int64_t rows = run < kBlockValues ? kBlockValues / run : 1;
    for (int64_t n = piece.n0; n < piece.n1; n += rows) {
      const int64_t end = n + rows < piece.n1 ? n + rows : piece.n1;
      for (int64_t l = piece.l0; l < piece.l1; l += kBlockValues) {
        Sums<A> sums;
        const int64_t length = piece.l1 - l < kBlockValues ? piece.l1 - l : kBlockValues;
        add(sums, n, end - n, piece.c, l, length, mine);
        whole.merge({sums.first_total(), sums.second_total()});
      }
    }
    return whole;
  }

  void add(Sums<A>& sums, int64_t n, int64_t rows, int64_t c, int64_t l, int64_t length,
           const Coefficients<A>& mine) const {
    const Matrix<const T> dy = at<const T>(call.dy, n, c, l), x = at<const T>(call.x, n, c, l);
    const Matrix<const T> residual = at<const T>(call.residual, n, c, l);
    if (residual.data) add_gradients<T, K, true>(sums, dy, x, residual, rows, length, mine, call.activation);
    else add_gradients<T, K, false>(sums, dy, x, {}, rows, length, mine, call.activation);
  }

  void finish(int64_t c, const Partial& sums) const {
    call.sum_dz[c] = sums.first;
    call.sum_dz_xhat[c] = sum_dz_xhat<A>(call.mean[c], channels.inverse_std[c], sums.first, sums.second);
  }
  void prepare(int64_t c) const {
    of[c] = without_answer(c);
    if (answers_to_statistics(call))
      answer_to_statistics(of[c], call.mean[c], channels.weight[c], channels.inverse_std[c], call.sum_dz[c],
                           call.sum_dz_xhat[c], inverse_count_);
  }
  Coefficients<A> without_answer(int64_t c) const {
    return coefficients<A>(call.mean[c], channels.weight[c], channels.bias[c], channels.inverse_std[c]);
  }

  void map(const Piece& piece, int64_t ahead) const {
    const auto [c, n, end, l, l1] = piece;
    gradient_rows<T, K>(at<T>(call.dx, n, c, l), at<T>(call.dresidual, n, c, l), at<const T>(call.dy, n, c, l),
                        at<const T>(call.x, n, c, l), at<const T>(call.residual, n, c, l), mask_at(call, n, l), end - n,
                        l1 - l, of[c], call.activation, call.is_estimated, stream, ahead, fetches);
  }

  void map_runs(int64_t r, int64_t end) const {
    for (; r < end; ++r) map({r % call.C, r / call.C, r / call.C + 1, 0, call.L}, 0);
  }

  const double inverse_count_ = 1 / static_cast<double>(call.count);
};

template <class Pass> class PlanarRun {
 public:
  using Partial = typename Pass::Partial;

  PlanarRun(const Pass& pass, Partial* partials, int tensors)
      : pass_(pass), call_(pass.call), pieces_(pass.call), partials_(partials),
        channel_bytes_(call_.N * call_.L * bytes_of(call_.dtype) * tensors) {}

  void operator()() {
    const int threads = useful_threads(call_.threads, channel_bytes_ * call_.C);
    const bool shares_evenly = call_.C % threads == 0 || call_.C >= 8 * threads;
    if (call_.reduces && call_.maps && shares_evenly && channel_bytes_ <= most_channel_bytes(threads)) {
      together_ = channels_together(call_.C, channel_bytes_, threads);
      run_tasks((call_.C + together_ - 1) / together_, threads, whole_channels, this);
      return;
    }
    if (call_.reduces) reduce(threads);
    if (!call_.maps) return;
    for (int64_t c = 0; c < call_.C; ++c) pass_.prepare(c);
    if (!call_.reduces && call_.L < kMapValues) {
      together_ = runs_together(call_.N * call_.C, call_.L, bytes_of(call_.dtype), threads);
      run_tasks((call_.N * call_.C + together_ - 1) / together_, threads, map_runs, this);
    } else {
      run_tasks(pieces_.number(), threads, map_piece, this, call_.reduces ? From::back : From::front);
    }
  }

 private:
  static void whole_channels(void* self, int64_t i, int64_t next) {
    const PlanarRun& run = *static_cast<PlanarRun*>(self);
    const Pass& pass = run.pass_;
    const Call& call = run.call_;
    const int64_t end = (i + 1) * run.together_ < call.C ? (i + 1) * run.together_ : call.C;
    for (int64_t c = i * run.together_; c < end; ++c) {
      const Piece piece{c, 0, call.N, 0, call.L};
      const int64_t then = c + 1 < end ? c + 1 : next * run.together_;
      pass.finish(c, pass.reduce(piece));
      pass.prepare(c);
      pass.map(piece, then < 0 ? 0 : (then - c) * call.x.stride_c);
    }
    if (pass.stream) finish_streams();
  }
  static void reduce_piece(void* self, int64_t i, int64_t) {
    PlanarRun& run = *static_cast<PlanarRun*>(self);
    run.partials_[i] = run.pass_.reduce(run.pieces_[i]);
  }
  static void map_piece(void* self, int64_t i, int64_t next) {
    PlanarRun& run = *static_cast<PlanarRun*>(self);
    const Piece piece = run.pieces_[i];
    int64_t ahead = 0;
    if (next >= 0) {
      const Piece then = run.pieces_[next];
      const Operand& x = run.call_.x;
      ahead = (then.n0 - piece.n0) * x.stride_n + (then.c - piece.c) * x.stride_c + then.l0 - piece.l0;
    }
    run.pass_.map(piece, ahead);
    if (run.pass_.stream) finish_streams();
  }
  // Without a first pass there is no order but that of the memory.
  static void map_runs(void* self, int64_t i, int64_t) {
    const PlanarRun& run = *static_cast<PlanarRun*>(self);
    const Call& call = run.call_;
    const int64_t end = (i + 1) * run.together_ < call.N * call.C ? (i + 1) * run.together_ : call.N * call.C;
    run.pass_.map_runs(i * run.together_, end);
    if (run.pass_.stream) finish_streams();
  }

  void reduce(int threads) {
    run_tasks(pieces_.number(), threads, reduce_piece, this);
    for (int64_t c = 0; c < call_.C; ++c) {
      Partial whole;
      for (int64_t n = 0; n < pieces_.row_parts; ++n)
        for (int64_t l = 0; l < pieces_.run_parts; ++l) whole.merge(partials_[pieces_.index(n, c, l)]);
      pass_.finish(c, whole);
    }
  }

  Pass pass_;
  const Call& call_;
  Pieces pieces_;
  Partial* partials_;  // by piece
  int64_t channel_bytes_;
  int64_t together_ = 1;  // channels, or runs, of a task
};

template <class Pass> inline void run_planar(const Call& call, int tensors, bool stream) {
  using Of = Coefficients<typename Pass::A>;
  using Partial = typename Pass::Partial;
  const int64_t pieces = Pieces(call).number();
  const size_t bytes = static_cast<size_t>(call.C) * (sizeof(Of) + 24) + static_cast<size_t>(pieces) * sizeof(Partial);
  Cutter room(scratch(Arena::call, bytes + 512));
  Of* of = room.cut<Of>(call.C);
  ChannelValues channels;
  if (Pass::kIsBackward) {
    channels = ChannelValues(room, call.C);
    channels.load(call, 0, call.C);
  }
  const int64_t values = call.C * call.N * call.L, size = bytes_of(call.dtype);
  const bool fetches = !stream && fetches_output(call.L * size, values * size * (tensors + 1), call.threads);
  PlanarRun<Pass>(Pass{call, of, channels, stream, fetches}, room.cut<Partial>(pieces), tensors)();
}

}  // namespace BATCHNORM_ISA
}  // namespace batchnorm
