// Reads a spec from the flat list of numbers that Python passes.
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <vector>

#include "spec.h"

namespace starflow {

constexpr size_t SPEC_FIELDS = 24;

// Reads `fields` in the order of Spec's members, see block/packing.py. Throws std::invalid_argument if a kernel could
// not run such a block.
inline Spec read_spec(const std::vector<int64_t>& fields, double clip) {
    if (fields.size() != SPEC_FIELDS) throw std::invalid_argument("block spec: expected 24 fields");
    constexpr int64_t MOST = std::numeric_limits<int>::max();
    auto field = fields.begin();
    auto number = [&](int64_t least, int64_t most) {
        int64_t value = *field++;
        if (value < least || value > most) throw std::invalid_argument("block spec: a field is out of range");
        return int(value);
    };
    Spec spec;
    for (int* size :
         {&spec.token_dim, &spec.channels, &spec.layers, &spec.heads, &spec.head_dim, &spec.kv_heads, &spec.mlp_dim})
        *size = number(1, MOST);
    for (int* size : {&spec.positions, &spec.text_dim, &spec.transition_dim}) *size = number(0, MOST);
    for (bool* flag : {&spec.start, &spec.flip, &spec.bias, &spec.qk_norm, &spec.qk_layer_norm, &spec.post_norm,
                       &spec.final_norm, &spec.adaptive, &spec.bf16, &spec.rounded})
        *flag = number(0, 1);
    spec.mlp = Mlp(number(0, int(Mlp::swiglu)));
    spec.norm = Norm(number(0, int(Norm::none)));
    spec.rotary = Rotary(number(0, int(Rotary::half)));
    spec.affine = {Scale(number(0, int(Scale::unit))), float(clip)};
    if (spec.heads % spec.kv_heads) throw std::invalid_argument("block spec: key heads do not divide the heads");
    return spec;
}

}  // namespace starflow
