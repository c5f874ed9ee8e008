#include "row_math.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

// Chosen when the module is loaded; lanes are fixed, so every machine sums in the same order. The core is built with
// -O2, for which g++ 12 leaves most loops scalar.
#ifdef __SANITIZE_THREAD__
// The choice would be instrumented too, and run before the sanitizer can be called.
#define VECTORIZED
#else
#define VECTORIZED __attribute__((optimize("O3"), target_clones("avx512f", "avx2", "default")))
#endif

namespace enginery {
namespace {

constexpr int32_t kLanes = 16;
constexpr int32_t kBlock = 512;  // elements summed in float before they go to double

// exp for x <= 0, relative error below 2e-7: 2^n · exp(r) with |r| <= ln 2 / 2, exp(r) by its Taylor series of
// degree 7.
inline float exp_of_nonpositive(float x) {
    const float clamped = x < -87.0F ? -87.0F : x;
    const float n = (clamped * 1.44269504F + 12582912.0F) - 12582912.0F;  // rounds to an integer
    const float r = (clamped - n * 0.693359375F) - n * -2.12194440e-4F;
    float p = 1.9841270e-4F;
    p = p * r + 1.3888889e-3F;
    p = p * r + 8.3333333e-3F;
    p = p * r + 4.1666667e-2F;
    p = p * r + 1.6666667e-1F;
    p = p * r + 0.5F;
    p = p * r + 1.0F;
    p = p * r + 1.0F;
    const float power = std::bit_cast<float>((static_cast<int32_t>(n) + 127) << 23);
    return x < -87.0F ? 0.0F : p * power;
}

using Floats = float __attribute__((vector_size(kLanes * sizeof(float))));

// Raises `largest` to the largest of a block, and adds 0 to `zero` for each finite element, NaN for others.
VECTORIZED void scan_block(const float* row, int32_t size, float& largest, float& zero) {
    Floats largest_lanes = Floats{} + largest;
    Floats zero_lanes = {};
    int32_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
        Floats values;
        std::memcpy(&values, row + i, sizeof(values));
        largest_lanes = values > largest_lanes ? values : largest_lanes;
        zero_lanes += values * 0.0F;
    }
    for (; i < size; ++i) {
        largest = row[i] > largest ? row[i] : largest;
        zero += row[i] * 0.0F;
    }
    for (int32_t j = 0; j < kLanes; ++j) {
        largest = largest_lanes[j] > largest ? largest_lanes[j] : largest;
        zero += zero_lanes[j];
    }
}

VECTORIZED float exp_block(const float* row, int32_t size, float peak, float factor, float floor, float* weights) {
    for (int32_t i = 0; i < size; ++i) {
        const float x = (row[i] - peak) * factor;
        const float weight = exp_of_nonpositive(x);
        weights[i] = x < floor ? 0.0F : weight;
    }
    float lanes[kLanes] = {};
    int32_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
        for (int32_t j = 0; j < kLanes; ++j) lanes[j] += weights[i + j];
    }
    float sum = 0.0F;
    for (; i < size; ++i) sum += weights[i];
    for (const float lane : lanes) sum += lane;
    return sum;
}

}  // namespace

RowPeak find_peak(const float* row, int32_t size) {
    float largest = -INFINITY;
    float zero = 0.0F;
    int32_t start = 0;  // of the block that holds the first of the largest
    for (int32_t i = 0; i < size; i += kBlock) {
        const float before = largest;
        scan_block(row + i, std::min(kBlock, size - i), largest, zero);
        if (largest > before) start = i;
    }
    const int32_t end = std::min(size, start + kBlock);
    const auto token = static_cast<int32_t>(std::find(row + start, row + end, largest) - row);
    return {token == end ? 0 : token, largest, zero == 0.0F};
}

double exp_weights(float* row, int32_t size, float peak, float factor, float floor) {
    double sum = 0;
    for (int32_t i = 0; i < size; i += kBlock) {
        sum += static_cast<double>(exp_block(row + i, std::min(kBlock, size - i), peak, factor, floor, row + i));
    }
    return sum;
}

double exp_sum(const float* row, int32_t size, float peak) {
    float weights[kBlock];
    double sum = 0;
    for (int32_t i = 0; i < size; i += kBlock) {
        sum += static_cast<double>(exp_block(row + i, std::min(kBlock, size - i), peak, 1.0F, -INFINITY, weights));
    }
    return sum;
}

VECTORIZED int32_t num_before(const float* row, int32_t size, int32_t token) {
    const float logit = row[token];
    int32_t count = 0;
    for (int32_t i = 0; i < token; ++i) count += row[i] >= logit;
    for (int32_t i = token + 1; i < size; ++i) count += row[i] > logit;
    return count;
}

}  // namespace enginery
