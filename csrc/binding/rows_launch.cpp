// From norms and masked softmax to their kernels: addresses, strides, and how rows are divided. What
// is copied, and why, is settled before, in kernels/backends/cpu_native/norm_launch.py and softmax_launch.py.

#include "binding/rows_launch.h"

#include "binding/operators.h"
#include "binding/set_mask.h"
#include "constants.h"

namespace rowmax {
namespace {

// The index of a dtype in the tables of row-wise kernels.
int item_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return 0;
    case ScalarType::Double:
      return 1;
    case ScalarType::BFloat16:
      return 2;
    case ScalarType::Half:
      return 3;
    default:
      throw std::runtime_error("expected a float dtype");
  }
}

// How many rows of `columns` elements a task takes.
int64_t task_rows(int64_t columns) {
  return std::max<int64_t>(1, TASK_ELEMENTS / std::max<int64_t>(1, columns));
}

// How many rows a chunk sums into one partial gradient; from the shape alone. A chunk costs two rows
// to write and to read again, so it should have many; but there should be chunks for all threads, and
// no more than 128 sums one after another in one precision.
int64_t chunk_rows(int64_t rows, int64_t columns) {
  return std::min<int64_t>(128, std::max({int64_t{16}, rows / 64, task_rows(columns)})) / 4 * 4;
}

// What both passes read: rows (rows, columns) of x with a stride of their own; weight and bias of the
// type computed in. Absent ones are filled in by `parameters`.
NormCall norm_call(
    const void* x, int64_t x_row, int64_t rows, int64_t columns, double dropout_p,
    const MaybeTensor& seed) {
  NormCall call{};
  call.x = x;
  call.x_row = x_row;
  call.rows = rows;
  call.columns = columns;
  call.task_rows = task_rows(columns);
  call.keep_scale = 1.0;
  call.dropout = dropout_p > 0.0;
  if (call.dropout) {
    require(seed.has_value(), "seed: expected one with dropout_p > 0");
    call.seed = *address<int64_t>(seed);
    call.threshold = dropout_threshold(dropout_p);
    call.keep_scale = dropout_scale(dropout_p);
  }
  return call;
}

int64_t computed_bytes(int item) { return item == 1 ? 8 : 4; }

// The parameter's address, or `memory` filled with what an absent one means.
const void* parameter(
    const MaybeTensor& given, double absent, char* memory, int item, int64_t columns) {
  if (given) {
    return given->data_ptr();
  }
  if (item == 1) {
    std::fill_n(reinterpret_cast<double*>(memory), columns, absent);
  } else {
    std::fill_n(reinterpret_cast<float*>(memory), columns, static_cast<float>(absent));
  }
  return memory;
}

// Half types as they lie in memory, and their values.
struct BFloat16 {
  uint16_t bits;
  operator float() const { return std::bit_cast<float>(uint32_t{bits} << 16); }
};
struct Half {
  uint16_t bits;
  operator float() const {
    const uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 0x1f,
                   mantissa = bits & 0x3ff;
    const uint32_t magnitude =
        exponent == 0 ? std::bit_cast<uint32_t>(static_cast<float>(mantissa) * 0x1p-24f)
                      : (exponent == 31 ? 255 : exponent + 112) << 23 | mantissa << 13;
    return std::bit_cast<float>(sign | magnitude);
  }
};

// `memory`, filled with a parameter's elements in the type computed in.
template <typename T>
const void* widened(const View& given, T* memory, int64_t columns) {
  const auto fill = [&](const auto* elements) {
    std::transform(
        elements, elements + columns, memory, [](auto element) { return static_cast<T>(element); });
  };
  switch (given.dtype) {
    case ScalarType::Float:
      fill(static_cast<const float*>(given.data));
      break;
    case ScalarType::Double:
      fill(static_cast<const double*>(given.data));
      break;
    case ScalarType::BFloat16:
      fill(static_cast<const BFloat16*>(given.data));
      break;
    default:
      fill(static_cast<const Half*>(given.data));
  }
  return memory;
}

// As above, and where a parameter has another type than is computed in, `memory` filled with it.
const void* parameter(
    const std::optional<View>& given, double absent, char* memory, int item, int64_t columns) {
  if (!given) {
    return parameter(MaybeTensor(), absent, memory, item, columns);
  }
  if (item == 1) {
    return given->dtype == ScalarType::Double
               ? given->data
               : widened(*given, reinterpret_cast<double*>(memory), columns);
  }
  return given->dtype == ScalarType::Float
             ? given->data
             : widened(*given, reinterpret_cast<float*>(memory), columns);
}

// Runs the kernel of the forward pass. weight and bias are what `parameter` takes; with `statistics`
// bytes each, mean and rstd lie in memory that ends with the call.
template <typename Given>
void run_forward(
    NormCall& call, int item, const Given& weight, const Given& bias, int64_t statistics) {
  const int64_t bytes = round_up(call.columns * computed_bytes(item), 64);
  const int64_t tasks = divide_up(call.rows, call.task_rows);
  const auto& kernel = chosen_kernels().norm_forward[item];
  run_kernel(kernel, call, tasks, 0, 2 * (bytes + statistics), [&](char*, char* memory) {
    call.weight = parameter(weight, 1.0, memory, item, call.columns);
    call.bias = parameter(bias, 0.0, memory + bytes, item, call.columns);
    if (statistics > 0) {
      call.mean = memory + 2 * bytes;
      call.rstd = memory + 2 * bytes + statistics;
    }
  });
}

// y, total (rows, columns) like x, contiguous; mean, rstd (rows,) and weight, bias (columns,) of the
// type computed in. Without a residual total is not written; without `mean` it is taken as 0.
void norm_forward(
    Tensor x, int64_t x_row, MaybeTensor residual, int64_t residual_row, MaybeTensor weight,
    MaybeTensor bias, Tensor y, MaybeTensor total, MaybeTensor mean, Tensor rstd, int64_t rows,
    int64_t columns, double eps, double dropout_p, MaybeTensor seed) {
  const int item = item_of(x.scalar_type());
  NormCall call = norm_call(x.data_ptr(), x_row, rows, columns, dropout_p, seed);
  call.residual = address<void>(residual);
  call.residual_row = residual_row;
  call.y = y.data_ptr();
  call.total = mutable_address(total);
  call.mean = mutable_address(mean);
  call.rstd = rstd.data_ptr();
  call.subtract_mean = mean.has_value();
  call.eps = eps;
  if (rows > 0) {
    run_forward(call, item, weight, bias, 0);
  }
}

// d_total and, with dropout, d_x like x, contiguous; d_weight and d_bias (columns,) of the type
// computed in, where they are wanted.
void norm_backward(
    Tensor x, int64_t x_row, Tensor grad_y, int64_t grad_y_row, MaybeTensor grad_total,
    int64_t grad_total_row, MaybeTensor mean, Tensor rstd, MaybeTensor weight, Tensor d_total,
    MaybeTensor d_x, MaybeTensor d_weight, MaybeTensor d_bias, int64_t rows, int64_t columns,
    double dropout_p, MaybeTensor seed) {
  const int item = item_of(x.scalar_type());
  NormCall call = norm_call(x.data_ptr(), x_row, rows, columns, dropout_p, seed);
  call.grad_y = grad_y.data_ptr();
  call.grad_y_row = grad_y_row;
  call.grad_total = address<void>(grad_total);
  call.grad_total_row = grad_total_row;
  call.mean = mutable_address(mean);
  call.rstd = rstd.data_ptr();
  call.subtract_mean = mean.has_value();
  call.d_total = d_total.data_ptr();
  call.d_x = mutable_address(d_x);
  call.d_weight = mutable_address(d_weight);
  call.d_bias = mutable_address(d_bias);
  call.chunk_rows = chunk_rows(rows, columns);
  // Without any row one chunk still writes the zeros of d_weight and d_bias.
  call.chunks = std::max<int64_t>(1, divide_up(rows, call.chunk_rows));
  const int64_t tasks =
      std::min(call.chunks, std::max<int64_t>(1, divide_up(rows, task_rows(columns))));
  const int64_t bytes = round_up(columns * computed_bytes(item), 64);
  const auto& kernel = chosen_kernels().norm_backward[item];
  run_kernel(kernel, call, tasks, 0, (1 + 2 * call.chunks) * bytes, [&](char*, char* memory) {
    call.weight = parameter(weight, 1.0, memory, item, columns);
    call.partials = memory + bytes;
  });
}

// scores (B, H, Lq, Lk) with contiguous rows, weights like it, contiguous; the mask's tensors
// contiguous but for the dense one's leading dimensions.
void softmax_forward(const Tensor& weights, const SoftmaxProblem& problem) {
  const View& scores = problem.scores;
  SoftmaxCall call{};
  call.scores = scores.data;
  call.scores_batch = scores.strides[0];
  call.scores_head = scores.strides[1];
  call.scores_query = scores.strides[2];
  call.weights = weights.data_ptr();
  call.heads = scores.sizes[1];
  call.queries = scores.sizes[2];
  call.keys = scores.sizes[3];
  call.rows = scores.sizes[0] * call.heads * call.queries;
  call.task_rows = task_rows(call.keys);
  set_mask_fields(call, problem.mask);
  call.scale = problem.scale;
  const auto& kernel = chosen_kernels().softmax_forward[item_of(scores.dtype)];
  run_kernel(kernel, call, divide_up(call.rows, call.task_rows), 0, 0, [](char*, char*) {});
}

template <typename Fields>
struct SoftmaxOperators;
template <typename... Field>
struct SoftmaxOperators<Types<Tensor, Field...>> {
  static void forward(Tensor weights, Tensor scores, Field... field) {
    softmax_forward(weights, {view_of(scores, "scores"), field...});
  }
};
using Softmax = SoftmaxOperators<SoftmaxProblemTypes>;

// (rows, keys), weights and grad with a row stride of their own; d_scores like them, contiguous.
void softmax_backward(
    Tensor weights, int64_t weights_row, Tensor grad, int64_t grad_row, Tensor d_scores,
    int64_t rows, int64_t keys, double scale) {
  SoftmaxCall call{};
  call.weights = weights.data_ptr();
  call.weights_row = weights_row;
  call.grad = grad.data_ptr();
  call.grad_row = grad_row;
  call.d_scores = d_scores.data_ptr();
  call.rows = rows;
  call.keys = keys;
  call.task_rows = task_rows(keys);
  call.scale = scale;
  const auto& kernel = chosen_kernels().softmax_backward[item_of(weights.scalar_type())];
  run_kernel(kernel, call, divide_up(rows, call.task_rows), 0, 0, [](char*, char*) {});
}

// logits (rows, columns) with contiguous rows, target (rows,), losses (rows,), contiguous.
void cross_entropy(
    Tensor logits, Tensor target, Tensor losses, double label_smoothing, int64_t ignore_index,
    bool with_gradient) {
  CrossEntropyCall call{};
  call.logits = logits.data_ptr();
  call.logits_row = logits.strides()[0];
  call.target = static_cast<const int64_t*>(target.data_ptr());
  call.losses = losses.data_ptr();
  call.rows = logits.sizes()[0];
  call.columns = logits.sizes()[1];
  call.task_rows = task_rows(call.columns);
  call.ignore_index = ignore_index;
  call.with_gradient = with_gradient;
  call.label_smoothing = label_smoothing;
  const auto& kernel = chosen_kernels().cross_entropy[item_of(logits.scalar_type())];
  run_kernel(kernel, call, divide_up(call.rows, call.task_rows), 0, 0, [](char*, char*) {});
}

int64_t vector_bits() { return 8 * chosen_kernels().vector_bytes; }

bool bfloat16_dots() { return pair_kernels() != nullptr; }

}  // namespace

void fast_path_norm(
    const View& x, const std::optional<View>& residual, const std::optional<View>& weight,
    const std::optional<View>& bias, const View& y, const View& total, int64_t rows, double eps,
    bool subtract_mean) {
  const int item = item_of(x.dtype);
  const int64_t columns = x.sizes[x.dimensions - 1];
  NormCall call = norm_call(x.data, columns, rows, columns, 0.0, std::nullopt);
  if (residual) {
    call.residual = residual->data;
    call.residual_row = columns;
    call.total = total.data;
  }
  call.y = y.data;
  call.subtract_mean = subtract_mean;
  call.eps = eps;
  run_forward(call, item, weight, bias, round_up(rows * computed_bytes(item), 64));
}

void register_rows() {
  Library definitions;
  definitions.define(
      "norm_forward(Tensor x, int x_row, Tensor? residual, int residual_row, Tensor? weight,"
      " Tensor? bias, Tensor(a!) y, Tensor(b!)? total, Tensor(c!)? mean, Tensor(d!) rstd, int rows,"
      " int columns, float eps, float dropout_p, Tensor? seed) -> ()");
  definitions.define(
      "norm_backward(Tensor x, int x_row, Tensor grad_y, int grad_y_row, Tensor? grad_total,"
      " int grad_total_row, Tensor? mean, Tensor rstd, Tensor? weight, Tensor(a!) d_total,"
      " Tensor(b!)? d_x, Tensor(c!)? d_weight, Tensor(d!)? d_bias, int rows, int columns,"
      " float dropout_p, Tensor? seed) -> ()");
  definitions.define(
      "softmax_forward(Tensor(a!) weights, " + std::string(kSoftmaxProblem) + ") -> ()");
  definitions.define(
      "softmax_backward(Tensor weights, int weights_row, Tensor grad, int grad_row,"
      " Tensor(a!) d_scores, int rows, int keys, float scale) -> ()");
  definitions.define(
      "cross_entropy(Tensor(a!) logits, Tensor target, Tensor(b!) losses, float label_smoothing,"
      " int ignore_index, bool with_gradient) -> ()");
  definitions.define("vector_bits() -> int");
  definitions.define("bfloat16_dots() -> bool");
  Library on_cpu("CPU");
  on_cpu.implement<norm_forward>("norm_forward");
  on_cpu.implement<norm_backward>("norm_backward");
  on_cpu.implement<Softmax::forward>("softmax_forward");
  on_cpu.implement<softmax_backward>("softmax_backward");
  on_cpu.implement<cross_entropy>("cross_entropy");
  Library anywhere("CompositeExplicitAutograd");
  anywhere.implement<vector_bits>("vector_bits");
  anywhere.implement<bfloat16_dots>("bfloat16_dots");
}

}  // namespace rowmax
