// What is needed here of DLPack's C interface, versions 1.x (github.com/dmlc/dlpack, dlpack.h): reading
// a Python tensor's address, dtype, sizes and strides in some tens of nanoseconds. torch offers the
// table of functions as the capsule `torch.Tensor.__dlpack_c_exchange_api__`, but its own copy of the
// header is not for extensions on the stable ABI.

#pragma once

#include <stdint.h>

namespace rowmax::dlpack {

inline constexpr uint32_t kMajorVersion = 1;
inline constexpr const char* kCapsule = "dlpack_exchange_api";
inline constexpr int32_t kCpu = 1;
inline constexpr uint8_t kInt = 0, kFloat = 2, kBfloat = 4, kBool = 6;

struct Device {
  int32_t type, id;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t dimensions;
  DataType dtype;
  int64_t *sizes, *strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  const ExchangeApi* previous;
  int (*allocate)(Tensor*, void**, void*, void (*)(void*, const char*, const char*));
  int (*from_object)(void*, void**);
  int (*to_object)(void*, void**);
  // A view of the tensor behind a Python object, which lives as long as that; -1 with an exception set.
  // The table may lack it.
  int (*view)(void* object, Tensor* view);
  int (*current_stream)(int32_t, int32_t, void**);
};

}  // namespace rowmax::dlpack
