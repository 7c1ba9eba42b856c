// What the extension uses of torch: functions of its stable C ABI, which torch 2.10 and every later release
// has (torch/csrc/stable/c/shim.h, torch/csrc/inductor/aoti_torch/c/shim.h). They are declared here and
// found when the module is loaded, in the libraries that torch has loaded by then: nothing of torch is
// needed to compile or to link. tests/csrc/test_libtorch.py compares these types with torch's own.

#pragma once

#include <stdint.h>

#include <memory>
#include <ostream>
#include <sstream>
#include <stdexcept>

struct AtenTensorOpaque;
struct TorchLibraryOpaque;

namespace rowmax {

// An argument or a result of an operator: a number's bits, an owned tensor, or for what is optional
// null or the address of such a word on the heap, which is owned as well.
using Word = uint64_t;
using BoxedFunction = void (*)(Word* stack, uint64_t arguments, uint64_t results);
using ParallelFunction = void (*)(int64_t begin, int64_t end, void* context);

// X(name, type) for each function. Those of type int32_t(...) with an argument return 0 or an error.
#define ROWMAX_LIBTORCH_FUNCTIONS(X)                                                \
  X(aoti_torch_dtype_float32, int32_t())                                            \
  X(aoti_torch_dtype_float64, int32_t())                                            \
  X(aoti_torch_dtype_bfloat16, int32_t())                                           \
  X(aoti_torch_dtype_float16, int32_t())                                            \
  X(aoti_torch_get_dtype, int32_t(AtenTensorOpaque*, int32_t*))                     \
  X(aoti_torch_get_data_ptr, int32_t(AtenTensorOpaque*, void**))                    \
  X(aoti_torch_get_dim, int32_t(AtenTensorOpaque*, int64_t*))                       \
  X(aoti_torch_get_numel, int32_t(AtenTensorOpaque*, int64_t*))                     \
  X(aoti_torch_get_sizes, int32_t(AtenTensorOpaque*, int64_t**))                    \
  X(aoti_torch_get_strides, int32_t(AtenTensorOpaque*, int64_t**))                  \
  X(aoti_torch_is_contiguous, int32_t(AtenTensorOpaque*, bool*))                    \
  X(aoti_torch_delete_tensor_object, int32_t(AtenTensorOpaque*))                    \
  X(aoti_torch_library_init_fragment,                                               \
    int32_t(const char*, const char*, uint32_t, TorchLibraryOpaque**))              \
  X(aoti_torch_library_init_impl,                                                   \
    int32_t(const char*, const char*, const char*, uint32_t, TorchLibraryOpaque**)) \
  X(aoti_torch_library_def, int32_t(TorchLibraryOpaque*, const char*))              \
  X(torch_library_impl,                                                             \
    int32_t(TorchLibraryOpaque*, const char*, rowmax::BoxedFunction, uint64_t))     \
  X(torch_get_num_threads, int32_t(uint32_t*))                                      \
  X(torch_parallel_for, int32_t(int64_t, int64_t, int64_t, rowmax::ParallelFunction, void*))

struct Libtorch {
#define ROWMAX_MEMBER(name, ...) std::add_pointer_t<__VA_ARGS__> name;
  ROWMAX_LIBTORCH_FUNCTIONS(ROWMAX_MEMBER)
#undef ROWMAX_MEMBER
};
extern Libtorch libtorch;

// The release whose conventions are kept here, as torch encodes it: 2.10.
inline constexpr uint64_t kLibtorchVersion = (uint64_t{2} << 56) | (uint64_t{10} << 48);

// Finds the functions in the loaded library at `path` and in those that it depends on. Throws
// std::runtime_error where one is missing.
void find_libtorch(const char* path);

// Throws std::runtime_error with the message that `parts` make, unless `condition` holds.
template <typename... Part>
void require(bool condition, const Part&... parts) {
  if (!condition) [[unlikely]] {
    std::ostringstream message;
    (message << ... << parts);
    throw std::runtime_error(message.str());
  }
}

inline void succeed(int32_t status) { require(status == 0, "rowmax: a function of torch failed"); }

enum class ScalarType { Float, Double, BFloat16, Half, Other };
inline std::ostream& operator<<(std::ostream& stream, ScalarType type) {
  constexpr const char* names[] = {"float32", "float64", "bfloat16", "float16", "another dtype"};
  return stream << names[static_cast<int>(type)];
}

// A tensor that is owned elsewhere, as an operator's arguments are for the time of the call.
class Tensor {
 public:
  explicit Tensor(AtenTensorOpaque* handle) : handle_(handle) {}

  void* data_ptr() const { return asked(libtorch.aoti_torch_get_data_ptr); }
  int64_t dim() const { return asked(libtorch.aoti_torch_get_dim); }
  int64_t numel() const { return asked(libtorch.aoti_torch_get_numel); }
  const int64_t* sizes() const { return asked(libtorch.aoti_torch_get_sizes); }
  const int64_t* strides() const { return asked(libtorch.aoti_torch_get_strides); }
  bool is_contiguous() const { return asked(libtorch.aoti_torch_is_contiguous); }
  ScalarType scalar_type() const {
    const int32_t code = asked(libtorch.aoti_torch_get_dtype);
    return code == libtorch.aoti_torch_dtype_float32()    ? ScalarType::Float
           : code == libtorch.aoti_torch_dtype_float64()  ? ScalarType::Double
           : code == libtorch.aoti_torch_dtype_bfloat16() ? ScalarType::BFloat16
           : code == libtorch.aoti_torch_dtype_float16()  ? ScalarType::Half
                                                          : ScalarType::Other;
  }

 private:
  template <typename T>
  T asked(int32_t (*function)(AtenTensorOpaque*, T*)) const {
    T answer;
    succeed(function(handle_, &answer));
    return answer;
  }

  AtenTensorOpaque* handle_;
};

// function(begin, end) for parts of [0, count), on torch's threads.
template <typename Function>
void parallel_for(int64_t count, const Function& function) {
  const ParallelFunction call = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const Function*>(context))(begin, end);
  };
  succeed(libtorch.torch_parallel_for(0, count, 1, call, const_cast<Function*>(&function)));
}

inline int64_t get_num_threads() {
  uint32_t threads;
  succeed(libtorch.torch_get_num_threads(&threads));
  return threads;
}

}  // namespace rowmax
