// Ops that show whether weights have changed since they were packed.
#include <algorithm>

#include "bindings.h"

namespace starflow {

namespace {

// Bytes per piece, each of which is read by one thread, and bytes from which threads save more than they cost.
constexpr int64_t PIECE = 1 << 20;
constexpr int64_t PARALLEL = 1 << 24;

// Memory of weights. A change of one value always changes its digest; several random changes leave it as it was with a
// probability of about 2^-32. It differs between instruction sets.
class Memory {
public:
    void add(const void* from, int64_t count) {
        auto bytes = static_cast<const char*>(from);
        for (int64_t first = 0; first < count; first += PIECE)
            pieces_.push_back({bytes + first, std::min(PIECE, count - first)});
        count_ += count;
    }
    int64_t digest() const {
        int64_t n = pieces_.size();
        if (count_ < PARALLEL) return int64_t(kernels().fingerprint(pieces_.data(), n));
        std::vector<uint64_t> digests(n);
        parallel_for(n, 1, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; ++i) digests[i] = kernels().fingerprint(&pieces_[i], 1);
        });
        Bytes joined{reinterpret_cast<const char*>(digests.data()), int64_t(n * sizeof(uint64_t))};
        return int64_t(kernels().fingerprint(&joined, 1));
    }

private:
    std::vector<Bytes> pieces_;
    int64_t count_ = 0;
};

// Returns a digest of the bytes at `places` (n, 2), rows of an address and a number of bytes.
int64_t fingerprint(Tensor places) {
    auto place = static_cast<const int64_t*>(values(places, ScalarType::Long, 2 * places.size(0)));
    Memory memory;
    for (int64_t i = 0; i < places.size(0); ++i)
        memory.add(reinterpret_cast<const void*>(place[2 * i]), place[2 * i + 1]);
    return memory.digest();
}

// Returns two numbers for the weights of each of several models, which are joined: whether they have the form of the
// model, and a digest of their values, or 0. forms: the number of dimensions and the sizes of each weight of a model.
// Weights of another dtype than float32 or bfloat16, of several dtypes, on another device or with gaps have no form.
std::vector<int64_t> fingerprints(std::vector<Tensor> weights, std::vector<Tensor> forms) {
    std::vector<int64_t> found;
    auto weight = weights.begin();
    for (const Tensor& form : forms) {
        auto next = static_cast<const int64_t*>(values(form, ScalarType::Long, ANY)), end = next + form.numel();
        STD_TORCH_CHECK(next < end && weight < weights.end(), "native kernels: the weights do not fit their forms");
        Memory memory;
        auto type = weight->scalar_type();
        bool fits = type == ScalarType::Float || type == ScalarType::BFloat16;
        for (; next < end; ++weight) {
            STD_TORCH_CHECK(*next >= 0 && *next < end - next && weight < weights.end(),
                            "native kernels: the weights do not fit their forms");
            auto sizes = weight->sizes();
            fits = fits && weight->scalar_type() == type && weight->is_cpu() && weight->is_contiguous() &&
                   int64_t(sizes.size()) == *next && std::equal(sizes.begin(), sizes.end(), next + 1);
            next += 1 + *next;
            if (fits) memory.add(weight->data_ptr(), weight->numel() * (type == ScalarType::Float ? 4 : 2));
        }
        found.push_back(fits);
        found.push_back(fits ? memory.digest() : 0);
    }
    STD_TORCH_CHECK(weight == weights.end(), "native kernels: the weights do not fit their forms");
    return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(starflow_native, m) {
    m.def("fingerprint(Tensor places) -> int");
    m.def("fingerprints(Tensor[] weights, Tensor[] forms) -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(starflow_native, CPU, m) { m.impl("fingerprint", TORCH_BOX(&fingerprint)); }

STABLE_TORCH_LIBRARY_IMPL(starflow_native, CompositeExplicitAutograd, m) {
    m.impl("fingerprints", TORCH_BOX(&fingerprints));
}

}  // namespace starflow
