// The choice among the CPU capabilities, made once at load and changeable for tests.

#include <cstdlib>
#include <cstring>

#include "bindings.h"

namespace modmask {

namespace {

struct Supported {
  const Kernels* tables[3];
  const char* names[3];
  int count = 0;

  void add(const Kernels& k) {
    tables[count] = &k;
    names[count++] = k.capability;
  }

  Supported() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      add(kKernelsAvx512);
    }
    if (avx2) {
      add(kKernelsAvx2);
    }
#endif
    add(kKernelsPlain);
  }

  const Kernels* find(const char* name) const {
    for (int i = 0; i < count; ++i) {
      if (std::strcmp(names[i], name) == 0) {
        return tables[i];
      }
    }
    return nullptr;
  }
};

const Supported& supported() {
  static const Supported s;
  return s;
}

const Kernels*& active() {
  static const Kernels* table = [] {
    const char* wanted = std::getenv("MODMASK_CPU_CAPABILITY");
    const Kernels* found = wanted != nullptr ? supported().find(wanted) : nullptr;
    return found != nullptr ? found : supported().tables[0];
  }();
  return table;
}

}  // namespace

const Kernels& active_kernels() {
  return *active();
}

const char* const* supported_capabilities(int& count) {
  count = supported().count;
  return supported().names;
}

bool choose_capability(const char* name) {
  const Kernels* found = supported().find(name);
  if (found == nullptr) {
    return false;
  }
  active() = found;
  return true;
}

Runner torch_runner() {
  return {
      static_cast<int>(torch::stable::get_num_threads()),
      [](int threads, void (*body)(void*), void* context) {
        torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            body(context);
          }
        });
      }};
}

}  // namespace modmask
