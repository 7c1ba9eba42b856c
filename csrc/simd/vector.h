// Vectors of the width that this file is compiled for, and loads and stores of every item type.
//
// Every kernel source is compiled once for each instruction set, with ROWMAX_ISA naming it: all that
// kernels use stands in the namespace rowmax::ROWMAX_ISA, so that the linker can never put the
// AVX-512 copy of a function into a path for a processor without it. For the same reason kernels
// call no inline function of the standard library.
//
// Vec<float> and Vec<double> are GCC's vector extensions: + - * / and comparisons work lane by lane,
// and a comparison is a vector of integers, all bits or none. Instructions are named only where the
// extensions don't reach one. Products and sums are fused where `multiply_add` says so, and nowhere
// else (-ffp-contract=off): the bits are the same in every tile shape.

#pragma once

#include <stdint.h>

#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#ifndef ROWMAX_ISA
#error "ROWMAX_ISA must name the instruction set that is compiled for"
#endif

namespace rowmax {
namespace ROWMAX_ISA {

#if defined(__AVX512F__) && defined(__AVX512VL__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#define ROWMAX_AVX512 1
inline constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define ROWMAX_AVX2 1
inline constexpr int VECTOR_BYTES = 32;
#else
inline constexpr int VECTOR_BYTES = 16;
#endif

#define ROWMAX_INLINE inline __attribute__((always_inline))

// Half types as they lie in memory; nothing is computed in either.
struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename E, int bytes>
struct VectorOf {
  typedef E type __attribute__((vector_size(bytes)));
};
template <typename E, int bytes>
using Lanes = typename VectorOf<E, bytes>::type;

template <typename T>
inline constexpr int LANES = VECTOR_BYTES / static_cast<int>(sizeof(T));
template <typename T>
using Vec = Lanes<T, VECTOR_BYTES>;
// Signed and unsigned integers of T's width: positions and masks, and bits and random words.
template <typename T>
using IntOf = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
template <typename T>
using WordOf = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
template <typename T>
using Ints = Vec<IntOf<T>>;
template <typename T>
using Words = Vec<WordOf<T>>;
// What a type in memory is computed in.
template <typename Item>
using Computed = std::conditional_t<sizeof(Item) == 2, float, Item>;

template <typename A>
ROWMAX_INLINE constexpr A min(A a, A b) {
  return a < b ? a : b;
}
template <typename A>
ROWMAX_INLINE constexpr A max(A a, A b) {
  return a > b ? a : b;
}
ROWMAX_INLINE constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}
template <typename T>
inline constexpr T INFINITE = static_cast<T>(__builtin_inf());

// --- lanes ----------------------------------------------------------------------------------------

template <typename T>
ROWMAX_INLINE Vec<T> splat(T scalar) {
  if constexpr (std::is_floating_point_v<T>) {
    return scalar - Vec<T>{};  // (a sum with zero would lose the sign of -0)
  } else {
    return scalar + Vec<T>{};
  }
}

// 0, 1, 2, ...
template <typename E, int... lane>
ROWMAX_INLINE Vec<E> lane_numbers(std::integer_sequence<int, lane...>) {
  return Vec<E>{static_cast<E>(lane)...};
}
template <typename E>
ROWMAX_INLINE Vec<E> lane_numbers() {
  return lane_numbers<E>(std::make_integer_sequence<int, LANES<E>>{});
}

template <typename V, typename M>
ROWMAX_INLINE V select(M condition, V yes, V no) {
  return condition ? yes : no;
}

ROWMAX_INLINE Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(ROWMAX_AVX512)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(ROWMAX_AVX2)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}
ROWMAX_INLINE Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(ROWMAX_AVX512)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(ROWMAX_AVX2)
  return _mm256_fmadd_pd(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f64(c, a, b);
#else
  return a * b + c;
#endif
}

// The larger; b where a is NaN. (A NaN score reaches the result through exp2 and the sum.)
ROWMAX_INLINE Vec<float> maximum(Vec<float> a, Vec<float> b) {
#if defined(ROWMAX_AVX512)
  return _mm512_max_ps(a, b);
#elif defined(ROWMAX_AVX2)
  return _mm256_max_ps(a, b);
#elif defined(__x86_64__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
ROWMAX_INLINE Vec<double> maximum(Vec<double> a, Vec<double> b) {
#if defined(ROWMAX_AVX512)
  return _mm512_max_pd(a, b);
#elif defined(ROWMAX_AVX2)
  return _mm256_max_pd(a, b);
#elif defined(__x86_64__)
  return _mm_max_pd(a, b);
#else
  return a > b ? a : b;
#endif
}

template <typename V>
ROWMAX_INLINE bool any_lane(V mask) {
#if defined(ROWMAX_AVX512)
  const __m512i bits = reinterpret_cast<__m512i>(mask);
  return _mm512_test_epi64_mask(bits, bits) != 0;
#elif defined(ROWMAX_AVX2)
  const __m256i bits = reinterpret_cast<__m256i>(mask);
  return !_mm256_testz_si256(bits, bits);
#else
  const Vec<int64_t> words = reinterpret_cast<Vec<int64_t>>(mask);
  return (words[0] | words[1]) != 0;
#endif
}

template <typename V>
using ElementOf = std::remove_cv_t<std::remove_reference_t<decltype(V{}[0])>>;

// The first or the second half of the lanes.
template <int half, typename V, int... lane>
ROWMAX_INLINE auto half_of(V v, std::integer_sequence<int, lane...>) {
  constexpr int lanes = sizeof...(lane);
  return __builtin_shufflevector(v, v, (half * lanes + lane)...);
}
// All lanes joined by halves, in registers: the same order on every run.
template <typename V, typename Join>
ROWMAX_INLINE ElementOf<V> join_lanes(V v, const Join& join) {
  constexpr int lanes = sizeof(V) / sizeof(ElementOf<V>);
  if constexpr (lanes == 2) {
    return join(v[0], v[1]);
  } else {
    constexpr auto numbers = std::make_integer_sequence<int, lanes / 2>{};
    return join_lanes(join(half_of<0>(v, numbers), half_of<1>(v, numbers)), join);
  }
}
template <typename V>
ROWMAX_INLINE ElementOf<V> add_lanes(V v) {
  return join_lanes(v, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
}
// (of numbers)
template <typename V>
ROWMAX_INLINE ElementOf<V> largest_lane(V v) {
  return join_lanes(v, [](auto a, auto b) __attribute__((always_inline)) { return a > b ? a : b; });
}

// The sums of neighbouring groups of `group` lanes of two vectors: within each `block` lanes a's, then b's.
template <int block, int group, typename V, int... lane>
ROWMAX_INLINE V add_neighbours(V a, V b, std::integer_sequence<int, lane...>) {
  constexpr int lanes = sizeof...(lane), half = block / 2;
  const auto first = [](int at) constexpr {
    const int inside = at % half;
    return at / block * block + inside / group * 2 * group + inside % group +
           (at % block < half ? 0 : lanes);
  };
  return __builtin_shufflevector(a, b, first(lane)...) +
         __builtin_shufflevector(a, b, (first(lane) + group)...);
}
// The sums of as many vectors as they have lanes: lane n is the sum of the lanes of vector n. Rounds
// of adding neighbours, of two vectors into one: first within 128 bits, where shuffles cost least.
template <int count, typename V>
ROWMAX_INLINE V add_across(const V (&vectors)[count]) {
  if constexpr (count == 1) {
    return vectors[0];
  } else {
    constexpr int lanes = sizeof(V) / sizeof(ElementOf<V>), part = 16 / sizeof(ElementOf<V>);
    constexpr bool within = count * part > lanes;
    V sums[count / 2];
#pragma GCC unroll 8
    for (int n = 0; n < count / 2; ++n) {
      sums[n] = add_neighbours<within ? part : lanes, within ? 1 : part>(
          vectors[2 * n], vectors[2 * n + 1], std::make_integer_sequence<int, lanes>{});
    }
    return add_across(sums);
  }
}

// Two vectors' lanes in turn: their first halves (part = 0) or their second halves (part = 1).
template <typename V, int... lane>
ROWMAX_INLINE V interleave(V a, V b, int part, std::integer_sequence<int, lane...>) {
  constexpr int lanes = sizeof...(lane);
  return part == 0 ? __builtin_shufflevector(a, b, (lane / 2 + lanes * (lane % 2))...)
                   : __builtin_shufflevector(a, b, (lanes / 2 + lane / 2 + lanes * (lane % 2))...);
}
template <typename V>
ROWMAX_INLINE V interleave(V a, V b, int part) {
  constexpr int lanes = sizeof(V) / sizeof(ElementOf<V>);
  return interleave(a, b, part, std::make_integer_sequence<int, lanes>{});
}

// --- memory ---------------------------------------------------------------------------------------

template <typename V>
ROWMAX_INLINE V load_bits(const void* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

// Half of a vector's bytes: as many items of half its elements' width as it has lanes.
typedef Lanes<uint16_t, VECTOR_BYTES / 2> HalfBits;

// (GCC converts vectors of 256 bits in halves.)
ROWMAX_INLINE Vec<float> widen(HalfBits bits, Bfloat16) {
#if defined(ROWMAX_AVX2)
  return reinterpret_cast<Vec<float>>(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(bits)), 16));
#else
  return reinterpret_cast<Vec<float>>(__builtin_convertvector(bits, Words<float>) << 16);
#endif
}

ROWMAX_INLINE Vec<float> widen(HalfBits bits, Float16) {
#if defined(ROWMAX_AVX512)
  return _mm512_cvtph_ps(reinterpret_cast<__m256i>(bits));
#elif defined(ROWMAX_AVX2)
  return _mm256_cvtph_ps(reinterpret_cast<__m128i>(bits));
#else
  const Words<float> word = __builtin_convertvector(bits, Words<float>);
  const Words<float> sign = (word & 0x8000) << 16, rest = word & 0x7fff;
  // Exponent and mantissa moved into place, and the exponent's bias by a product, which also
  // makes subnormal numbers normal; infinities and NaN have all bits of the exponent.
  const Vec<float> scaled = reinterpret_cast<Vec<float>>(rest << 13) * splat(0x1p112f);
  const Words<float> special = rest << 13 | 0x7f800000;
  const Words<float> value = rest >= 0x7c00 ? special : reinterpret_cast<Words<float>>(scaled);
  return reinterpret_cast<Vec<float>>(value | sign);
#endif
}

// Rounded to nearest even; NaN stays NaN.
ROWMAX_INLINE HalfBits narrow(Vec<float> v, Bfloat16) {
  const Words<float> bits = reinterpret_cast<Words<float>>(v);
  const Words<float> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words<float> nan = bits >> 16 | 0x40;
  const Words<float> result = v == v ? rounded : nan;
#if defined(ROWMAX_AVX2)
  const __m256i words = reinterpret_cast<__m256i>(result);
  return reinterpret_cast<HalfBits>(
      _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
#else
  return __builtin_convertvector(result, HalfBits);
#endif
}

ROWMAX_INLINE HalfBits narrow(Vec<float> v, Float16) {
#if defined(ROWMAX_AVX512)
  return reinterpret_cast<HalfBits>(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(ROWMAX_AVX2)
  return reinterpret_cast<HalfBits>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  const Words<float> bits = reinterpret_cast<Words<float>>(v);
  const Words<float> sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  // Normal: the bias changed and 13 bits rounded away. Below 2^-14 a sum with 1/2 leaves the
  // rounded multiple of 2^-24 in the lowest bits. From 65520 on it is infinity.
  const Words<float> normal = (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13;
  const Words<float> subnormal =
      reinterpret_cast<Words<float>>(reinterpret_cast<Vec<float>>(rest) + splat(0.5f)) - 0x3f000000;
  Words<float> value = rest < 0x38800000 ? subnormal : normal;
  value = rest >= 0x477ff000 ? Words<float>{} + 0x7c00 : value;
  value = rest > 0x7f800000 ? Words<float>{} + 0x7e00 : value;
  return __builtin_convertvector(value | sign, HalfBits);
#endif
}

// A vector of elements in memory, at the address of any of them. It is an access to elements, not to
// bytes that may belong to anything: so a store leaves the compiler what it knows of other types, which
// are the addresses and sizes that every loop needs.
template <typename E>
struct InMemory {
  typedef E type __attribute__((vector_size(VECTOR_BYTES), aligned(alignof(E))));
};
typedef uint16_t HalfBitsInMemory __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2)));

// A vector of items in memory, in the type that they are computed in.
template <typename Item>
ROWMAX_INLINE Vec<Computed<Item>> load(const Item* from) {
  if constexpr (sizeof(Item) == 2) {
    return widen(*reinterpret_cast<const HalfBitsInMemory*>(from), Item{});
  } else {
    return *reinterpret_cast<const typename InMemory<Item>::type*>(from);
  }
}

template <typename Item>
ROWMAX_INLINE void store(Item* to, Vec<Computed<Item>> v) {
  if constexpr (sizeof(Item) == 2) {
    *reinterpret_cast<HalfBitsInMemory*>(to) = narrow(v, Item{});
  } else {
    *reinterpret_cast<typename InMemory<Item>::type*>(to) = v;
  }
}

// The first `count` items, and zeros; what lies beyond is not read.
template <typename Item>
ROWMAX_INLINE Vec<Computed<Item>> load_first(const Item* from, int64_t count) {
  constexpr int lanes = LANES<Computed<Item>>;
  if (count >= lanes) {
    return load(from);
  }
#if defined(ROWMAX_AVX512)
  const uint32_t mask = (1u << max<int64_t>(count, 0)) - 1;
  if constexpr (sizeof(Item) == 2) {
    const __m256i bits = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), from);
    return widen(reinterpret_cast<HalfBits>(bits), Item{});
  } else if constexpr (sizeof(Item) == 4) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from);
  } else {
    return _mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), from);
  }
#else
  Item items[lanes] = {};
  for (int64_t lane = 0; lane < count; ++lane) {
    items[lane] = from[lane];
  }
  return load(items);
#endif
}

// The first `count` lanes; what lies beyond them in memory is not touched.
template <typename Item>
ROWMAX_INLINE void store_first(Item* to, Vec<Computed<Item>> v, int64_t count) {
  constexpr int lanes = LANES<Computed<Item>>;
  if (count >= lanes) {
    store(to, v);
    return;
  }
#if defined(ROWMAX_AVX512)
  const uint32_t mask = (1u << max<int64_t>(count, 0)) - 1;
  if constexpr (sizeof(Item) == 2) {
    const __m256i bits = reinterpret_cast<__m256i>(narrow(v, Item{}));
    _mm256_mask_storeu_epi16(to, static_cast<__mmask16>(mask), bits);
  } else if constexpr (sizeof(Item) == 4) {
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>(mask), v);
  } else {
    _mm512_mask_storeu_pd(to, static_cast<__mmask8>(mask), v);
  }
#else
  Item items[lanes];
  store(items, v);
  for (int64_t lane = 0; lane < count; ++lane) {
    to[lane] = items[lane];
  }
#endif
}

// `count` elements, rounded up to whole vectors, set to `value`.
template <typename T>
ROWMAX_INLINE void fill(T* to, int64_t count, T value) {
  for (int64_t at = 0; at < count; at += LANES<T>) {
    store(to + at, splat(value));
  }
}

// Ask for the cache line of an address; one that is not there does no harm. The empty statement is
// for GCC, which takes a function that only prefetches for one without effect, and leaves out its calls.
ROWMAX_INLINE void prefetch(const void* address) {
  __builtin_prefetch(address, 0, 2);
  __asm__ volatile("");
}
// The same for a line that will be written: no other core may keep it.
ROWMAX_INLINE void prefetch_to_write(const void* address) {
  __builtin_prefetch(address, 1, 3);
  __asm__ volatile("");
}

// --- threads --------------------------------------------------------------------------------------

ROWMAX_INLINE int64_t take_work(int64_t* counter) {
  return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
}
// As `take_work`, and a barrier: who draws the last number sees what all others wrote.
ROWMAX_INLINE int64_t finish_task(int64_t* counter) {
  return __atomic_fetch_add(counter, 1, __ATOMIC_ACQ_REL);
}

// step(first, end) for `size` numbers below `count` at a time, until the threads have taken all.
template <typename Step>
ROWMAX_INLINE void for_grabs(int64_t* counter, int64_t size, int64_t count, const Step& step) {
  for (int64_t first; (first = take_work(counter) * size) < count;) {
    step(first, min(first + size, count));
  }
}

}  // namespace ROWMAX_ISA
}  // namespace rowmax
