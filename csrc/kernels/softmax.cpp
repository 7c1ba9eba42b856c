// The kernels of masked softmax, forward and backward: keys in the lanes, row by row.
//
//     weights = softmax(scale * scores) over the keys that the mask allows, 0 elsewhere
//     d_scores = scale * weights * (grad - sum(weights * grad)),  grad taken as 0 where weights are 0
//
// The exponentials are 2^((s - max s) * |scale| * log2 e) with s = sign(scale) * scores: the difference
// is rounded once, however large the scores. Bands, lengths and documents leave each row one range of
// keys, and only that is read; within it documents and a dense mask turn what they forbid into -inf.
// A row of a half type is worked on in float scratch.

#include "kernels/dispatch.h"
#include "kernels/rows.h"

namespace rowmax {
namespace ROWMAX_ISA {
namespace {

struct Range {
  int64_t first, end;
};

// The keys that bands and lengths allow; first == end when there are none.
Range key_range(const SoftmaxCall& call, int64_t batch, int64_t query) {
  int64_t lower = call.band_lower, upper = call.band_upper, end = call.keys;
  if (call.band != nullptr) {
    lower = max(lower, call.band[2 * batch]);
    upper = min(upper, call.band[2 * batch + 1]);
  }
  if (call.key_lengths != nullptr) {
    end = min(end, call.key_lengths[batch]);
  }
  if (call.query_lengths != nullptr && query >= call.query_lengths[batch]) {
    end = 0;
  }
  const int64_t no_bound = NO_BOUND;
  const int64_t first = max<int64_t>(0, query + max(lower, -no_bound));
  const int64_t prefix = call.prefix_lengths != nullptr ? call.prefix_lengths[batch] : 0;
  end = max<int64_t>(0, min(end, max(query + min(upper, no_bound) + 1, prefix)));
  return {min(first, end), end};
}

// Without the keys of other documents before the first and behind the last own.
Range document_range(const int64_t* ids, int64_t document, Range range) {
  while (range.first < range.end && ids[range.first] != document) {
    ++range.first;
  }
  while (range.end > range.first && ids[range.end - 1] != document) {
    --range.end;
  }
  return range;
}

// target = sign * scores where allowed(c) is true, -inf elsewhere.
template <typename T, typename Item, typename Allowed>
ROWMAX_INLINE void mask_row(
    const Item* scores, T sign, T* target, int64_t keys, const Allowed& allowed) {
  for_vectors<T>(keys, [&](int64_t c, int64_t count) {
    Ints<T> flags{};
    if (count == LANES<T>) {
      IntOf<T> each[LANES<T>];
      for (int lane = 0; lane < LANES<T>; ++lane) {
        each[lane] = allowed(c + lane) ? -1 : 0;
      }
      flags = load_bits<Ints<T>>(each);
    } else {
      for (int64_t lane = 0; lane < count; ++lane) {
        flags[lane] = allowed(c + lane) ? -1 : 0;
      }
    }
    const Vec<T> score = load_first(scores + c, count) * splat(sign);
    store_first(target + c, select(flags, score, splat(-INFINITE<T>)), count);
  });
}

// target[first:end] = softmax(row[first:end] * sign * factor), 0 elsewhere. `work` may be `row`.
template <typename T, typename Item, typename Source>
void weigh_row(
    const Source* row, T sign, T* work, T factor, Item* target, Range range, int64_t keys) {
  const int64_t width = range.end - range.first;
  T largest = row_maximum(row + range.first, sign, width);
  largest = largest == -INFINITE<T> ? T(0) : largest;
  const Vec<T> signs = splat(sign), largests = splat(largest), factors = splat(factor);
  Vec<T> totals{};
  for_vectors<T>(width, [&](int64_t c, int64_t count) {
    const Vec<T> score = load_first(row + range.first + c, count) * signs;
    const Vec<T> weight = exp2<T>((score - largests) * factors);
    store_first(work + range.first + c, weight, count);
    totals = totals + select(lanes_before<T>(count), weight, Vec<T>{});
  });
  const T total = add_lanes(totals);
  // A sum of 0 is one of no key, or of scores that are all -inf: the weights stay 0.
  const T inverse = total == T(0) ? T(1) : T(1) / total;
  for_vectors<T>(width, [&](int64_t c, int64_t count) {
    const Vec<T> weight = load_first(work + range.first + c, count) * splat(inverse);
    store_first(target + range.first + c, weight, count);
  });
  // Where a score is NaN the whole row is, as in the equation.
  const Vec<T> rest = splat(inverse * T(0));
  const auto set = [&](int64_t first, int64_t end) {
    for_vectors<T>(end - first, [&](int64_t c, int64_t count) {
      store_first(target + first + c, rest, count);
    });
  };
  set(0, range.first);
  set(range.end, keys);
}

template <typename Item>
void forward(const SoftmaxCall& call, void* memory) {
  using T = Computed<Item>;
  const int64_t queries = call.queries, keys = call.keys;
  // A scale of 0 is a sign of 0: -inf must not be multiplied by it once it stands for 'masked'.
  const T sign = call.scale == 0.0 ? T(0) : call.scale > 0.0 ? T(1) : T(-1);
  const T factor = call.scale == 0.0 ? T(1) : static_cast<T>(__builtin_fabs(call.scale) * LOG2_E);
  for_rows(call, [&](int64_t index) {
    const int64_t query = index % queries, plane = index / queries;
    const int64_t batch = plane / call.heads, head = plane % call.heads;
    const Item* row = static_cast<const Item*>(call.scores) + batch * call.scores_batch +
                      head * call.scores_head + query * call.scores_query;
    Item* target = static_cast<Item*>(call.weights) + index * keys;
    T* work = static_cast<T*>(memory);
    if constexpr (std::is_same_v<Item, T>) {
      work = target;
    }
    Range range = key_range(call, batch, query);
    bool masked = false;
    if (call.query_documents != nullptr) {
      const int64_t document = call.query_documents[batch * queries + query];
      const int64_t* ids = call.key_documents + batch * keys;
      range = document_range(ids, document, range);
      ids += range.first;
      mask_row(
          row + range.first, sign, work + range.first, range.end - range.first,
          [&](int64_t c) { return ids[c] == document; });
      masked = true;
    }
    if (call.dense != nullptr) {
      const uint8_t* flags =
          call.dense + batch * call.dense_batch + head * call.dense_head + query * call.dense_row;
      const auto allowed = [&](int64_t c) { return flags[range.first + c] != 0; };
      const int64_t width = range.end - range.first;
      if (call.dense_column != 1) {
        range.end = flags[0] == 0 ? range.first : range.end;
      } else if (masked) {
        mask_row(work + range.first, T(1), work + range.first, width, allowed);
      } else {
        mask_row(row + range.first, sign, work + range.first, width, allowed);
        masked = true;
      }
    }
    if (masked) {
      weigh_row(work, T(1), work, factor, target, range, keys);
    } else {
      weigh_row(row, sign, work, factor, target, range, keys);
    }
  });
}

template <typename Item>
void backward(const SoftmaxCall& call, void*) {
  using T = Computed<Item>;
  constexpr int64_t lanes = LANES<T>;
  const int64_t keys = call.keys;
  const Vec<T> scales = splat(static_cast<T>(call.scale)), zero{};
  for_rows(call, [&](int64_t index) {
    const Item* weights = static_cast<const Item*>(call.weights) + index * call.weights_row;
    const Item* grad = static_cast<const Item*>(call.grad) + index * call.grad_row;
    Item* target = static_cast<Item*>(call.d_scores) + index * keys;
    Vec<T> sums[2] = {};
    int64_t c = 0;
    for (; c + 2 * lanes <= keys; c += 2 * lanes) {
#pragma GCC unroll 2
      for (int n = 0; n < 2; ++n) {
        const Vec<T> weight = load(weights + c + n * lanes);
        const Vec<T> of_weight = load(grad + c + n * lanes);
        sums[n] = multiply_add(weight, weight == zero ? zero : of_weight, sums[n]);
      }
    }
    for (; c < keys; c += lanes) {
      const Vec<T> weight = load_first(weights + c, keys - c);
      const Vec<T> of_weight = load_first(grad + c, keys - c);
      sums[0] = multiply_add(weight, weight == zero ? zero : of_weight, sums[0]);
    }
    const Vec<T> dots = splat(add_lanes(sums[0] + sums[1]));
    for_vectors<T>(keys, [&](int64_t at, int64_t count) {
      const Vec<T> weight = load_first(weights + at, count);
      const Vec<T> of_weight = load_first(grad + at, count);
      const Vec<T> attended = weight == zero ? zero : of_weight;
      store_first(target + at, scales * weight * (attended - dots), count);
    });
  });
}

template <typename Item>
int64_t row_bytes(const SoftmaxCall& call) {
  return sizeof(Item) == 2 ? call.keys * static_cast<int64_t>(sizeof(float)) : 0;
}

template <typename Item>
constexpr SoftmaxKernel FORWARD{forward<Item>, row_bytes<Item>};
template <typename Item>
constexpr SoftmaxKernel BACKWARD{backward<Item>, no_bytes<Item>};

}  // namespace

const SoftmaxKernel softmax_forward[4] = {
    FORWARD<float>, FORWARD<double>, FORWARD<Bfloat16>, FORWARD<Float16>};
const SoftmaxKernel softmax_backward[4] = {
    BACKWARD<float>, BACKWARD<double>, BACKWARD<Bfloat16>, BACKWARD<Float16>};

}  // namespace ROWMAX_ISA
}  // namespace rowmax
