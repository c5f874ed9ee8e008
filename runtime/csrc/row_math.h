// Arithmetic over one row of logits, written so that the compiler vectorises it. Results depend on the row alone.
#pragma once

#include <cstdint>

namespace enginery {

struct RowPeak {
    int32_t token;  // the lowest id of the largest logit
    float logit;
    bool is_finite;  // whether every element is
};
RowPeak find_peak(const float* row, int32_t size);

// row[i] = exp(x) with x = (row[i] - peak) * factor, 0 where x < floor; returns their sum. No row[i] is above peak.
double exp_weights(float* row, int32_t size, float peak, float factor, float floor);

// The sum of exp(row[i] - peak).
double exp_sum(const float* row, int32_t size, float peak);

// How many elements come before `token` when sorted by logit, equals by id.
int32_t num_before(const float* row, int32_t size, int32_t token);

}  // namespace enginery
