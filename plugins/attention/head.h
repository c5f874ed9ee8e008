// What happens to one head of a query or key before it meets the other: its norm and its rotation.
#pragma once

#include <cmath>

#include "plugins/simd.h"

namespace enginery::ENGINERY_ISA {

struct HeadTransform {
    int64_t head_dim = 0;
    int64_t half = 0;             // rot_dim / 2: elements i and half + i turn together
    const float* norm = nullptr;  // [head_dim], or null
    float eps = 0.0f;
};

// to [head_dim] = rotate(norm(from)). cos, sin: [half], of the token's position.
static inline void transform_head(const HeadTransform& t, const float* from, const float* cos, const float* sin,
                                  float* to) {
    VecF factor = set1(1.0f);
    if (t.norm != nullptr) {
        VecF squares = zero();
        for (int64_t i = 0; i < t.head_dim; i += kLanes) {
            const VecF x = load_part(from + i, lanes_left(t.head_dim, i));
            squares = fma(x, x, squares);
        }
        factor = set1(1.0f / std::sqrt(sum_lanes(squares) / static_cast<float>(t.head_dim) + t.eps));
    }
    for (int64_t i = 0; i < t.head_dim; i += kLanes) {
        const int count = lanes_left(t.head_dim, i);
        VecF x = load_part(from + i, count);
        if (t.norm != nullptr) x = x * factor * load_part(t.norm + i, count);
        store_part(to + i, x, count);
    }
    for (int64_t i = 0; i < t.half; i += kLanes) {
        const int count = lanes_left(t.half, i);
        const VecF c = load_part(cos + i, count), s = load_part(sin + i, count);
        const VecF x1 = load_part(to + i, count), x2 = load_part(to + t.half + i, count);
        store_part(to + i, fnma(x2, s, x1 * c), count);
        store_part(to + t.half + i, fma(x1, s, x2 * c), count);
    }
}

}  // namespace enginery::ENGINERY_ISA
