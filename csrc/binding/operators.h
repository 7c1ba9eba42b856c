// Functions as operators torch.ops.rowmax_native.*: taking arguments off torch's stack, and registering.

#pragma once

#include <bit>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>

#include "binding/libtorch.h"

namespace rowmax {

static_assert(std::endian::native == std::endian::little, "numbers lie in a word's first bytes");

// An argument of an operator. It owns what the word on the stack owned.
template <typename T>
struct Argument {
  static_assert(std::is_arithmetic_v<T>);
  explicit Argument(Word word) { std::memcpy(&value, &word, sizeof value); }
  T value;
};

template <>
struct Argument<Tensor> {
  explicit Argument(Word word) : handle(std::bit_cast<AtenTensorOpaque*>(word)), value(handle) {}
  ~Argument() { libtorch.aoti_torch_delete_tensor_object(handle); }
  Argument(const Argument&) = delete;
  Argument& operator=(const Argument&) = delete;
  AtenTensorOpaque* handle;
  Tensor value;
};

template <typename T>
struct Argument<std::optional<T>> {
  explicit Argument(Word word) {
    if (const std::unique_ptr<Word> inner{std::bit_cast<Word*>(word)}) {
      value = owned.emplace(*inner).value;
    }
  }
  std::optional<Argument<T>> owned;
  std::optional<T> value;
};

// `function` as torch calls it.
template <auto function>
struct Boxed;
template <typename Result, typename... Parameter, Result (*function)(Parameter...)>
struct Boxed<function> {
  static void call(Word* stack, uint64_t arguments, uint64_t results) {
    require(
        arguments == sizeof...(Parameter) && results == (std::is_void_v<Result> ? 0 : 1),
        "an operator whose schema is not its function's");
    call(stack, std::index_sequence_for<Parameter...>());
  }

 private:
  template <size_t... index>
  static void call(Word* stack, std::index_sequence<index...>) {
    const std::tuple<Argument<Parameter>...> taken{stack[index]...};
    if constexpr (std::is_void_v<Result>) {
      function(std::get<index>(taken).value...);
    } else {
      const Result result = function(std::get<index>(taken).value...);
      stack[0] = 0;
      std::memcpy(stack, &result, sizeof result);
    }
  }
};

// Definitions of operators, or their implementations for a dispatch key. They last as long as the process.
class Library {
 public:
  Library() {
    succeed(libtorch.aoti_torch_library_init_fragment(kName, __FILE__, __LINE__, &handle_));
  }
  explicit Library(const char* key) {
    succeed(libtorch.aoti_torch_library_init_impl(kName, key, __FILE__, __LINE__, &handle_));
  }

  void define(const std::string& schema) {
    succeed(libtorch.aoti_torch_library_def(handle_, schema.c_str()));
  }
  template <auto function>
  void implement(const char* name) {
    const BoxedFunction boxed = Boxed<function>::call;
    succeed(libtorch.torch_library_impl(handle_, name, boxed, kLibtorchVersion));
  }

 private:
  static constexpr const char* kName = "rowmax_native";
  TorchLibraryOpaque* handle_;
};

}  // namespace rowmax
