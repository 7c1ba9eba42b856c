// How attention is divided into tiles, chunks of keys and tasks, from sizes and threads alone.
//
// kernels/backends/cpu_numba/attention_plan.py says the same, line by line. The bits of a result depend on
// nothing that is decided here.

#pragma once

#include <cstdint>

namespace rowmax {

struct Sizes {
  int64_t batch, heads, key_heads;
  int64_t query_len, key_len;  // of packed sequences the longest
};

struct DecodePlan {
  int64_t chunks;  // of keys that a head has, at most
  int64_t tasks;
};

struct ForwardPlan {
  int64_t tile, tasks_per_grab;
  int64_t grabs;  // how often threads take tasks
  bool keeps_wide;
};

struct BackwardPlan {
  int64_t tile, batch_tasks, head_tasks, chunk_tasks, chunk_keys, tasks_per_grab, grabs;
};

// The most queries that a sequence has for the decoding kernel.
int64_t max_decode_queries(int64_t heads, int64_t key_heads);

// A task is a chunk of keys of a head of K and V.
DecodePlan decode_plan(const Sizes& of);

// A task is a tile of queries of a head; a tile has at most `vectors` vectors of `lanes` queries.
//
// `wide_bytes` is what a key's rows of K and V take when they are widened, 0 where they are not. They are
// kept where several tiles read a head and its rows fit MAX_WIDE_BYTES.
ForwardPlan forward_plan(const Sizes& of, int64_t vectors, int64_t lanes, int64_t wide_bytes);

// A task is a head of K and V, one chunk of its keys, or all heads that share a bias gradient.
//
// A bias that several heads or batch elements share has one gradient, of the sizes `d_bias` (or null): the
// same task takes them all, one after another. Keys are divided where heads alone would leave threads idle,
// and where the sums of dK and dV, `row_bytes` a key, outgrow a core's cache, but not if all of them share a
// bias.
BackwardPlan backward_plan(
    const Sizes& of, int64_t vectors, int64_t lanes, int64_t row_bytes, const int64_t* d_bias);

// What becomes of an element's gradient where the bias's gradient has the sizes `d_bias`.
int64_t bias_gradient_kind(const Sizes& of, const int64_t* d_bias, bool of_computed_type);

}  // namespace rowmax
