// The rule by which a result passes, the one of tests/kernels/support.py: for the largest error and
// for the root mean square of all errors alike,
//
//     error(kernel) <= 2 * error(the equations in the type that the kernel computes in)
//                      + eps(item) * |exact| + SUMMATION * eps(computed) * magnitude
//
// where `exact` are the equations in a wider type, and `magnitude` is what their sums would be if
// no term cancelled another. Where `exact` is not finite, the kernel's result must be the same.

#pragma once

#include <algorithm>
#include <cstdio>
#include <map>
#include <string>

#include "storage.h"

namespace parity {

inline constexpr double SUMMATION = 8.0;

// The results of a call by their names, in the order of their indices; and their magnitudes.
struct Answer {
  std::map<std::string, Values> values, magnitudes;
};

struct Result {
  Values values;
  Item stored;  // the type that it is rounded to
};
using Results = std::map<std::string, Result>;

inline bool same_place(double got, double exact) {
  return std::isnan(exact) ? std::isnan(got) : got == exact;
}

// What is wrong with a result; empty where nothing is.
inline std::string fault_of(
    const Result& got, const Values& exact, const Values& plain, const Values& magnitude) {
  if (got.values.size() != exact.size()) {
    return "has " + std::to_string(got.values.size()) + " elements instead of " +
           std::to_string(exact.size());
  }
  const ItemFacts &stored = kFacts[got.stored], &sums = kFacts[computed(got.stored)];
  double largest[3] = {}, squares[3] = {};  // error, naive error, rounding
  size_t count = 0;
  for (size_t n = 0; n < exact.size(); ++n) {
    if (!std::isfinite(exact[n])) {
      if (!same_place(got.values[n], exact[n])) {
        return "is " + std::to_string(got.values[n]) + " instead of " + std::to_string(exact[n]);
      }
      continue;
    }
    if (!std::isfinite(got.values[n])) {
      return "is " + std::to_string(got.values[n]) + " at " + std::to_string(n);
    }
    const double of[3] = {
        std::fabs(got.values[n] - exact[n]), std::fabs(plain[n] - exact[n]),
        stored.eps * std::fabs(exact[n]) + stored.tiny + SUMMATION * sums.eps * magnitude[n]};
    for (int which = 0; which < 3; ++which) {
      largest[which] = std::max(largest[which], of[which]);
      squares[which] += of[which] * of[which];
    }
    ++count;
  }
  const auto compare = [](const char* norm, double error, double naive, double rounding) {
    const double limit = 2.0 * naive + rounding;
    if (error <= limit) {
      return std::string();
    }
    char text[200];
    std::snprintf(
        text, sizeof text, "%s error %.3e > %.3e, the equations' in the same type is %.3e", norm,
        error, limit, naive);
    return std::string(text);
  };
  const std::string fault = compare("largest", largest[0], largest[1], largest[2]);
  if (!fault.empty() || count == 0) {
    return fault;
  }
  const auto rms = [&](int which) {
    return std::sqrt(squares[which] / static_cast<double>(count));
  };
  return compare("rms", rms(0), rms(1), rms(2));
}

inline std::string fault_of(const Results& got, const Answer& exact, const Answer& plain) {
  for (const auto& [name, values] : exact.values) {
    const auto found = got.find(name);
    if (found == got.end()) {
      return name + " is missing";
    }
    const std::string fault =
        fault_of(found->second, values, plain.values.at(name), exact.magnitudes.at(name));
    if (!fault.empty()) {
      return name + ": " + fault;
    }
  }
  return {};
}

}  // namespace parity
