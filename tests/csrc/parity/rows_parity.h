// Random calls of the row-wise kernels, norms and masked softmax, beside their equations.

#pragma once

#include "attention_case.h"
#include "run.h"

namespace parity {

// --- norms
// ----------------------------------------------------------------------------------------

// Layer norm, add-and-norm where there is a residual, RMS norm without subtract_mean; (rows, columns).
struct NormCase {
  Item item = kFloat;
  int64_t rows = 0, columns = 0;
  bool subtract_mean = true, adds = false;
  Values x, residual, weight, bias, grad_y, grad_total;  // weight and bias of the type computed in
  double eps = 1e-5;
  std::optional<Dropout> dropout;

  double kept(int64_t row, int64_t column) const {
    if (!dropout) {
      return 1.0;
    }
    const std::array<uint32_t, 4> counter = {
        static_cast<uint32_t>(column / 4), static_cast<uint32_t>(row), 0,
        static_cast<uint32_t>(rowmax::NORM_STREAM)};
    const uint32_t word = philox(counter, dropout->seed)[column % 4];
    return word >= dropout->threshold() ? dropout->keep_scale() : 0.0;
  }
};

inline NormCase draw_norm(Random& random) {
  NormCase of;
  of.item = static_cast<Item>(random.between(0, 3));
  of.rows = random.one_of<int64_t>({1, 2, 3, 7, 20, 45});
  of.columns =
      random.chance(0.7) ? random.between(1, 70) : random.one_of<int64_t>({256, 515, 1536, 1600});
  of.subtract_mean = random.chance(0.7);
  of.adds = of.subtract_mean && random.chance(0.5);
  of.eps = random.one_of<double>({1e-5, 0.5});
  if (of.adds && random.chance(0.5)) {
    of.dropout = Dropout{random.one_of<double>({0.3, 0.9, 1.0}), random.next()};
  }
  const int64_t count = of.rows * of.columns;
  const auto draw = [&](int64_t size, Item item, double offset) {
    Values values = normals(size, random);
    for (double& value : values) {
      value = rounded(item, value + offset);
    }
    return values;
  };
  of.x = draw(count, of.item, random.one_of<double>({0.0, 30.0}));
  of.weight = draw(of.columns, computed(of.item), 0.0);
  of.bias = draw(of.columns, computed(of.item), 0.0);
  of.grad_y = draw(count, of.item, 0.0);
  if (of.adds) {
    of.residual = draw(count, of.item, 0.0);
    of.grad_total = draw(count, of.item, 0.0);
  }
  return of;
}

// y, total, d_total, d_x, d_weight and d_bias in Real; `stored` as in AttentionEquations.
template <typename Real>
Answer norm_equations(const NormCase& of, std::optional<Item> stored) {
  const int64_t columns = of.columns;
  const size_t count = of.x.size(), width = of.weight.size();
  Answer answer;
  for (const char* name : {"y", "total", "d_total", "d_x"}) {
    answer.values[name] = answer.magnitudes[name] = Values(count);
  }
  std::vector<Real> d_weight(width), d_bias(width);
  Values d_weight_size(width), d_bias_size(width);
  for (int64_t r = 0; r < of.rows; ++r) {
    const int64_t first = r * columns;
    std::vector<Real> row(width), keep(width);
    Values terms(width);
    Real mean = 0, square = 0;
    for (size_t c = 0; c < width; ++c) {
      keep[c] = static_cast<Real>(of.kept(r, static_cast<int64_t>(c)));
      row[c] = static_cast<Real>(of.x[first + c]) * keep[c];
      terms[c] = std::fabs(static_cast<double>(row[c]));
      if (of.adds) {
        row[c] += static_cast<Real>(of.residual[first + c]);
        terms[c] += std::fabs(of.residual[first + c]);
        answer.values["total"][first + c] = static_cast<double>(row[c]);
        answer.magnitudes["total"][first + c] = terms[c];
        if (stored) {
          row[c] = static_cast<Real>(rounded(*stored, static_cast<double>(row[c])));
        }
      }
      mean += row[c] / static_cast<Real>(columns);
    }
    mean = of.subtract_mean ? mean : Real(0);
    for (size_t c = 0; c < width; ++c) {
      square += (row[c] - mean) * (row[c] - mean) / static_cast<Real>(columns);
    }
    const Real rstd = 1 / std::sqrt(square + static_cast<Real>(of.eps));
    Real g_mean = 0, gx_mean = 0;
    double g_size = 0.0, gx_size = 0.0;
    for (size_t c = 0; c < width; ++c) {
      const Real hat = (row[c] - mean) * rstd, weight = static_cast<Real>(of.weight[c]);
      const Real d_y = static_cast<Real>(of.grad_y[first + c]), g = d_y * weight;
      const double hat_size = terms[c] * static_cast<double>(rstd);
      answer.values["y"][first + c] =
          static_cast<double>(hat * weight + static_cast<Real>(of.bias[c]));
      answer.magnitudes["y"][first + c] =
          hat_size * std::fabs(of.weight[c]) + std::fabs(of.bias[c]);
      d_weight[c] += d_y * hat;
      d_bias[c] += d_y;
      d_weight_size[c] += std::fabs(of.grad_y[first + c]) * hat_size;
      d_bias_size[c] += std::fabs(of.grad_y[first + c]);
      g_mean += g / static_cast<Real>(columns);
      gx_mean += g * hat / static_cast<Real>(columns);
      g_size += std::fabs(static_cast<double>(g)) / static_cast<double>(columns);
      gx_size += std::fabs(static_cast<double>(g)) * hat_size / static_cast<double>(columns);
    }
    g_mean = of.subtract_mean ? g_mean : Real(0);
    for (size_t c = 0; c < width; ++c) {
      const Real hat = (row[c] - mean) * rstd;
      const Real g = static_cast<Real>(of.grad_y[first + c]) * static_cast<Real>(of.weight[c]);
      const double hat_size = terms[c] * static_cast<double>(rstd);
      Real d_total = rstd * (g - g_mean - hat * gx_mean);
      double size = static_cast<double>(rstd) *
                    (std::fabs(static_cast<double>(g)) + g_size + hat_size * gx_size);
      if (of.adds) {
        d_total += static_cast<Real>(of.grad_total[first + c]);
        size += std::fabs(of.grad_total[first + c]);
      }
      answer.values["d_total"][first + c] = static_cast<double>(d_total);
      answer.magnitudes["d_total"][first + c] = size;
      if (of.dropout) {
        answer.values["d_x"][first + c] = static_cast<double>(d_total * keep[c]);
        answer.magnitudes["d_x"][first + c] = size * static_cast<double>(keep[c]);
      }
    }
  }
  answer.values["d_weight"] = Values(d_weight.begin(), d_weight.end());
  answer.values["d_bias"] = Values(d_bias.begin(), d_bias.end());
  answer.magnitudes["d_weight"] = d_weight_size, answer.magnitudes["d_bias"] = d_bias_size;
  return answer;
}

inline Results run_norm(const NormCase& of, Random& random, std::string& fault) {
  const Item type = computed(of.item);
  const Shape shape = {of.rows, of.columns}, per_row = {of.rows}, per_column = {of.columns};
  const auto stored = [&](Item item, const Shape& of_shape, const Values& values, Random* strides) {
    Stored tensor(item, of_shape, strides);
    tensor.set(values);
    return tensor;
  };
  Stored x = stored(of.item, shape, of.x, &random),
         residual = stored(of.item, shape, of.residual, &random);
  Stored weight = stored(type, per_column, of.weight, nullptr),
         bias = stored(type, per_column, of.bias, nullptr);
  Stored grad_y = stored(of.item, shape, of.grad_y, &random);
  Stored grad_total = stored(of.item, shape, of.grad_total, &random);
  Stored y(of.item, shape), total(of.item, shape), d_total(of.item, shape), d_x(of.item, shape);
  Stored mean(type, per_row), rstd(type, per_row), d_weight(type, per_column),
      d_bias(type, per_column);

  rowmax::NormCall call{};
  call.x = x.data(), call.x_row = x.stride(0);
  call.residual = of.adds ? residual.data() : nullptr, call.residual_row = residual.stride(0);
  call.weight = weight.data(), call.bias = bias.data();
  call.y = y.data(), call.total = of.adds ? total.data() : nullptr;
  call.mean = of.subtract_mean ? mean.data() : nullptr, call.rstd = rstd.data();
  call.rows = of.rows, call.columns = of.columns, call.task_rows = random.between(1, 8);
  call.subtract_mean = of.subtract_mean;
  call.eps = of.eps;
  call.keep_scale = 1.0;
  if (of.dropout) {
    call.dropout = true;
    call.seed = of.dropout->seed;
    call.threshold = of.dropout->threshold();
    call.keep_scale = of.dropout->keep_scale();
  }
  run(rowmax::chosen_kernels().norm_forward[of.item], call, random.between(1, 3));

  Stored normalised = of.adds ? stored(of.item, shape, total.values(), &random) : x;
  call.x = normalised.data(), call.x_row = normalised.stride(0);
  call.residual = nullptr;
  call.grad_y = grad_y.data(), call.grad_y_row = grad_y.stride(0);
  call.grad_total = of.adds ? grad_total.data() : nullptr,
  call.grad_total_row = grad_total.stride(0);
  call.d_total = d_total.data(), call.d_x = of.dropout ? d_x.data() : nullptr;
  call.d_weight = d_weight.data(), call.d_bias = d_bias.data();
  call.chunk_rows = 4 * random.between(1, 8);
  call.chunks = (of.rows + call.chunk_rows - 1) / call.chunk_rows;
  const auto partials =
      aligned_memory(2 * call.chunks * ((of.columns + 15) / 16 * 16) * kFacts[type].bytes, 0xff);
  call.partials = partials.get();
  run(rowmax::chosen_kernels().norm_backward[of.item], call, random.between(1, 3));

  for (const Stored* tensor : {&x, &residual, &grad_y, &grad_total, &normalised}) {
    fault = tensor->gaps_untouched() ? fault : "an input is written to";
  }
  const Values zeros(of.x.size());
  return {
      {"y", {y.values(), of.item}},
      {"total", {of.adds ? total.values() : zeros, of.item}},
      {"d_total", {d_total.values(), of.item}},
      {"d_x", {of.dropout ? d_x.values() : zeros, of.item}},
      {"d_weight", {d_weight.values(), type}},
      {"d_bias", {d_bias.values(), type}},
  };
}

inline std::string text_of(const NormCase& of) {
  return std::string("norm ") + kFacts[of.item].name + " " + std::to_string(of.rows) + " " +
         std::to_string(of.columns) + (of.subtract_mean ? " subtract_mean" : "") + (of.adds ? " adds" : "") +
         (of.dropout ? " dropout" : "");
}

// --- masked softmax
// -------------------------------------------------------------------------------

// An attention case whose query and key are of no account: it has the shape (B, H, Lq, Lk) and the
// mask.
struct SoftmaxCase {
  AttentionCase mask;
  Values scores, grad;
};

inline SoftmaxCase draw_softmax(Random& random) {
  SoftmaxCase of;
  do {
    of.mask = draw_sizes(random);
    draw_mask(of.mask, random);
  } while (of.mask.packed());
  of.mask.bias.clear();
  of.mask.bias_shape.clear();
  of.mask.scale = random.chance(0.5) ? 1.0 : random.normal();
  const int64_t count = of.mask.batch * of.mask.heads * of.mask.query_len * of.mask.key_len;
  of.scores = normals(count, random), of.grad = normals(count, random);
  for (Values* values : {&of.scores, &of.grad}) {
    for (double& value : *values) {
      value = rounded(of.mask.item, value);
    }
  }
  return of;
}

template <typename Real>
Answer softmax_equations(const SoftmaxCase& of, std::optional<Item> stored) {
  const AttentionCase& mask = of.mask;
  Answer answer;
  for (const char* name : {"weights", "d_scores"}) {
    answer.values[name] = answer.magnitudes[name] = Values(of.scores.size());
  }
  const size_t keys = mask.key_len;
  for (int64_t plane = 0; plane < mask.batch * mask.heads; ++plane) {
    for (int64_t i = 0; i < mask.query_len; ++i) {
      const int64_t first = (plane * mask.query_len + i) * mask.key_len;
      std::vector<Real> weight(keys), read(keys);
      Real largest = -std::numeric_limits<Real>::infinity(), total = 0, dot = 0;
      double reach = 0.0, dot_size = 0.0;
      for (size_t j = 0; j < keys; ++j) {
        const double score = mask.scale * of.scores[first + j];
        weight[j] = -std::numeric_limits<Real>::infinity();
        if (mask.allowed(plane / mask.heads, plane % mask.heads, i, static_cast<int64_t>(j))) {
          weight[j] = static_cast<Real>(mask.scale) * static_cast<Real>(of.scores[first + j]);
          largest = std::max(largest, weight[j]);
          reach = std::max(reach, std::fabs(score));
        }
      }
      for (Real& score : weight) {
        score = std::isinf(score) ? Real(0) : std::exp(score - largest);
        total += score;
      }
      for (size_t j = 0; j < keys && total != 0; ++j) {
        weight[j] /= total;
        const double size = static_cast<double>(weight[j]) * (1.0 + reach);
        answer.values["weights"][first + j] = static_cast<double>(weight[j]);
        answer.magnitudes["weights"][first + j] = size;
        read[j] = stored ? static_cast<Real>(rounded(*stored, static_cast<double>(weight[j])))
                         : weight[j];
        dot += read[j] * static_cast<Real>(of.grad[first + j]);
        dot_size += size * std::fabs(of.grad[first + j]);
      }
      for (size_t j = 0; j < keys; ++j) {
        const Real scale = static_cast<Real>(mask.scale);
        answer.values["d_scores"][first + j] =
            static_cast<double>(scale * read[j] * (static_cast<Real>(of.grad[first + j]) - dot));
        answer.magnitudes["d_scores"][first + j] = std::fabs(mask.scale) *
                                                   static_cast<double>(weight[j]) * (1.0 + reach) *
                                                   (std::fabs(of.grad[first + j]) + dot_size);
      }
    }
  }
  return answer;
}

inline Results run_softmax(const SoftmaxCase& of, Random& random, std::string& fault) {
  const AttentionCase& mask = of.mask;
  const Shape shape = {mask.batch, mask.heads, mask.query_len, mask.key_len};
  Stored scores(mask.item, shape, &random), weights(mask.item, shape), d_scores(mask.item, shape);
  scores.set(of.scores);
  rowmax::SoftmaxCall call{};
  call.scores = scores.data();
  call.scores_batch = scores.stride(0), call.scores_head = scores.stride(1);
  call.scores_query = scores.stride(2);
  call.weights = weights.data();
  call.heads = mask.heads, call.queries = mask.query_len, call.keys = mask.key_len;
  call.rows = mask.batch * mask.heads * mask.query_len, call.task_rows = random.between(1, 8);
  call.band_lower = mask.lower, call.band_upper = mask.upper;
  const auto data = [](const auto& values) { return values.empty() ? nullptr : values.data(); };
  call.band = data(mask.band);
  call.key_lengths = data(mask.key_lengths), call.query_lengths = data(mask.query_lengths);
  call.query_documents = data(mask.query_documents), call.key_documents = data(mask.key_documents);
  if (!mask.dense.empty()) {
    const Shape& sizes = mask.dense_shape;
    int64_t stride = 1;
    int64_t* const strides[4] = {
        &call.dense_batch, &call.dense_head, &call.dense_query, &call.dense_key};
    for (size_t n = 4; n-- > 0;) {
      *strides[n] = sizes[n] == 1 ? 0 : stride;
      stride *= sizes[n];
    }
    call.dense = mask.dense.data();
  }
  call.scale = mask.scale;
  run(rowmax::chosen_kernels().softmax_forward[mask.item], call, random.between(1, 3));

  const Shape rows = {call.rows, call.keys};
  Stored given(mask.item, rows, &random), grad(mask.item, rows, &random);
  given.set(weights.values()), grad.set(of.grad);
  call.weights = given.data(), call.weights_row = given.stride(0);
  call.grad = grad.data(), call.grad_row = grad.stride(0);
  call.d_scores = d_scores.data();
  run(rowmax::chosen_kernels().softmax_backward[mask.item], call, random.between(1, 3));
  for (const Stored* tensor : {&scores, &given, &grad}) {
    fault = tensor->gaps_untouched() ? fault : "an input is written to";
  }
  return {{"weights", {weights.values(), mask.item}}, {"d_scores", {d_scores.values(), mask.item}}};
}

inline std::string text_of(const SoftmaxCase& of) { return "softmax of " + text_of(of.mask); }

}  // namespace parity
