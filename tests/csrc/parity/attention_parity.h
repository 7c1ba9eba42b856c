// Random calls of the attention kernels, and what they answer.

#pragma once

#include "attention_equations.h"
#include "run.h"

namespace parity {

inline std::vector<int64_t> integers(int64_t count, int64_t low, int64_t high, Random& random) {
  std::vector<int64_t> drawn(count);
  for (int64_t& number : drawn) {
    number = random.between(low, high);
  }
  return drawn;
}

// Sizes whose products stay small enough for an emulated processor.
inline AttentionCase draw_sizes(Random& random) {
  AttentionCase of;
  of.item = static_cast<Item>(random.between(0, 3));
  of.batch = random.between(1, 3);
  of.key_heads = random.between(1, 2);
  of.heads = of.key_heads * random.between(1, 3);
  const auto length = [&] {
    return random.chance(0.8) ? random.between(0, 40)
                              : random.one_of<int64_t>({64, 127, 129, 257, 300});
  };
  const auto width = [&] {
    return random.chance(0.8) ? random.between(1, 24) : random.one_of<int64_t>({32, 64, 65, 128});
  };
  do {
    of.query_len = length(), of.key_len = length();
    of.head_dim = width(), of.value_dim = width();
    if (random.chance(0.15)) {  // decoding
      of.query_len = random.between(1, 4), of.key_len = random.between(200, 800);
    }
  } while (of.query_len * of.key_len * (of.head_dim + of.value_dim) > 300000);
  return of;
}

inline void draw_mask(AttentionCase& of, Random& random) {
  const bool packed = random.chance(0.2);
  if (packed) {
    of.query_starts = of.key_starts = {0};
    int64_t queries = 0, keys = 0;
    for (int64_t b = 0; b < of.batch; ++b) {
      const int64_t more_queries = random.between(0, of.query_len),
                    more_keys = random.between(0, of.key_len);
      of.query_starts.push_back(of.query_starts.back() + more_queries);
      of.key_starts.push_back(of.key_starts.back() + more_keys);
      queries = std::max(queries, more_queries), keys = std::max(keys, more_keys);
    }
    of.query_len = queries, of.key_len = keys;
  }
  if (random.chance(0.4)) {
    of.lower = random.chance(0.5) ? -rowmax::NO_BOUND : random.between(-40, 20);
    of.upper = random.chance(0.3) ? rowmax::NO_BOUND : random.between(-20, 40);
  }
  if (random.chance(0.15)) {
    of.band = integers(2 * of.batch, -30, 30, random);
  }
  if (packed) {
    return;
  }
  if (random.chance(0.2)) {
    of.key_lengths = integers(of.batch, -2, of.key_len + 3, random);
  }
  if (random.chance(0.15)) {
    of.query_lengths = integers(of.batch, -2, of.query_len + 3, random);
  }
  if (random.chance(0.15)) {
    of.query_documents = integers(of.batch * of.query_len, 0, 2, random);
    of.key_documents = integers(of.batch * of.key_len, 0, 2, random);
    if (random.chance(0.5)) {
      std::sort(of.query_documents.begin(), of.query_documents.end());
      std::sort(of.key_documents.begin(), of.key_documents.end());
    }
  }
  const Shape full = {of.batch, of.heads, of.query_len, of.key_len};
  const auto broadcast = [&] {
    Shape shape = full;
    for (int64_t& size : shape) {
      size = random.chance(0.4) ? 1 : size;
    }
    return shape;
  };
  if (random.chance(0.25)) {
    of.dense_shape = broadcast();
    const double share = random.one_of<double>({0.05, 0.7, 0.95});
    for (int64_t n = 0; n < elements(of.dense_shape); ++n) {
      of.dense.push_back(random.chance(share));
    }
  }
  if (random.chance(0.25)) {
    of.bias_shape = broadcast();
    of.bias = normals(elements(of.bias_shape), random);
    for (double& value : of.bias) {
      value =
          rounded(of.item, random.chance(0.05) ? -std::numeric_limits<double>::infinity() : value);
    }
    if (of.bias.empty()) {
      of.bias_shape.clear();
    }
  }
}

inline void draw_scores(AttentionCase& of, Random& random) {
  of.scale =
      random.chance(0.7) ? 1.0 / std::sqrt(static_cast<double>(of.head_dim)) : random.normal();
  of.softcap = random.chance(0.15) ? 0.2 + 5.0 * random.uniform() : 0.0;
  if (random.chance(0.15)) {
    of.alibi = normals(of.batch * of.heads, random);
    for (double& slope : of.alibi) {
      slope = std::fabs(slope);
    }
    of.alibi_offset = integers(of.batch, -20, 20, random);
  }
  if (random.chance(0.2)) {
    of.sinks = normals(of.heads, random);
  }
  if (random.chance(0.3)) {
    const double p = random.one_of<double>({0.1, 0.5, 0.9, 1.0});
    of.dropout = Dropout{p, random.next()};
    of.batch_start = random.one_of<int64_t>({0, 5});
  }
}

// Keys that no query of their batch element may attend, by band and lengths, hold NaN.
inline void draw_tensors(AttentionCase& of, Random& random) {
  const int64_t query_rows = of.places() * of.heads * of.query_rows();
  const int64_t key_rows = of.places() * of.key_heads * of.key_rows();
  const auto draw = [&](int64_t count) {
    Values values = normals(count, random);
    for (double& value : values) {
      value = rounded(of.item, value);
    }
    return values;
  };
  of.query = draw(query_rows * of.head_dim);
  of.key = draw(key_rows * of.head_dim);
  of.value = draw(key_rows * of.value_dim);
  of.grad_out = draw(query_rows * of.value_dim);
  if (random.chance(0.5)) {
    of.grad_lse = normals(query_rows, random);
  }
  for (int64_t b = 0; b < of.batch; ++b) {
    const Sequence at = of.sequence(b);
    for (int64_t j = 0; j < at.keys; ++j) {
      bool met = false;
      for (int64_t i = 0; i < at.queries && !met; ++i) {
        met = of.in_range(b, i, j);
      }
      for (int64_t head = 0; head < of.key_heads && !met; ++head) {
        const int64_t row = (at.place * of.key_heads + head) * of.key_rows() + at.first_key + j;
        std::fill_n(of.key.begin() + row * of.head_dim, of.head_dim, std::nan(""));
        std::fill_n(of.value.begin() + row * of.value_dim, of.value_dim, std::nan(""));
      }
    }
  }
}

inline AttentionCase draw_attention(Random& random) {
  AttentionCase of = draw_sizes(random);
  draw_mask(of, random);
  draw_scores(of, random);
  draw_tensors(of, random);
  return of;
}

inline std::string text_of(const AttentionCase& of) {
  std::string text = std::string("attention ") + kFacts[of.item].name;
  for (const int64_t size :
       {of.batch, of.heads, of.key_heads, of.query_len, of.key_len, of.head_dim, of.value_dim}) {
    text += " " + std::to_string(size);
  }
  const std::pair<const char*, bool> features[] = {
      {"packed", of.packed()},
      {"bounds", of.lower > -rowmax::NO_BOUND || of.upper < rowmax::NO_BOUND},
      {"band", !of.band.empty()},
      {"key_lengths", !of.key_lengths.empty()},
      {"query_lengths", !of.query_lengths.empty()},
      {"documents", !of.query_documents.empty()},
      {"dense", !of.dense.empty()},
      {"bias", !of.bias.empty()},
      {"alibi", !of.alibi.empty()},
      {"sinks", !of.sinks.empty()},
      {"softcap", of.softcap != 0.0},
      {"dropout", of.dropout.has_value()},
      {"grad_lse", !of.grad_lse.empty()},
  };
  for (const auto& [name, present] : features) {
    text += present ? std::string(" ") + name : "";
  }
  return text;
}

// The kernels' answer: the forward pass, and the backward pass from what it stored.
class AttentionRun {
 public:
  AttentionRun(const AttentionCase& of, Random& random)
      : of_(of),
        random_(random),
        type_(computed(of.item)),
        query_(heads_of(of.heads, of.query_rows(), of.head_dim)),
        key_(heads_of(of.key_heads, of.key_rows(), of.head_dim)),
        value_(heads_of(of.key_heads, of.key_rows(), of.value_dim)),
        out_(heads_of(of.heads, of.query_rows(), of.value_dim)),
        lse_(kDouble, {of.places(), of.heads, of.query_rows()}),
        grad_out_(heads_of(of.heads, of.query_rows(), of.value_dim)),
        d_query_(heads_of(of.heads, of.query_rows(), of.head_dim)),
        d_key_(heads_of(of.key_heads, of.key_rows(), of.head_dim)),
        d_value_(heads_of(of.key_heads, of.key_rows(), of.value_dim)),
        delta_(kDouble, lse_.shape()),
        grad_lse_(of.grad_lse) {
    query_.set(of.query), key_.set(of.key), value_.set(of.value), grad_out_.set(of.grad_out);
    fill_call();
  }

  Results answer(std::string& fault) {
    forward();
    backward();
    for (const Stored* tensor : {&out_, &d_query_, &d_key_, &d_value_, &d_bias_}) {
      if (!tensor->shape().empty() && !tensor->gaps_untouched()) {
        fault = "a result is written to beyond its elements";
      }
    }
    if (fault.empty()) {
      fault = fault_of_delta();
    }
    Results results = {
        {"out", {out_.values(), of_.item}},         {"lse", {lse_.values(), type_}},
        {"d_query", {d_query_.values(), of_.item}}, {"d_key", {d_key_.values(), of_.item}},
        {"d_value", {d_value_.values(), of_.item}}, {"d_bias", {{}, type_}},
    };
    if (!of_.bias.empty()) {
      const bool half = half_of(d_bias_.item()) != rowmax::ITEM_COMPUTED;
      results["d_bias"] = {d_bias_.values(), half ? d_bias_.item() : type_};
    }
    return results;
  }

 private:
  Stored heads_of(int64_t heads, int64_t rows, int64_t columns) {
    return Stored(of_.item, {of_.places(), heads, rows, columns}, &random_);
  }
  static int64_t half_of(Item item) {
    return item == ITEM_BFLOAT16  ? rowmax::ITEM_BFLOAT16
           : item == ITEM_FLOAT16 ? rowmax::ITEM_FLOAT16
                              : rowmax::ITEM_COMPUTED;
  }
  template <typename E>
  static const E* data(const std::vector<E>& values) {
    return values.empty() ? nullptr : values.data();
  }

  // delta = sum(d_out * out) - d_lse of the out that is stored, in rows that attend something.
  std::string fault_of_delta() const {
    const Values out = out_.values(), lse = lse_.values(), got = delta_.values();
    const size_t columns = of_.value_dim;
    for (size_t row = 0; row < got.size(); ++row) {
      double expected = of_.grad_lse.empty() ? 0.0 : -of_.grad_lse[row], size = std::fabs(expected);
      for (size_t n = row * columns; n < (row + 1) * columns; ++n) {
        expected += of_.grad_out[n] * out[n];
        size += std::fabs(of_.grad_out[n] * out[n]);
      }
      const double error = std::fabs(got[row] - expected);
      if (std::isfinite(lse[row]) && !(error <= SUMMATION * kFacts[type_].eps * size)) {
        return "delta: error " + std::to_string(error) + " in row " + std::to_string(row);
      }
    }
    return {};
  }

  void fill_call() {
    call_.query = query_.data(), call_.key = key_.data(), call_.value = value_.data();
    call_.out = out_.data();
    const auto strides = [](Stored& from, int64_t& batch, int64_t& head, int64_t& row) {
      batch = from.stride(0), head = from.stride(1), row = from.stride(2);
    };
    strides(query_, call_.query_batch, call_.query_head, call_.query_row);
    strides(key_, call_.key_batch, call_.key_head, call_.key_row);
    strides(value_, call_.value_batch, call_.value_head, call_.value_row);
    strides(out_, call_.out_batch, call_.out_head, call_.out_row);
    strides(grad_out_, call_.grad_out_batch, call_.grad_out_head, call_.grad_out_row);
    strides(d_query_, call_.d_query_batch, call_.d_query_head, call_.d_query_row);
    strides(d_key_, call_.d_key_batch, call_.d_key_head, call_.d_key_row);
    strides(d_value_, call_.d_value_batch, call_.d_value_head, call_.d_value_row);
    call_.item_type = half_of(of_.item);
    call_.batch = of_.batch, call_.heads = of_.heads, call_.key_heads = of_.key_heads;
    call_.query_len = of_.query_len, call_.key_len = of_.key_len;
    call_.head_dim = of_.head_dim, call_.value_dim = of_.value_dim;
    call_.query_rows = of_.query_rows();
    call_.query_starts = data(of_.query_starts), call_.key_starts = data(of_.key_starts);
    call_.band_lower = of_.lower, call_.band_upper = of_.upper;
    call_.band = data(of_.band);
    call_.key_lengths = data(of_.key_lengths), call_.query_lengths = data(of_.query_lengths);
    call_.query_documents = data(of_.query_documents),
    call_.key_documents = data(of_.key_documents);
    call_.query_documents_batch = of_.query_len, call_.key_documents_batch = of_.key_len;
    call_.alibi = data(of_.alibi), call_.alibi_batch = of_.heads;
    call_.alibi_offset = data(of_.alibi_offset), call_.alibi_offset_batch = 1;
    call_.sinks = data(of_.sinks);
    call_.score_scale = of_.scale;
    const bool capped = of_.softcap != 0.0;
    call_.scale = capped ? of_.scale / of_.softcap : of_.scale * rowmax::LOG2_E;
    call_.cap = capped ? of_.softcap * rowmax::LOG2_E : 0.0;
    call_.keep_scale = 1.0;
    if (of_.dropout) {
      call_.dropout = true;
      call_.seed = of_.dropout->seed;
      call_.threshold = of_.dropout->threshold();
      call_.keep_scale = of_.dropout->keep_scale();
    }
    call_.batch_start = of_.batch_start;
    fill_bias_and_dense();
    const rowmax::Kernels& kernels = rowmax::chosen_kernels();
    lanes_ = kernels.vector_bytes / kFacts[type_].bytes;
    call_.tile = lanes_ * random_.between(1, kernels.vectors);
  }

  void fill_bias_and_dense() {
    if (!of_.bias.empty()) {
      // half types as they are, or widened
      const Item item = random_.chance(0.5) ? of_.item : type_;
      bias_ = Stored(item, of_.bias_shape, &random_);
      bias_.set(of_.bias);
      call_.bias = bias_.data();
      call_.bias_item_type = half_of(item);
      call_.bias_batch = bias_.broadcast_stride(0), call_.bias_head = bias_.broadcast_stride(1);
      call_.bias_row = bias_.broadcast_stride(2), call_.bias_column = bias_.broadcast_stride(3);
    }
    if (!of_.dense.empty()) {
      const Shape& shape = of_.dense_shape;
      int64_t stride = 1;
      int64_t* const strides[4] = {
          &call_.dense_batch, &call_.dense_head, &call_.dense_row, &call_.dense_column};
      for (size_t n = 4; n-- > 0;) {
        *strides[n] = shape[n] == 1 ? 0 : stride;
        stride *= shape[n];
      }
      call_.dense = of_.dense.data();
    }
  }

  void forward() {
    const Item stored = of_.item == kDouble || of_.item == kFloat ? kDouble : kFloat;
    Stored lse(stored, lse_.shape());
    call_.lse = lse.data();
    const int64_t few =
        std::min(rowmax::MAX_DECODE_QUERIES, rowmax::MAX_DECODE_ROWS / (of_.heads / of_.key_heads));
    if (of_.query_len > 0 && (of_.packed() || of_.query_len <= few) && random_.chance(0.7)) {
      call_.max_decode_queries = few;
      decode();
    }
    if (of_.query_len > call_.max_decode_queries) {
      call_.tasks_per_grab = random_.between(1, 3);
      const rowmax::AttentionKernel* kernel = &rowmax::chosen_kernels().attention_forward[type_];
      run(pairs() != nullptr ? pairs()->forward : *kernel, call_, random_.between(1, 3));
    }
    lse_.set(lse.values());
  }

  // The kernel of few queries.
  void decode() {
    const rowmax::DecodeKernel& kernel = rowmax::chosen_kernels().attention_decode[type_];
    const int64_t chunks = (of_.key_len + rowmax::CHUNK_KEYS - 1) / rowmax::CHUNK_KEYS;
    call_.chunks = std::max<int64_t>(1, chunks);
    const auto finished = aligned_memory(8 * of_.batch * of_.key_heads, 0);
    const auto partials = aligned_memory(kernel.partial_bytes(call_), 0xff);
    call_.chunks_done = call_.chunks > 1 ? static_cast<int64_t*>(finished.get()) : nullptr;
    call_.partials = partials.get();
    run(kernel, call_, random_.between(1, 3));
  }

  const rowmax::PairKernels* pairs() const {
    return of_.item == ITEM_BFLOAT16 ? rowmax::pair_kernels() : nullptr;
  }

  void backward() {
    call_.lse = lse_.data();
    call_.grad_out = grad_out_.data();
    call_.grad_lse = data(grad_lse_);
    call_.d_query = d_query_.data(), call_.d_key = d_key_.data(), call_.d_value = d_value_.data();
    // rows that no tile of keys meets: out = 0
    Values unmet(elements(lse_.shape()));
    for (size_t n = 0; n < grad_lse_.size(); ++n) {
      unmet[n] = -grad_lse_[n];
    }
    delta_.set(unmet);
    call_.delta = static_cast<double*>(delta_.data());
    call_.batch_tasks = of_.batch, call_.head_tasks = of_.key_heads;
    bool one_column = false;
    if (!of_.bias.empty()) {
      const Shape full = {of_.batch, of_.heads, of_.query_len, of_.key_len};
      const bool in_tiles = of_.bias_shape[2] == full[2] && of_.bias_shape[3] == full[3];
      Item item = type_;
      if (of_.bias_shape != full) {
        call_.d_bias_kind =
            in_tiles && random_.between(0, 1) == 1 ? rowmax::BIAS_GRAD_SUM : rowmax::BIAS_GRAD_SUM_WIDE;
        item = call_.d_bias_kind == rowmax::BIAS_GRAD_SUM ? type_ : kDouble;
      } else {
        call_.d_bias_kind = rowmax::BIAS_GRAD_STORE;
        if (type_ == kFloat && random_.between(0, 1) == 1) {
          item = random_.between(0, 1) == 1 ? ITEM_BFLOAT16 : ITEM_FLOAT16;
        }
      }
      call_.d_bias_item_type = half_of(item);
      d_bias_ = Stored(item, of_.bias_shape);
      d_bias_.set(Values(of_.bias.size(), 0.0));
      call_.d_bias = d_bias_.data();
      call_.d_bias_batch = d_bias_.broadcast_stride(0),
      call_.d_bias_head = d_bias_.broadcast_stride(1);
      call_.d_bias_row = d_bias_.broadcast_stride(2),
      call_.d_bias_column = d_bias_.broadcast_stride(3);
      call_.batch_tasks = of_.bias_shape[0] == 1 ? 1 : of_.batch;
      call_.head_tasks = of_.bias_shape[1] == 1 ? 1 : of_.key_heads;
      one_column = of_.bias_shape[3] == 1;
    }
    const int64_t blocks =
        std::max<int64_t>(1, (of_.key_len + rowmax::BLOCK_KEYS - 1) / rowmax::BLOCK_KEYS);
    const int64_t of_chunk = one_column ? blocks : random_.between(1, blocks);
    call_.chunk_tasks = (blocks + of_chunk - 1) / of_chunk;
    call_.chunk_keys = of_chunk * rowmax::BLOCK_KEYS;
    const bool whole = call_.batch_tasks == of_.batch && call_.head_tasks == of_.key_heads &&
                       call_.chunk_tasks == 1;
    call_.tasks_per_grab = whole ? random_.between(1, 3) : 1;
    const int64_t tiles = of_.batch * of_.heads * ((of_.query_len + call_.tile - 1) / call_.tile);
    const auto turns = aligned_memory(8 * tiles, 0);
    const auto sums = aligned_memory(tiles * call_.tile * of_.head_dim * kFacts[type_].bytes, 0xff);
    call_.dq_semaphore = static_cast<int64_t*>(turns.get());
    call_.dq_accumulator = sums.get();
    const rowmax::AttentionKernel* kernel = &rowmax::chosen_kernels().attention_backward[type_];
    run(pairs() != nullptr ? pairs()->backward : *kernel, call_, random_.between(1, 3));
  }

  const AttentionCase& of_;
  Random& random_;
  Item type_;
  int64_t lanes_ = 0;
  Stored query_, key_, value_, out_, lse_, grad_out_, d_query_, d_key_, d_value_, delta_, bias_,
      d_bias_;
  std::vector<double> grad_lse_;
  rowmax::AttentionCall call_{};
};

}  // namespace parity
