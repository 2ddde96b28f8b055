// Ops that describe the machine, and parts of the kernels on their own, for tests.
#include <sys/mman.h>

#include <string>

#include "bindings.h"

namespace starflow {

namespace {

// Requests huge pages for a large tensor that has not been written yet: weights stream faster from them.
void use_huge_pages(Tensor tensor) {
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t page = 4096;
    auto start = (reinterpret_cast<uintptr_t>(tensor.data_ptr()) + page - 1) / page * page;
    auto end = (reinterpret_cast<uintptr_t>(tensor.data_ptr()) + tensor.numel() * tensor.element_size()) / page * page;
    if (end > start) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#endif
}

void elementary(Tensor x, int64_t which, Tensor out) {
    kernels().elementary(Elementary(which), data(x), data(out, x.numel()), x.numel());
}

std::string instruction_set() { return kernels().name; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(starflow_native, m) {
    m.def("instruction_set() -> str");
    m.def("has_bf16_products() -> bool");
    m.def("limit_cores(int cores) -> ()");
    m.def("rehearse(int seed) -> int");
    m.def("elementary(Tensor x, int which, Tensor(a!) out) -> ()");
    m.def("use_huge_pages(Tensor tensor) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(starflow_native, CompositeExplicitAutograd, m) {
    m.impl("instruction_set", TORCH_BOX(&instruction_set));
    m.impl("has_bf16_products", TORCH_BOX(&has_bf16_products));
    m.impl("limit_cores", TORCH_BOX(&limit_cores));
    m.impl("rehearse", TORCH_BOX(&rehearse));
}

STABLE_TORCH_LIBRARY_IMPL(starflow_native, CPU, m) {
    m.impl("elementary", TORCH_BOX(&elementary));
    m.impl("use_huge_pages", TORCH_BOX(&use_huge_pages));
}

}  // namespace starflow
