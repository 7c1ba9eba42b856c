// See attention_plan.h.

#include "binding/attention_plan.h"

#include <algorithm>

#include "binding/threads.h"
#include "constants.h"

namespace rowmax {
namespace {

using std::max;
using std::min;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Queries of a tile: as many as the registers hold.
int64_t tile_queries(int64_t query_len, int64_t vectors, int64_t lanes) {
  return min(vectors * lanes, max<int64_t>(1, divide_up(query_len, lanes)) * lanes);
}

// The busiest thread's queries, times `threads`; a tile costs as much as `lanes` queries more.
int64_t forward_work(const Sizes& of, int64_t tile, int64_t lanes, int64_t threads) {
  const int64_t tasks = of.batch * of.heads * divide_up(of.query_len, tile);
  if (tasks <= threads || tasks % threads != 0) {
    return divide_up(tasks, threads) * (tile + lanes) * threads;
  }
  const int64_t whole = of.query_len / tile, rest = of.query_len % tile;
  const int64_t last = rest > 0 ? divide_up(rest, lanes) * lanes + lanes : 0;
  return of.batch * of.heads * (whole * (tile + lanes) + last);
}

// Heads that a thread takes at once: several short ones, so that one can ask memory for the next. Long
// heads are tiles that any thread may take.
int64_t heads_at_once(int64_t heads, int64_t length) {
  return length <= SHORT_HEAD ? min<int64_t>(8, heads / (8 * thread_count(heads))) : 0;
}

}  // namespace

int64_t max_decode_queries(int64_t heads, int64_t key_heads) {
  const int64_t group = heads / max<int64_t>(1, key_heads);
  return min<int64_t>(MAX_DECODE_QUERIES, MAX_DECODE_ROWS / max<int64_t>(1, group));
}

DecodePlan decode_plan(const Sizes& of) {
  const int64_t chunks = max<int64_t>(1, divide_up(of.key_len, CHUNK_KEYS));
  return {chunks, of.batch * of.key_heads * chunks};
}

ForwardPlan forward_plan(const Sizes& of, int64_t vectors, int64_t lanes, int64_t wide_bytes) {
  const int64_t planes = of.batch * of.heads;
  int64_t tile = tile_queries(of.query_len, vectors, lanes);
  // Narrower tiles where few wide ones would leave threads idle.
  const int64_t threads = thread_count(planes * divide_up(of.query_len, lanes));
  if (planes * divide_up(of.query_len, tile) < 8 * threads) {
    int64_t least = forward_work(of, tile, lanes, threads);
    for (int64_t narrower = tile - lanes; narrower > 0; narrower -= lanes) {
      const int64_t work = forward_work(of, narrower, lanes, threads);
      if (work < least) {
        tile = narrower;
        least = work;
      }
    }
  }
  const int64_t tiles = divide_up(of.query_len, tile);
  const int64_t tasks_per_grab =
      max<int64_t>(1, tiles * heads_at_once(planes, max(of.query_len, of.key_len)));
  const bool keeps_wide = wide_bytes > 0 && of.key_len * wide_bytes <= MAX_WIDE_BYTES &&
                          (tiles > 1 || of.heads > of.key_heads);
  return {tile, tasks_per_grab, divide_up(planes * tiles, tasks_per_grab), keeps_wide};
}

BackwardPlan backward_plan(
    const Sizes& of, int64_t vectors, int64_t lanes, int64_t row_bytes, const int64_t* d_bias) {
  const int64_t tile = tile_queries(of.query_len, vectors, lanes);
  const int64_t batch_tasks = d_bias != nullptr && d_bias[0] == 1 ? 1 : of.batch;
  const int64_t head_tasks = d_bias != nullptr && d_bias[1] == 1 ? 1 : of.key_heads;
  const int64_t tasks = batch_tasks * head_tasks, blocks = divide_up(of.key_len, BLOCK_KEYS);
  const int64_t threads = thread_count(tasks * blocks);
  const bool even = tasks == 0 || tasks >= 4 * threads || tasks % threads == 0;
  // A chunk of several blocks reads its queries less often; four tasks a thread even out.
  int64_t chunk_blocks =
      even ? blocks : min<int64_t>(4, max<int64_t>(1, tasks * blocks / (4 * threads)));
  const int64_t block_bytes = BLOCK_KEYS * row_bytes;
  if (blocks * block_bytes > 3 * CACHE_BYTES) {
    chunk_blocks = min(chunk_blocks, max<int64_t>(1, CACHE_BYTES / block_bytes));
  }
  int64_t chunk_tasks = 1;
  if (blocks < 2 || chunk_blocks == blocks || (d_bias != nullptr && d_bias[3] == 1)) {
    chunk_blocks = max<int64_t>(1, blocks);
  } else {
    chunk_tasks = divide_up(blocks, chunk_blocks);
  }
  int64_t tasks_per_grab = 1;
  if (chunk_tasks == 1 && tasks == of.batch * of.key_heads) {
    tasks_per_grab = max<int64_t>(1, heads_at_once(tasks, max(of.query_len, of.key_len)));
  }
  return {
      tile,
      batch_tasks,
      head_tasks,
      chunk_tasks,
      chunk_blocks * BLOCK_KEYS,
      tasks_per_grab,
      divide_up(tasks * chunk_tasks, tasks_per_grab)};
}

int64_t bias_gradient_kind(const Sizes& of, const int64_t* d_bias, bool of_computed_type) {
  const bool in_tiles = d_bias[2] == of.query_len && d_bias[3] == of.key_len;
  if (in_tiles && d_bias[0] == of.batch && d_bias[1] == of.heads) {
    return BIAS_GRAD_STORE;
  }
  return in_tiles && of_computed_type ? BIAS_GRAD_SUM : BIAS_GRAD_SUM_WIDE;
}

}  // namespace rowmax
