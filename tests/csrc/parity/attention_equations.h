// Attention and its gradients as the paper writes them, one query after another in a type of
// choice. Nothing here is shared with the kernels but the constants of Philox.

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
    const size_t n = static_cast<size_t>(b);
    return {
        0, query_starts[n], key_starts[n], query_starts[n + 1] - query_starts[n],
        key_starts[n + 1] - key_starts[n]};
  }
  // Whether band and lengths let query i of batch element b attend key j.
  bool in_range(int64_t b, int64_t i, int64_t j) const {
    const size_t n = static_cast<size_t>(b);
    return j - i >= lower && j - i <= upper &&
           (band.empty() || (j - i >= band[2 * n] && j - i <= band[2 * n + 1])) &&
           (key_lengths.empty() || j < key_lengths[n]) &&
           (query_lengths.empty() || i < query_lengths[n]);
  }
  bool allowed(int64_t b, int64_t h, int64_t i, int64_t j) const {
    return in_range(b, i, j) && (dense.empty() || dense[broadcast(dense_shape, b, h, i, j)] != 0) &&
           (query_documents.empty() || query_documents[static_cast<size_t>(b * query_len + i)] ==
                                           key_documents[static_cast<size_t>(b * key_len + j)]) &&
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
    return static_cast<size_t>(index);
  }
  double kept(int64_t b, int64_t h, int64_t i, int64_t j) const {
    if (!dropout) {
      return 1.0;
    }
    const std::array<uint32_t, 4> counter = {
        static_cast<uint32_t>(j / 4), static_cast<uint32_t>(i), static_cast<uint32_t>(h),
        static_cast<uint32_t>(b + batch_start)};
    const uint32_t word = philox(counter, dropout->seed)[static_cast<size_t>(j % 4)];
    return word >= dropout->threshold() ? dropout->keep_scale() : 0.0;
  }
};

// out, lse, d_query, d_key, d_value and d_bias, computed in Real. `stored` is the type that out is
// rounded to before the backward pass reads it, or none.
template <typename Real>
Answer attention_equations(const AttentionCase& of, std::optional<Item> stored) {
  const int64_t query_rows = of.query_rows(), key_rows = of.key_rows(), places = of.places();
  const int64_t D = of.head_dim, Dv = of.value_dim, groups = of.heads / of.key_heads;
  struct Sum {
    std::vector<Real> value;
    Values size;
    explicit Sum(int64_t count)
        : value(static_cast<size_t>(count)), size(static_cast<size_t>(count)) {}
    void add(size_t at, Real term, double magnitude) {
      value[at] += term;
      size[at] += magnitude;
    }
  };
  const int64_t rows = places * of.heads * query_rows,
                keys_of_all = places * of.key_heads * key_rows;
  Sum out(rows * Dv), lse(rows), delta(rows), d_query(rows * D);
  Sum d_key(keys_of_all * D), d_value(keys_of_all * Dv);
  Sum d_bias(of.bias.empty() ? 0 : elements(of.bias_shape));

  for (int64_t b = 0; b < of.batch; ++b) {
    const Sequence at = of.sequence(b);
    for (int64_t h = 0; h < of.heads; ++h) {
      const double* slope =
          of.alibi.empty() ? nullptr : &of.alibi[static_cast<size_t>(b * of.heads + h)];
      for (int64_t i = 0; i < at.queries; ++i) {
        const size_t row =
            static_cast<size_t>((at.place * of.heads + h) * query_rows + at.first_query + i);
        const auto key_row = [&](int64_t j) {
          return static_cast<size_t>(
              (at.place * of.key_heads + h / groups) * key_rows + at.first_key + j);
        };
        const double* query = &of.query[row * static_cast<size_t>(D)];
        const double* d_out = &of.grad_out[row * static_cast<size_t>(Dv)];

        // scores, their derivative by the scaled product, and the weights
        const size_t count = static_cast<size_t>(at.keys);
        std::vector<Real> weight(count), slopes(count, Real(1)), keep(count);
        std::vector<char> allowed(count);
        const Real nothing = -std::numeric_limits<Real>::infinity();
        Real largest =
            of.sinks.empty() ? nothing : static_cast<Real>(of.sinks[static_cast<size_t>(h)]);
        double reach = of.sinks.empty() ? 0.0 : std::fabs(of.sinks[static_cast<size_t>(h)]);
        for (int64_t j = 0; j < at.keys; ++j) {
          const size_t n = static_cast<size_t>(j);
          allowed[n] = of.allowed(b, h, i, j);
          if (!allowed[n]) {
            continue;
          }
          const double* key = &of.key[key_row(j) * static_cast<size_t>(D)];
          Real score = 0;
          double size = 0.0;
          for (int64_t d = 0; d < D; ++d) {
            score += static_cast<Real>(query[d]) * static_cast<Real>(key[d]);
            size += std::fabs(query[d] * key[d]);
          }
          score *= static_cast<Real>(of.scale);
          if (of.softcap != 0.0) {
            const Real capped = std::tanh(score / static_cast<Real>(of.softcap));
            slopes[n] = 1 - capped * capped;
            score = static_cast<Real>(of.softcap) * capped;
          }
          double added = of.bias_at(b, h, i, j);
          if (slope != nullptr) {
            const int64_t distance = i + of.alibi_offset[static_cast<size_t>(b)] - j;
            added -= *slope * std::fabs(static_cast<double>(distance));
          }
          weight[n] = score + static_cast<Real>(added);
          largest = std::max(largest, weight[n]);
          reach = std::max(reach, std::fabs(of.scale) * size + std::fabs(added));
        }
        Real total = of.sinks.empty()
                         ? Real(0)
                         : std::exp(static_cast<Real>(of.sinks[static_cast<size_t>(h)]) - largest);
        for (size_t n = 0; n < count; ++n) {
          weight[n] = allowed[n] ? std::exp(weight[n] - largest) : Real(0);
          total += weight[n];
        }
        const double rounding = 1.0 + reach;  // a weight carries the rounding of its score
        lse.value[row] = total == 0 ? nothing : largest + std::log(total);
        lse.size[row] =
            total == 0 ? 0.0 : rounding + std::fabs(static_cast<double>(lse.value[row]));
        if (total == 0) {
          continue;
        }

        // out, and delta of the out that was stored
        for (size_t n = 0; n < count; ++n) {
          weight[n] /= total;
          keep[n] =
              allowed[n] ? static_cast<Real>(of.kept(b, h, i, static_cast<int64_t>(n))) : Real(0);
        }
        for (int64_t d = 0; d < Dv; ++d) {
          const size_t to = row * static_cast<size_t>(Dv) + static_cast<size_t>(d);
          for (size_t n = 0; n < count; ++n) {
            if (allowed[n]) {
              const double element =
                  of.value
                      [key_row(static_cast<int64_t>(n)) * static_cast<size_t>(Dv) +
                       static_cast<size_t>(d)];
              const Real kept = weight[n] * keep[n];
              out.add(
                  to, kept * static_cast<Real>(element),
                  static_cast<double>(kept) * rounding * std::fabs(element));
            }
          }
          Real read = out.value[to];
          if (stored) {
            read = static_cast<Real>(rounded(*stored, static_cast<double>(read)));
          }
          delta.add(row, static_cast<Real>(d_out[d]) * read, std::fabs(d_out[d]) * out.size[to]);
        }
        if (!of.grad_lse.empty()) {
          delta.add(row, -static_cast<Real>(of.grad_lse[row]), std::fabs(of.grad_lse[row]));
        }

        // the gradients
        for (int64_t j = 0; j < at.keys; ++j) {
          const size_t n = static_cast<size_t>(j);
          if (!allowed[n]) {
            continue;
          }
          const size_t to_key = key_row(j) * static_cast<size_t>(D),
                       to_value = key_row(j) * static_cast<size_t>(Dv);
          Real d_weight = 0;
          double size = 0.0;
          for (int64_t d = 0; d < Dv; ++d) {
            const double element = of.value[to_value + static_cast<size_t>(d)];
            d_weight += static_cast<Real>(d_out[d]) * static_cast<Real>(element);
            size += std::fabs(d_out[d] * element);
            const Real kept = weight[n] * keep[n];
            d_value.add(
                to_value + static_cast<size_t>(d), kept * static_cast<Real>(d_out[d]),
                static_cast<double>(kept) * rounding * std::fabs(d_out[d]));
          }
          Real d_score = weight[n] * (d_weight * keep[n] - delta.value[row]);
          const double reach_of_score = static_cast<double>(weight[n]) * rounding *
                                        (size * static_cast<double>(keep[n]) + delta.size[row]);
          if (!of.bias.empty()) {
            d_bias.add(
                AttentionCase::broadcast(of.bias_shape, b, h, i, j), d_score, reach_of_score);
          }
          d_score *= slopes[n] * static_cast<Real>(of.scale);
          const double factor = reach_of_score * std::fabs(of.scale);
          for (int64_t d = 0; d < D; ++d) {
            const double element = of.key[to_key + static_cast<size_t>(d)];
            d_query.add(
                row * static_cast<size_t>(D) + static_cast<size_t>(d),
                d_score * static_cast<Real>(element), factor * std::fabs(element));
            d_key.add(
                to_key + static_cast<size_t>(d), d_score * static_cast<Real>(query[d]),
                factor * std::fabs(query[d]));
          }
        }
      }
    }
  }

  Answer answer;
  const auto put = [&](const char* name, const Sum& sum) {
    answer.values[name] = Values(sum.value.begin(), sum.value.end());
    answer.magnitudes[name] = sum.size;
  };
  put("out", out), put("lse", lse), put("d_query", d_query), put("d_key", d_key);
  put("d_value", d_value), put("d_bias", d_bias);
  return answer;
}

}  // namespace parity
