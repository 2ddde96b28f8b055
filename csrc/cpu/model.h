// Converts the flat arrays from Python to the kernels' structures, and distributes a call over threads.
#pragma once

#include <vector>

#include "../read_spec.h"
#include "kernels.h"

namespace starflow {

// A block and the layers that it points to. offsets: place of each weight among the `floats` floats of `packed`, ordered
// as in block/packing.py.
class Model {
public:
    Model(const Spec& spec, const float* packed, int64_t floats, const std::vector<int64_t>& offsets);
    Block block;

private:
    std::vector<Layer> layers_;
};

// The transposed matrices of a block, in the order of block/packing.py without those that act on the text.
class TransposedModel {
public:
    TransposedModel(const Spec& spec, const float* packed, int64_t floats, const std::vector<int64_t>& offsets);
    Transposed solve;

private:
    std::vector<Transposed::Layer> layers_;
};

// Returns the floats of a call's own part of the cache, per thread.
int64_t own_cache_floats(const BlockCall& call);

// Runs every group of sequences through `calls`, one after the other, on up to `threads` threads. The calls have the
// same B and group, and read one cache only if there is one of them. workspace: `floats` floats per thread. seconds:
// one per call, to which the time of the first group of threads is added; or null.
void run_groups(ParallelFor parallel_for, int threads, const std::vector<BlockCall>& calls, float* workspace,
                int64_t floats, double* seconds = nullptr);

}  // namespace starflow
