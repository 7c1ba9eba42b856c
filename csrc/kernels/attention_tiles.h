// What the attention kernels share: sequences, key ranges, what changes scores, dropout.
//
// A tile is up to call.tile queries of one head, one query a lane; its matrices are kept transposed,
// a key (or a column of the head) a row, `width` elements a row. Scores are in base 2: score * log2 e.

#pragma once

#include "kernels/attention_rows.h"
#include "simd/philox.h"
#include "simd/vector_math.h"

namespace rowmax {
namespace ROWMAX_ISA {

// The element of the tensor `name` of `call` where this row of a head begins.
#define ROWMAX_OFFSET(name, batch, head, row) \
  ((batch) * call.name##_batch + (head) * call.name##_head + (row) * call.name##_row)

// Where batch element b lies.
struct Sequence {
  int64_t batch_index;  // index in memory
  int64_t first_query, first_key, query_len, key_len;
};

inline Sequence sequence_of(const AttentionCall& call, int64_t b) {
  if (call.query_starts == nullptr) {
    return {b, 0, 0, call.query_len, call.key_len};
  }
  const int64_t* queries = call.query_starts + b;
  const int64_t* keys = call.key_starts + b;
  return {0, queries[0], keys[0], queries[1] - queries[0], keys[1] - keys[0]};
}

// Queries start, ..., start + rows - 1 of head h of batch element b, in `width` lanes.
struct Tile {
  int64_t b, h, start, rows, width;
};

template <typename T>
inline Tile tile_of(
    const AttentionCall& call, int64_t b, int64_t h, int64_t start, int64_t length) {
  const int64_t rows = min(call.tile, length - start);
  return {b, h, start, rows, min<int64_t>(TILE_VECTORS * LANES<T>, round_up(rows, LANES<T>))};
}

// Of a batch element: bounds on j - i, how many queries and keys count, and how many of these have
// no upper bound.
struct Limits {
  int64_t lower, upper, queries, keys, prefix;

  int64_t lowest_key(int64_t i) const { return max<int64_t>(0, i + lower); }
  int64_t highest_key(int64_t i) const { return min(keys - 1, max(i + upper, prefix - 1)); }
};

inline Limits limits_of(const AttentionCall& call, int64_t b, const Sequence& sequence) {
  Limits limits{call.band_lower, call.band_upper, sequence.query_len, sequence.key_len, 0};
  if (call.band != nullptr) {
    limits.lower = max(limits.lower, call.band[2 * b]);
    limits.upper = min(limits.upper, call.band[2 * b + 1]);
  }
  if (call.prefix_lengths != nullptr) {
    limits.prefix = max<int64_t>(0, call.prefix_lengths[b]);
  }
  if (call.key_lengths != nullptr) {
    limits.keys = min(limits.keys, call.key_lengths[b]);
  }
  if (call.query_lengths != nullptr) {
    limits.queries = min(limits.queries, call.query_lengths[b]);
  }
  return limits;
}

// Vectors of a row of scores whose sums, and the coefficients of exp2, the registers hold.
#if defined(ROWMAX_AVX512) || defined(__aarch64__)
inline constexpr int PANEL_VECTORS = 4;
#else
inline constexpr int PANEL_VECTORS = 2;
#endif

// visit(first lane, number of vectors as a constant) for panels of so many vectors or fewer.
template <typename T, typename Visit>
ROWMAX_INLINE void for_panels(int64_t width, const Visit& visit) {
  int64_t vectors = width / LANES<T>;
  for (int64_t panels = (vectors + PANEL_VECTORS - 1) / PANEL_VECTORS, at = 0; panels > 0;
       --panels) {
    const int64_t wide = (vectors + panels - 1) / panels;
    if constexpr (PANEL_VECTORS == 4) {
      if (wide == 4) {
        visit(at, std::integral_constant<int, 4>{});
      } else if (wide == 3) {
        visit(at, std::integral_constant<int, 3>{});
      }
    }
    if (wide == 2) {
      visit(at, std::integral_constant<int, 2>{});
    } else if (wide == 1) {
      visit(at, std::integral_constant<int, 1>{});
    }
    at += wide * LANES<T>;
    vectors -= wide;
  }
}

// The keys begin <= j < end are attended by some query of a tile, common_first to common_last by all.
struct KeyRange {
  int64_t begin, end, common_first, common_last;
};

// The keys first[r] to last[r] that each query of the tile may attend by band and lengths. Lanes past
// the last row attend anything (their results are not used); a query that may attend nothing has
// last = -1.
template <typename T>
inline KeyRange key_ranges(
    const AttentionCall& call, const Sequence& sequence, const Tile& tile, IntOf<T>* first,
    IntOf<T>* last) {
  const Limits limits = limits_of(call, tile.b, sequence);
  const int64_t queries = limits.queries, keys = limits.keys;
  const int64_t last_row = tile.start + tile.rows - 1;
  if (last_row < queries && keys > 0 && limits.lowest_key(last_row) == 0 &&
      limits.highest_key(tile.start) == keys - 1) {
    // every query may attend every key that counts
    fill<IntOf<T>>(first, tile.width, 0);
    fill<IntOf<T>>(last, tile.width, static_cast<IntOf<T>>(keys - 1));
    return {0, keys, 0, keys - 1};
  }
  KeyRange range{sequence.key_len, 0, 0, sequence.key_len - 1};
  for (int64_t r = 0; r < tile.width; ++r) {
    const int64_t i = tile.start + r;
    int64_t low = limits.lowest_key(i), high = limits.highest_key(i);
    if (r >= tile.rows) {
      low = 0;
      high = sequence.key_len;
    } else if (i >= queries || low > high) {
      low = 0;
      high = range.common_last = -1;
    } else {
      range.begin = min(range.begin, low);
      range.end = max(range.end, high + 1);
      range.common_first = max(range.common_first, low);
      range.common_last = min(range.common_last, high);
    }
    first[r] = static_cast<IntOf<T>>(low);
    last[r] = static_cast<IntOf<T>>(high);
  }
  return range;
}

// Where the block of keys that k0 lies in ends. The blocks of a head do not depend on where a tile
// begins, so neither does the order of its sums.
inline int64_t block_end(int64_t k0, int64_t end) {
  return min<int64_t>(end, (k0 / BLOCK_KEYS + 1) * BLOCK_KEYS);
}

// Which lanes may attend key k, from their ranges.
template <typename T>
ROWMAX_INLINE Ints<T> in_range(int64_t k, Ints<T> low, Ints<T> high) {
  const Ints<T> key = splat(static_cast<IntOf<T>>(k));
  return (low <= key) & (key <= high);
}

// --- scores ---------------------------------------------------------------------------------------

// scores = cap * tanh(scores), and tanh's derivative in `slopes`.
template <typename T>
inline void cap_scores(T cap, T* scores, T* slopes, int64_t elements) {
  for (int64_t at = 0; at < elements; at += LANES<T>) {
    const Vec<T> capped = tanh<T>(load(scores + at));
    store(slopes + at, splat(T(1)) - capped * capped);
    store(scores + at, capped * splat(cap));
  }
}

// Whether any, and whether every query of the tile may attend a key of the block, at most.
struct Documents {
  bool met, every;
};
inline Documents same_document(
    const AttentionCall& call, const Tile& tile, int64_t k0, int64_t keys) {
  const int64_t* queries = call.query_documents + tile.b * call.query_documents_batch + tile.start;
  const int64_t* ids = call.key_documents + tile.b * call.key_documents_batch + k0;
  int64_t low = queries[0], high = queries[0];
  for (int64_t r = 1; r < tile.rows; ++r) {
    low = min(low, queries[r]);
    high = max(high, queries[r]);
  }
  Documents result{false, low == high};
  for (int64_t k = 0; k < keys; ++k) {
    result.met = result.met || (low <= ids[k] && ids[k] <= high);
    result.every = result.every && ids[k] == low;
  }
  return result;
}

inline const uint8_t* dense_at(const AttentionCall& call, const Tile& tile, int64_t k0) {
  return call.dense + tile.b * call.dense_batch + tile.h * call.dense_head +
         tile.start * call.dense_row + k0 * call.dense_column;
}

// Whether dense mask or documents forbid a block, which then is neither read nor computed.
inline bool attends_none(const AttentionCall& call, const Tile& tile, int64_t k0, int64_t keys) {
  if (call.query_documents != nullptr && !same_document(call, tile, k0, keys).met) {
    return true;
  }
  if (call.dense == nullptr) {
    return false;
  }
  const uint8_t* allowed = dense_at(call, tile, k0);
  for (int64_t r = 0; r < (call.dense_row == 0 ? 1 : tile.rows); ++r) {
    const uint8_t* row = allowed + r * call.dense_row;
    uint8_t seen = 0;
    for (int64_t k = 0; k < (call.dense_column == 0 ? 1 : keys); ++k) {
      seen |= row[k * call.dense_column];
    }
    if (seen != 0) {
      return false;
    }
  }
  return true;
}

// Whether anything but the band and the lengths changes scores one by one.
inline bool has_terms(const AttentionCall& call) {
  return call.bias != nullptr || call.dense != nullptr || call.alibi != nullptr ||
         call.query_documents != nullptr;
}

// scores += added; -inf wherever `added` is, even over NaN.
template <typename T>
ROWMAX_INLINE void add_pair(T* scores, Vec<T> added) {
  const Vec<T> nothing = splat(-INFINITE<T>);
  store(scores, select(added == nothing, nothing, load(scores) + added));
}

// The upper left of a LANES x LANES block; zeros in the rest.
template <typename T, typename Item>
inline void copy_block(const Item* source, int64_t row, int64_t rows, int64_t columns, T* block) {
  for (int64_t r = 0; r < LANES<T>; ++r) {
    store(block + r * LANES<T>, r < rows ? load_first(source + r * row, columns) : Vec<T>{});
  }
}

// Which of the first `count` bytes are not 0; what lies beyond is not read.
template <typename T>
ROWMAX_INLINE Ints<T> load_first_flags(const uint8_t* from, int64_t count) {
  constexpr int lanes = LANES<T>;
  uint8_t flags[lanes] = {};
  if (count < lanes) {
    for (int64_t lane = 0; lane < count; ++lane) {
      flags[lane] = from[lane];
    }
    from = flags;
  }
  return __builtin_convertvector(load_bits<Lanes<uint8_t, lanes>>(from), Ints<T>) != 0;
}

// Ask for the block after the one at `offset`, up to the end of the rows' `keys` left here. A block is
// short pieces of many rows, which the hardware does not foresee.
template <typename T>
inline void prefetch_block(
    int64_t item_type, const void* address, int64_t offset, int64_t row, int64_t rows,
    int64_t keys) {
  const int64_t columns = min<int64_t>(BLOCK_KEYS, keys - BLOCK_KEYS);
  if (columns > 0) {
    prefetch_rows<T>(item_type, address, offset + BLOCK_KEYS, row, rows, columns);
  }
}

inline bool bias_is_matrix(const AttentionCall& call) {
  return call.bias != nullptr && call.bias_row != 0 && call.bias_column == 1;
}
inline bool dense_is_matrix(const AttentionCall& call) {
  return call.dense != nullptr && call.dense_row != 0 && call.dense_column == 1;
}

// What differs from pair to pair: log2(e) * bias, and -inf where the dense mask forbids.
//
// It lies in memory a query a row, and is turned over LANES x LANES at a time. Keys past the last of a
// block get something too, which is not used. `block` is scratch of one such block.
template <typename T>
inline void add_matrix(
    const AttentionCall& call, const Tile& tile, int64_t k0, int64_t keys, T* scores, T* block) {
  constexpr int lanes = LANES<T>;
  const T factor = static_cast<T>(LOG2_E);
  const int64_t offset =
      tile.b * call.bias_batch + tile.h * call.bias_head + tile.start * call.bias_row + k0;
  const bool bias = bias_is_matrix(call), dense = dense_is_matrix(call);
  const uint8_t* allowed = dense ? dense_at(call, tile, k0) : nullptr;
  if (bias) {
    prefetch_block<T>(
        call.bias_item_type, call.bias, offset, call.bias_row, tile.rows, call.key_len - k0);
  }
  with_items<T>(call.bias_item_type, call.bias, [&](auto* items) {
    for (int64_t v = 0; v < tile.width; v += lanes) {
      for (int64_t k = 0; k < keys; k += lanes) {
        const int64_t rows = min<int64_t>(lanes, tile.rows - v);
        const int64_t columns = min<int64_t>(lanes, keys - k);
        T* target = scores + k * tile.width + v;
        const auto* source = items + offset + v * call.bias_row + k;
        if (bias && !dense && rows == lanes && columns == lanes) {
          turn_block<Turn::kScore>(source, call.bias_row, target, tile.width, factor);
          continue;
        }
        copy_block(source, call.bias_row, bias ? rows : 0, columns, block);
        for (int64_t r = 0; dense && r < rows; ++r) {
          const uint8_t* flags = allowed + (v + r) * call.dense_row + k;
          T* at = block + r * lanes;
          store(at, select(load_first_flags<T>(flags, columns), load(at), splat(-INFINITE<T>)));
        }
        turn_block<Turn::kScore>(block, int64_t{lanes}, target, tile.width, factor);
      }
    }
  });
}

// log2(e) * a bias that is the same for all queries or for all keys.
template <typename T>
inline void add_bias(
    const AttentionCall& call, const Tile& tile, int64_t k0, int64_t keys, T* scores, T* scratch) {
  const T factor = static_cast<T>(LOG2_E);
  const int64_t offset = tile.b * call.bias_batch + tile.h * call.bias_head +
                         tile.start * call.bias_row + k0 * call.bias_column;
  const bool by_row = call.bias_row != 0;
  const Matrix<const T> source = readable<T>(
      call.bias_item_type, call.bias, offset, call.bias_row, by_row ? tile.rows : 1,
      call.bias_column == 0 ? 1 : keys, scratch);
  T* of_rows = scratch + TILE_VECTORS * LANES<T>;
  for (int64_t r = 0; by_row && r < tile.width; ++r) {
    of_rows[r] = r < tile.rows ? source.at[r * source.row] * factor : T(0);
  }
  for (int64_t k = 0; k < keys; ++k) {
    for (int64_t v = 0; v < tile.width; v += LANES<T>) {
      const Vec<T> added =
          by_row ? load(of_rows + v) : splat(source.at[k * call.bias_column] * factor);
      add_pair(scores + k * tile.width + v, added);
    }
  }
}

// scores -= log2(e) * slope * |i + offset - j| (ALiBi).
template <typename T>
inline void subtract_decay(
    const AttentionCall& call, const Tile& tile, int64_t k0, int64_t keys, T* scores) {
  const double slope = call.alibi[tile.b * call.alibi_batch + tile.h];
  const int64_t offset = call.alibi_offset[tile.b * call.alibi_offset_batch];
  const Vec<T> decay = splat(static_cast<T>(-LOG2_E * slope)), zero{};
  for (int64_t v = 0; v < tile.width; v += LANES<T>) {
    for (int64_t k = 0; k < keys; ++k) {
      Vec<T> distance =
          splat(static_cast<T>(tile.start + v + offset - (k0 + k))) + lane_numbers<T>();
      distance = maximum(distance, zero - distance);
      T* at = scores + k * tile.width + v;
      store(at, multiply_add(distance, decay, load(at)));
    }
  }
}

// scores = -inf where documents, or a dense mask that is no matrix, forbid a pair.
template <typename T>
inline void forbid(
    const AttentionCall& call, const Tile& tile, int64_t k0, int64_t keys, T* scores) {
  if (call.dense != nullptr && !dense_is_matrix(call)) {
    const uint8_t* allowed = dense_at(call, tile, k0);
    for (int64_t k = 0; k < keys; ++k) {
      const uint8_t* column = allowed + k * call.dense_column;
      if (call.dense_row == 0) {
        if (column[0] == 0) {
          fill(scores + k * tile.width, tile.width, -INFINITE<T>);
        }
        continue;
      }
      for (int64_t r = 0; r < tile.rows; ++r) {
        if (column[r * call.dense_row] == 0) {
          scores[k * tile.width + r] = -INFINITE<T>;
        }
      }
    }
  }
  if (call.query_documents != nullptr && !same_document(call, tile, k0, keys).every) {
    const int64_t* queries =
        call.query_documents + tile.b * call.query_documents_batch + tile.start;
    const int64_t* ids = call.key_documents + tile.b * call.key_documents_batch + k0;
    for (int64_t k = 0; k < keys; ++k) {
      for (int64_t r = 0; r < tile.rows; ++r) {
        if (queries[r] != ids[k]) {
          scores[k * tile.width + r] = -INFINITE<T>;
        }
      }
    }
  }
}

// scores += log2(e) * (bias + ALiBi), and -inf where bias, dense mask or documents say so. `scores` is
// (keys, width), and so is `scratch`.
template <typename T>
inline void add_terms(
    const AttentionCall& call, const Tile& tile, int64_t k0, int64_t keys, T* scores, T* scratch) {
  if (call.alibi != nullptr) {
    subtract_decay(call, tile, k0, keys, scores);
  }
  if (call.bias != nullptr && !bias_is_matrix(call)) {
    add_bias(call, tile, k0, keys, scores, scratch);
  }
  if (bias_is_matrix(call) || dense_is_matrix(call)) {
    add_matrix(call, tile, k0, keys, scores, scratch);
  }
  forbid(call, tile, k0, keys, scores);
}

// --- dropout --------------------------------------------------------------------------------------

// Words for keys 4 * group to 4 * group + 3 and the lanes from `v` on.
template <typename T>
ROWMAX_INLINE RandomWords<T> random_words(
    const AttentionCall& call, const Tile& tile, int64_t v, int64_t group) {
  return philox<T>(
      static_cast<uint32_t>(group), static_cast<uint32_t>(tile.start + v),
      static_cast<uint32_t>(tile.h), static_cast<uint32_t>(tile.b + call.batch_start), call.seed);
}

// Zero the dropped weights of a (keys, width) block; the kept ones are scaled at the end.
template <typename T>
inline void drop_weights(
    const AttentionCall& call, const Tile& tile, int64_t k0, int64_t keys, T* weights) {
  const Vec<T> zero{};
  for (int64_t v = 0; v < tile.width; v += LANES<T>) {
    for (int64_t group = k0 / 4; group < (k0 + keys + 3) / 4; ++group) {
      const RandomWords<T> words = random_words<T>(call, tile, v, group);
      for (int64_t n = 0; n < 4; ++n) {
        const int64_t k = 4 * group + n - k0;
        if (0 <= k && k < keys) {
          T* at = weights + k * tile.width + v;
          store(at, select(at_least<T>(words.word[n], call.threshold), load(at), zero));
        }
      }
    }
  }
}

}  // namespace ROWMAX_ISA
}  // namespace rowmax
