// Tensors of the parity test in memory: any item type, any strides, and NaN wherever no element
// lies, so that a kernel that reads past its elements computes NaN, and one that writes there is
// seen.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numbers>
#include <numeric>
#include <utility>
#include <vector>

namespace parity {

// In the order of the tables of row-wise kernels.
enum Item { kFloat = 0, kDouble = 1, ITEM_BFLOAT16 = 2, ITEM_FLOAT16 = 3 };

struct ItemFacts {
  const char* name;
  int64_t bytes;
  double eps, tiny;  // from 1 to the next number; the smallest normal number
};
inline constexpr ItemFacts kFacts[] = {
    {"float32", 4, 0x1p-23, 0x1p-126},
    {"float64", 8, 0x1p-52, 0x1p-1022},
    {"bfloat16", 2, 0x1p-7, 0x1p-126},
    {"float16", 2, 0x1p-10, 0x1p-14},
};
// What items of a type are computed in.
inline Item computed(Item item) { return item == kDouble ? kDouble : kFloat; }

inline uint16_t float16_bits(double value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double size = std::fabs(value);
  if (std::isnan(value) || size >= 65520.0) {
    return sign | (std::isnan(value) ? 0x7e00 : 0x7c00);
  }
  const int unit = size < 0x1p-14 ? -24 : std::ilogb(size) - 10;  // the last place's
  const int units = static_cast<int>(std::nearbyint(std::ldexp(size, -unit)));
  return sign | static_cast<uint16_t>(((unit + 24) << 10) + units);
}

inline double float16_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  double size =
      std::ldexp(exponent == 0 ? mantissa : 1024 + mantissa, exponent == 0 ? -24 : exponent - 25);
  if (exponent == 31) {
    size = mantissa == 0 ? std::numeric_limits<double>::infinity() : std::nan("");
  }
  return (bits & 0x8000) != 0 ? -size : size;
}

inline uint16_t bfloat16_bits(double value) {
  const float rounded = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  return static_cast<uint16_t>(
      std::isnan(value) ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline double bfloat16_value(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename T>
T read_as(const unsigned char* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
template <typename T>
void write_as(unsigned char* to, T value) {
  std::memcpy(to, &value, sizeof value);
}

inline double read_item(Item item, const unsigned char* from) {
  switch (item) {
    case kFloat: return read_as<float>(from);
    case kDouble: return read_as<double>(from);
    case ITEM_BFLOAT16: return bfloat16_value(read_as<uint16_t>(from));
    default: return float16_value(read_as<uint16_t>(from));
  }
}
inline void write_item(Item item, unsigned char* to, double value) {
  switch (item) {
    case kFloat: return write_as(to, static_cast<float>(value));
    case kDouble: return write_as(to, value);
    case ITEM_BFLOAT16: return write_as(to, bfloat16_bits(value));
    default: return write_as(to, float16_bits(value));
  }
}
inline double rounded(Item item, double value) {
  unsigned char bytes[8];
  write_item(item, bytes, value);
  return read_item(item, bytes);
}

// A generator whose numbers are the same everywhere: splitmix64 (Steele, Lea & Flood 2014).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
  }
  // low <= number <= high
  int64_t between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(next() % static_cast<uint64_t>(high - low + 1));
  }
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
  bool chance(double p) { return uniform() < p; }
  double normal() {
    const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform()));
    return radius * std::cos(2.0 * std::numbers::pi * uniform());
  }
  template <typename E>
  E one_of(const std::vector<E>& from) {
    return from[between(0, from.size() - 1)];
  }

 private:
  uint64_t state_;
};

using Shape = std::vector<int64_t>;
using Values = std::vector<double>;

inline int64_t elements(const Shape& shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
}

inline Values normals(int64_t count, Random& random) {
  Values values(count);
  for (double& value : values) {
    value = random.normal();
  }
  return values;
}

class Stored {
 public:
  Stored() = default;

  // Contiguous, or with any order of the leading dimensions, gaps behind rows, and any start.
  Stored(Item item, Shape shape, Random* random = nullptr)
      : item_(item), shape_(std::move(shape)), strides_(shape_.size(), 1) {
    std::vector<size_t> order(shape_.size() - 1);
    std::iota(order.rbegin(), order.rend(), size_t{0});
    int64_t stride = shape_.back(), start = 0;
    if (random != nullptr) {
      for (size_t n = order.size(); n > 1; --n) {
        std::swap(order[n - 1], order[random->between(0, n - 1)]);
      }
      stride += random->between(0, 3);
      start = random->between(0, 2);
    }
    for (const size_t dimension : order) {
      strides_[dimension] = stride;
      stride *= shape_[dimension];
    }
    start_ = start;
    bytes_.assign((start + stride) * kFacts[item].bytes, 0xff);
  }

  Item item() const { return item_; }
  const Shape& shape() const { return shape_; }
  int64_t stride(size_t dimension) const { return strides_[dimension]; }
  // The stride with 0 for a dimension of size 1.
  int64_t broadcast_stride(size_t dimension) const {
    return shape_[dimension] == 1 ? 0 : strides_[dimension];
  }
  void* data() { return bytes_.data() + start_ * kFacts[item_].bytes; }

  void set(const Values& values) {
    for (size_t n = 0; n < values.size(); ++n) {
      write_item(item_, bytes_.data() + byte_of(n), values[n]);
    }
  }
  // In the order of the indices, whatever the strides.
  Values values() const {
    Values values(elements(shape_));
    for (size_t n = 0; n < values.size(); ++n) {
      values[n] = read_item(item_, bytes_.data() + byte_of(n));
    }
    return values;
  }
  // Whether all that lies between the elements is as it was made.
  bool gaps_untouched() const {
    std::vector<unsigned char> rest = bytes_;
    for (int64_t n = 0; n < elements(shape_); ++n) {
      std::memset(rest.data() + byte_of(n), 0xff, kFacts[item_].bytes);
    }
    for (const unsigned char byte : rest) {
      if (byte != 0xff) {
        return false;
      }
    }
    return true;
  }

 private:
  int64_t byte_of(int64_t index) const {
    int64_t at = start_;
    for (size_t dimension = shape_.size(); dimension-- > 0;) {
      at += index % shape_[dimension] * strides_[dimension];
      index /= shape_[dimension];
    }
    return at * kFacts[item_].bytes;
  }

  Item item_ = kFloat;
  Shape shape_, strides_;
  int64_t start_ = 0;
  std::vector<unsigned char> bytes_;
};

}  // namespace parity
