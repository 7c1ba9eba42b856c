#include "binding/libtorch.h"

#include <dlfcn.h>

namespace rowmax {

Libtorch libtorch;

void find_libtorch(const char* path) {
  void* library = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
  require(library != nullptr, path, " is not loaded");
  const auto find = [&](auto& function, const char* name) {
    void* found = dlsym(library, name);
    require(found != nullptr, path, " has no ", name, ": torch >= 2.10 has it");
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(found);
  };
#define ROWMAX_FIND(name, ...) find(libtorch.name, #name);
  ROWMAX_LIBTORCH_FUNCTIONS(ROWMAX_FIND)
#undef ROWMAX_FIND
  dlclose(library);  // torch keeps it
}

}  // namespace rowmax
