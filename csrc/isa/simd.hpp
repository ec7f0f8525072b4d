// Vectors of one instruction set, by the vector extension of GCC and Clang: the same source for all of them.
//
// BATCHNORM_ISA names the namespace, BATCHNORM_VECTOR_BYTES the width of a register; CMakeLists.txt sets both.
// Nothing here may instantiate templates of the standard library: two instruction sets would share one symbol.
#pragma once

#include <initializer_list>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace batchnorm {
namespace BATCHNORM_ISA {

constexpr int kVectorBytes = BATCHNORM_VECTOR_BYTES;

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

// Registers of float and double, and of integers as wide as they.
typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef double Doubles __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef int64_t Longs __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

template <class A> struct Register;
template <> struct Register<float> {
  using Vector = Floats;
  using Mask = Ints;
};
template <> struct Register<double> {
  using Vector = Doubles;
  using Mask = Longs;
};
template <class A> using Vector = typename Register<A>::Vector;

template <class A> constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

template <class A> inline Vector<A> broadcast(A value) { return Vector<A>{} + value; }

template <class V> inline V load_bytes(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class V> inline void store_bytes(void* p, V v) { memcpy(p, &v, sizeof v); }

// Past the caches, for outputs that do not fit there: saves reading each line before it is written. p is aligned.
inline void stream_bytes(void* p, Floats v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(static_cast<float*>(p), v);
#elif defined(__AVX__)
  _mm256_stream_ps(static_cast<float*>(p), v);
#elif defined(__SSE2__)
  _mm_stream_ps(static_cast<float*>(p), v);
#else
  store_bytes(p, v);
#endif
}
inline void stream_bytes(void* p, Halves v) {
#if defined(__AVX512F__)
  _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
#elif defined(__AVX__)
  _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)v);
#else
  store_bytes(p, v);
#endif
}

// Makes streamed stores visible to the other threads, in order.
inline void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Into the second-level cache, not the first, which the running pass needs.
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// How a dtype is stored, and the dtype A it is computed in.
template <class T> struct Storage;

template <> struct Storage<float> {
  using A = float;
  static Floats load(const float* p) { return load_bytes<Floats>(p); }
  static void store(float* p, Floats v) { store_bytes(p, v); }
  static void stream(float* p, Floats v) { stream_bytes(p, v); }
  static float widen(float v) { return v; }
};

template <> struct Storage<double> {
  using A = double;
  static Doubles load(const double* p) { return load_bytes<Doubles>(p); }
  static void store(double* p, Doubles v) { store_bytes(p, v); }
  static void stream(double* p, Doubles v) { stream_bytes(p, (Floats)v); }
  static double widen(double v) { return v; }
};

template <> struct Storage<bfloat16> {
  using A = float;
#if defined(__AVX512BW__)
  // Each half goes where the upper part of a float is, in one instruction.
  static Floats load(const bfloat16* p) {
    typedef int16_t Shorts __attribute__((vector_size(kVectorBytes)));
    const Shorts from = {0, 0, 0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0, 7, 0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
    const __m512i halves = _mm512_castsi256_si512((__m256i)load_bytes<Halves>(p));
    return (Floats)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, (__m512i)from, halves);
  }
#else
  static Floats load(const bfloat16* p) {
    return (Floats)(__builtin_convertvector(load_bytes<Halves>(p), Words) << 16);
  }
#endif
  // To nearest, ties to even. The instruction gives 0 for what is below 2^-126.
#if defined(__AVX512BF16__)
  static Halves narrow(Floats v) { return (Halves)_mm512_cvtneps_pbh(v); }
#else
  static Halves narrow(Floats v) {
    const Words bits = (Words)v;
    const Words rounded = bits + 0x7fff + ((bits >> 16) & 1);
    const Words nan = (bits >> 16) | 0x40;                     // rounding could turn a NaN into infinity
    const Words chosen = (v != v) ? nan : (rounded >> 16);
    return __builtin_convertvector(chosen, Halves);
  }
#endif
  static void store(bfloat16* p, Floats v) { store_bytes(p, narrow(v)); }
  static void stream(bfloat16* p, Floats v) { stream_bytes(p, narrow(v)); }
  static float widen(bfloat16 v) {
    const uint32_t bits = uint32_t{v.bits} << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
  }
};

template <> struct Storage<float16> {
  using A = float;
  static Floats load(const float16* p) {
#if defined(__AVX512F__)
    return _mm512_maskz_cvtph_ps(-1, (__m256i)load_bytes<Halves>(p));  // GCC 12 warns of the plain one
#elif defined(__F16C__)
    return _mm256_cvtph_ps((__m128i)load_bytes<Halves>(p));
#else
    const Words half = __builtin_convertvector(load_bytes<Halves>(p), Words);
    const Words sign = (half & 0x8000) << 16, rest = half & 0x7fff;
    // The exponent moves from bias 15 to 127; infinity and NaN move up to the top; subnormals are a multiple of 2^-24.
    const Words normal = (rest << 13) + ((127 - 15) << 23);
    const Words special = (rest << 13) | 0x7f800000;
    const Floats small = __builtin_convertvector((Ints)rest, Floats) * 5.9604644775390625e-8f;
    Words bits = rest >= 0x7c00 ? special : normal;
    bits = rest < 0x0400 ? (Words)small : bits;
    return (Floats)(bits | sign);
#endif
  }
  static Halves narrow(Floats v) {
#if defined(__AVX512F__)
    return (Halves)_mm512_maskz_cvtps_ph(-1, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
    return (Halves)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const Words bits = (Words)v, sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
    const Words normal = (rest - ((127 - 15) << 23) + 0xfff + ((rest >> 13) & 1)) >> 13;
    // Adding 0.5 puts the last bit of a subnormal half on the last bit of the float: the addition rounds.
    const Words small = (Words)((Floats)rest + 0.5f) - 0x3f000000;
    Words half = rest < 0x38800000 ? small : normal;
    half = rest >= 0x477ff000 ? (Words{} + 0x7c00) : half;
    half = rest > 0x7f800000 ? (Words{} + 0x7e00) : half;
    return __builtin_convertvector(half | sign, Halves);
#endif
  }
  static void store(float16* p, Floats v) { store_bytes(p, narrow(v)); }
  static void stream(float16* p, Floats v) { stream_bytes(p, narrow(v)); }
  static float widen(float16 v) {
    float16 lanes[kLanes<float>] = {v};
    return load(lanes)[0];
  }
};

template <class T> using Arithmetic = typename Storage<T>::A;

// The first `count` lanes, the others 0.
template <class T> inline Vector<Arithmetic<T>> load_part(const T* p, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 8) return (Doubles)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1), p);
  if constexpr (sizeof(T) == 4) return (Floats)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
  if constexpr (sizeof(T) == 2) {
    const __m256i part = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), p);
    return Storage<T>::load(reinterpret_cast<const T*>(&part));
  }
#else
  T lanes[kLanes<Arithmetic<T>>];
  memset(lanes, 0, sizeof lanes);
  memcpy(lanes, p, count * sizeof(T));
  return Storage<T>::load(lanes);
#endif
}
template <class T> inline void store_part(T* p, Vector<Arithmetic<T>> v, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 8) _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << count) - 1), (__m512d)v);
  else if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), (__m512)v);
  else _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << count) - 1), (__m256i)Storage<T>::narrow(v));
#else
  T lanes[kLanes<Arithmetic<T>>];
  Storage<T>::store(lanes, v);
  memcpy(p, lanes, count * sizeof(T));
#endif
}

// All ones in the first `count` lanes, for vectors of A.
template <class A> inline typename Register<A>::Mask first_lanes(int64_t count) {
  typename Register<A>::Mask lane;
  for (int i = 0; i < kLanes<A>; ++i) lane[i] = i;
  return lane < static_cast<decltype(lane[0] + 0)>(count);
}

// All ones where the byte of the mask is not 0; lanes from `count` on are zeros.
template <class A> inline typename Register<A>::Mask lanes_of(const uint8_t* mask, int64_t count) {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes<A>)));
  Bytes bytes{};
  if (count == kLanes<A>) memcpy(&bytes, mask, sizeof bytes);
  else memcpy(&bytes, mask, static_cast<size_t>(count));
  return __builtin_convertvector(bytes, typename Register<A>::Mask) != 0;
}

// In pairs, as one sum would wait for its own last addition.
template <class V> inline double total(V v) {
  constexpr int number = sizeof v / sizeof v[0];
  double sums[number];
  for (int i = 0; i < number; ++i) sums[i] = v[i];
  for (int left = number / 2; left; left /= 2)
    for (int i = 0; i < left; ++i) sums[i] += sums[i + left];
  return sums[0];
}

}  // namespace BATCHNORM_ISA
}  // namespace batchnorm
