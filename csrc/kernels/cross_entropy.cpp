// The cross entropy of rows of logits z (V columns), and its gradient in their place.
//
//     q_j = (1 - s) * [j = target] + s / V,    p = softmax(z)
//     loss = -sum_j q_j log p_j = log(sum exp(z - max z)) - sum_j q_j (z_j - max z)
//     gradient = p - q
//
// Differences to the maximum are rounded once, however large the logits. A row of `ignore_index` gives
// zeros, one of a target that is no column NaN.

#include "kernels/dispatch.h"
#include "kernels/rows.h"

namespace rowmax {
namespace ROWMAX_ISA {
namespace {

template <typename Item>
void fill(Item* row, int64_t columns, Computed<Item> value) {
  using T = Computed<Item>;
  for_vectors<T>(
      columns, [&](int64_t c, int64_t count) { store_first(row + c, splat(value), count); });
}

// The loss of one row; the row becomes its gradient, if that is wanted.
template <typename Item>
Computed<Item> row_loss(
    Item* row, int64_t target, int64_t columns, Computed<Item> smoothing, bool with_gradient) {
  using T = Computed<Item>;
  const T largest = row_maximum(row, T(1), columns);
  const T confidence = T(1) - smoothing, share = smoothing / static_cast<T>(columns);
  const Vec<T> largests = splat(largest), factors = splat(static_cast<T>(LOG2_E));
  const T wanted = load_first(row + target, 1)[0] - largest;
  Vec<T> totals{}, differences{};
  for_vectors<T>(columns, [&](int64_t c, int64_t count) {
    const Ints<T> inside = lanes_before<T>(count);
    const Vec<T> difference = load_first(row + c, count) - largests;
    totals = totals + select(inside, exp2<T>(difference * factors), Vec<T>{});
    differences = differences + select(inside, difference, Vec<T>{});
  });
  const T total = add_lanes(totals);
  if (with_gradient) {
    const Vec<T> inverses = splat(T(1) / total), shares = splat(share);
    for_vectors<T>(columns, [&](int64_t c, int64_t count) {
      const Vec<T> difference = load_first(row + c, count) - largests;
      store_first(row + c, exp2<T>(difference * factors) * inverses - shares, count);
    });
    const Vec<T> here = exp2<T>(splat(wanted) * factors) * inverses - splat(share + confidence);
    store_first(row + target, here, 1);
  }
  T loss = static_cast<T>(__builtin_log(static_cast<double>(total)));
  // A logit of -inf beside a wanted probability of 0 adds nothing.
  if (confidence > T(0)) {
    loss -= confidence * wanted;
  }
  return smoothing > T(0) ? loss - share * add_lanes(differences) : loss;
}

template <typename Item>
void cross_entropy_rows(const CrossEntropyCall& call, void*) {
  using T = Computed<Item>;
  const int64_t columns = call.columns;
  T* losses = static_cast<T*>(call.losses);
  for_rows(call, [&](int64_t index) {
    Item* row = static_cast<Item*>(call.logits) + index * call.logits_row;
    const int64_t target = call.target[index];
    const bool ignored = target == call.ignore_index;
    if (ignored || target < 0 || target >= columns) {
      losses[index] = ignored ? T(0) : static_cast<T>(__builtin_nan(""));
      if (call.with_gradient) {
        fill(row, columns, losses[index]);
      }
    } else {
      losses[index] =
          row_loss(row, target, columns, static_cast<T>(call.label_smoothing), call.with_gradient);
    }
  });
}

template <typename Item>
constexpr CrossEntropyKernel KERNEL{cross_entropy_rows<Item>, no_bytes<Item>};

}  // namespace

const CrossEntropyKernel cross_entropy[4] = {
    KERNEL<float>, KERNEL<double>, KERNEL<Bfloat16>, KERNEL<Float16>};

}  // namespace ROWMAX_ISA
}  // namespace rowmax
