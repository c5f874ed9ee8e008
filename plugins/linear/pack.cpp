// Each panel of 16 rows is read twice: from memory for the largest magnitude of each row, then from the cache to be
// encoded. All packed layouts are the same transposition, of 8 rows by 8 groups of four bytes: 1, 2 or 4 columns.
#include "plugins/linear/pack.h"

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include "plugins/linear/pack_codes.h"
#include "plugins/linear/pack_source.h"

namespace enginery {

namespace {

constexpr int64_t kBlockColumns = 32;

// The least bits of a magnitude that is not finite in the layout: bf16 rounds the last f32 values to infinity.
uint32_t finite_limit(PackLayout layout) {
    const bool rounds = layout == PackLayout::kRowsBf16 || layout == PackLayout::kBf16K2N16;
    return rounds ? 0x7f7f8000u : 0x7f800000u;
}

// To the nearest bf16, ties to even, in the low half of each lane.
__m256i round_bf16(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
}

// Encoders make 32 bytes of consecutive columns of a row.

struct ToF32 {
    static constexpr int kVectors = 1;
    static __m256i encode(const __m256* x, float) { return _mm256_castps_si256(x[0]); }
};

struct ToBf16 {
    static constexpr int kVectors = 2;
    static __m256i encode(const __m256* x, float) {
        return _mm256_permute4x64_epi64(_mm256_packus_epi32(round_bf16(x[0]), round_bf16(x[1])), 0xd8);
    }
};

struct ToInt8 {
    static constexpr int kVectors = 4;
    // By division: a product with the reciprocal would round otherwise.
    static __m256i encode(const __m256* x, float divisor) {
        __m256i q[4];
        for (int i = 0; i < 4; ++i) q[i] = _mm256_cvtps_epi32(_mm256_div_ps(x[i], _mm256_set1_ps(divisor)));
        const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
        const __m256i ordered = _mm256_permutevar8x32_epi32(bytes, _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0));
        return _mm256_max_epi8(ordered, _mm256_set1_epi8(-127));
    }
};

void transpose(__m256i rows[8]) {
    __m256i pairs[8], quads[8];
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        quads[i] = _mm256_unpacklo_epi64(pairs[i], pairs[i + 2]);
        quads[i + 1] = _mm256_unpackhi_epi64(pairs[i], pairs[i + 2]);
        quads[i + 2] = _mm256_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        quads[i + 3] = _mm256_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        rows[i] = _mm256_permute2x128_si256(quads[i], quads[i + 4], 0x20);
        rows[i + 4] = _mm256_permute2x128_si256(quads[i], quads[i + 4], 0x31);
    }
}

// Of each lane, the sum of its four int8 values.
__m256i sum_bytes(__m256i x) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), x), _mm256_set1_epi16(1));
}

struct Panel {
    int64_t first_row;
    int64_t rows;  // 1 ... 16
    std::byte* out;
    float divisors[kPanelRows];
    __m256i sums[2];  // int8: of rows 0 ... 7 and 8 ... 15
};

// Columns [column, column + 32) of rows [8 half, 8 half + 8) of the panel. Complete: all of them exist.
template <class Source, class Encoder, bool complete>
void pack_block(const PackJob& job, Panel& panel, int64_t column, int half) {
    constexpr int64_t kColumns = Encoder::kVectors * kLanes;
    constexpr int64_t kStepColumns = Encoder::kVectors;  // columns in four bytes
    for (int64_t first = column; first < column + kBlockColumns; first += kColumns) {
        __m256i steps[8];
        for (int r = 0; r < 8; ++r) {
            const int64_t row_in_panel = half * 8 + r;
            if (!complete && row_in_panel >= panel.rows) {
                steps[r] = _mm256_setzero_si256();
                continue;
            }
            const Row<Source> row(job, panel.first_row + row_in_panel);
            __m256 x[Encoder::kVectors];
            for (int v = 0; v < Encoder::kVectors; ++v) {
                x[v] = complete ? row.load(first + v * kLanes) : row.load_part(first + v * kLanes);
            }
            steps[r] = Encoder::encode(x, panel.divisors[row_in_panel]);
        }
        transpose(steps);
        std::byte* out = panel.out + first / kStepColumns * 64 + half * 32;
        for (int step = 0; step < 8; ++step, out += 64) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), steps[step]);
            if constexpr (Encoder::kVectors == 4) {
                panel.sums[half] = _mm256_add_epi32(panel.sums[half], sum_bytes(steps[step]));
            }
        }
    }
}

template <class Source, class Encoder>
void pack_panel(const PackJob& job, Panel& panel) {
    const int64_t padded = (job.columns + 63) / 64 * 64;
    const int64_t whole = panel.rows == kPanelRows ? job.columns / kBlockColumns * kBlockColumns : 0;
    for (int64_t column = 0; column < whole; column += kBlockColumns) {
        for (int half : {0, 1}) pack_block<Source, Encoder, true>(job, panel, column, half);
    }
    for (int64_t column = whole; column < padded; column += kBlockColumns) {
        for (int half : {0, 1}) pack_block<Source, Encoder, false>(job, panel, column, half);
    }
}

// To the nearest e4m3, ties to even, in the low byte of each lane; |x| is at most 448 and what rounds to it.
__m256i round_e4m3(__m256 x) {
    const __m256i bits = magnitude(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 20), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7ffff)));
    const __m256i normal = _mm256_sub_epi32(_mm256_srli_epi32(rounded, 20), _mm256_set1_epi32((127 - 7) << 3));
    // Below 2^-6 the code counts units of 2^-9, the last place of a float of this size.
    const __m256 unit = _mm256_set1_ps(16384.0f);
    const __m256i subnormal = _mm256_sub_epi32(_mm256_castps_si256(_mm256_add_ps(_mm256_castsi256_ps(bits), unit)),
                                               _mm256_castps_si256(unit));
    const __m256i is_subnormal = _mm256_cmpgt_epi32(_mm256_set1_epi32(0x3c800000), bits);
    const __m256i sign =
        _mm256_srli_epi32(_mm256_andnot_si256(_mm256_set1_epi32(0x7fffffff), _mm256_castps_si256(x)), 24);
    return _mm256_or_si256(_mm256_blendv_epi8(normal, subnormal, is_subnormal), sign);
}

__m256i round_int8(__m256 x) { return _mm256_max_epi32(_mm256_cvtps_epi32(x), _mm256_set1_epi32(-127)); }

// The low half of each lane, and the low byte.
__m128i low_words(__m256i x) {
    const __m256i low = _mm256_and_si256(x, _mm256_set1_epi32(0xffff));
    return _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
}

__m128i low_bytes(__m256i x) {
    return _mm_packus_epi16(low_words(_mm256_and_si256(x, _mm256_set1_epi32(0xff))), _mm_setzero_si128());
}

// A row as it is, of job.columns values and so many zeros that it fills row_bytes.
template <class Source>
void convert_row(const PackJob& job, const Row<Source>& row, float divisor, std::byte* out, int64_t row_bytes) {
    const __m256 divisors = _mm256_set1_ps(divisor);
    const int64_t element_bytes = job.layout == PackLayout::kRowsF32 ? 4 : has_scale(job.layout) ? 1 : 2;
    for (int64_t column = 0; column * element_bytes < row_bytes; column += kLanes) {
        const auto count = static_cast<size_t>(std::min<int64_t>(row_bytes / element_bytes - column, kLanes));
        const __m256 x = row.load_part(column);
        if (job.layout == PackLayout::kRowsF32) {
            std::memcpy(out + column * 4, &x, count * 4);
        } else if (element_bytes == 2) {
            const __m128i words = low_words(round_bf16(x));
            std::memcpy(out + column * 2, &words, count * 2);
        } else {
            const __m256 quotient = _mm256_div_ps(x, divisors);
            const bool is_fp8 = job.layout == PackLayout::kFp8P128;
            const __m128i bytes = low_bytes(is_fp8 ? round_e4m3(quotient) : round_int8(quotient));
            std::memcpy(out + column, &bytes, count);
        }
    }
}

// Packs panel `index` and returns what pack_rows does, for it alone.
template <class Source>
int64_t run_panel(const PackJob& job, int64_t index) {
    Panel panel{};
    panel.first_row = index * kPanelRows;
    panel.rows = std::min(kPanelRows, job.rows - panel.first_row);
    panel.out = job.out + index * job.stride * panel_bytes(job.layout, job.columns);
    const float largest_code = job.layout == PackLayout::kFp8P128 ? 448.0f : 127.0f;
    float scales[kPanelRows] = {};
    for (int64_t r = 0; r < panel.rows; ++r) {
        const Row<Source> row(job, panel.first_row + r);
        const uint32_t largest = largest_magnitude(row, job.columns);
        if (largest >= finite_limit(job.layout)) {
            return (panel.first_row + r) * job.columns + first_at_least(row, finite_limit(job.layout));
        }
        scales[r] = std::bit_cast<float>(largest) / largest_code;
        // Divided by infinity, all values of a zero row become 0.
        panel.divisors[r] = scales[r] > 0.0f ? scales[r] : std::numeric_limits<float>::infinity();
    }
    switch (job.layout) {
        case PackLayout::kRowsF32:
        case PackLayout::kRowsBf16:
        case PackLayout::kBf16P128:
        case PackLayout::kFp8P128:
        case PackLayout::kInt8P128:
            for (int64_t r = 0; r < panel.rows; ++r) {
                const int64_t row_bytes = panel_bytes(job.layout, job.columns) / kPanelRows;
                convert_row(job, Row<Source>(job, panel.first_row + r), panel.divisors[r],
                            panel.out + r * job.stride * row_bytes, row_bytes);
                if (has_scale(job.layout)) job.scale[(panel.first_row + r) * job.stride] = scales[r];
            }
            break;
        case PackLayout::kF32K1N16:
            pack_panel<Source, ToF32>(job, panel);
            break;
        case PackLayout::kBf16K2N16:
            pack_panel<Source, ToBf16>(job, panel);
            break;
        case PackLayout::kInt8K4N16:
            pack_panel<Source, ToInt8>(job, panel);
            std::memcpy(job.scale + index * job.stride * kPanelRows, scales, sizeof(scales));
            std::memcpy(job.sums + index * job.stride * kPanelRows, panel.sums, sizeof(panel.sums));
            break;
        case PackLayout::kCodesK8N16: {
            const int64_t place = index * job.stride * kPanelRows * num_groups(job.columns, job.group);
            const auto groups = static_cast<size_t>(kPanelRows * num_groups(job.columns, job.group));
            std::memset(panel.out, 0, static_cast<size_t>(panel_bytes(job.layout, job.columns)));
            std::memset(job.half_scale + place, 0, groups * sizeof(uint16_t));
            if (job.zeros != nullptr) std::memset(job.zeros + place, 0, groups);
            for (int64_t r = 0; r < panel.rows; ++r) {
                pack_codes(job, Row<Source>(job, panel.first_row + r), r, panel.out, job.half_scale + place,
                           job.zeros == nullptr ? nullptr : job.zeros + place);
            }
            break;
        }
    }
    return -1;
}

int64_t run_panel(const PackJob& job, int64_t index) {
    switch (job.type) {
        case SourceType::kF32:
            return run_panel<FromF32>(job, index);
        case SourceType::kBf16:
            return run_panel<FromBf16>(job, index);
        case SourceType::kF16:
            return run_panel<FromF16>(job, index);
    }
    return -1;
}

}  // namespace

int64_t pack_rows(const PackJob& job) {
    const int64_t num_panels = (job.rows + kPanelRows - 1) / kPanelRows;
    constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
    std::atomic<int64_t> next_panel{0};
    std::atomic<int64_t> first_found{kNone};
    const auto work = [&] {
        for (int64_t index = next_panel++; index < num_panels; index = next_panel++) {
            const int64_t found = run_panel(job, index);
            if (found < 0) continue;
            int64_t known = first_found;
            while (found < known && !first_found.compare_exchange_weak(known, found)) {
            }
        }
    };
    {
        std::vector<std::jthread> others;
        for (int64_t i = 1; i < std::min<int64_t>(job.num_threads, num_panels); ++i) others.emplace_back(work);
        work();
    }
    return first_found == kNone ? -1 : first_found.load();
}

}  // namespace enginery
