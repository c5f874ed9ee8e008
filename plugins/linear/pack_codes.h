// Rows of four-bit codes in groups: plugins/linear/quantize_int4.py without moments, bit for bit.
#pragma once

#include <cmath>
#include <limits>

#include "plugins/linear/pack_source.h"

namespace enginery {

// The least and greatest of a group of columns [begin, end) of a row, and 0.
struct Bounds {
    float low, high;
};

template <class Source>
Bounds bounds_of(const Row<Source>& row, int64_t begin, int64_t end) {
    __m256 low = _mm256_setzero_ps(), high = _mm256_setzero_ps();
    for (int64_t column = begin; column < end; column += kLanes) {
        const __m256 x = row.load_part(column);
        low = _mm256_min_ps(low, x);
        high = _mm256_max_ps(high, x);
    }
    float lows[kLanes], highs[kLanes];
    _mm256_storeu_ps(lows, low);
    _mm256_storeu_ps(highs, high);
    return {*std::min_element(lows, lows + kLanes), *std::max_element(highs, highs + kLanes)};
}

// Whether the first element of the magnitude is positive; there is one.
template <class Source>
bool first_is_positive(const Row<Source>& row, int64_t begin, float magnitude) {
    for (int64_t column = begin;; column += kLanes) {
        float lanes[kLanes];
        _mm256_storeu_ps(lanes, row.load_part(column));
        for (const float x : lanes) {
            if (std::fabs(x) == magnitude) return x > 0.0f;
        }
    }
}

// To the nearest f16, with +0 for -0.
inline uint16_t to_half(float scale) {
    const float bounded = std::clamp(scale, -65504.0f, 65504.0f);
    const auto half = static_cast<uint16_t>(_cvtss_sh(bounded, _MM_FROUND_TO_NEAREST_INT));
    return half == 0x8000 ? uint16_t{0} : half;
}

// Eight codes of a row in four bytes: columns k ... k + 3 in the low halves, k + 4 ... k + 7 in the high ones.
inline int32_t encode_codes(__m256 x, __m256 divisor, __m256i zero) {
    const __m256 bounded =
        _mm256_max_ps(_mm256_set1_ps(-32), _mm256_min_ps(_mm256_set1_ps(32), _mm256_div_ps(x, divisor)));
    const __m256i steps = _mm256_add_epi32(_mm256_cvtps_epi32(bounded), zero);
    const __m256i codes = _mm256_max_epi32(_mm256_setzero_si256(), _mm256_min_epi32(_mm256_set1_epi32(15), steps));
    const __m128i bytes =
        _mm_or_si128(_mm256_castsi256_si128(codes), _mm_slli_epi32(_mm256_extracti128_si256(codes, 1), 4));
    const __m128i first = _mm_set_epi8(-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 12, 8, 4, 0);
    return _mm_cvtsi128_si32(_mm_shuffle_epi8(bytes, first));
}

// Row `r` of a panel of codes, rounded to nearest: plugins/linear/quantize_int4.py says to which scale and zero point.
template <class Source>
void pack_codes(const PackJob& job, const Row<Source>& row, int64_t r, std::byte* panel, uint16_t* scales,
                uint8_t* zeros) {
    for (int64_t group = 0; group * job.group < job.columns; ++group) {
        const int64_t begin = group * job.group, end = std::min(begin + job.group, job.columns);
        const Bounds bounds = bounds_of(row, begin, end);
        uint16_t half;
        int32_t zero = 8;
        if (zeros == nullptr) {
            const float largest = std::max(bounds.high, -bounds.low);
            const bool positive =
                bounds.high == -bounds.low ? first_is_positive(row, begin, largest) : bounds.high > -bounds.low;
            half = to_half((positive ? largest : -largest) / -8.0f);
        } else {
            half = to_half(bounds.high / 15.0f - bounds.low / 15.0f);
        }
        const float scale = _cvtsh_ss(half);
        const float divisor = half == 0 ? std::numeric_limits<float>::infinity() : scale;
        if (zeros != nullptr) {
            const float steps = std::nearbyint(bounds.low / -divisor);
            zero = static_cast<int32_t>(std::min(15.0f, steps));
            zeros[group * kPanelRows + r] = static_cast<uint8_t>(zero);
        }
        scales[group * kPanelRows + r] = half;
        for (int64_t column = begin; column < end; column += kLanes) {
            int32_t codes = encode_codes(row.load_part(column), _mm256_set1_ps(divisor), _mm256_set1_epi32(zero));
            // What lies beyond the row is 0, as padding is.
            for (int64_t i = job.columns - column; i < kLanes; ++i) {
                codes &= static_cast<int32_t>(~(15u << (i < 4 ? 8 * i : 8 * (i - 4) + 4)));
            }
            std::memcpy(panel + column / kLanes * 64 + r * 4, &codes, sizeof(codes));
        }
    }
}

}  // namespace enginery
