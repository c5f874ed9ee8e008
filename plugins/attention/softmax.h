// The online softmax (Milakov and Gimelshein, 2018) by tiles of keys: scores become weights, and the running maximum
// and sum of a row move on. Scores are logarithms to the base of 2 here: 2^x is cheaper than e^x.
#pragma once

#include "plugins/simd.h"

namespace enginery::ENGINERY_ISA {

inline constexpr int64_t kKeyTile = 64;
inline constexpr int kTileVecs = kKeyTile / kLanes;

// Of one query row: what was summed so far is relative to 2^maximum.
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

    static constexpr float kLog2E = 1.44269504088896341f;

    // By what a product of query and key is multiplied before rate_keys.
    float factor() const { return softcap > 0.0f ? scale : scale * kLog2E; }
};

ENGINERY_INLINE float exp2_one(float x) { return first_lane(exp2(set1(x))); }

// A row that has seen nothing has maximum -infinity: relative to 0 instead, its 2^-infinity are 0 and not NaN.
ENGINERY_INLINE float reference_of(float maximum) { return maximum == -kInfinity ? 0.0f : maximum; }

// v: scores of the keys at positions base ... base + kKeyTile - 1, times rule.factor(); they become logarithms of
// weights, -infinity where a key is not seen; such a key's score may be anything. Returns the greatest.
ENGINERY_INLINE float rate_keys(const ScoreRule& rule, Visible visible, int32_t base, VecF (&v)[kTileVecs]) {
    VecF largest = set1(-kInfinity);
    const bool all_seen = visible.first <= base && base + kKeyTile - 1 <= visible.last;
    for (int i = 0; i < kTileVecs; ++i) {
        if (rule.softcap > 0.0f) v[i] = set1(rule.softcap * ScoreRule::kLog2E) * tanh(v[i] / set1(rule.softcap));
        if (!all_seen) {
            const VecI position = lane_index() + set1_i32(base + i * kLanes);
            const Mask seen =
                both(greater(position, set1_i32(visible.first - 1)), greater(set1_i32(visible.last + 1), position));
            v[i] = select(seen, v[i], set1(-kInfinity));
        }
        largest = max(v[i], largest);
    }
    return max_lanes(largest);
}

// Makes a row's sum relative to a maximum that includes a tile's. Returns the factor for its other earlier sums.
ENGINERY_INLINE float raise_maximum(RowState& row, float tile_maximum) {
    const float maximum = tile_maximum > row.maximum ? tile_maximum : row.maximum;
    const float factor = exp2_one(row.maximum - reference_of(maximum));
    row.maximum = maximum;
    row.sum *= factor;
    return factor;
}

// v: logarithms of weights; they become weights relative to the row's maximum, and the row's sum counts them.
ENGINERY_INLINE void weigh_keys(RowState& row, VecF (&v)[kTileVecs]) {
    const VecF reference = set1(reference_of(row.maximum));
    VecF sum = zero();
    for (VecF& x : v) {
        x = exp2(x - reference);
        sum = sum + x;
    }
    row.sum += sum_lanes(sum);
}

// Adds to `total` what another split of the context gave: [value_dim] weighted sums of values, and their row state.
ENGINERY_INLINE void merge_split(RowState& total, float* total_values, const RowState& split, const float* split_values,
                                 int64_t value_dim) {
    const float maximum = split.maximum > total.maximum ? split.maximum : total.maximum;
    const float reference = reference_of(maximum);
    const float total_factor = exp2_one(total.maximum - reference), split_factor = exp2_one(split.maximum - reference);
    for (int64_t i = 0; i < value_dim; i += kLanes) {
        const VecF scaled = load(total_values + i) * set1(total_factor);
        store(total_values + i, fma(load(split_values + i), set1(split_factor), scaled));
    }
    total.sum = total.sum * total_factor + split.sum * split_factor;
    total.maximum = maximum;
}

}  // namespace enginery::ENGINERY_ISA
