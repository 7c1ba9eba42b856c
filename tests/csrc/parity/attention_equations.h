// Attention and its gradients as the paper writes them, one query after another, in a type of
// choice.

#pragma once

#include "attention_case.h"

namespace parity {

// Sums, each with what it would be if no term cancelled another.
template <typename Real>
struct Sums {
  std::vector<Real> value;
  Values size;

  explicit Sums(int64_t count) : value(count), size(count) {}
  void add(int64_t at, Real term, double magnitude) {
    value[at] += term;
    size[at] += magnitude;
  }
};

template <typename Real>
class AttentionEquations {
 public:
  // `stored` is the type that out is rounded to before the backward pass reads it, or none.
  AttentionEquations(const AttentionCase& of, std::optional<Item> stored)
      : of_(of),
        stored_(stored),
        groups_(of.heads / of.key_heads),
        D_(of.head_dim),
        Dv_(of.value_dim),
        rows_(of.places() * of.heads * of.query_rows()),
        keys_(of.places() * of.key_heads * of.key_rows()),
        out_(rows_ * Dv_),
        lse_(rows_),
        d_query_(rows_ * D_),
        d_key_(keys_ * D_),
        d_value_(keys_ * Dv_),
        d_bias_(of.bias.empty() ? 0 : elements(of.bias_shape)) {}

  Answer answer() {
    for (int64_t b = 0; b < of_.batch; ++b) {
      const Sequence at = of_.sequence(b);
      for (int64_t h = 0; h < of_.heads; ++h) {
        for (int64_t i = 0; i < at.queries; ++i) {
          Row row{b, h, i};
          row.query = (at.place * of_.heads + h) * of_.query_rows() + at.first_query + i;
          row.first_key = (at.place * of_.key_heads + h / groups_) * of_.key_rows() + at.first_key;
          if (weigh(row, at.keys)) {
            attend(row);
            differentiate(row);
          }
        }
      }
    }
    Answer answer;
    const auto put = [&](const char* name, const Sums<Real>& sums) {
      answer.values[name] = Values(sums.value.begin(), sums.value.end());
      answer.magnitudes[name] = sums.size;
    };
    put("out", out_), put("lse", lse_), put("d_query", d_query_), put("d_key", d_key_);
    put("d_value", d_value_), put("d_bias", d_bias_);
    return answer;
  }

 private:
  // A key that a query attends: its weight, dropout's factor, and the softcap's derivative.
  struct Term {
    int64_t j;
    Real weight, keep, slope;
  };
  // A query of a head: the rows of its query and of key 0 in the tensors; what the steps find.
  struct Row {
    int64_t b, h, i, query = 0, first_key = 0;
    std::vector<Term> terms = {};
    double rounding = 0.0;  // a weight carries the rounding of its score
    Real delta = 0;         // sum(d_out * out) - d_lse
    double delta_size = 0.0;
  };

  // score = scale * q . k, capped, plus biases; P = exp(score - lse). False where nothing is
  // attended.
  bool weigh(Row& row, int64_t keys) {
    const bool has_sink = !of_.sinks.empty();
    const Real sink =
        has_sink ? static_cast<Real>(of_.sinks[row.h]) : -std::numeric_limits<Real>::infinity();
    Real largest = sink;
    double reach = has_sink ? std::fabs(of_.sinks[row.h]) : 0.0;
    for (int64_t j = 0; j < keys; ++j) {
      if (!of_.allowed(row.b, row.h, row.i, j)) {
        continue;
      }
      Real score = 0, slope = 1;
      double size = 0.0;
      for (int64_t d = 0; d < D_; ++d) {
        const double query = of_.query[row.query * D_ + d];
        const double key = of_.key[(row.first_key + j) * D_ + d];
        score += static_cast<Real>(query) * static_cast<Real>(key);
        size += std::fabs(query * key);
      }
      score *= static_cast<Real>(of_.scale);
      if (of_.softcap != 0.0) {
        const Real capped = std::tanh(score / static_cast<Real>(of_.softcap));
        slope = 1 - capped * capped;
        score = static_cast<Real>(of_.softcap) * capped;
      }
      double added = of_.bias_at(row.b, row.h, row.i, j);
      if (!of_.alibi.empty()) {
        const double distance = static_cast<double>(row.i + of_.alibi_offset[row.b] - j);
        added -= of_.alibi[row.b * of_.heads + row.h] * std::fabs(distance);
      }
      score += static_cast<Real>(added);
      largest = std::max(largest, score);
      reach = std::max(reach, std::fabs(of_.scale) * size + std::fabs(added));
      const Real keep = static_cast<Real>(of_.kept(row.b, row.h, row.i, j));
      row.terms.push_back({j, score, keep, slope});
    }
    Real total = has_sink ? std::exp(sink - largest) : Real(0);
    for (Term& term : row.terms) {
      term.weight = std::exp(term.weight - largest);
      total += term.weight;
    }
    for (Term& term : row.terms) {
      term.weight /= total;
    }
    row.rounding = 1.0 + reach;
    const Real lse =
        total == 0 ? -std::numeric_limits<Real>::infinity() : largest + std::log(total);
    lse_.add(row.query, lse, total == 0 ? 0.0 : row.rounding + std::fabs(static_cast<double>(lse)));
    return total != 0;
  }

  // out = sum_j P_j M_j v_j with dropout's M, and delta of the out that was stored.
  void attend(Row& row) {
    for (int64_t d = 0; d < Dv_; ++d) {
      const int64_t to = row.query * Dv_ + d;
      for (const Term& term : row.terms) {
        const double value = of_.value[(row.first_key + term.j) * Dv_ + d];
        const Real kept = term.weight * term.keep;
        out_.add(
            to, kept * static_cast<Real>(value),
            static_cast<double>(kept) * row.rounding * std::fabs(value));
      }
      const double d_out = of_.grad_out[to], out = static_cast<double>(out_.value[to]);
      const Real read = stored_ ? static_cast<Real>(rounded(*stored_, out)) : out_.value[to];
      row.delta += static_cast<Real>(d_out) * read;
      row.delta_size += std::fabs(d_out) * out_.size[to];
    }
    if (!of_.grad_lse.empty()) {
      row.delta -= static_cast<Real>(of_.grad_lse[row.query]);
      row.delta_size += std::fabs(of_.grad_lse[row.query]);
    }
  }

  // dS = P (M dP - delta) with dP = dO . v; dV = P M dO, dQ = scale dS k, dK = scale dS q.
  void differentiate(const Row& row) {
    const double* d_out = &of_.grad_out[row.query * Dv_];
    for (const Term& term : row.terms) {
      const int64_t key = row.first_key + term.j;
      const Real kept = term.weight * term.keep;
      Real d_weight = 0;
      double size = 0.0;
      for (int64_t d = 0; d < Dv_; ++d) {
        const double value = of_.value[key * Dv_ + d];
        d_weight += static_cast<Real>(d_out[d]) * static_cast<Real>(value);
        size += std::fabs(d_out[d] * value);
        d_value_.add(
            key * Dv_ + d, kept * static_cast<Real>(d_out[d]),
            static_cast<double>(kept) * row.rounding * std::fabs(d_out[d]));
      }
      Real d_score = term.weight * (d_weight * term.keep - row.delta);
      size = static_cast<double>(term.weight) * row.rounding *
             (size * static_cast<double>(term.keep) + row.delta_size);
      if (!of_.bias.empty()) {
        const int64_t to = AttentionCase::broadcast(of_.bias_shape, row.b, row.h, row.i, term.j);
        d_bias_.add(to, d_score, size);
      }
      d_score *= term.slope * static_cast<Real>(of_.scale);
      size *= std::fabs(of_.scale);
      for (int64_t d = 0; d < D_; ++d) {
        const double of_query = of_.query[row.query * D_ + d], of_key = of_.key[key * D_ + d];
        d_query_.add(
            row.query * D_ + d, d_score * static_cast<Real>(of_key), size * std::fabs(of_key));
        d_key_.add(key * D_ + d, d_score * static_cast<Real>(of_query), size * std::fabs(of_query));
      }
    }
  }

  const AttentionCase& of_;
  std::optional<Item> stored_;
  int64_t groups_, D_, Dv_, rows_, keys_;
  Sums<Real> out_, lse_, d_query_, d_key_, d_value_, d_bias_;
};

}  // namespace parity
