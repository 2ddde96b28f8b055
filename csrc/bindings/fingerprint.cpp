// Op that shows whether weights have changed since they were packed.
#include <algorithm>

#include "bindings.h"

namespace starflow {

namespace {

// Bytes per piece, each of which is read by one thread, and bytes from which threads save more than they cost.
constexpr int64_t PIECE = 1 << 20;
constexpr int64_t PARALLEL = 1 << 24;

// Returns a digest of the bytes at `places` (n, 2), rows of an address and a number of bytes. A change of one value
// always changes it; several random changes leave it as it was with a probability of about 2^-32. It differs between
// instruction sets. The op takes addresses, since passing 30 tensors takes longer than reading small ones.
int64_t fingerprint(Tensor places) {
    auto place = static_cast<const int64_t*>(values(places, ScalarType::Long, 2 * places.size(0)));
    std::vector<Bytes> pieces;
    int64_t all = 0;
    for (int64_t i = 0; i < places.size(0); ++i) {
        auto bytes = reinterpret_cast<const char*>(place[2 * i]);
        int64_t total = place[2 * i + 1];
        for (int64_t first = 0; first < total; first += PIECE)
            pieces.push_back({bytes + first, std::min(PIECE, total - first)});
        all += total;
    }
    int64_t n = pieces.size();
    if (all < PARALLEL) return int64_t(kernels().fingerprint(pieces.data(), n));
    std::vector<uint64_t> digests(n);
    parallel_for(n, 1, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) digests[i] = kernels().fingerprint(&pieces[i], 1);
    });
    Bytes joined{reinterpret_cast<const char*>(digests.data()), int64_t(n * sizeof(uint64_t))};
    return int64_t(kernels().fingerprint(&joined, 1));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(starflow_native, m) { m.def("fingerprint(Tensor places) -> int"); }

STABLE_TORCH_LIBRARY_IMPL(starflow_native, CPU, m) { m.impl("fingerprint", TORCH_BOX(&fingerprint)); }

}  // namespace starflow
