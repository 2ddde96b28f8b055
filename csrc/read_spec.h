// Reads a spec from the flat list of numbers that Python passes.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "spec.h"

namespace starflow {

// Reads `fields` in the order of Spec's members, see block/packing.py. Throws std::invalid_argument on a wrong length.
inline Spec read_spec(const std::vector<int64_t>& fields, double clip) {
    if (fields.size() != 20) throw std::invalid_argument("block spec: expected 20 fields");
    auto field = fields.begin();
    auto number = [&] { return int(*field++); };
    Spec spec;
    for (int* size : {&spec.token_dim, &spec.channels, &spec.layers, &spec.heads, &spec.head_dim, &spec.kv_heads,
                      &spec.mlp_dim, &spec.positions, &spec.text_dim})
        *size = number();
    for (bool* flag :
         {&spec.start, &spec.flip, &spec.bias, &spec.qk_norm, &spec.post_norm, &spec.final_norm, &spec.bf16})
        *flag = number();
    spec.mlp = Mlp(number());
    spec.norm = Norm(number());
    spec.rotary = Rotary(number());
    spec.affine = {Scale(number()), float(clip)};
    return spec;
}

}  // namespace starflow
