// Attention backward: chunks of keys outside, query tiles inside, blocks of a chunk innermost.
//
// Every product is done once, and each sum has one order, whatever the number of threads. With
// P recomputed from lse, M = dropout's keep mask / (1 - p) and delta = sum_k(dO * O) - dlse:
//
//     S^T = K Q^T        P^T = 2^(S^T - lse * log2 e)       (Q^T scaled by scale * log2 e)
//     dP^T = V dO^T      dS^T = P^T * (M^T * dP^T - delta)  d_bias += dS
//     dV += (P * M)^T dO     dK += scale * dS^T Q           columns of the head in the lanes
//     dQ^T += scale * K^T dS^T                              queries in the lanes
//
// (Dao et al. 2022, algorithm 4; a softcap multiplies dS by its derivative after d_bias.) lse * log2 e
// comes as a rounded value and the rest of it. `attention_backward_products.h` has the products, in float
// or in pairs of bfloat16.
//
// A task is one head of K and V, with all query heads that share it, the last tile first. Where there
// are few heads it is one chunk of keys of a head, and a tile of dQ has a semaphore: chunk after chunk adds
// its blocks' parts to it, in the same order as one task alone, so that the bits are the same. Tasks
// are taken in order: whoever is waited for is being worked on.

#include <sched.h>

#include "kernels/attention_backward_blocks.h"
#include "kernels/attention_backward_products.h"
#include "kernels/dispatch.h"

namespace rowmax {
namespace ROWMAX_ISA {
namespace {

template <typename Products, typename T = typename Products::T>
struct BackwardScratch {
  BackwardScratch(const AttentionCall& call, Scratch& scratch)
      : head_columns(round_up(call.head_dim, LANES<T>)),
        value_columns(round_up(call.value_dim, LANES<T>)) {
    const int64_t width = call.tile;
    d_key = scratch.take<T>(call.chunk_keys * head_columns);
    d_value = scratch.take<T>(call.chunk_keys * value_columns);
    query_t = scratch.take<T>(Products::transposed_rows(call.head_dim) * width);
    d_query_t = scratch.take<T>(call.head_dim * width);
    grad_out_t = scratch.take<T>(Products::transposed_rows(call.value_dim) * width);
    scores = scratch.take<T>(BLOCK_KEYS * width);
    d_weights = scratch.take<T>(BLOCK_KEYS * width);
    query_rows = scratch.take<T>(head_columns * width);
    grad_out_rows = scratch.take<T>(value_columns * width);
    terms.lse2 = scratch.take<T>(width);
    terms.rest = scratch.take<T>(width);
    terms.delta = scratch.take<T>(width);
    terms.first = scratch.take<IntOf<T>>(width);
    terms.last = scratch.take<IntOf<T>>(width);
    if (call.chunk_tasks > 1) {
      parts = scratch.take<T>(call.chunk_keys / BLOCK_KEYS * call.head_dim * width);
    }
    if (call.cap != 0.0) {
      slopes = scratch.take<T>(BLOCK_KEYS * width);
    }
    ones = scratch.take<T>(VECTORS * LANES<T>);
    if (call.item_type != ITEM_COMPUTED) {
      key_rows = scratch.take<T>(BLOCK_KEYS * (call.head_dim + call.value_dim + 2 * LANES<T>));
    }
    if (has_terms(call) || Products::spare) {
      spare = scratch.take<T>(BLOCK_KEYS * width);
    }
  }

  int64_t head_columns, value_columns;  // D and Dv in whole vectors
  T *d_key, *d_value;                   // (chunk_keys, head_columns | value_columns)
  T *query_t, *grad_out_t;              // (D | Dv, width), or half as many rows of pairs
  T* d_query_t;                         // (D, width)
  T *scores, *d_weights;                // (BLOCK_KEYS, width)
  T *query_rows, *grad_out_rows;        // (width, head_columns | value_columns)
  QueryTerms<T> terms;                  // (width,) each
  T* parts = nullptr;                   // (blocks of a chunk, D, width): their parts of dQ^T
  T* slopes = nullptr;                  // (BLOCK_KEYS, width): the derivative of the softcap
  T* ones;                              // (VECTORS * LANES,)
  T* key_rows = nullptr;                // BLOCK_KEYS rows of K and V, widened or in pairs
  T* spare = nullptr;                   // (BLOCK_KEYS, width)
};

// lse * log2 e, rounded, and the rest of it; whether some row of the tile attends nothing. Such a row
// has lse2 = +inf, which makes its weights 2^-inf = 0.
template <typename T>
bool read_lse(const AttentionCall& call, int64_t row, int64_t rows, const QueryTerms<T>& to) {
  const double* lse = static_cast<const double*>(call.lse) + row;
  bool dead = false;
  for (int64_t r = 0; r < rows; ++r) {
    if (lse[r] == -INFINITE<double> || to.last[r] < to.first[r]) {
      dead = true;
      to.lse2[r] = INFINITE<T>;
      to.rest[r] = T(0);
    } else {
      const double both = lse[r] * LOG2_E;
      to.lse2[r] = static_cast<T>(both);
      to.rest[r] = static_cast<T>(both - static_cast<double>(to.lse2[r]));
    }
  }
  return dead;
}

// delta -= dlse; with `keep` a copy of it for the gradient of the sinks.
template <typename T>
void finish_delta(
    const AttentionCall& call, int64_t row, int64_t rows, const QueryTerms<T>& to, bool keep) {
  const double* lse = static_cast<const double*>(call.lse) + row;
  for (int64_t r = 0; r < rows; ++r) {
    if (to.lse2[r] == INFINITE<T>) {
      to.delta[r] = T(0);
    }
    if (call.grad_lse != nullptr && lse[r] != -INFINITE<double>) {
      to.delta[r] -= static_cast<T>(call.grad_lse[row + r]);
    }
    if (keep && call.delta != nullptr) {
      call.delta[row + r] = static_cast<double>(to.delta[r]);
    }
  }
}

// d_query = scale * (d_query_t)^T; `row` counts from the start of the tensor.
template <typename T>
void store_query_gradient(
    const AttentionCall& call, int64_t batch_index, int64_t row, const Tile& tile,
    const T* d_query_t, Matrix<T> scratch) {
  const int64_t offset = ROWMAX_OFFSET(d_query, batch_index, tile.h, row);
  const T factor = static_cast<T>(call.score_scale);
  const Matrix<const T> from{d_query_t, tile.width};
  if (call.item_type == ITEM_COMPUTED) {
    T* to = static_cast<T*>(call.d_query) + offset;
    transpose<T>(from, {to, call.d_query_row}, call.head_dim, tile.rows, factor);
    return;
  }
  transpose<T>(from, scratch, call.head_dim, tile.rows, factor);
  write_rows<T>(
      call.item_type, call.d_query, offset, call.d_query_row, {scratch.at, scratch.row}, tile.rows,
      call.head_dim, T(1));
}

// Add the blocks' parts of a tile's dQ to its sum, after `before` chunks; returns the sum.
template <typename T>
T* accumulate_dq(
    const AttentionCall& call, const Tile& tile, int64_t before, bool last, const T* parts,
    int64_t blocks) {
  const int64_t size = call.head_dim * tile.width;
  const int64_t tiles = (call.query_len + call.tile - 1) / call.tile;
  const int64_t index = (tile.b * call.heads + tile.h) * tiles + tile.start / call.tile;
  int64_t* semaphore = call.dq_semaphore + index;
  T* total = static_cast<T*>(call.dq_accumulator) + index * call.head_dim * call.tile;
  while (__atomic_load_n(semaphore, __ATOMIC_ACQUIRE) < before) {
    sched_yield();  // who is waited for may be waiting for this core
  }
  if (before == 0) {
    fill(total, size, T(0));
  }
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t at = 0; at < size; at += LANES<T>) {
      store(total + at, load(total + at) + load(parts + block * size + at));
    }
  }
  if (!last) {
    __atomic_store_n(semaphore, before + 1, __ATOMIC_RELEASE);
  }
  return total;
}

enum Part { kQuery, kKey, kValue, kOut, kGradOut };

// Ask for a part of what the first query head of a head of K and V reads, as the forward pass does: see
// attention_forward.
template <typename T>
void prefetch_part(const AttentionCall& call, int64_t plane, Part part) {
  const int64_t b = plane / call.key_heads, head = plane % call.key_heads;
  const int64_t h = head * (call.heads / call.key_heads);
  const Sequence at = sequence_of(call, b);
  const auto ask = [&](const void* address, int64_t batch, int64_t of_head, int64_t which,
                       int64_t row, int64_t first, int64_t rows, int64_t columns) {
    const int64_t offset = at.batch_index * batch + which * of_head + first * row;
    prefetch_rows<T>(call.item_type, address, offset, row, rows, columns);
  };
  if (part == kQuery) {
    ask(call.query, call.query_batch, call.query_head, h, call.query_row, at.first_query,
        at.query_len, call.head_dim);
  } else if (part == kKey) {
    ask(call.key, call.key_batch, call.key_head, head, call.key_row, at.first_key, at.key_len,
        call.head_dim);
  } else if (part == kValue) {
    ask(call.value, call.value_batch, call.value_head, head, call.value_row, at.first_key,
        at.key_len, call.value_dim);
  } else if (part == kOut) {
    ask(call.out, call.out_batch, call.out_head, h, call.out_row, at.first_query, at.query_len,
        call.value_dim);
  } else {
    ask(call.grad_out, call.grad_out_batch, call.grad_out_head, h, call.grad_out_row,
        at.first_query, at.query_len, call.value_dim);
  }
}

// One tile of queries and one chunk of keys: adds to its d_query and to the chunk's d_key and d_value.
// `following` is the short head of K and V after it, or -1.
template <typename Products, typename T = typename Products::T>
void backward_tile(
    const AttentionCall& call, int64_t b, int64_t h, int64_t start, int64_t chunk,
    int64_t following, const BackwardScratch<Products>& with) {
  const Sequence sequence = sequence_of(call, b);
  const Tile tile = tile_of<T>(call, b, h, start, sequence.query_len);
  const int64_t rows = tile.rows, width = tile.width;
  const QueryTerms<T>& terms = with.terms;

  const KeyRange range = key_ranges<T>(call, sequence, tile, terms.first, terms.last);
  const int64_t chunk_begin = chunk * call.chunk_keys;
  int64_t first_chunk = 0, last_chunk = 0;
  if (range.begin < range.end) {
    first_chunk = range.begin / call.chunk_keys;
    last_chunk = (range.end - 1) / call.chunk_keys;
  }
  const int64_t begin = max(range.begin, chunk_begin);
  const int64_t end = min(range.end, chunk_begin + call.chunk_keys);
  if (begin >= end && chunk != first_chunk) {
    return;
  }

  const int64_t batch_index = sequence.batch_index, head = h / (call.heads / call.key_heads);
  const int64_t first_row = sequence.first_query + start;
  const int64_t row = (batch_index * call.heads + h) * call.query_rows + first_row;
  const int64_t key = ROWMAX_OFFSET(key, batch_index, head, sequence.first_key);
  const int64_t value = ROWMAX_OFFSET(value, batch_index, head, sequence.first_key);

  if (following >= 0) {
    prefetch_part<T>(call, following, kQuery);
  }
  fill(with.d_query_t, call.head_dim * width, T(0));
  TileParts<T> parts{with.query_t, with.grad_out_t, with.query_rows, with.grad_out_rows, {},
                     {},           terms.lse2,      terms.delta};
  if (begin < end) {
    if (rows < width) {
      fill(terms.lse2, width, T(0));
      fill(terms.rest, width, T(0));
      fill(terms.delta, width, T(0));
    }
    const bool dead = read_lse(call, row, rows, terms);
    const TileOffsets at{
        ROWMAX_OFFSET(query, batch_index, h, first_row),
        ROWMAX_OFFSET(grad_out, batch_index, h, first_row),
        ROWMAX_OFFSET(out, batch_index, h, first_row)};
    Products::load_tile(call, at, tile, dead, parts);
    finish_delta(call, row, rows, terms, chunk == first_chunk);
  }
  if (following >= 0) {
    prefetch_part<T>(call, following, kOut);
  }

  const bool alone = call.chunk_tasks == 1;
  int64_t blocks = 0;
  for (int64_t k0 = begin, keys; k0 < end; k0 += keys) {
    keys = block_end(k0, end) - k0;
    if (attends_none(call, tile, k0, keys)) {
      continue;
    }
    const KeyBlock<T> block{
        key + k0 * call.key_row, value + k0 * call.value_row, keys, with.key_rows, with.spare};
    const bool asks = following >= 0 && blocks == 0;
    Products::score_products(call, block, width, parts, with.scores, with.d_weights);
    if (asks) {
      prefetch_part<T>(call, following, kKey);
    }
    if (call.cap != 0.0) {
      cap_scores(static_cast<T>(call.cap), with.scores, with.slopes, keys * width);
    }
    if (has_terms(call)) {
      add_terms(call, tile, k0, keys, with.scores, with.spare);
    }
    const bool masked = k0 < range.common_first || k0 + keys - 1 > range.common_last;
    gradient_block(call, tile, masked, k0, keys, with.scores, with.d_weights, terms);
    if (asks) {
      prefetch_part<T>(call, following, kValue);
    }
    if (call.d_bias != nullptr) {
      store_bias_gradient(call, tile, k0, keys, with.d_weights, with.spare);
    }
    if (call.cap != 0.0) {
      for (int64_t at = 0; at < keys * width; at += LANES<T>) {
        store(with.d_weights + at, load(with.d_weights + at) * load(with.slopes + at));
      }
    }
    const int64_t done = k0 - chunk_begin;
    Products::add_products(
        call, block, tile, parts, with.scores, with.d_weights,
        {with.d_key + done * with.head_columns, with.head_columns},
        {with.d_value + done * with.value_columns, with.value_columns},
        alone ? with.d_query_t : with.parts + blocks * call.head_dim * width, alone, with.ones);
    if (asks) {
      prefetch_part<T>(call, following, kGradOut);
    }
    ++blocks;
  }

  const T* d_query_t = with.d_query_t;
  if (!alone) {
    const bool ends = chunk == last_chunk;
    d_query_t = accumulate_dq(call, tile, chunk - first_chunk, ends, with.parts, blocks);
    if (!ends) {
      return;
    }
  }
  store_query_gradient<T>(
      call, batch_index, first_row, tile, d_query_t, {with.query_rows, with.head_columns});
}

// One chunk of a head of K and V, with every query of every query head that shares it.
template <typename Products, typename T = typename Products::T>
void backward_chunk(
    const AttentionCall& call, int64_t b, int64_t head, int64_t chunk, int64_t following,
    const BackwardScratch<Products>& with) {
  const Sequence sequence = sequence_of(call, b);
  const int64_t begin = chunk * call.chunk_keys;
  const int64_t keys = max<int64_t>(0, min(call.chunk_keys, sequence.key_len - begin));
  if (keys == 0 && chunk > 0) {
    return;
  }
  fill(with.d_key, keys * with.head_columns, T(0));
  fill(with.d_value, keys * with.value_columns, T(0));
  const int64_t groups = call.heads / call.key_heads;
  for (int64_t h = head * groups; h < (head + 1) * groups; ++h) {
    for (int64_t tile = (sequence.query_len + call.tile - 1) / call.tile - 1; tile >= 0; --tile) {
      const bool is_last = tile == 0 && h == (head + 1) * groups - 1;
      backward_tile<Products>(call, b, h, tile * call.tile, chunk, is_last ? following : -1, with);
    }
  }
  const int64_t first_key = sequence.first_key + begin;
  const int64_t to_key = ROWMAX_OFFSET(d_key, sequence.batch_index, head, first_key);
  write_rows<T>(
      call.item_type, call.d_key, to_key, call.d_key_row, {with.d_key, with.head_columns}, keys,
      call.head_dim, static_cast<T>(call.score_scale));
  const int64_t to_value = ROWMAX_OFFSET(d_value, sequence.batch_index, head, first_key);
  write_rows<T>(
      call.item_type, call.d_value, to_value, call.d_value_row, {with.d_value, with.value_columns},
      keys, call.value_dim, T(1));
}

// All heads of K and V; a task is one, one chunk of it, or all that share a bias gradient.
template <typename Products>
void backward(const AttentionCall& call, void* memory) {
  using T = typename Products::T;
  Scratch scratch(memory);
  const BackwardScratch<Products> parts(call, scratch);
  fill(parts.ones, VECTORS * LANES<T>, T(1));
  const int64_t tasks = call.batch_tasks * call.head_tasks * call.chunk_tasks;
  for_grabs(call.work_counter, call.tasks_per_grab, tasks, [&](int64_t first, int64_t end) {
    for (int64_t task = first; task < end; ++task) {
      // (a task is a head where several run)
      const int64_t following = task + 1 < end ? task + 1 : -1;
      const int64_t plane = task / call.chunk_tasks, chunk = task % call.chunk_tasks;
      const int64_t b = plane / call.head_tasks, head = plane % call.head_tasks;
      const int64_t b_end = call.batch_tasks == call.batch ? b + 1 : call.batch;
      const int64_t head_end = call.head_tasks == call.key_heads ? head + 1 : call.key_heads;
      for (int64_t each_b = b; each_b < b_end; ++each_b) {
        for (int64_t each_head = head; each_head < head_end; ++each_head) {
          backward_chunk<Products>(call, each_b, each_head, chunk, following, parts);
        }
      }
    }
  });
}

template <typename Products>
int64_t backward_scratch(const AttentionCall& call) {
  Scratch scratch(nullptr);
  BackwardScratch<Products>(call, scratch);
  return scratch.bytes();
}

template <typename Products>
constexpr AttentionKernel KERNEL{backward<Products>, backward_scratch<Products>};

}  // namespace

// This file is compiled for AVX512-BF16 as well, and then has but the products of pairs.
#if defined(__AVX512BF16__)
const AttentionKernel attention_backward_pairs = KERNEL<GradientPairs>;
#else
const AttentionKernel attention_backward[2] = {
    KERNEL<GradientFloats<float>>, KERNEL<GradientFloats<double>>};
#endif

}  // namespace ROWMAX_ISA
}  // namespace rowmax
