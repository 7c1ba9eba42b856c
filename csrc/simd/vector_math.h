// Functions of single vectors: the exponential of the softmax, tanh and log2.

#pragma once

#include "constants.h"
#include "simd/vector.h"

namespace rowmax {
namespace ROWMAX_ISA {

// Mantissa bits, the exponent's bias, the number whose addition leaves round(x) + bias in the low bits,
// and the coefficients of the series.
template <typename T>
struct Format;
template <>
struct Format<float> {
  static constexpr int mantissa_bits = 23, bias = 127;
  static constexpr float rounder = 0x1.8p23f + bias;
  static constexpr auto& exp2 = EXP2_FLOAT;
  static constexpr auto& tanh = TANH_FLOAT;
};
template <>
struct Format<double> {
  static constexpr int mantissa_bits = 52, bias = 1023;
  static constexpr double rounder = 0x1.8p52 + bias;
  static constexpr auto& exp2 = EXP2_DOUBLE;
  static constexpr auto& tanh = TANH_DOUBLE;
};

// sum over n of coefficients[n] * x^n
template <typename T, int count>
ROWMAX_INLINE Vec<T> polynomial(const double (&coefficients)[count], Vec<T> x) {
  Vec<T> value = splat(static_cast<T>(coefficients[count - 1]));
#pragma GCC unroll 16
  for (int n = count - 2; n >= 0; --n) {
    value = multiply_add(value, x, splat(static_cast<T>(coefficients[n])));
  }
  return value;
}

// 2^(x + low) for x <= 0 of at least -bias: x = n + f with n = round(x), a polynomial in f + low, and
// n + bias for the exponent's bits. With x = -bias they come out as 0, and so does the result.
template <typename T, typename Add>
ROWMAX_INLINE Vec<T> exp2_of(Vec<T> x, const Add& add_low) {
  using F = Format<T>;
  const Vec<T> shifted = x + splat(F::rounder);
  const Vec<T> fraction = x - (shifted - splat(F::rounder));
  const Words<T> exponent = reinterpret_cast<Words<T>>(shifted) << F::mantissa_bits;
  return polynomial<T>(F::exp2, add_low(fraction)) * reinterpret_cast<Vec<T>>(exponent);
}

// 2^x for x <= 0, lane by lane; 0 below the smallest normal number, -inf included; NaN of NaN.
template <typename T>
ROWMAX_INLINE Vec<T> exp2(Vec<T> x) {
  const Vec<T> clamped = maximum(splat(static_cast<T>(-Format<T>::bias)), x);
  return exp2_of<T>(clamped, [](Vec<T> fraction) { return fraction; });
}

// What rounding took from a number, all of it in `large` where it is more than 1/8 (of numbers from 2^21
// on in float), else in `small`.
template <typename T>
struct Rest {
  Vec<T> large, small;
};
template <typename T>
ROWMAX_INLINE Rest<T> rest_of(Vec<T> rest) {
  const Vec<T> zero{}, size = maximum(rest, zero - rest);
  const Vec<T> large = select(size > splat(T(0.125)), rest, zero);
  return {large, rest - large};
}

// 2^(a - b - rest) for a <= b + rest, with what rounding takes from a - b where |a| <= |b| (Dekker 1971);
// as `exp2` else.
template <typename T>
ROWMAX_INLINE Vec<T> exp2_difference(Vec<T> a, Vec<T> b, const Rest<T>& rest) {
  const Vec<T> least = splat(static_cast<T>(-Format<T>::bias)), difference = a - b;
  // (the bound is met, by NaN too, only where the difference is clamped or NaN)
  const Vec<T> taken = maximum(a - (maximum(least, difference) + b), splat(T(-0x1p-16)));
  const Vec<T> low = taken - rest.small;
  const Vec<T> clamped = maximum(least, difference - rest.large);
  return exp2_of<T>(clamped, [&](Vec<T> fraction) { return fraction + low; });
}

// tanh lane by lane: sign(x) * (1 - e) / (1 + e) with e = exp(-2 |x|); near 0 by its series.
template <typename T>
ROWMAX_INLINE Vec<T> tanh(Vec<T> x) {
  const Vec<T> one = splat(T(1)), zero{};
  const Vec<T> size = maximum(x, zero - x);
  const Vec<T> e = exp2<T>(size * splat(static_cast<T>(-2.0 * LOG2_E)));
  Vec<T> large = (one - e) / (one + e);
  large = x < zero ? zero - large : large;
  return size < splat(T(0.25)) ? polynomial<T>(Format<T>::tanh, x * x) * x : large;
}

// log2(x) of finite x > 0; of 0 anything.
ROWMAX_INLINE Vec<double> log2(Vec<double> x) {
  const Ints<double> bits = reinterpret_cast<Ints<double>>(x);
  // the exponent of x / sqrt(1/2), so that m = x / 2^n lies around 1
  const Ints<double> exponent = (bits - 0x3FE6A09E667F3BCD) >> 52;
  const Vec<double> m = reinterpret_cast<Vec<double>>(bits - (exponent << 52));
  const Vec<double> s = (m - splat(1.0)) / (m + splat(1.0));
  return multiply_add(
      polynomial<double>(LOG2_SERIES, s * s), s, __builtin_convertvector(exponent, Vec<double>));
}

// As many elements as a vector of doubles has lanes, in float64.
template <typename T>
ROWMAX_INLINE Vec<double> load_wide(const T* from) {
  const auto items = load_bits<Lanes<T, LANES<double> * sizeof(T)>>(from);
  return __builtin_convertvector(items, Vec<double>);
}

}  // namespace ROWMAX_ISA
}  // namespace rowmax
