// From an attention problem to its kernels: addresses and strides, and how work is divided. What is
// copied, and why, is settled before, in kernels/cpu_preparation.py.

#include <algorithm>
#include <optional>
#include <string>

#include "constants.h"
#include "launch.h"

namespace rowmax {
namespace {

using MaybeInt = std::optional<int64_t>;

// The fields of kernels/problem.py's AttentionProblem, flat.
struct Problem {
  Tensor query, key, value;
  MaybeTensor bias, alibi_slopes, alibi_offset, sinks;
  MaybeTensor dense, key_lengths, query_lengths, query_documents, key_documents, band;
  MaybeInt band_lower, band_upper;
  double scale;
  std::optional<double> softcap;
  double dropout_p;
  MaybeTensor seed;
  int64_t batch_start;
  MaybeTensor query_starts, key_starts;
  int64_t longest_query, longest_key;
};
constexpr const char* kProblem =
    "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? alibi_slopes,"
    " Tensor? alibi_offset, Tensor? sinks, Tensor? dense_mask, Tensor? key_lengths,"
    " Tensor? query_lengths, Tensor? query_documents, Tensor? key_documents, Tensor? band,"
    " int? band_lower, int? band_upper, float scale, float? softcap, float dropout_p,"
    " Tensor? seed, int batch_start, Tensor? query_starts, Tensor? key_starts,"
    " int longest_query, int longest_key) -> ()";
template <typename... Type>
struct Types {};
using ProblemTypes = Types<
    Tensor, Tensor, Tensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor,
    MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeInt, MaybeInt, double,
    std::optional<double>, double, MaybeTensor, int64_t, MaybeTensor, MaybeTensor, int64_t, int64_t>;

int64_t half_of(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 ? kBfloat16 : dtype == ScalarType::Half ? kFloat16 : kWhole;
}

void check(const Tensor& tensor, const char* name, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.dim() == 4, name, ": expected 4 dimensions, got ", tensor.dim());
  STD_TORCH_CHECK(
      tensor.scalar_type() == dtype, name, ": expected ", torch::headeronly::toString(dtype),
      ", got ", torch::headeronly::toString(tensor.scalar_type()));
  // (torch counts a tensor without elements as contiguous, whatever its strides.)
  STD_TORCH_CHECK(
      tensor.size(3) <= 1 || tensor.stride(3) == 1 || tensor.numel() == 0, name,
      ": expected contiguous rows");
}

struct Heads {
  int64_t batch, head, row;
};
Heads strides_of(const Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}
// A call, the type it is computed in (0 float, 1 double) and what follows from the two.
struct Launch {
  AttentionCall call{};
  const Kernels& kernels = chosen_kernels();
  int type;
  int64_t element, lanes;

  explicit Launch(const Problem& problem, const Tensor& out) {
    const Tensor &query = problem.query, &key = problem.key, &value = problem.value;
    const ScalarType dtype = query.scalar_type();
    type = dtype == ScalarType::Double ? 1 : 0;
    element = type == 1 ? 8 : 4;
    lanes = kernels.vector_bytes / element;
    check(query, "query", dtype);
    check(key, "key", dtype);
    check(value, "value", dtype);
    check(out, "out", dtype);
    call.query = query.data_ptr();
    call.key = key.data_ptr();
    call.value = value.data_ptr();
    call.out = out.data_ptr();
    const Heads q = strides_of(query), k = strides_of(key), v = strides_of(value);
    const Heads o = strides_of(out);
    call.query_batch = q.batch, call.query_head = q.head, call.query_row = q.row;
    call.key_batch = k.batch, call.key_head = k.head, call.key_row = k.row;
    call.value_batch = v.batch, call.value_head = v.head, call.value_row = v.row;
    call.out_batch = o.batch, call.out_head = o.head, call.out_row = o.row;
    call.half = half_of(dtype);
    call.heads = query.size(1);
    call.key_heads = key.size(1);
    call.head_dim = query.size(3);
    call.value_dim = value.size(3);
    call.query_rows = query.size(2);
    if (problem.query_starts) {
      call.query_starts = address<int64_t>(problem.query_starts);
      call.key_starts = address<int64_t>(problem.key_starts);
      call.batch = problem.query_starts->numel() - 1;
      call.query_len = problem.longest_query;
      call.key_len = problem.longest_key;
    } else {
      call.batch = query.size(0);
      call.query_len = query.size(2);
      call.key_len = key.size(2);
    }
    set_mask(problem);
    set_scores(problem);
  }

  void set_mask(const Problem& problem) {
    call.band_lower = problem.band_lower.value_or(-NO_BOUND);
    call.band_upper = problem.band_upper.value_or(NO_BOUND);
    call.band = address<int64_t>(problem.band);
    call.key_lengths = address<int64_t>(problem.key_lengths);
    call.query_lengths = address<int64_t>(problem.query_lengths);
    if (problem.query_documents) {
      call.query_documents = address<int64_t>(problem.query_documents);
      call.key_documents = address<int64_t>(problem.key_documents);
      call.query_documents_batch = problem.query_documents->stride(0);
      call.key_documents_batch = problem.key_documents->stride(0);
    }
    if (problem.dense) {
      const Tensor& dense = *problem.dense;
      call.dense = static_cast<const uint8_t*>(dense.data_ptr());
      call.dense_batch = broadcast_stride(dense, 0);
      call.dense_head = broadcast_stride(dense, 1);
      call.dense_row = broadcast_stride(dense, 2);
      call.dense_column = broadcast_stride(dense, 3);
    }
  }

  void set_scores(const Problem& problem) {
    if (problem.bias) {
      const Tensor& bias = *problem.bias;
      call.bias = bias.data_ptr();
      call.bias_half = half_of(bias.scalar_type());
      call.bias_batch = broadcast_stride(bias, 0);
      call.bias_head = broadcast_stride(bias, 1);
      call.bias_row = broadcast_stride(bias, 2);
      call.bias_column = broadcast_stride(bias, 3);
    }
    if (problem.alibi_slopes) {
      call.alibi = address<double>(problem.alibi_slopes);
      call.alibi_batch = broadcast_stride(*problem.alibi_slopes, 0);
      call.alibi_offset = address<int64_t>(problem.alibi_offset);
      call.alibi_offset_batch = broadcast_stride(*problem.alibi_offset, 0);
    }
    call.sinks = address<double>(problem.sinks);
    call.dropout = problem.dropout_p > 0.0;
    call.keep_scale = 1.0;
    if (call.dropout) {
      STD_TORCH_CHECK(problem.seed.has_value(), "seed: expected one with dropout_p > 0");
      call.seed = static_cast<uint64_t>(*address<int64_t>(problem.seed));
      call.threshold = dropout_threshold(problem.dropout_p);
      call.keep_scale = dropout_scale(problem.dropout_p);
    }
    call.batch_start = problem.batch_start;
    call.plain_scale = problem.scale;
    call.scale = problem.softcap ? problem.scale / *problem.softcap : problem.scale * LOG2_E;
    call.cap = problem.softcap ? *problem.softcap * LOG2_E : 0.0;
  }

  // Heads that a thread takes at once: several short ones, so that one can ask memory for the next.
  // Long heads are tiles that any thread may take.
  int64_t heads_at_once(int64_t heads) const {
    const bool is_short = std::max(call.query_len, call.key_len) <= SHORT_HEAD;
    return is_short ? std::min<int64_t>(8, heads / (8 * thread_count(heads))) : 0;
  }

  // Runs `tasks` tasks, with `turns` zeros and `sums` bytes that all threads share.
  void run(const AttentionKernel& kernel, int64_t tasks, int64_t turns, int64_t sums) {
    run_kernel(kernel, call, divide_up(tasks, call.run), 8 * turns, sums, [&](char* zeros, char* of) {
      call.turns = reinterpret_cast<int64_t*>(zeros);
      call.d_query_sums = of;
    });
  }
};

// out and lse (B, Hq, Lq), float64 or, where out is of a half type, float32.
void forward(const Tensor& out, const Tensor& lse, const Problem& problem) {
  Launch launch(problem, out);
  AttentionCall& call = launch.call;
  STD_TORCH_CHECK(
      lse.is_contiguous() &&
          lse.scalar_type() == (call.half == kWhole ? ScalarType::Double : ScalarType::Float),
      "lse: expected a contiguous tensor of float64, float32 beside half types");
  call.lse = lse.data_ptr();
  const int64_t planes = call.batch * call.heads;
  if (planes == 0 || call.query_len == 0) {
    return;
  }
  // As many queries as the registers hold, fewer where threads would stay idle. (The bits of a
  // result do not depend on it.)
  const int64_t lanes = launch.lanes;
  const int64_t threads = thread_count(planes * divide_up(call.query_len, lanes));
  int64_t tile = std::min(launch.kernels.vectors * lanes, std::max(lanes, round_up(call.query_len, lanes)));
  while (tile > lanes && planes * divide_up(call.query_len, tile) < threads) {
    tile -= lanes;
  }
  call.tile = tile;
  const int64_t tiles = divide_up(call.query_len, tile);
  call.run = std::max<int64_t>(1, tiles * launch.heads_at_once(planes));
  const AttentionKernel* pairs = call.half == kBfloat16 ? bfloat16_forward() : nullptr;
  launch.run(
      pairs != nullptr ? *pairs : launch.kernels.attention_forward[launch.type], planes * tiles, 0,
      0);
}

// How many tasks batch elements, heads of K and keys are divided into, and keys a chunk has.
//
// A bias that several heads or batch elements share has one gradient: the same task takes them all,
// one after another. Keys are divided where heads alone would leave threads idle, but not if all of
// them share a bias. (The bits of a result do not depend on it.)
void divide_backward(AttentionCall& call, const MaybeTensor& d_bias) {
  call.batch_tasks = d_bias && d_bias->size(0) == 1 ? 1 : call.batch;
  call.head_tasks = d_bias && d_bias->size(1) == 1 ? 1 : call.key_heads;
  const int64_t tasks = call.batch_tasks * call.head_tasks;
  const int64_t blocks = divide_up(call.key_len, BLOCK_KEYS);
  const int64_t threads = thread_count(tasks * blocks);
  const bool even = tasks == 0 || tasks >= 4 * threads || tasks % threads == 0;
  if (even || blocks < 2 || (d_bias && d_bias->size(3) == 1)) {
    call.chunk_tasks = 1;
    call.chunk_keys = std::max<int64_t>(1, blocks) * BLOCK_KEYS;
    return;
  }
  // A chunk of several blocks reads its queries less often; four tasks a thread even out.
  const int64_t chunk_blocks =
      std::min<int64_t>(4, std::max<int64_t>(1, tasks * blocks / (4 * threads)));
  call.chunk_tasks = divide_up(blocks, chunk_blocks);
  call.chunk_keys = chunk_blocks * BLOCK_KEYS;
}

// d_query, d_key and d_value are written whole; d_bias, zeros like bias, is added to, in float64 where
// it is broadcast; delta (B, Hq, Lq) float64 is written where a tile of keys meets the row.
void backward(
    const Tensor& out, const Tensor& lse, const Tensor& grad_out, const MaybeTensor& grad_lse,
    const Tensor& d_query, const Tensor& d_key, const Tensor& d_value, const MaybeTensor& d_bias,
    const MaybeTensor& delta, const Problem& problem) {
  Launch launch(problem, out);
  AttentionCall& call = launch.call;
  const ScalarType dtype = out.scalar_type();
  check(grad_out, "grad_out", dtype);
  check(d_query, "d_query", dtype);
  check(d_key, "d_key", dtype);
  check(d_value, "d_value", dtype);
  STD_TORCH_CHECK(
      lse.is_contiguous() && lse.scalar_type() == ScalarType::Double,
      "lse: expected a contiguous float64 tensor");
  call.lse = lse.data_ptr();
  call.grad_out = grad_out.data_ptr();
  call.d_query = d_query.data_ptr();
  call.d_key = d_key.data_ptr();
  call.d_value = d_value.data_ptr();
  const Heads g = strides_of(grad_out), q = strides_of(d_query);
  const Heads k = strides_of(d_key), v = strides_of(d_value);
  call.grad_out_batch = g.batch, call.grad_out_head = g.head, call.grad_out_row = g.row;
  call.d_query_batch = q.batch, call.d_query_head = q.head, call.d_query_row = q.row;
  call.d_key_batch = k.batch, call.d_key_head = k.head, call.d_key_row = k.row;
  call.d_value_batch = v.batch, call.d_value_head = v.head, call.d_value_row = v.row;
  call.grad_lse = address<double>(grad_lse);
  call.delta = delta ? static_cast<double*>(delta->data_ptr()) : nullptr;
  if (d_bias) {
    call.d_bias = d_bias->data_ptr();
    call.d_bias_wide = launch.type == 0 && d_bias->scalar_type() == ScalarType::Double;
    call.d_bias_batch = broadcast_stride(*d_bias, 0);
    call.d_bias_head = broadcast_stride(*d_bias, 1);
    call.d_bias_row = broadcast_stride(*d_bias, 2);
    call.d_bias_column = broadcast_stride(*d_bias, 3);
  }
  if (call.batch == 0 || call.key_heads == 0) {
    return;
  }
  const int64_t lanes = launch.lanes;
  call.tile = std::min(launch.kernels.vectors * lanes, std::max(lanes, round_up(call.query_len, lanes)));
  divide_backward(call, d_bias);
  const bool chunked = call.chunk_tasks > 1;
  const int64_t turns =
      chunked ? call.batch * call.heads * divide_up(call.query_len, call.tile) : 0;
  const int64_t sums = turns * call.tile * call.head_dim * launch.element;
  const int64_t tasks = call.batch_tasks * call.head_tasks * call.chunk_tasks;
  const bool whole = tasks == call.batch * call.key_heads;  // a task is a head
  call.run = whole ? std::max<int64_t>(1, launch.heads_at_once(tasks)) : 1;
  launch.run(launch.kernels.attention_backward[launch.type], tasks, turns, sums);
}

template <typename Fields>
struct Operators;
template <typename... Field>
struct Operators<Types<Field...>> {
  static void attention_forward(Tensor out, Tensor lse, Field... field) {
    forward(out, lse, Problem{std::move(field)...});
  }
  static void attention_backward(
      Tensor out, Tensor lse, Tensor grad_out, MaybeTensor grad_lse, Tensor d_query, Tensor d_key,
      Tensor d_value, MaybeTensor d_bias, MaybeTensor delta, Field... field) {
    backward(
        out, lse, grad_out, grad_lse, d_query, d_key, d_value, d_bias, delta,
        Problem{std::move(field)...});
  }
};
using Attention = Operators<ProblemTypes>;

}  // namespace
}  // namespace rowmax

STABLE_TORCH_LIBRARY_FRAGMENT(rowmax_native, m) {
  const std::string problem = rowmax::kProblem;
  m.def(("attention_forward(Tensor(a!) out, Tensor(b!) lse, " + problem).c_str());
  m.def(("attention_backward(Tensor out, Tensor lse, Tensor grad_out, Tensor? grad_lse,"
         " Tensor(a!) d_query, Tensor(b!) d_key, Tensor(c!) d_value, Tensor(d!)? d_bias,"
         " Tensor(e!)? delta, " + problem).c_str());
}

STABLE_TORCH_LIBRARY_IMPL(rowmax_native, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&rowmax::Attention::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&rowmax::Attention::attention_backward));
}
