// The mask's fields of a kernel's call, the same for attention and for softmax.

#pragma once

#include <algorithm>

#include "binding/launch.h"
#include "constants.h"
#include "problems.h"

namespace rowmax {

// Bounds are clamped to what sums of positions can hold; a dimension of size 1 has stride 0.
template <typename Call>
void set_mask_fields(Call& call, const MaskStructure& mask) {
  const int64_t no_bound = NO_BOUND;
  call.band_lower = std::max(mask.band_lower.value_or(-no_bound), -no_bound);
  call.band_upper = std::min(mask.band_upper.value_or(no_bound), no_bound);
  call.band = address<int64_t>(mask.band);
  call.prefix_lengths = address<int64_t>(mask.prefix_lengths);
  call.key_lengths = address<int64_t>(mask.key_lengths);
  call.query_lengths = address<int64_t>(mask.query_lengths);
  if (mask.query_documents && mask.key_documents) {
    call.query_documents = address<int64_t>(mask.query_documents);
    call.key_documents = address<int64_t>(mask.key_documents);
  }
  if (mask.dense) {
    const Tensor& dense = *mask.dense;
    call.dense = static_cast<const uint8_t*>(dense.data_ptr());
    ROWMAX_SET_BROADCAST(dense, dense);
  }
}

}  // namespace rowmax
