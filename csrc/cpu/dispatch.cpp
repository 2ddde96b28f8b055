#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace starflow {

// Tables of kernels from the sources that are compiled once per instruction set.
namespace base {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

namespace {

const Kernels& choose() {
#if defined(__x86_64__)
    const char* wanted = std::getenv("STARFLOW_ISA");
    auto allowed = [&](const Kernels& set) { return !wanted || !std::strcmp(wanted, set.name); };
    __builtin_cpu_init();
    bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
    if (v4 && allowed(avx512::kernels)) return avx512::kernels;
    if (v3 && allowed(avx2::kernels)) return avx2::kernels;
#endif
    return base::kernels;
}

}  // namespace

const Kernels& kernels() {
    static const Kernels& chosen = choose();
    return chosen;
}

bool has_bf16_products() {
#if defined(__x86_64__)
    return &kernels() == &avx512::kernels && __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

}  // namespace starflow
