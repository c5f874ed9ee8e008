// One step of the online softmax (Milakov and Gimelshein, 2018): scores of a tile of keys become weights, and the
// running maximum and sum of a row move on.
#pragma once

#include "plugins/simd.h"

namespace enginery::ENGINERY_ISA {

// Of one query row: what was summed so far is relative to e^maximum.
struct RowState {
    float maximum = -kInfinity;
    float sum = 0.0f;
};

// Keys at positions first .. last are seen.
struct Visible {
    int32_t first, last;
};

struct ScoreRule {
    float scale = 1.0f;
    float softcap = 0.0f;
};

ENGINERY_INLINE float exp_one(float x) { return first_lane(exp(set1(x))); }

// A row that has seen nothing has maximum -infinity: relative to 0 instead, its e^-infinity are 0 and not NaN.
ENGINERY_INLINE float reference_of(float maximum) { return maximum == -kInfinity ? 0.0f : maximum; }

// scores [count] of the keys from position `base` on, become weights; count is a multiple of 16. Returns the factor
// that makes the row's earlier sums relative to the new maximum. key_scales: [count] or null.
ENGINERY_INLINE float softmax_step(const ScoreRule& rule, Visible visible, int32_t base, int64_t count,
                                   const float* key_scales, float* scores, RowState& row) {
    VecF largest = set1(-kInfinity);
    const bool all_seen = visible.first <= base && base + count - 1 <= visible.last;
    for (int64_t i = 0; i < count; i += kLanes) {
        VecF s = load(scores + i) * set1(rule.scale);
        if (key_scales != nullptr) s = s * load(key_scales + i);
        if (rule.softcap > 0.0f) s = set1(rule.softcap) * tanh(s / set1(rule.softcap));
        if (!all_seen) {
            const VecI position = lane_index() + set1_i32(base + static_cast<int32_t>(i));
            const Mask seen =
                both(greater(position, set1_i32(visible.first - 1)), greater(set1_i32(visible.last + 1), position));
            s = select(seen, s, set1(-kInfinity));
        }
        largest = max(s, largest);
        store(scores + i, s);
    }
    const float tile_maximum = max_lanes(largest);
    const float maximum = tile_maximum > row.maximum ? tile_maximum : row.maximum;
    const float reference = reference_of(maximum);
    const float factor = exp_one(row.maximum - reference);
    VecF sum = zero();
    for (int64_t i = 0; i < count; i += kLanes) {
        const VecF weight = exp(load(scores + i) - set1(reference));
        sum = sum + weight;
        store(scores + i, weight);
    }
    row.maximum = maximum;
    row.sum = row.sum * factor + sum_lanes(sum);
    return factor;
}

// Adds to `total` what another split of the context gave: [value_dim] weighted sums of values, and their row state.
ENGINERY_INLINE void merge_split(RowState& total, float* total_values, const RowState& split, const float* split_values,
                                 int64_t value_dim) {
    const float maximum = split.maximum > total.maximum ? split.maximum : total.maximum;
    const float reference = reference_of(maximum);
    const float total_factor = exp_one(total.maximum - reference), split_factor = exp_one(split.maximum - reference);
    for (int64_t i = 0; i < value_dim; i += kLanes) {
        const VecF scaled = load(total_values + i) * set1(total_factor);
        store(total_values + i, fma(load(split_values + i), set1(split_factor), scaled));
    }
    total.sum = total.sum * total_factor + split.sum * split_factor;
    total.maximum = maximum;
}

}  // namespace enginery::ENGINERY_ISA
