// What a call of attention is: sizes, tensors as plain numbers, masks and options, and dropout's
// coins. Nothing here is shared with the kernels but the constants of Philox.

#pragma once

#include <array>
#include <optional>

#include "constants.h"
#include "judgement.h"

namespace parity {

// Four words of Philox4x32-10 (Salmon et al. 2011).
inline std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, uint64_t seed) {
  uint32_t keys[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < rowmax::PHILOX_ROUNDS; ++round) {
    const uint64_t first = static_cast<uint64_t>(rowmax::PHILOX_MULTIPLIERS[0]) * counter[0];
    const uint64_t second = static_cast<uint64_t>(rowmax::PHILOX_MULTIPLIERS[1]) * counter[2];
    counter = {
        static_cast<uint32_t>(second >> 32) ^ counter[1] ^ keys[0], static_cast<uint32_t>(second),
        static_cast<uint32_t>(first >> 32) ^ counter[3] ^ keys[1], static_cast<uint32_t>(first)};
    keys[0] += static_cast<uint32_t>(rowmax::PHILOX_WEYL[0]);
    keys[1] += static_cast<uint32_t>(rowmax::PHILOX_WEYL[1]);
  }
  return counter;
}

struct Dropout {
  double p;
  uint64_t seed;

  int64_t threshold() const {
    return std::min<int64_t>(static_cast<int64_t>(std::nearbyint(p * 0x1p32)), 0xffffffff);
  }
  double keep_scale() const { return p < 1.0 ? 1.0 / (1.0 - p) : 0.0; }
};

// Where the tensors of a batch element begin, and its lengths.
struct Sequence {
  int64_t place, first_query, first_key, queries, keys;
};

// A call of attention, with the gradients that its results receive. Tensors are in the order of
// their indices, their values rounded to `item`: query (B, Hq, Lq, D), key (B, Hkv, Lk, D), value
// (B, Hkv, Lk, Dv); in packed ones B is 1, L all rows, and the sequences lie at the `starts`.
struct AttentionCase {
  Item item = kFloat;
  int64_t batch = 0, heads = 0, key_heads = 0, query_len = 0, key_len = 0, head_dim = 0,
          value_dim = 0;
  std::vector<int64_t> query_starts, key_starts;
  Values query, key, value, grad_out, grad_lse;  // grad_lse (B, Hq, Lq), or empty
  double scale = 1.0, softcap = 0.0;             // no cap
  int64_t lower = -rowmax::NO_BOUND, upper = rowmax::NO_BOUND;
  std::vector<int64_t> band;                            // (B, 2) or empty, as all that follow
  std::vector<int64_t> key_lengths, query_lengths;      // (B,)
  std::vector<int64_t> query_documents, key_documents;  // (B, Lq), (B, Lk)
  Shape bias_shape, dense_shape;                        // (B | 1, Hq | 1, Lq | 1, Lk | 1)
  Values bias;
  std::vector<uint8_t> dense;
  std::vector<double> alibi;          // (B, Hq), slopes
  std::vector<int64_t> alibi_offset;  // (B,)
  std::vector<double> sinks;          // (Hq,)
  std::optional<Dropout> dropout;
  int64_t batch_start = 0;

  bool packed() const { return !query_starts.empty(); }
  int64_t places() const { return packed() ? 1 : batch; }
  int64_t query_rows() const { return packed() ? query_starts.back() : query_len; }
  int64_t key_rows() const { return packed() ? key_starts.back() : key_len; }

  Sequence sequence(int64_t b) const {
    if (!packed()) {
      return {b, 0, 0, query_len, key_len};
    }
    const size_t n = b;
    return {
        0, query_starts[n], key_starts[n], query_starts[n + 1] - query_starts[n],
        key_starts[n + 1] - key_starts[n]};
  }
  // Whether band and lengths let query i of batch element b attend key j.
  bool in_range(int64_t b, int64_t i, int64_t j) const {
    const size_t n = b;
    return j - i >= lower && j - i <= upper &&
           (band.empty() || (j - i >= band[2 * n] && j - i <= band[2 * n + 1])) &&
           (key_lengths.empty() || j < key_lengths[n]) &&
           (query_lengths.empty() || i < query_lengths[n]);
  }
  bool allowed(int64_t b, int64_t h, int64_t i, int64_t j) const {
    return in_range(b, i, j) && (dense.empty() || dense[broadcast(dense_shape, b, h, i, j)] != 0) &&
           (query_documents.empty() ||
            query_documents[b * query_len + i] == key_documents[b * key_len + j]) &&
           bias_at(b, h, i, j) != -std::numeric_limits<double>::infinity();
  }
  double bias_at(int64_t b, int64_t h, int64_t i, int64_t j) const {
    return bias.empty() ? 0.0 : bias[broadcast(bias_shape, b, h, i, j)];
  }
  static size_t broadcast(const Shape& shape, int64_t b, int64_t h, int64_t i, int64_t j) {
    const int64_t at[4] = {b, h, i, j};
    int64_t index = 0;
    for (size_t n = 0; n < 4; ++n) {
      index = index * shape[n] + (shape[n] == 1 ? 0 : at[n]);
    }
    return index;
  }
  double kept(int64_t b, int64_t h, int64_t i, int64_t j) const {
    if (!dropout) {
      return 1.0;
    }
    const std::array<uint32_t, 4> counter = {
        static_cast<uint32_t>(j / 4), static_cast<uint32_t>(i), static_cast<uint32_t>(h),
        static_cast<uint32_t>(b + batch_start)};
    const uint32_t word = philox(counter, dropout->seed)[j % 4];
    return word >= dropout->threshold() ? dropout->keep_scale() : 0.0;
  }
};

}  // namespace parity
