// Rows of q, k, v and their gradients in memory, of the type computed in or of a half type.
//
// `item_type` says which, at run time: so one machine function does all three, and a matrix of a half type
// is widened block by block. Offsets and row strides count elements.

#pragma once

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "call_records.h"
#include "constants.h"
#include "simd/gemm.h"

namespace rowmax {
namespace ROWMAX_ISA {

template <typename Item, typename Address>
using PointerLike =
    std::conditional_t<std::is_const_v<std::remove_pointer_t<Address>>, const Item*, Item*>;

// visit(pointer to items of the type that `item_type` names)
template <typename T, typename Address, typename Visit>
ROWMAX_INLINE void with_items(int64_t item_type, Address address, Visit visit) {
  if constexpr (std::is_same_v<T, float>) {
    if (item_type == ITEM_BFLOAT16) {
      return visit(static_cast<PointerLike<Bfloat16, Address>>(address));
    }
    if (item_type == ITEM_FLOAT16) {
      return visit(static_cast<PointerLike<Float16, Address>>(address));
    }
  }
  visit(static_cast<PointerLike<T, Address>>(address));
}

// A (rows, columns) matrix that can be computed with: half types are widened into `scratch`.
template <typename T>
inline Matrix<const T> readable(
    int64_t item_type, const void* address, int64_t offset, int64_t row, int64_t rows,
    int64_t columns, T* scratch) {
  if (item_type == ITEM_COMPUTED) {
    return {static_cast<const T*>(address) + offset, row};
  }
  with_items<T>(item_type, address, [&](auto* items) {
    const int64_t full = columns - columns % LANES<T>;
    for (int64_t r = 0; r < rows; ++r) {
      const auto* from = items + offset + r * row;
      T* to = scratch + r * columns;
#pragma GCC unroll 4
      for (int64_t c = 0; c < full; c += LANES<T>) {
        store(to + c, load(from + c));
      }
      if (full < columns) {
        store_first(to + full, load_first(from + full, columns - full), columns - full);
      }
    }
  });
  return {scratch, columns};
}

// Ask for rows that will be read soon, while there is other work.
template <typename T>
inline void prefetch_rows(
    int64_t item_type, const void* address, int64_t offset, int64_t row, int64_t rows,
    int64_t columns) {
  const int64_t size = item_type == ITEM_COMPUTED ? sizeof(T) : 2;
  for (int64_t r = 0; r < rows; ++r) {
    const char* first = static_cast<const char*>(address) + (offset + r * row) * size;
    for (int64_t at = 0; at < columns * size; at += 64) {
      prefetch(first + at);
    }
  }
}

// Ask for rows that will be written soon.
template <typename T>
inline void prefetch_target(
    int64_t item_type, void* address, int64_t offset, int64_t row, int64_t rows, int64_t columns) {
  const int64_t size = item_type == ITEM_COMPUTED ? sizeof(T) : 2;
  for (int64_t r = 0; r < rows; ++r) {
    char* first = static_cast<char*>(address) + (offset + r * row) * size;
    for (int64_t at = 0; at < columns * size; at += 64) {
      prefetch_to_write(first + at);
    }
  }
}

// target = factor * source; rows of `source` are padded to vectors.
template <typename T>
inline void write_rows(
    int64_t item_type, void* address, int64_t offset, int64_t row, Matrix<const T> source,
    int64_t rows, int64_t columns, T factor) {
  with_items<T>(item_type, address, [&](auto* items) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; c += LANES<T>) {
        const Vec<T> vector = load(source.at + r * source.row + c) * splat(factor);
        store_first(items + offset + r * row + c, vector, columns - c);
      }
    }
  });
}

// Rows padded with zeros to `target.row` columns; zeros where lse2 is +inf: a row that attends nothing
// may hold NaN.
template <typename T>
inline void copy_rows(
    int64_t item_type, const void* address, int64_t offset, int64_t row, Matrix<T> target,
    int64_t rows, int64_t columns, const T* lse2) {
  with_items<T>(item_type, address, [&](auto* items) {
    for (int64_t r = 0; r < rows; ++r) {
      const bool dead = lse2[r] == INFINITE<T>;
      for (int64_t c = 0; c < target.row; c += LANES<T>) {
        Vec<T> vector{};
        if (!dead) {
          vector = load_first(items + offset + r * row + c, columns - c);
        }
        store(target.at + r * target.row + c, vector);
      }
    }
  });
}

// totals[r] = sum_c a[r, c] * b[r, c], with `a` in memory.
template <typename T, typename Item>
inline void dot_rows(
    int64_t item_type, const void* address, int64_t offset, int64_t row, Matrix<const Item> b,
    int64_t rows, int64_t columns, T* totals) {
  with_items<T>(item_type, address, [&](auto* items) {
    for (int64_t r = 0; r < rows; ++r) {
      Vec<T> total{};
      for (int64_t c = 0; c < columns; c += LANES<T>) {
        const auto left = load_first(items + offset + r * row + c, columns - c);
        total = multiply_add(left, load_first(b.at + r * b.row + c, columns - c), total);
      }
      totals[r] = add_lanes(total);
    }
  });
}

// Parts of a thread's scratch, each on a cache line; counts them where there is no memory yet.
class Scratch {
 public:
  explicit Scratch(void* memory) : first_(reinterpret_cast<uintptr_t>(memory)) {}

  template <typename E>
  E* take(int64_t elements) {
    const uintptr_t at = first_ + static_cast<uintptr_t>(bytes_);
    bytes_ += round_up(elements * static_cast<int64_t>(sizeof(E)), 64);
#if defined(__SANITIZE_ADDRESS__)
    if (first_ != 0) {  // between the parts there is memory that nothing may touch
      __asan_poison_memory_region(reinterpret_cast<void*>(first_ + bytes_), 64);
    }
    bytes_ += 64;
#endif
    return reinterpret_cast<E*>(at);
  }
  int64_t bytes() const { return bytes_; }

 private:
  uintptr_t first_;
  int64_t bytes_ = 0;
};

}  // namespace ROWMAX_ISA
}  // namespace rowmax
