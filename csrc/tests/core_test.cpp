// The core without Python, for the sanitizers: every way of cutting the work, every dtype, activation and instruction
// set, against a plain float64 loop. Buffers are exactly as large as they must be, so that AddressSanitizer sees a step
// beyond. Prints what fails and exits with 1.
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#if defined(__unix__)
#include <sys/wait.h>
#include <unistd.h>
#endif

#include "call.hpp"
#include "parallel.hpp"
#include "pool.hpp"
#include "running.hpp"
#include "select.hpp"
#include "tiling.hpp"

using namespace batchnorm;

namespace {

int failures = 0;

void check(bool holds, const char* what, const Call& call, const char* isa) {
  if (holds) return;
  ++failures;
  std::printf("FAILED %s: %s, N=%ld C=%ld L=%ld layout=%d dtype=%d activation=%d threads=%d\n", isa, what,
              static_cast<long>(call.N), static_cast<long>(call.C), static_cast<long>(call.L),
              static_cast<int>(call.layout), static_cast<int>(call.dtype), static_cast<int>(call.activation),
              call.threads);
}

// Values of one dtype in memory.
struct Array {
  Dtype dtype;
  std::vector<unsigned char> bytes;

  Array(Dtype dtype, int64_t size) : dtype(dtype), bytes(static_cast<size_t>(size * bytes_of(dtype))) {}
  double get(int64_t i) const {
    const unsigned char* p = bytes.data() + i * bytes_of(dtype);
    if (dtype == Dtype::float64) { double v; std::memcpy(&v, p, 8); return v; }
    if (dtype == Dtype::float32) { float v; std::memcpy(&v, p, 4); return v; }
    uint16_t half;
    std::memcpy(&half, p, 2);
    if (dtype == Dtype::bfloat16) {
      const uint32_t bits = uint32_t{half} << 16;
      float v;
      std::memcpy(&v, &bits, 4);
      return v;
    }
    const int exponent = (half >> 10) & 31, fraction = half & 1023;
    const double size = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
    return half & 0x8000 ? -size : size;
  }
  void set(int64_t i, double value) {
    unsigned char* p = bytes.data() + i * bytes_of(dtype);
    if (dtype == Dtype::float64) { std::memcpy(p, &value, 8); return; }
    const float narrow = static_cast<float>(value);
    if (dtype == Dtype::float32) { std::memcpy(p, &narrow, 4); return; }
    uint32_t bits;
    std::memcpy(&bits, &narrow, 4);
    // Cut off, not rounded: any value will do as an input.
    const int exponent = static_cast<int>((bits >> 23) & 255) - 112;
    const uint32_t half = dtype == Dtype::bfloat16 ? bits >> 16
                          : exponent <= 0          ? 0
                                                   : ((bits >> 16) & 0x8000) | (static_cast<uint32_t>(exponent) << 10) |
                                                         ((bits >> 13) & 1023);
    const uint16_t out = static_cast<uint16_t>(half);
    std::memcpy(p, &out, 2);
  }
};

double activate(double z, Activation which) {
  switch (which) {
    case Activation::none: return z;
    case Activation::relu: return z <= 0 ? 0 : z;
    case Activation::leaky_relu: return z > 0 ? z : 0.01 * z;
    case Activation::silu: return z / (1 + std::exp(-z));
    case Activation::sigmoid: return 1 / (1 + std::exp(-z));
    case Activation::tanh: return std::tanh(z);
    default: return 0.5 * z * (1 + std::erf(z * std::sqrt(0.5)));
  }
}

double slope(double z, Activation which) {
  const double h = 1e-5;
  if (which == Activation::relu) return z > 0;
  if (which == Activation::leaky_relu) return z > 0 ? 1 : 0.01;
  return (activate(z + h, which) - activate(z - h, which)) / (2 * h);
}

struct Shape {
  int64_t N, C, L;
};

// One half at a time is cut into work in ways of its own; the results must be those of the whole.
void halves(const Kernels& kernels, Call call, Call back, const Array& y, const Array& dx) {
  const int64_t size = call.N * call.C * call.L;
  const double tolerance = call.dtype == Dtype::float64 ? 1e-9 : call.dtype == Dtype::float32 ? 1e-4 : 6e-2;
  std::vector<double> mean(call.mean, call.mean + call.C), var(mean.size()), sums(mean.size()), products(mean.size());
  Array again(call.dtype, size), dx_again(call.dtype, size);
  auto holds = [&](const Array& one, const Array& two) {
    bool same = true;
    for (int64_t i = 0; i < size; ++i) same &= std::abs(one.get(i) - two.get(i)) <= tolerance * (1 + std::abs(one.get(i)));
    return same;
  };
  Call part = call;
  part.y = {};
  part.mean = mean.data();
  part.var = var.data();
  part.maps = false;
  kernels.forward(part);
  for (size_t c = 0; c < mean.size(); ++c)
    check(std::abs(mean[c] - call.mean[c]) < 1e-5 && std::abs(var[c] - call.var[c]) < 1e-4 * (1 + call.var[c]),
          "moments alone", call, kernels.name);
  part = call;
  part.y.data = again.bytes.data();
  part.reduces = false;
  kernels.forward(part);
  check(holds(y, again), "y alone", call, kernels.name);
  part = back;
  part.sum_dz = sums.data();
  part.sum_dz_xhat = products.data();
  part.dx = part.dresidual = {};
  part.maps = false;
  kernels.backward(part);
  part = back;
  part.sum_dz = sums.data();
  part.sum_dz_xhat = products.data();
  part.dx.data = dx_again.bytes.data();
  part.dresidual = {};
  part.reduces = false;
  kernels.backward(part);
  check(holds(dx, dx_again), "dx alone", call, kernels.name);
}

// A gradient whose samples (planar) or positions (channels-last) are all one: pitches of 0.
void test_repeated_gradient(const Kernels& kernels, Shape shape, Layout layout, int threads) {
  const int64_t size = shape.N * shape.C * shape.L, piece = layout == Layout::planar ? shape.C * shape.L : shape.C;
  Array x(Dtype::float32, size), whole(Dtype::float32, size), one(Dtype::float32, piece);
  Array dx(Dtype::float32, size), expected(Dtype::float32, size);
  std::mt19937 random(5);
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < size; ++i) x.set(i, normal(random));
  for (int64_t i = 0; i < piece; ++i) one.set(i, normal(random));
  for (int64_t i = 0; i < size; ++i) whole.set(i, one.get(i % piece));
  std::vector<double> mean(static_cast<size_t>(shape.C)), var(mean.size(), 1.0), sums(mean.size()), products(mean.size());
  Call call;
  call.N = shape.N;
  call.C = shape.C;
  call.L = shape.L;
  call.layout = layout;
  call.activation = Activation::relu;
  call.threads = threads;
  call.count = shape.N * shape.L;
  call.mean = mean.data();
  call.var = var.data();
  call.sum_dz = sums.data();
  call.sum_dz_xhat = products.data();
  auto operand = [&](Array& array) {
    if (layout == Layout::channels_last) return Operand{array.bytes.data(), shape.C * shape.L, 1, shape.C};
    return Operand{array.bytes.data(), shape.C * shape.L, shape.L, 1};
  };
  call.x = operand(x);
  call.dy = operand(whole);
  call.dx = operand(expected);
  kernels.backward(call);
  call.dy = operand(one);
  call.dy.stride_n = 0;
  if (layout == Layout::channels_last) call.dy.stride_l = 0;
  call.dx = operand(dx);
  kernels.backward(call);
  bool same = true;
  for (int64_t i = 0; i < size; ++i) same &= std::abs(dx.get(i) - expected.get(i)) < 1e-4;
  check(same, "repeated gradient", call, kernels.name);
}

// Threads that take and give buffers and fork; children that do likewise.
void test_pool() {
  Call none;
  limit_pool(64 << 20);
  std::atomic<int> wrong{0};
  auto work = [&](unsigned char mine) {
    for (int i = 0; i < 60; ++i) {
      const size_t size = static_cast<size_t>((1 + i % 3) << 22) + 5;
      auto* one = static_cast<unsigned char*>(take_buffer(size));
      auto* two = static_cast<unsigned char*>(take_buffer(size));
      if (!one || !two || one == two) ++wrong;
      std::memset(one, mine, size);
      std::memset(two, mine + 1, size);
      if (one[0] != mine || one[size - 1] != mine || two[size / 2] != mine + 1) ++wrong;
      release_buffer(one);
      release_buffer(two);
    }
  };
  std::vector<std::thread> team;
  for (int t = 0; t < 4; ++t) team.emplace_back(work, static_cast<unsigned char>(2 * t));
#if defined(__unix__) && !defined(__SANITIZE_THREAD__)  // whose runtime does not follow into a fork of several threads
  for (int i = 0; i < 5; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      void* buffer = take_buffer(10 << 20);
      std::memset(buffer, 1, 10 << 20);
      release_buffer(buffer);
      _exit(0);
    }
    int status = 1;
    waitpid(child, &status, 0);
    wrong += status != 0;
  }
#endif
  for (std::thread& member : team) member.join();
  check(wrong == 0, "buffers", none, "pool");
  check(pool_state().lent == 0 && pool_state().idle <= 64 << 20 && pool_state().idle > 0, "limit", none, "pool");
  void* kept = take_buffer(9 << 20);
  limit_pool(0);
  check(pool_state().idle == 0 && take_buffer(9 << 20) == nullptr, "off", none, "pool");
  release_buffer(kept);
  check(pool_state().idle == 0 && pool_state().lent == 0, "given back", none, "pool");
  check(usual_pool_limit() > 0 && usual_pool_limit() <= int64_t{512} << 20, "usual limit", none, "pool");
}

// Several threads call the core at once, as several Python threads would.
void test_calls_at_once(const Kernels& kernels) {
  std::vector<std::thread> team;
  std::atomic<int> wrong{0};
  for (int t = 0; t < 3; ++t)
    team.emplace_back([&, t] {
      const Shape shapes[] = {{20, 24, 49}, {4, 8, 2000}, {900, 40, 1}};
      const Shape shape = shapes[t];
      const int64_t size = shape.N * shape.C * shape.L;
      std::vector<float> x(static_cast<size_t>(size)), y(x.size()), first;
      for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 101);
      std::vector<double> mean(static_cast<size_t>(shape.C)), var(mean.size());
      Call call;
      call.N = shape.N;
      call.C = shape.C;
      call.L = shape.L;
      call.layout = shape.L == 1 ? Layout::channels_last : Layout::planar;
      call.threads = 2;
      call.count = shape.N * shape.L;
      call.mean = mean.data();
      call.var = var.data();
      call.x = {x.data(), shape.C * shape.L, shape.L, shape.L == 1 ? shape.C : 1};
      call.y = {y.data(), shape.C * shape.L, shape.L, shape.L == 1 ? shape.C : 1};
      for (int i = 0; i < 10; ++i) {
        kernels.forward(call);
        if (i == 0) first = y;
        wrong += first != y;
      }
    });
  for (std::thread& member : team) member.join();
  check(wrong == 0, "bit for bit again", Call{}, kernels.name);
}

void run(const Kernels& kernels, Shape shape, Layout layout, Dtype dtype, Activation activation, bool residual,
         bool masked, int threads) {
  const int64_t size = shape.N * shape.C * shape.L, positions = shape.N * shape.L;
  std::mt19937 random(17);
  std::normal_distribution<double> normal;
  Array x(dtype, size), dy(dtype, size), r(dtype, size), y(dtype, size), dx(dtype, size), dr(dtype, size);
  for (int64_t i = 0; i < size; ++i) {
    x.set(i, 3 + 2 * normal(random));
    dy.set(i, normal(random));
    r.set(i, normal(random));
  }
  std::vector<uint8_t> mask(static_cast<size_t>(positions));
  int64_t count = 0;
  for (auto& m : mask) count += m = masked ? random() % 4 != 0 : 1;
  if (count < 2) return;
  std::vector<float> weight(static_cast<size_t>(shape.C)), bias(static_cast<size_t>(shape.C));
  for (auto& w : weight) w = static_cast<float>(1 + 0.3 * normal(random));
  for (auto& b : bias) b = static_cast<float>(normal(random));
  std::vector<double> mean(weight.size()), var(weight.size()), sums(weight.size()), products(weight.size());

  Call call;
  call.N = shape.N;
  call.C = shape.C;
  call.L = shape.L;
  call.layout = layout;
  call.dtype = dtype;
  call.activation = activation;
  call.threads = threads;
  call.eps = 1e-5;
  call.weight = {weight.data(), Dtype::float32};
  call.bias = {bias.data(), Dtype::float32};
  call.mean = mean.data();
  call.var = var.data();
  call.count = count;
  call.mask = masked ? mask.data() : nullptr;
  auto operand = [&](Array& array) {
    Operand out{array.bytes.data(), shape.C * shape.L, shape.L, 1};
    if (layout == Layout::channels_last) out = {array.bytes.data(), shape.C * shape.L, 1, shape.C};
    return out;
  };
  auto at = [&](int64_t n, int64_t c, int64_t l) {
    return layout == Layout::planar ? (n * shape.C + c) * shape.L + l : (n * shape.L + l) * shape.C + c;
  };
  call.x = operand(x);
  call.y = operand(y);
  if (residual) call.residual = operand(r);
  kernels.forward(call);
  Call back = call;
  back.y = {};
  back.dy = operand(dy);
  back.dx = operand(dx);
  if (residual) back.dresidual = operand(dr);
  back.sum_dz = sums.data();
  back.sum_dz_xhat = products.data();
  kernels.backward(back);
  halves(kernels, call, back, y, dx);

  const double tolerance = dtype == Dtype::float64 ? 1e-7 : dtype == Dtype::float32 ? 1e-4
                           : dtype == Dtype::bfloat16 ? 6e-2 : 1e-2;
  for (int64_t c = 0; c < shape.C; ++c) {
    double mu = 0, v = 0, s1 = 0, s2 = 0;
    auto each = [&](auto f) {
      for (int64_t n = 0; n < shape.N; ++n)
        for (int64_t l = 0; l < shape.L; ++l) f(at(n, c, l), mask[static_cast<size_t>(n * shape.L + l)] != 0);
    };
    each([&](int64_t i, bool counts) { if (counts) mu += x.get(i); });
    mu /= static_cast<double>(count);
    each([&](int64_t i, bool counts) { if (counts) v += (x.get(i) - mu) * (x.get(i) - mu); });
    v /= static_cast<double>(count);
    const size_t k = static_cast<size_t>(c);
    check(std::abs(mean[k] - mu) < 1e-5 && std::abs(var[k] - v) < 1e-4 * (1 + v), "moments", call, kernels.name);
    const double inverse = 1 / std::sqrt(v + call.eps), w = weight[k];
    auto z_of = [&](int64_t i) { return (x.get(i) - mu) * inverse * w + bias[k] + (residual ? r.get(i) : 0); };
    bool is_near_kink = false;
    each([&](int64_t i, bool) {
      const double z = z_of(i), dz = dy.get(i) * slope(z, activation);
      if (activation == Activation::relu || activation == Activation::leaky_relu) is_near_kink |= std::abs(z) < 1e-4;
      s1 += dz;
      s2 += dz * (x.get(i) - mu) * inverse;
    });
    if (is_near_kink) continue;
    bool y_holds = true, dx_holds = true, dr_holds = true;
    each([&](int64_t i, bool counts) {
      const double z = z_of(i), expected = activate(z, activation), dz = dy.get(i) * slope(z, activation);
      y_holds &= std::abs(y.get(i) - expected) < tolerance * (1 + std::abs(expected));
      const double through = (s1 + (x.get(i) - mu) * inverse * s2) / static_cast<double>(count);
      const double gradient = w * inverse * (dz - (counts ? through : 0));
      dx_holds &= std::abs(dx.get(i) - gradient) < tolerance * (2 + std::abs(gradient));
      if (residual) dr_holds &= std::abs(dr.get(i) - dz) < tolerance * (1 + std::abs(dz));
    });
    const double scale = tolerance * std::sqrt(static_cast<double>(positions)) + 1e-9;
    check(y_holds, "y", call, kernels.name);
    check(dx_holds, "dx", call, kernels.name);
    check(dr_holds, "dresidual", call, kernels.name);
    check(std::abs(sums[k] - s1) < scale * 3 && std::abs(products[k] - s2) < scale * 3, "sums", call, kernels.name);
  }
}

void test_running() {
  std::vector<float> mean{0, 0}, var{1, 1};
  int64_t batches = 0;
  const double batch_mean[] = {1, 2}, batch_var[] = {1, 3}, broken[] = {1, NAN};
  Call none;
  const Parameter to_mean{mean.data(), Dtype::float32}, to_var{var.data(), Dtype::float32};
  check(take_in(to_mean, to_var, &batches, batch_mean, batch_var, 2, 2, 0.5), "takes in", none, "running");
  check(mean[0] == 0.5f && mean[1] == 1.0f && var[0] == 1.5f && var[1] == 3.5f, "values", none, "running");
  check(!take_in(to_mean, to_var, &batches, broken, batch_var, 2, 2, 0.5), "refuses NaN", none, "running");
  check(take_in(to_mean, to_var, &batches, batch_mean, batch_var, 2, 0, 0.5) && batches == 2, "counts", none, "running");
  check(mean[0] == 0.5f && var[0] == 1.5f, "stays", none, "running");
}

}  // namespace

int main() {
  const Shape shapes[] = {{2, 3, 5}, {1, 1, 7}, {5, 17, 49}, {40, 64, 49}, {3, 4, 1000}, {2, 5, 9000},
                          {1, 2, 70001}, {300, 3, 1}, {65, 100, 1}, {9, 300, 2}, {1000, 2, 3}, {4, 1100, 1}, {60, 3200, 1},
                          {3, 6, 196}, {16, 24, 150}, {2, 9, 70}, {7, 5, 33}, {2100, 12, 1}};
  for (const Kernels* const* kernels = usable_kernels(); *kernels; ++kernels)
    for (const Shape& shape : shapes)
      for (Layout layout : {Layout::planar, Layout::channels_last})
        for (int dtype = 0; dtype < 4; ++dtype)
          for (int form = 0; form < 6; ++form) {
            if (layout == Layout::planar && shape.L == 1) continue;
            const Activation activations[] = {Activation::none, Activation::relu, Activation::silu,
                                              Activation::gelu, Activation::tanh, Activation::leaky_relu};
            run(**kernels, shape, layout, static_cast<Dtype>(dtype), activations[form], form % 2 == 1, form == 2,
                1 + form % 3);
          }
  for (const Kernels* const* kernels = usable_kernels(); *kernels; ++kernels) {
    for (const Shape& shape : shapes)
      for (int threads = 1; threads <= 2; ++threads) {
        test_repeated_gradient(**kernels, shape, Layout::channels_last, threads);
        if (shape.L > 1) test_repeated_gradient(**kernels, shape, Layout::planar, threads);
      }
    test_calls_at_once(**kernels);
  }
  test_pool();
  test_running();
  std::printf(failures ? "%d failed\n" : "all hold\n", failures);
  return failures != 0;
}
