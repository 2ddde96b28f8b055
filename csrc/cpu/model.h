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

// Runs every group of sequences on up to `threads` threads. workspace: `floats` floats per thread.
void run_groups(ParallelFor parallel_for, int threads, const BlockCall& call, float* workspace, int64_t floats);

}  // namespace starflow
