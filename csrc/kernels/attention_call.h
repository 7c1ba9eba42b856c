// What a launch tells the attention kernels: addresses, strides in elements and sizes. An absent
// tensor has address null; a broadcast dimension has stride 0.

#pragma once

#include <stdint.h>

namespace rowmax {

// Types of tensors in memory: the one computed in, or a half type that is widened to float.
enum Half : int64_t { kWhole = 0, kBfloat16 = 1, kFloat16 = 2 };

// What becomes of a block of the bias gradient: each element is one pair's and is put there, in the
// type computed in or a half type, or it is a sum, in the type computed in or in double.
enum BiasSum : int64_t { kPut = 0, kSum = 1, kSumWide = 2 };

struct AttentionCall {
  const void* query;  // (B, Hq, Lq, D)
  const void* key;    // (B, Hkv, Lk, D)
  const void* value;  // (B, Hkv, Lk, Dv)
  void* out;          // (B, Hq, Lq, Dv)
  void*
      lse;  // (B, Hq, query_rows), contiguous, double; float where the tensors are half; or absent
  int64_t query_batch, query_head, query_row;
  int64_t key_batch, key_head, key_row;
  int64_t value_batch, value_head, value_row;
  int64_t out_batch, out_head, out_row;
  int64_t half;  // of q, k, v, out and their gradients
  int64_t batch, heads, key_heads, query_len, key_len, head_dim, value_dim;
  int64_t tile;  // queries a tile has: a multiple of the lanes
  int64_t few;   // sequences of at most so many queries are for the decoding kernel, not for tiles
  int64_t query_rows;              // rows of q in memory a head
  const int64_t* query_starts;     // packed: (batch + 1,)
  const int64_t* key_starts;       // packed: (batch + 1,)
  int64_t band_lower, band_upper;  // bounds on j - i
  const int64_t* band;             // (B, 2), as well
  const int64_t* key_lengths;      // (B,)
  const int64_t* query_lengths;    // (B,)
  const int64_t* query_documents;  // (B, Lq)
  const int64_t* key_documents;    // (B, Lk)
  int64_t query_documents_batch, key_documents_batch;
  const void* bias;  // (B, Hq, Lq, Lk)
  int64_t bias_batch, bias_head, bias_row, bias_column, bias_half;
  const uint8_t* dense;  // (B, Hq, Lq, Lk)
  int64_t dense_batch, dense_head, dense_row, dense_column;
  const double* alibi;  // (B, Hq)
  int64_t alibi_batch;
  const int64_t* alibi_offset;  // (B,)
  int64_t alibi_offset_batch;
  const double* sinks;  // (Hq,)
  bool dropout;
  int64_t threshold;  // words below it drop
  uint64_t seed;
  int64_t batch_start;  // dropout counts batch elements from here
  // scale is the scores' factor times log2 e; with a softcap c > 0 it is the factor / c, and cap
  // is c * log2 e. Without one cap is 0.
  double scale, keep_scale, cap;

  int64_t run;       // tasks taken at once
  int64_t* tickets;  // eight counters that start at zero

  // Of decoding alone.
  int64_t chunks;     // chunks of CHUNK_KEYS keys a head has, at most
  int64_t* finished;  // (B, Hkv) zeros: how many chunks of a head are done; absent where it is one
  void* partials;     // (B, Hkv, chunks, rows, .) of the type computed in: m, l and O

  // Of the backward pass alone.
  double score_scale;
  const void* grad_out;  // (B, Hq, Lq, Dv)
  int64_t grad_out_batch, grad_out_head, grad_out_row;
  const double* grad_lse;  // (B, Hq, query_rows), contiguous, or absent
  void* d_query;           // as query
  void* d_key;
  void* d_value;
  int64_t d_query_batch, d_query_head, d_query_row;
  int64_t d_key_batch, d_key_head, d_key_row;
  int64_t d_value_batch, d_value_head, d_value_row;
  void* d_bias;  // zeros, as bias
  int64_t d_bias_batch, d_bias_head, d_bias_row, d_bias_column;
  int64_t d_bias_sum, d_bias_half;
  double* delta;  // (B, Hq, query_rows): written where the sinks' gradient needs it, or absent
  int64_t batch_tasks, head_tasks;  // 1 where one task takes all batch elements, or all heads
  int64_t chunk_tasks, chunk_keys;  // chunks of keys, a multiple of BLOCK_KEYS; 1 and all keys
  // Where there are several chunks: the turns, (B, Hq, tiles) zeros, and the sums of dQ until the
  // last turn, (B, Hq, tiles, D, tile) of the type computed in.
  int64_t* turns;
  void* d_query_sums;
};

}  // namespace rowmax
