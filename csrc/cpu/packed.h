// Reads weights that block/native.py has packed.
#pragma once

#include <stdexcept>
#include <vector>

#include "workspace.h"

namespace starflow {

// Returns one weight after the other. offsets: place of each among the `floats` floats of `packed`.
class PackedWeights {
public:
    PackedWeights(const float* packed, int64_t floats, const std::vector<int64_t>& offsets, bool bf16)
        : packed_(packed), floats_(floats), offset_(offsets.begin()), end_(offsets.end()), bf16_(bf16) {}

    const float* next(int64_t width, int64_t rows = 1) {
        if (offset_ == end_) throw std::invalid_argument("packed weights: too few for the block spec");
        int64_t begin = *offset_++;
        if (begin < 0 || begin + rows * padded(width) > floats_)
            throw std::invalid_argument("packed weights: too small for the block spec");
        return packed_ + begin;
    }

    Linear linear(int out, int in) {
        const float* weight = next(out, bf16_ ? (in + 1) / 2 : in);
        return {weight, next(out), in, out};
    }

    void finish() const {
        if (offset_ != end_) throw std::invalid_argument("packed weights: too many for the block spec");
    }

private:
    const float* packed_;
    int64_t floats_;
    std::vector<int64_t>::const_iterator offset_, end_;
    bool bf16_;
};

}  // namespace starflow
