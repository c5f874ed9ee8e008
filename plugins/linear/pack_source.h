// The rows that the packer reads: stored in any type, widened to f32.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "plugins/linear/pack.h"

namespace enginery {

inline constexpr int kLanes = 8;

struct FromF32 {
    static constexpr int64_t kBytes = 4;
    static __m256 load(const std::byte* p) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }
};

struct FromBf16 {
    static constexpr int64_t kBytes = 2;
    static __m256 load(const std::byte* p) {
        const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
    }
};

struct FromF16 {
    static constexpr int64_t kBytes = 2;
    static __m256 load(const std::byte* p) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
};

// One row, widened to f32, with the constant added.
template <class Source>
class Row {
  public:
    Row(const PackJob& job, int64_t row)
        : data_(job.source + row * job.columns * Source::kBytes),
          columns_(job.columns),
          // x + -0.0 is x, also for -0.0; x + 0.0 is not.
          add_(_mm256_set1_ps(job.add == 0.0f ? -0.0f : job.add)) {}

    // Columns [column, column + 8), which exist.
    __m256 load(int64_t column) const { return _mm256_add_ps(Source::load(data_ + column * Source::kBytes), add_); }

    // Those of them that exist, then zeros.
    __m256 load_part(int64_t column) const {
        const int64_t count = std::min<int64_t>(columns_ - column, kLanes);
        if (count <= 0) return _mm256_setzero_ps();
        if (count == kLanes) return load(column);
        std::byte values[kLanes * Source::kBytes] = {};
        std::memcpy(values, data_ + column * Source::kBytes, static_cast<size_t>(count * Source::kBytes));
        const __m256i lanes = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
        const __m256i exists = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lanes);
        return _mm256_and_ps(_mm256_add_ps(Source::load(values), add_), _mm256_castsi256_ps(exists));
    }

  private:
    const std::byte* data_;
    int64_t columns_;
    __m256 add_;
};

inline __m256i magnitude(__m256 x) { return _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff)); }

// The bits of the largest magnitude, which compare as the magnitudes do, with infinity and then NaN above all others.
template <class Source>
uint32_t largest_magnitude(const Row<Source>& row, int64_t columns) {
    __m256i largest[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    int64_t column = 0;
    for (; column + 2 * kLanes <= columns; column += 2 * kLanes) {
        largest[0] = _mm256_max_epu32(largest[0], magnitude(row.load(column)));
        largest[1] = _mm256_max_epu32(largest[1], magnitude(row.load(column + kLanes)));
    }
    for (; column < columns; column += kLanes) {
        largest[0] = _mm256_max_epu32(largest[0], magnitude(row.load_part(column)));
    }
    uint32_t lanes[kLanes];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), _mm256_max_epu32(largest[0], largest[1]));
    return *std::max_element(lanes, lanes + kLanes);
}

// The first column whose magnitude has at least `limit` for bits; there is one.
template <class Source>
int64_t first_at_least(const Row<Source>& row, uint32_t limit) {
    for (int64_t column = 0;; column += kLanes) {
        uint32_t lanes[kLanes];
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), magnitude(row.load_part(column)));
        const uint32_t* found = std::find_if(lanes, lanes + kLanes, [&](uint32_t bits) { return bits >= limit; });
        if (found != lanes + kLanes) return column + (found - lanes);
    }
}

}  // namespace enginery
