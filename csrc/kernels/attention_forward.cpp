// Attention forward: online softmax over blocks of keys, queries in the lanes.
//
// For a tile of queries, with scale * log2(e) in the scores, each block of keys adds
//
//     S^T = K Q^T;  m' = max(m, max_k S^T);  P^T = 2^(S^T - m');  l = l * 2^(m - m') + sum_k P^T
//     O^T = O^T * 2^(m - m') + V^T drop(P^T)
//
// so that maxima, sums and exponentials are lane-wise, with no reduction across a vector. At the end
// out = O / l and lse = (m + log2 l) * ln 2 (Milakov & Gimelshein 2018; Dao et al. 2022). A sink is a
// key of weight 2^(sink - m) without a value: it starts m and l. `attention_products.h` has the two
// products, in float or in pairs of bfloat16.

#include "kernels/attention_products.h"
#include "kernels/dispatch.h"

namespace rowmax {
namespace ROWMAX_ISA {
namespace {

template <typename T>
struct ForwardScratch {
  ForwardScratch(const AttentionCall& call, int64_t query_elements, Scratch& scratch) {
    const int64_t width = call.tile;
    query_t = scratch.take<T>(query_elements);
    out_t = scratch.take<T>(call.value_dim * width);
    scores = scratch.take<T>(BLOCK_KEYS * width);
    terms = scratch.take<T>(BLOCK_KEYS * width);
    row_max = scratch.take<T>(width);
    row_sum = scratch.take<T>(width);
    rescale = scratch.take<T>(width);
    first = scratch.take<IntOf<T>>(width);
    last = scratch.take<IntOf<T>>(width);
    if (call.item_type != ITEM_COMPUTED) {
      const int64_t columns = max(call.head_dim, call.value_dim) + LANES<T>;
      wide_rows = scratch.take<T>(max<int64_t>(BLOCK_KEYS, width) * columns);
    }
    if (call.keeps_wide) {
      wide_key = scratch.take<T>(call.key_len * call.head_dim);
      wide_value = scratch.take<T>(call.key_len * call.value_dim);
      wide_done = scratch.take<bool>(key_blocks(call));
    }
  }

  static int64_t key_blocks(const AttentionCall& call) {
    return (call.key_len + BLOCK_KEYS - 1) / BLOCK_KEYS;
  }

  // A head of K and V begins, of which no block is widened yet.
  void begin_head(const AttentionCall& call) const {
    for (int64_t block = 0; wide_done != nullptr && block < key_blocks(call); ++block) {
      wide_done[block] = false;
    }
  }

  // Where the block of key k0 is widened; from now on it is done.
  WideBlock<T> wide_block(const AttentionCall& call, int64_t k0, int64_t key_len) const {
    if (wide_done == nullptr) {
      return {};
    }
    const int64_t block = k0 / BLOCK_KEYS, first = block * BLOCK_KEYS;
    const bool done = wide_done[block];
    wide_done[block] = true;
    return {
        wide_key + first * call.head_dim, wide_value + first * call.value_dim, done,
        block_end(first, key_len) - first};
  }

  T *query_t, *out_t;    // Q^T, (Dv, width)
  T *scores, *terms;     // (BLOCK_KEYS, width)
  T *row_max, *row_sum;  // (width,)
  T* rescale;
  IntOf<T>*first, *last;
  T* wide_rows = nullptr;  // of half types: queries, then a block of keys or values, then out
  // of half types: a head of K and V, (key_len, D | Dv), and which of its blocks are there
  T *wide_key = nullptr, *wide_value = nullptr;
  bool* wide_done = nullptr;
};

// Turn a block of scores into weights, and move the running maximum and sum. Leaves 2^(m - m') in
// `rescale` and returns whether any maximum moved. Rows of the block are read one after another, as they
// lie in memory, with the sums of `vectors` vectors of queries in registers: those from lane `at` on.
template <int vectors, typename T>
bool softmax_rows(
    bool masked, int64_t k0, int64_t keys, int64_t width, int64_t at, const ForwardScratch<T>& to) {
  constexpr int lanes = LANES<T>;
  const Vec<T> nothing = splat(-INFINITE<T>), zero{};
  Vec<T> after[vectors], shift[vectors], total[vectors];
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    after[v] = load(to.row_max + at + v * lanes);
    total[v] = zero;
  }
  T* scores = to.scores + at;
  if (masked) {
    for (int64_t k = 0; k < keys; ++k, scores += width) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        const Ints<T> low = load_bits<Ints<T>>(to.first + at + v * lanes);
        const Ints<T> high = load_bits<Ints<T>>(to.last + at + v * lanes);
        const Vec<T> all = load(scores + v * lanes);
        const Vec<T> score = select(in_range<T>(k0 + k, low, high), all, nothing);
        store(scores + v * lanes, score);
        after[v] = maximum(score, after[v]);
      }
    }
  } else {
    for (int64_t k = 0; k < keys; ++k, scores += width) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        after[v] = maximum(load(scores + v * lanes), after[v]);
      }
    }
  }
  // a row with no key yet has m' = -inf; 0 in its place keeps the differences -inf
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    shift[v] = after[v] == nothing ? zero : after[v];
  }
  scores = to.scores + at;
  for (int64_t k = 0; k < keys; ++k, scores += width) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const Vec<T> weight = exp2<T>(load(scores + v * lanes) - shift[v]);
      total[v] = total[v] + weight;
      store(scores + v * lanes, weight);
    }
  }
  bool moved = false;
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    T *row_max = to.row_max + at + v * lanes, *row_sum = to.row_sum + at + v * lanes;
    const Vec<T> before = load(row_max);
    moved = moved || any_lane(after[v] > before);
    const Vec<T> factor = exp2<T>(before - shift[v]);
    store(row_max, after[v]);
    store(to.rescale + at + v * lanes, factor);
    store(row_sum, multiply_add(load(row_sum), factor, total[v]));
  }
  return moved;
}

// The same for any width.
template <typename T>
bool softmax_block(
    bool masked, int64_t k0, int64_t keys, int64_t width, const ForwardScratch<T>& to) {
  bool moved = false;
  for_panels<T>(width, [&](int64_t at, auto vectors) {
    moved |= softmax_rows<decltype(vectors)::value>(masked, k0, keys, width, at, to);
  });
  return moved;
}

// out = keep_scale * O / l and lse of the tile's rows; zeros and -inf where l = 0.
template <typename T>
void finish(
    const AttentionCall& call, const Sequence& sequence, const Tile& tile,
    const ForwardScratch<T>& from) {
  const Vec<T> zero{}, keep_scale = splat(static_cast<T>(call.keep_scale));
  for (int64_t v = 0; v < tile.width; v += LANES<T>) {
    const Vec<T> total = load(from.row_sum + v);
    const Ints<T> empty = total == zero;
    const Vec<T> factor = keep_scale / total;
    for (int64_t d = 0; d < call.value_dim; ++d) {
      T* at = from.out_t + d * tile.width + v;
      store(at, select(empty, zero, load(at) * factor));  // (O may be NaN there)
    }
  }
  const int64_t first_row = sequence.first_query + tile.start;
  const int64_t offset = ROWMAX_OFFSET(out, sequence.batch_index, tile.h, first_row);
  if (call.item_type == ITEM_COMPUTED) {
    T* out = static_cast<T*>(call.out) + offset;
    transpose<T>({from.out_t, tile.width}, {out, call.out_row}, call.value_dim, tile.rows, T(1));
  } else {
    const int64_t columns = round_up(call.value_dim, LANES<T>);
    transpose<T>(
        {from.out_t, tile.width}, {from.wide_rows, columns}, call.value_dim, tile.rows, T(1));
    write_rows<T>(
        call.item_type, call.out, offset, call.out_row, {from.wide_rows, columns}, tile.rows,
        call.value_dim, T(1));
  }
  if (call.lse == nullptr) {
    return;
  }
  const int64_t row = (sequence.batch_index * call.heads + tile.h) * call.query_rows + first_row;
  for (int64_t v = 0; v < tile.rows; v += LANES<double>) {
    const Vec<double> largest = load_wide(from.row_max + v);  // -inf where l = 0
    const Vec<double> total = load_wide(from.row_sum + v);
    // total - total is 0, or NaN where a score was.
    const Vec<double> row_lse = (largest + log2(total) + (total - total)) * splat(LN_2);
    if (call.item_type == ITEM_COMPUTED) {
      store_first(static_cast<double*>(call.lse) + row + v, row_lse, tile.rows - v);
    } else {
      for (int64_t r = 0; r < min<int64_t>(LANES<double>, tile.rows - v); ++r) {
        static_cast<float*>(call.lse)[row + v + r] = static_cast<float>(row_lse[r]);
      }
    }
  }
}

enum Part { kQuery, kKey, kValue, kOut };

// Ask for a part of a short head, which would begin by waiting for memory. A tile does so for the head
// after it, a part before each of its own steps: a core that asks for a whole head at once waits until
// most of it has come.
template <typename T>
void prefetch_part(const AttentionCall& call, int64_t plane, Part part) {
  const int64_t b = plane / call.heads, h = plane % call.heads;
  const Sequence at = sequence_of(call, b);
  const int64_t head = h / (call.heads / call.key_heads);
  if (part == kQuery) {
    const int64_t query = ROWMAX_OFFSET(query, at.batch_index, h, at.first_query);
    prefetch_rows<T>(
        call.item_type, call.query, query, call.query_row, at.query_len, call.head_dim);
  } else if (part == kKey) {
    const int64_t key = ROWMAX_OFFSET(key, at.batch_index, head, at.first_key);
    prefetch_rows<T>(call.item_type, call.key, key, call.key_row, at.key_len, call.head_dim);
  } else if (part == kValue) {
    const int64_t value = ROWMAX_OFFSET(value, at.batch_index, head, at.first_key);
    prefetch_rows<T>(call.item_type, call.value, value, call.value_row, at.key_len, call.value_dim);
  } else {
    const int64_t out = ROWMAX_OFFSET(out, at.batch_index, h, at.first_query);
    prefetch_target<T>(call.item_type, call.out, out, call.out_row, at.query_len, call.value_dim);
  }
}

// Ask for a tile's rows of out, and for the queries of the tile before it in the head, which comes next.
template <typename T>
void prefetch_tile(const AttentionCall& call, const Sequence& sequence, const Tile& tile) {
  const int64_t row = sequence.first_query + tile.start;
  const int64_t out = ROWMAX_OFFSET(out, sequence.batch_index, tile.h, row);
  prefetch_target<T>(call.item_type, call.out, out, call.out_row, tile.rows, call.value_dim);
  if (tile.start > 0) {
    const int64_t query = ROWMAX_OFFSET(query, sequence.batch_index, tile.h, row - call.tile);
    prefetch_rows<T>(call.item_type, call.query, query, call.query_row, call.tile, call.head_dim);
  }
}

// One tile of queries of head (b, h), from `start` on; `following` is the short head after it, or -1.
template <typename Products, typename T = typename Products::T>
void forward_tile(
    const AttentionCall& call, int64_t b, int64_t h, int64_t start, int64_t following,
    const ForwardScratch<T>& to) {
  const Sequence sequence = sequence_of(call, b);
  const Tile tile = tile_of<T>(call, b, h, start, sequence.query_len);
  if (tile.rows <= 0 || sequence.query_len <= call.max_decode_queries) {
    return;
  }
  const int64_t width = tile.width;
  const int64_t head = h / (call.heads / call.key_heads);
  const int64_t key = ROWMAX_OFFSET(key, sequence.batch_index, head, sequence.first_key);
  const int64_t value = ROWMAX_OFFSET(value, sequence.batch_index, head, sequence.first_key);

  const KeyRange range = key_ranges<T>(call, sequence, tile, to.first, to.last);
  T start_max = -INFINITE<T>, start_sum = T(0);
  if (call.sinks != nullptr) {
    const double sink = call.sinks[h] * LOG2_E;
    start_max = static_cast<T>(sink);
    // e^x of what rounding took from the sink, by its series; nothing of a huge one
    const double x = (sink - static_cast<double>(start_max)) * LN_2;
    start_sum = -1.0 < x && x < 1.0 ? static_cast<T>(1.0 + x + 0.5 * x * x) : T(1);
  }
  fill(to.row_max, width, start_max);
  fill(to.row_sum, width, start_sum);
  if (following >= 0) {
    prefetch_part<T>(call, b * call.heads + h, kOut);
    prefetch_part<T>(call, following, kQuery);
  }
  if (range.begin < range.end) {
    const int64_t offset =
        ROWMAX_OFFSET(query, sequence.batch_index, h, sequence.first_query + start);
    Products::load_query(call, offset, tile, to.query_t, to.wide_rows);
  }
  bool started = false;
  for (int64_t k0 = range.begin, keys; k0 < range.end; k0 += keys) {
    keys = block_end(k0, range.end) - k0;
    if (attends_none(call, tile, k0, keys)) {
      continue;
    }
    const KeyBlock<T> block{
        key + k0 * call.key_row,
        value + k0 * call.value_row,
        keys,
        to.wide_rows,
        nullptr,
        to.wide_block(call, k0, sequence.key_len),
        k0 % BLOCK_KEYS};
    Products::score_product(call, block, width, to.query_t, to.scores);
    if (following >= 0 && !started) {
      prefetch_part<T>(call, following, kKey);
    } else if (!started) {
      prefetch_tile<T>(call, sequence, tile);
    }
    if (call.cap != 0.0) {
      cap_scores(static_cast<T>(call.cap), to.scores, to.terms, keys * width);
    }
    if (has_terms(call)) {
      add_terms(call, tile, k0, keys, to.scores, to.terms);
    }
    const bool masked = k0 < range.common_first || k0 + keys - 1 > range.common_last;
    const bool moved = softmax_block(masked, k0, keys, width, to);
    if (following >= 0 && !started) {
      prefetch_part<T>(call, following, kValue);
    }
    if (call.dropout) {
      drop_weights(call, tile, k0, keys, to.scores);
    }
    Products::value_product(call, block, width, to.scores, to.out_t, to.rescale, moved, started);
    started = true;
  }
  if (!started) {
    fill(to.out_t, call.value_dim * width, T(0));
  }
  finish(call, sequence, tile, to);
}

// All tiles of all heads; a task is one tile, the last tiles (the longest under a causal mask) first.
template <typename Products>
void forward(const AttentionCall& call, void* memory) {
  using T = typename Products::T;
  Scratch scratch(memory);
  const ForwardScratch<T> parts(call, Products::query_elements(call), scratch);
  int64_t head = -1;  // of K and V
  const int64_t tiles = (call.query_len + call.tile - 1) / call.tile;
  const int64_t tasks = call.batch * call.heads * tiles;
  for_grabs(call.work_counter, call.tasks_per_grab, tasks, [&](int64_t first, int64_t end) {
    for (int64_t task = first; task < end; ++task) {
      const bool next_head = (task + 1) % tiles == 0 && task + 1 < end;
      const int64_t following = next_head ? (task + 1) / tiles : -1;
      const int64_t plane = task / tiles, tile = tiles - 1 - task % tiles;
      const int64_t of_keys = plane / (call.heads / call.key_heads);
      if (of_keys != head) {
        head = of_keys;
        parts.begin_head(call);
      }
      forward_tile<Products>(
          call, plane / call.heads, plane % call.heads, tile * call.tile, following, parts);
    }
  });
}

template <typename Products>
int64_t forward_scratch(const AttentionCall& call) {
  Scratch scratch(nullptr);
  ForwardScratch<typename Products::T>(call, Products::query_elements(call), scratch);
  return scratch.bytes();
}

template <typename Products>
constexpr AttentionKernel KERNEL{forward<Products>, forward_scratch<Products>};

}  // namespace

// This file is compiled for AVX512-BF16 as well, and then has but the products of pairs.
#if defined(__AVX512BF16__)
const AttentionKernel attention_forward_pairs = KERNEL<Pairs>;
#else
const AttentionKernel attention_forward[2] = {KERNEL<Floats<float>>, KERNEL<Floats<double>>};
#endif

}  // namespace ROWMAX_ISA
}  // namespace rowmax
