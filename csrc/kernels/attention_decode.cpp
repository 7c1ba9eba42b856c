// Attention of a few queries over many keys: decoding with a cache of K and V, keys in the lanes.
//
// One query fills one lane of sixteen, so here a row of scores is a row in memory, and all query heads
// that share a head of K and V, a row each, go over it together: K and V are read once. With chunk c of
// the keys and rows r = (query head, query) a task computes
//
//     S = scale * Q K^T;  m_c = max_k S;  P = 2^(S - m_c);  l_c = sum_k P;  O_c = drop(P) V
//
// and whoever finishes the last chunk of a head merges them in their order, so that the bits do not
// depend on the threads (Dao et al. 2023, 'Flash-Decoding'):
//
//     m = max_c m_c;  l = sum_c 2^(m_c - m) l_c;  out = sum_c 2^(m_c - m) O_c / l
//
// and lse = (m + log2 l) * ln 2. K and V of half types are widened as they are loaded.

#include "kernels/attention_tiles.h"
#include "kernels/dispatch.h"

namespace rowmax {
namespace ROWMAX_ISA {
namespace {

// What a chunk leaves of a row: m, l, zeros to the end of a vector, and O.
template <typename T>
int64_t partial_row(const AttentionCall& call) {
  return LANES<T> + round_up(call.value_dim, LANES<T>);
}

int64_t most_rows(const AttentionCall& call) {
  return call.heads / call.key_heads * min(call.max_decode_queries, call.query_len);
}

template <typename T>
struct DecodeScratch {
  DecodeScratch(const AttentionCall& call, Scratch& scratch)
      : head_columns(round_up(call.head_dim, LANES<T>)),
        value_columns(round_up(call.value_dim, LANES<T>)),
        scores_row(CHUNK_KEYS + LANES<T>) {
    const int64_t rows = most_rows(call);
    query = scratch.take<T>(rows * head_columns);
    scores = scratch.take<T>(rows * scores_row);
    sums = scratch.take<T>(value_columns);
    bias = scratch.take<T>(scores_row);
    alive = scratch.take<T>(CHUNK_KEYS);
    padded = scratch.take<T>(CHUNK_KEYS * max(head_columns, value_columns));
  }

  int64_t head_columns, value_columns;  // D and Dv in whole vectors
  int64_t scores_row;
  T* query;   // (rows, head_columns)
  T* scores;  // (rows, scores_row)
  T* sums;    // (value_columns,): of the chunks of one row
  T* bias;    // (scores_row,), widened
  T* alive;   // (CHUNK_KEYS,) zeros: to `copy_rows` no row is dead
  T* padded;  // (CHUNK_KEYS, head_columns | value_columns): rows that are no whole vectors
};

// sums[n][r] = the lane-wise sums over c of Q[r, c] * k[c], each row of K read once.
template <int rows, typename T, typename Item>
ROWMAX_INLINE void dot_key(
    int64_t columns, Matrix<const T> query, const Item* key, Vec<T> (&sums)[rows][LANES<T>],
    int at) {
  Vec<T> total[rows] = {};
  for (int64_t c = 0; c < columns; c += LANES<T>) {
    const Vec<T> of_key = load(key + c);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      total[r] = multiply_add(load(query.at + r * query.row + c), of_key, total[r]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) {
    sums[r][at] = total[r];
  }
}

// scores[r, k] = sum_c query[r, c] * key[k, c] of `rows` rows; whole vectors are stored.
template <int rows, typename T, typename Item>
__attribute__((noinline)) void score_rows(
    Matrix<const Item> key, int64_t keys, Matrix<const T> query, int64_t columns,
    Matrix<T> scores) {
  constexpr int lanes = LANES<T>;
  Vec<T> sums[rows][lanes] = {};
  for (int64_t k = 0; k < keys; k += lanes) {
    const int count = static_cast<int>(min<int64_t>(lanes, keys - k));
    // key by key: the order in memory, which the hardware's prefetching follows
    for (int n = 0; n < count; ++n) {
      dot_key<rows, T>(columns, query, key.at + (k + n) * key.row, sums, n);
    }
    for (int r = 0; r < rows; ++r) {
      store(scores.at + r * scores.row + k, add_across(sums[r]));
    }
  }
}

// What `attention_tiles.h`'s add_terms does, for one row: scores[k] of the keys k0 + k.
template <typename T>
void add_terms_to_row(
    const AttentionCall& call, int64_t b, int64_t h, int64_t i, int64_t k0, int64_t keys, T* scores,
    T* scratch) {
  const Vec<T> nothing = splat(-INFINITE<T>), zero{};
  if (call.alibi != nullptr) {
    const double slope = call.alibi[b * call.alibi_batch + h];
    const int64_t position = i + call.alibi_offset[b * call.alibi_offset_batch];
    const Vec<T> decay = splat(static_cast<T>(-LOG2_E * slope));
    for (int64_t v = 0; v < keys; v += LANES<T>) {
      Vec<T> distance = splat(static_cast<T>(k0 + v - position)) + lane_numbers<T>();
      distance = maximum(distance, zero - distance);
      store(scores + v, multiply_add(distance, decay, load(scores + v)));
    }
  }
  if (call.bias != nullptr) {
    const int64_t offset = ROWMAX_OFFSET(bias, b, h, i) + k0 * call.bias_column;
    const bool same = call.bias_column == 0;
    const T* source =
        readable<T>(call.bias_item_type, call.bias, offset, 0, 1, same ? 1 : keys, scratch).at;
    const Vec<T> factor = splat(static_cast<T>(LOG2_E));
    for (int64_t v = 0; v < keys; v += LANES<T>) {
      const Vec<T> added = same ? splat(source[0]) : load_first(source + v, keys - v);
      const Vec<T> total = multiply_add(added, factor, load(scores + v));
      store(scores + v, select(added == nothing, nothing, total));
    }
  }
  if (call.dense != nullptr) {
    const uint8_t* allowed = dense_at(call, {b, h, i, 1, 1}, k0);
    for (int64_t k = 0; k < keys; ++k) {
      scores[k] = allowed[k * call.dense_column] == 0 ? -INFINITE<T> : scores[k];
    }
  }
  if (call.query_documents != nullptr) {
    const int64_t own = call.query_documents[b * call.query_documents_batch + i];
    const int64_t* ids = call.key_documents + b * call.key_documents_batch + k0;
    for (int64_t k = 0; k < keys; ++k) {
      scores[k] = ids[k] != own ? -INFINITE<T> : scores[k];
    }
  }
}

template <typename T>
void cap_and_scale(const AttentionCall& call, T* scores, int64_t keys) {
  const Vec<T> scale = splat(static_cast<T>(call.scale)), cap = splat(static_cast<T>(call.cap));
  for (int64_t v = 0; v < keys; v += LANES<T>) {
    const Vec<T> score = load(scores + v) * scale;
    store(scores + v, call.cap != 0.0 ? tanh<T>(score) * cap : score);
  }
}

template <typename T>
struct RowSum {
  T largest, total;
};

// Scores to weights in place; m and l of the row. Keys outside first <= k <= last weigh 0.
template <typename T>
RowSum<T> weigh_row(T* scores, int64_t first, int64_t last, int64_t keys) {
  const Vec<T> nothing = splat(-INFINITE<T>);
  const Ints<T> low = splat(static_cast<IntOf<T>>(first)),
                high = splat(static_cast<IntOf<T>>(last));
  Vec<T> largest = nothing;
  for (int64_t v = 0; v < keys; v += LANES<T>) {
    const Ints<T> k = lane_numbers<IntOf<T>>() + static_cast<IntOf<T>>(v);
    const Vec<T> score = select((low <= k) & (k <= high), load(scores + v), nothing);
    store(scores + v, score);
    largest = maximum(score, largest);
  }
  const T row_max = largest_lane(largest);
  const Vec<T> shift = splat(row_max == -INFINITE<T> ? T(0) : row_max);
  Vec<T> total{};
  for (int64_t v = 0; v < keys; v += LANES<T>) {
    const Vec<T> weight = exp2<T>(load(scores + v) - shift);
    total = total + weight;
    store(scores + v, weight);
  }
  return {row_max, add_lanes(total)};
}

// Zero the weights of one row that dropout drops; k0 is a multiple of 4.
template <typename T>
void drop_row(
    const AttentionCall& call, int64_t b, int64_t h, int64_t i, int64_t k0, int64_t keys,
    T* weights) {
  for (int64_t v = 0; v < keys; v += 4 * LANES<T>) {
    const RandomWords<T> words = philox_columns<T>(
        static_cast<uint32_t>((k0 + v) / 4), static_cast<uint32_t>(i), static_cast<uint32_t>(h),
        static_cast<uint32_t>(b + call.batch_start), call.seed);
    for (int n = 0; n < 4 && v + n * LANES<T> < keys; ++n) {
      T* at = weights + v + n * LANES<T>;
      store(at, select(at_least<T>(words.word[n], call.threshold), load(at), Vec<T>{}));
    }
  }
}

// visit(rows) with a (rows, columns) matrix of K or V from element `offset` on: in place, of whatever
// type, where its rows are whole vectors, else padded copies.
template <typename T, typename Visit>
ROWMAX_INLINE void with_rows(
    const AttentionCall& call, const void* address, int64_t offset, int64_t row, int64_t rows,
    int64_t dim, int64_t columns, const DecodeScratch<T>& with, Visit visit) {
  if (dim == columns) {
    with_items<T>(call.item_type, address, [&](auto* items) {
      visit(Matrix<std::remove_pointer_t<decltype(items)>>{items + offset, row});
    });
    return;
  }
  const Matrix<T> copy{with.padded, columns};
  copy_rows<T>(call.item_type, address, offset, row, copy, rows, dim, with.alive);
  visit(Matrix<const T>{copy.at, copy.row});
}

// m, l and O of each row of one chunk, into `partial`.
template <typename T>
void decode_chunk(
    const AttentionCall& call, int64_t b, int64_t head, int64_t chunk, const DecodeScratch<T>& with,
    T* partial) {
  const Sequence sequence = sequence_of(call, b);
  const int64_t group = call.heads / call.key_heads, queries = sequence.query_len;
  const int64_t rows = group * queries, row_size = partial_row<T>(call);
  const int64_t batch_index = sequence.batch_index;

  const Limits limits = limits_of(call, b, sequence);
  const int64_t k0 = chunk * CHUNK_KEYS;
  int64_t begin = sequence.key_len, end = 0;
  for (int64_t i = 0; i < min(queries, limits.queries); ++i) {
    const int64_t low = limits.lowest_key(i), high = limits.highest_key(i);
    if (low <= high) {
      begin = min(begin, low);
      end = max(end, high + 1);
    }
  }
  begin = max(begin, k0);
  end = min<int64_t>(end, k0 + CHUNK_KEYS);
  bool seen = false;
  for (int64_t g = 0; g < group && begin < end && !seen; ++g) {
    seen = !attends_none(call, {b, head * group + g, 0, queries, 0}, begin, end - begin);
  }
  for (int64_t r = 0; r < rows; ++r) {
    partial[r * row_size] = -INFINITE<T>;
    partial[r * row_size + 1] = T(0);
  }
  if (!seen) {
    return;
  }

  fill(with.alive, CHUNK_KEYS, T(0));
  for (int64_t g = 0; g < group; ++g) {
    const int64_t at = ROWMAX_OFFSET(query, batch_index, head * group + g, sequence.first_query);
    const Matrix<T> to{with.query + g * queries * with.head_columns, with.head_columns};
    copy_rows<T>(
        call.item_type, call.query, at, call.query_row, to, queries, call.head_dim, with.alive);
  }
  const int64_t counted = end - begin, skipped = begin - k0;
  const int64_t key = ROWMAX_OFFSET(key, batch_index, head, sequence.first_key + begin);
  with_rows(
      call, call.key, key, call.key_row, counted, call.head_dim, with.head_columns, with,
      [&](auto keys) {
        for (int64_t r = 0; r < rows;) {
          const Matrix<const T> query{with.query + r * with.head_columns, with.head_columns};
          const Matrix<T> scores{with.scores + r * with.scores_row + skipped, with.scores_row};
          if (r + 4 <= rows) {
            score_rows<4>(keys, counted, query, with.head_columns, scores);
            r += 4;
          } else {
            score_rows<1>(keys, counted, query, with.head_columns, scores);
            r += 1;
          }
        }
      });
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t h = head * group + r / queries, i = r % queries;
    T* row = with.scores + r * with.scores_row;
    cap_and_scale(call, row + skipped, counted);
    add_terms_to_row(call, b, h, i, begin, counted, row + skipped, with.bias);
    const bool counts = i < limits.queries;
    const int64_t low = counts ? limits.lowest_key(i) - k0 : 0;
    const int64_t high = counts ? limits.highest_key(i) - k0 : -1;
    const RowSum<T> sum =
        weigh_row(row, max<int64_t>(low, 0), min<int64_t>(high, CHUNK_KEYS), end - k0);
    partial[r * row_size] = sum.largest;
    partial[r * row_size + 1] = sum.total;
    if (call.dropout) {
      drop_row(call, b, h, i, k0, end - k0, row);
    }
  }
  const int64_t value = ROWMAX_OFFSET(value, batch_index, head, sequence.first_key + begin);
  const Matrix<T> totals{partial + LANES<T>, row_size};
  with_rows(
      call, call.value, value, call.value_row, counted, call.value_dim, with.value_columns, with,
      [&](auto values) {
        const Left<T> weights{with.scores + skipped, with.scores_row, 1};
        multiply<T>(with.value_columns / LANES<T>, rows, counted, weights, values, totals, false);
      });
}

// out and lse of a head's rows from its chunks.
template <typename T>
void merge_chunks(
    const AttentionCall& call, int64_t b, int64_t head, const T* partials, int64_t chunk_size,
    const DecodeScratch<T>& with) {
  const Sequence sequence = sequence_of(call, b);
  const int64_t group = call.heads / call.key_heads, row_size = partial_row<T>(call);
  const int64_t chunks = (sequence.key_len + CHUNK_KEYS - 1) / CHUNK_KEYS;
  for (int64_t r = 0; r < group * sequence.query_len; ++r) {
    const int64_t h = head * group + r / sequence.query_len, i = r % sequence.query_len;
    const T* first = partials + r * row_size;
    const double sink = call.sinks != nullptr ? call.sinks[h] * LOG2_E : -INFINITE<double>;
    double largest = sink;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      largest = max<double>(largest, first[chunk * chunk_size]);
    }
    const double shift = largest == -INFINITE<double> ? 0.0 : largest;
    double total = call.sinks != nullptr ? exp2<double>(splat(sink - shift))[0] : 0.0;
    fill(with.sums, with.value_columns, T(0));
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const T* at = first + chunk * chunk_size;
      const double of_chunk = at[1];
      if (of_chunk == 0.0) {
        continue;  // (O may be NaN there)
      }
      const double factor = exp2<double>(splat(at[0] - shift))[0];
      total += factor * of_chunk;
      const Vec<T> factors = splat(static_cast<T>(factor));
      for (int64_t c = 0; c < with.value_columns; c += LANES<T>) {
        T* sum = with.sums + c;
        store(sum, multiply_add(load(at + LANES<T> + c), factors, load(sum)));
      }
    }
    const bool empty = total == 0.0;
    const T factor = empty ? T(0) : static_cast<T>(call.keep_scale / total);
    const int64_t row = sequence.first_query + i;
    const int64_t offset = ROWMAX_OFFSET(out, sequence.batch_index, h, row);
    write_rows<T>(
        call.item_type, call.out, offset, call.out_row, {with.sums, with.value_columns}, 1,
        call.value_dim, factor);
    if (call.lse == nullptr) {
      continue;
    }
    const double log_total = total > 0.0 ? log2(splat(total))[0] : total;  // NaN stays NaN
    const double row_lse = empty ? -INFINITE<double> : (shift + log_total) * LN_2;
    const int64_t at = (sequence.batch_index * call.heads + h) * call.query_rows + row;
    if (call.item_type == ITEM_COMPUTED) {
      static_cast<double*>(call.lse)[at] = row_lse;
    } else {
      static_cast<float*>(call.lse)[at] = static_cast<float>(row_lse);
    }
  }
}

// All chunks of all heads of K and V; the last to finish one of a head merges them.
template <typename T>
void decode(const AttentionCall& call, void* memory) {
  Scratch scratch(memory);
  const DecodeScratch<T> with(call, scratch);
  const int64_t chunk_size = most_rows(call) * partial_row<T>(call);
  while (true) {
    const int64_t task = take_work(call.work_counter);
    if (task >= call.batch * call.key_heads * call.chunks) {
      break;
    }
    const int64_t plane = task / call.chunks, chunk = task % call.chunks;
    const int64_t b = plane / call.key_heads, head = plane % call.key_heads;
    if (sequence_of(call, b).query_len > call.max_decode_queries) {
      continue;
    }
    T* partials = static_cast<T*>(call.partials) + plane * call.chunks * chunk_size;
    decode_chunk(call, b, head, chunk, with, partials + chunk * chunk_size);
    if (call.chunks == 1 || finish_task(call.chunks_done + plane) == call.chunks - 1) {
      merge_chunks(call, b, head, partials, chunk_size, with);
    }
  }
}

template <typename T>
int64_t decode_scratch(const AttentionCall& call) {
  Scratch scratch(nullptr);
  DecodeScratch<T>(call, scratch);
  return scratch.bytes();
}

template <typename T>
int64_t decode_partials(const AttentionCall& call) {
  return call.batch * call.key_heads * call.chunks * most_rows(call) * partial_row<T>(call) *
         static_cast<int64_t>(sizeof(T));
}

}  // namespace

const DecodeKernel attention_decode[2] = {
    {{decode<float>, decode_scratch<float>}, decode_partials<float>},
    {{decode<double>, decode_scratch<double>}, decode_partials<double>}};

}  // namespace ROWMAX_ISA
}  // namespace rowmax
