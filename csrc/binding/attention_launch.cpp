// From an attention problem to its kernels: addresses and strides, and memory. What is
// copied, and why, is settled before, in kernels/backends/cpu_common/preparation.py.

#include "binding/attention_launch.h"

#include <algorithm>
#include <optional>
#include <string>

#include "binding/attention_plan.h"
#include "binding/operators.h"
#include "binding/set_mask.h"
#include "constants.h"

namespace rowmax {
namespace {

int64_t item_type_of(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 ? ITEM_BFLOAT16
         : dtype == ScalarType::Half   ? ITEM_FLOAT16
                                       : ITEM_COMPUTED;
}

void check(const View& view, const char* name, ScalarType dtype) {
  require(view.dtype == dtype, name, ": expected ", dtype, ", got ", view.dtype);
  // (torch counts a tensor without elements as contiguous, whatever its strides.)
  const bool empty = std::find(view.sizes, view.sizes + 4, 0) != view.sizes + 4;
  require(view.sizes[3] <= 1 || view.strides[3] == 1 || empty, name, ": expected contiguous rows");
}

// The call's fields of a tensor (B, H, L, D) with contiguous rows, checked.
#define ROWMAX_SET_ROWS(name, view)      \
  check(view, #name, dtype);             \
  call.name = (view).data;               \
  call.name##_batch = (view).strides[0]; \
  call.name##_head = (view).strides[1];  \
  call.name##_row = (view).strides[2]

// A call, the type it is computed in (0 float, 1 double) and what follows from the two.
struct Launch {
  AttentionCall call{};
  const Kernels& kernels = chosen_kernels();
  int type;
  int64_t element, lanes;

  Launch(const AttentionProblem& problem, const View& out) {
    const View &query = problem.query, &key = problem.key, &value = problem.value;
    const ScalarType dtype = query.dtype;
    type = dtype == ScalarType::Double ? 1 : 0;
    element = type == 1 ? 8 : 4;
    lanes = kernels.vector_bytes / element;
    ROWMAX_SET_ROWS(query, query);
    ROWMAX_SET_ROWS(key, key);
    ROWMAX_SET_ROWS(value, value);
    ROWMAX_SET_ROWS(out, out);
    call.item_type = item_type_of(dtype);
    call.heads = query.sizes[1];
    call.key_heads = key.sizes[1];
    call.head_dim = query.sizes[3];
    call.value_dim = value.sizes[3];
    call.query_rows = query.sizes[2];
    if (problem.query_starts) {
      call.query_starts = address<int64_t>(problem.query_starts);
      call.key_starts = address<int64_t>(problem.key_starts);
      call.batch = problem.query_starts->numel() - 1;
      call.query_len = problem.longest_query;
      call.key_len = problem.longest_key;
    } else {
      call.batch = query.sizes[0];
      call.query_len = query.sizes[2];
      call.key_len = key.sizes[2];
    }
    set_mask(problem.mask);
    set_scores(problem);
  }

  void set_mask(const MaskStructure& mask) {
    set_mask_fields(call, mask);
    if (mask.query_documents && mask.key_documents) {
      call.query_documents_batch = mask.query_documents->strides()[0];
      call.key_documents_batch = mask.key_documents->strides()[0];
    }
  }

  void set_scores(const AttentionProblem& problem) {
    if (problem.bias) {
      const Tensor& bias = *problem.bias;
      call.bias = bias.data_ptr();
      call.bias_item_type = item_type_of(bias.scalar_type());
      ROWMAX_SET_BROADCAST(bias, bias);
    }
    if (problem.alibi_slopes && problem.alibi_offset) {
      call.alibi = address<double>(problem.alibi_slopes);
      call.alibi_batch = broadcast_stride(*problem.alibi_slopes, 0);
      call.alibi_offset = address<int64_t>(problem.alibi_offset);
      call.alibi_offset_batch = broadcast_stride(*problem.alibi_offset, 0);
    }
    call.sinks = address<double>(problem.sinks);
    call.dropout = problem.dropout_p > 0.0;
    call.keep_scale = 1.0;
    if (call.dropout) {
      require(problem.seed.has_value(), "seed: expected one with dropout_p > 0");
      call.seed = *address<int64_t>(problem.seed);
      call.threshold = dropout_threshold(problem.dropout_p);
      call.keep_scale = dropout_scale(problem.dropout_p);
    }
    call.batch_start = problem.batch_start;
    call.score_scale = problem.scale;
    call.scale = problem.softcap ? problem.scale / *problem.softcap : problem.scale * LOG2_E;
    call.cap = problem.softcap ? *problem.softcap * LOG2_E : 0.0;
  }

  Sizes sizes() const {
    return {call.batch, call.heads, call.key_heads, call.query_len, call.key_len};
  }
};

// The decoding kernel: out and lse of a problem of at most call.max_decode_queries queries, or of the
// packed sequences that have no more. Their bits are those of the same sequence alone.
void decode(Launch& launch) {
  AttentionCall& call = launch.call;
  const DecodePlan plan = decode_plan(launch.sizes());
  call.chunks = plan.chunks;
  const int64_t chunks_done = plan.chunks > 1 ? 8 * call.batch * call.key_heads : 0;
  const DecodeKernel& kernel = launch.kernels.attention_decode[launch.type];
  run_kernel(
      kernel, call, plan.tasks, chunks_done, kernel.partial_bytes(call),
      [&](char* zeros, char* memory) {
        call.chunks_done = reinterpret_cast<int64_t*>(zeros);
        call.partials = memory;
      });
}

// out and, unless it is absent, lse (B, Hq, Lq): float64 or, where out is of a half type, float32.
void forward(Launch& launch, const MaybeTensor& lse) {
  AttentionCall& call = launch.call;
  if (lse) {
    require(
        lse->is_contiguous() &&
            lse->scalar_type() ==
                (call.item_type == ITEM_COMPUTED ? ScalarType::Double : ScalarType::Float),
        "lse: expected a contiguous tensor of float64, float32 beside half types");
    call.lse = lse->data_ptr();
  }
  const int64_t planes = call.batch * call.heads;
  if (planes == 0 || call.query_len == 0) {
    return;
  }
  const int64_t most = max_decode_queries(call.heads, call.key_heads);
  const bool packed = call.query_starts != nullptr;
  if (packed || call.query_len <= most) {
    call.max_decode_queries = most;
    decode(launch);
  }
  if (call.query_len <= most) {
    return;
  }
  const PairKernels* pairs = call.item_type == ITEM_BFLOAT16 ? pair_kernels() : nullptr;
  const bool widens = call.item_type != ITEM_COMPUTED && pairs == nullptr;
  const int64_t wide_bytes = widens ? (call.head_dim + call.value_dim) * launch.element : 0;
  const ForwardPlan plan =
      forward_plan(launch.sizes(), launch.kernels.vectors, launch.lanes, wide_bytes);
  call.tile = plan.tile;
  call.tasks_per_grab = plan.tasks_per_grab;
  call.keeps_wide = plan.keeps_wide;
  const AttentionKernel& kernel =
      pairs != nullptr ? pairs->forward : launch.kernels.attention_forward[launch.type];
  run_kernel(kernel, call, plan.grabs, 0, 0, [](char*, char*) {});
}

// d_query, d_key and d_value are written whole; d_bias comes as zeros; delta (B, Hq, Lq) float64 is written where a tile of keys meets the row.
void backward(
    const View& out, const Tensor& lse, const View& grad_out, const MaybeTensor& grad_lse,
    const View& d_query, const View& d_key, const View& d_value, const MaybeTensor& d_bias,
    const MaybeTensor& delta, const AttentionProblem& problem) {
  Launch launch(problem, out);
  AttentionCall& call = launch.call;
  const ScalarType dtype = out.dtype;
  ROWMAX_SET_ROWS(grad_out, grad_out);
  ROWMAX_SET_ROWS(d_query, d_query);
  ROWMAX_SET_ROWS(d_key, d_key);
  ROWMAX_SET_ROWS(d_value, d_value);
  require(
      lse.is_contiguous() && lse.scalar_type() == ScalarType::Double,
      "lse: expected a contiguous float64 tensor");
  call.lse = lse.data_ptr();
  call.grad_lse = address<double>(grad_lse);
  call.delta = delta ? static_cast<double*>(delta->data_ptr()) : nullptr;
  const int64_t* d_bias_sizes = d_bias ? d_bias->sizes() : nullptr;
  if (d_bias) {
    const ScalarType computed = launch.type == 1 ? ScalarType::Double : ScalarType::Float;
    call.d_bias = d_bias->data_ptr();
    call.d_bias_item_type = item_type_of(d_bias->scalar_type());
    call.d_bias_kind =
        bias_gradient_kind(launch.sizes(), d_bias_sizes, d_bias->scalar_type() == computed);
    ROWMAX_SET_BROADCAST(d_bias, *d_bias);
  }
  if (call.batch == 0 || call.key_heads == 0) {
    return;
  }
  const int64_t row_bytes = (call.head_dim + call.value_dim) * launch.element;
  const BackwardPlan plan =
      backward_plan(launch.sizes(), launch.kernels.vectors, launch.lanes, row_bytes, d_bias_sizes);
  call.tile = plan.tile;
  call.batch_tasks = plan.batch_tasks;
  call.head_tasks = plan.head_tasks;
  call.chunk_tasks = plan.chunk_tasks;
  call.chunk_keys = plan.chunk_keys;
  call.tasks_per_grab = plan.tasks_per_grab;
  const int64_t tiles =
      plan.chunk_tasks > 1 ? call.batch * call.heads * divide_up(call.query_len, plan.tile) : 0;
  const int64_t dq_accumulator = tiles * plan.tile * call.head_dim * launch.element;
  const PairKernels* pairs = call.item_type == ITEM_BFLOAT16 ? pair_kernels() : nullptr;
  const AttentionKernel& kernel =
      pairs != nullptr ? pairs->backward : launch.kernels.attention_backward[launch.type];
  run_kernel(kernel, call, plan.grabs, 8 * tiles, dq_accumulator, [&](char* zeros, char* memory) {
    call.dq_semaphore = reinterpret_cast<int64_t*>(zeros);
    call.dq_accumulator = memory;
  });
}

// The arguments of an operator as a problem.
AttentionProblem problem_of(
    const Tensor& query, const Tensor& key, const Tensor& value, const auto&... others) {
  return {view_of(query, "query"), view_of(key, "key"), view_of(value, "value"), others...};
}

template <typename Fields>
struct Operators;
template <typename... Field>
struct Operators<Types<Field...>> {
  static void attention_forward(Tensor out, MaybeTensor lse, Field... field) {
    Launch launch(problem_of(field...), view_of(out, "out"));
    forward(launch, lse);
  }
  static void attention_backward(
      Tensor out, Tensor lse, Tensor grad_out, MaybeTensor grad_lse, Tensor d_query, Tensor d_key,
      Tensor d_value, MaybeTensor d_bias, MaybeTensor delta, Field... field) {
    backward(
        view_of(out, "out"), lse, view_of(grad_out, "grad_out"), grad_lse,
        view_of(d_query, "d_query"), view_of(d_key, "d_key"), view_of(d_value, "d_value"), d_bias,
        delta, problem_of(field...));
  }
};
using Attention = Operators<AttentionProblemTypes>;

}  // namespace

void fast_path_attention(
    const View& query, const View& key, const View& value, const View& out, double scale,
    std::optional<int64_t> band_upper, const std::optional<View>& key_lengths,
    const std::optional<View>& dense) {
  AttentionProblem problem{query, key, value};
  problem.scale = scale;
  problem.mask.band_upper = band_upper;
  Launch launch(problem, out);
  AttentionCall& call = launch.call;
  if (key_lengths) {
    call.key_lengths = static_cast<const int64_t*>(key_lengths->data);
  }
  if (dense) {
    call.dense = static_cast<const uint8_t*>(dense->data);
    ROWMAX_SET_BROADCAST(dense, *dense);
  }
  forward(launch, std::nullopt);
}

void register_attention() {
  const std::string problem = std::string(kAttentionProblem) + ") -> ()";
  Library definitions;
  definitions.define("attention_forward(Tensor(a!) out, Tensor(b!)? lse, " + problem);
  definitions.define(
      "attention_backward(Tensor out, Tensor lse, Tensor grad_out, Tensor? grad_lse,"
      " Tensor(a!) d_query, Tensor(b!) d_key, Tensor(c!) d_value, Tensor(d!)? d_bias,"
      " Tensor(e!)? delta, " +
      problem);
  Library on_cpu("CPU");
  on_cpu.implement<Attention::attention_forward>("attention_forward");
  on_cpu.implement<Attention::attention_backward>("attention_backward");
}

}  // namespace rowmax
