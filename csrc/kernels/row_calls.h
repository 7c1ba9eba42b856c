// What a launch tells the row-wise kernels. Row strides are in elements; an absent tensor is null.

#pragma once

#include <stdint.h>

namespace rowmax {

// Norms. What is called T is float, double for double items: the type that is computed in.
struct NormCall {
  const void* x;         // (rows, columns) items
  const void* residual;  // as x, or absent: then x itself is normalised
  int64_t x_row, residual_row;
  const void* weight;  // (columns,) T
  const void* bias;    // (columns,) T
  void* y;             // (rows, columns) items, contiguous
  void* total;         // as y: residual + dropout(x); unused without a residual
  void* mean;          // (rows,) T; neither written nor read unless `subtract_mean`
  void* rstd;          // (rows,) T
  int64_t rows, columns, task_rows;
  bool subtract_mean, dropping;
  int64_t threshold;  // words below it drop
  uint64_t seed;
  double eps, keep_scale;
  int64_t* tickets;  // eight counters that start at zero

  // Of the backward pass alone; x is the row that was normalised.
  const void* grad_y;      // (rows, columns) items
  const void* grad_total;  // as grad_y, or absent
  int64_t grad_y_row, grad_total_row;
  void* d_total;   // (rows, columns) items, contiguous
  void* d_x;       // as d_total, or absent
  void* partials;  // (chunks, 2, columns in whole vectors) T: each chunk's d_weight and d_bias
  void* d_weight;  // (columns,) T, or absent
  void* d_bias;    // (columns,) T, or absent
  int64_t chunks, chunk_rows;
};

struct SoftmaxCall {
  const void* scores;  // (B, H, Lq, Lk) items
  int64_t scores_batch, scores_head, scores_query;
  void* weights;  // (B, H, Lq, Lk) items, contiguous
  int64_t heads, queries, keys, rows, task_rows;
  int64_t band_lower, band_upper;  // bounds on j - i
  const int64_t* band;             // (B, 2), as well
  const int64_t* key_lengths;      // (B,)
  const int64_t* query_lengths;    // (B,)
  const int64_t* query_documents;  // (B, Lq)
  const int64_t* key_documents;    // (B, Lk)
  const uint8_t* dense;            // (B, H, Lq, Lk), strides 0 where broadcast, else 1 for the keys
  int64_t dense_batch, dense_head, dense_query, dense_key;
  double scale;
  int64_t* tickets;  // eight counters that start at zero

  // Of the backward pass alone, over (rows, keys).
  const void* given;  // the weights
  const void* grad;
  int64_t given_row, grad_row;
  void* d_scores;  // contiguous
};

}  // namespace rowmax
