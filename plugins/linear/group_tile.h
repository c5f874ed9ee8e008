// The inner product of `linear` with weights of four bits in groups: R activation rows times P panels. Codes are
// multiplied as they are, 0 .. 15, into 32-bit sums of one group; what they are too large by, and the group's scale,
// follow once a group, into float sums.
//
// A step is 64 bytes of a panel: of 16 rows four bytes each, whose low halves are columns k .. k + 3 and whose high
// halves are k + 4 .. k + 7. As in plugins/tile.h, a sum is one chain over groups, whatever R and P are.
#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "plugins/tile.h"

namespace enginery::ENGINERY_ISA {

inline constexpr int64_t kCodeColumns = 8;  // of a step
inline constexpr int64_t kSumColumns = 32;  // that one element of the activations' sums is for
inline constexpr int64_t kSumSteps = kSumColumns / kCodeColumns;
// Each tile of sums has two of registers: of the group and of all. GCC 12 spills some of 12.
inline constexpr int kGroupTiles = kLanes == 16 ? 10 : 2;

struct GroupArguments {
    const std::byte* activations;  // int8, of the first row
    int64_t activation_stride;     // bytes between rows
    const int32_t* sums;           // of the first row: -8 times the sum of each 32 activations
    int64_t sums_stride;           // elements between rows
    const std::byte* codes[kMostPanels];
    const uint16_t* scales[kMostPanels];  // f16 [groups][16]
    const uint8_t* zeros[kMostPanels];    // [groups][16]; null: all 8
    int64_t group_steps;                  // of all groups but the last, which may be shorter
    int64_t steps;
    float* out;  // [R][out_stride]; panel p at columns 16 p
    int64_t out_stride;
    bool add;  // to what is there
    const std::byte* ahead[kMostPanels];
    int num_ahead = 0;
};

ENGINERY_INLINE VecI low_codes(VecI bytes) {
#ifdef __AVX512F__
    return {_mm512_and_si512(bytes.v, _mm512_set1_epi8(15))};
#else
    return {_mm256_and_si256(bytes.v, _mm256_set1_epi8(15))};
#endif
}
ENGINERY_INLINE VecI high_codes(VecI bytes) {
#ifdef __AVX512F__
    return low_codes({_mm512_srli_epi16(bytes.v, 4)});
#else
    return low_codes({_mm256_srli_epi16(bytes.v, 4)});
#endif
}
ENGINERY_INLINE VecF load_u8(const uint8_t* p) {
#ifdef __AVX512F__
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)))};
#else
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)))};
#endif
}

// Products of codes and activations in each lane of 32 bits, added up over 32 columns. Without VNNI they are added in
// 16 bits, which hold 8 pairs of 15 * 127 each.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
ENGINERY_INLINE VecI begin_codes(VecI sum) { return sum; }
ENGINERY_INLINE VecI add_codes(VecI partial, VecI codes, VecI x) { return add_products(partial, codes, x); }
ENGINERY_INLINE VecI end_codes(VecI, VecI partial) { return partial; }
#else
ENGINERY_INLINE VecI begin_codes(VecI) { return set1_i32(0); }
#ifdef __AVX512F__
ENGINERY_INLINE VecI add_codes(VecI partial, VecI codes, VecI x) {
    return {_mm512_add_epi16(partial.v, _mm512_maddubs_epi16(codes.v, x.v))};
}
ENGINERY_INLINE VecI end_codes(VecI sum, VecI partial) {
    return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(partial.v, _mm512_set1_epi16(1)))};
}
#else
ENGINERY_INLINE VecI add_codes(VecI partial, VecI codes, VecI x) {
    return {_mm256_add_epi16(partial.v, _mm256_maddubs_epi16(codes.v, x.v))};
}
ENGINERY_INLINE VecI end_codes(VecI sum, VecI partial) {
    return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(partial.v, _mm256_set1_epi16(1)))};
}
#endif
#endif

// What the activations' sums say of columns first_step .. end_step - 1.
ENGINERY_INLINE VecI sum_of_steps(const int32_t* sums, int64_t first_step, int64_t end_step) {
    VecI sum = set1_i32(sums[first_step / kSumSteps]);
    for (int64_t s = first_step + kSumSteps; s < end_step; s += kSumSteps) sum = sum + set1_i32(sums[s / kSumSteps]);
    return sum;
}

template <bool zero_points, int R, int P>
static void multiply_groups(const GroupArguments& t) {
    constexpr int kVecs = P * kPanelVecs;
    VecF sums[R][kVecs];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
        for (int v = 0; v < kVecs; ++v) sums[r][v] = zero();
    }
    const std::byte* a = t.activations;
    int64_t step = 0;
    for (int64_t group = 0; step < t.steps; ++group) {
        const int64_t first = step, end = std::min(step + t.group_steps, t.steps);
        VecI dots[R][kVecs];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const VecI shift = sum_of_steps(t.sums + r * t.sums_stride, first, end);
#pragma GCC unroll 16
            for (int v = 0; v < kVecs; ++v) dots[r][v] = shift;
        }
        while (step < end) {
            VecI partial[R][kVecs];
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
                for (int v = 0; v < kVecs; ++v) partial[r][v] = begin_codes(dots[r][v]);
            }
#pragma GCC unroll 1
            for (const int64_t stop = step + kSumSteps; step < stop; ++step, a += kCodeColumns) {
                for (int i = 0; i < t.num_ahead; ++i) prefetch(t.ahead[i] + step * kPanelStep);
                VecI codes[kVecs];
#pragma GCC unroll 16
                for (int v = 0; v < kVecs; ++v) {
                    const std::byte* panel = t.codes[v / kPanelVecs] + step * kPanelStep;
                    codes[v] = load(reinterpret_cast<const int32_t*>(panel + v % kPanelVecs * kVecStep));
                }
#pragma GCC unroll 16
                for (int r = 0; r < R; ++r) {
                    const VecI x = broadcast_bytes(a + r * t.activation_stride);
#pragma GCC unroll 16
                    for (int v = 0; v < kVecs; ++v) partial[r][v] = add_codes(partial[r][v], low_codes(codes[v]), x);
                }
#pragma GCC unroll 16
                for (int r = 0; r < R; ++r) {
                    const VecI x = broadcast_bytes(a + r * t.activation_stride + kActivationStep);
#pragma GCC unroll 16
                    for (int v = 0; v < kVecs; ++v) partial[r][v] = add_codes(partial[r][v], high_codes(codes[v]), x);
                }
            }
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
                for (int v = 0; v < kVecs; ++v) dots[r][v] = end_codes(dots[r][v], partial[r][v]);
            }
        }
#pragma GCC unroll 16
        for (int v = 0; v < kVecs; ++v) {
            const int64_t place = group * kPanelLanes + v % kPanelVecs * kLanes;
            const VecF scale = load_f16(t.scales[v / kPanelVecs] + place);
            VecF shift = zero();
            // (8 - zero) times the activations' sum, of which -8 times is at hand.
            if (zero_points) shift = fma(load_u8(t.zeros[v / kPanelVecs] + place), set1(0.125f), set1(-1.0f));
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                VecF dot = to_float(dots[r][v]);
                if (zero_points) dot = fma(shift, to_float(sum_of_steps(t.sums + r * t.sums_stride, first, end)), dot);
                sums[r][v] = fma(dot, scale, sums[r][v]);
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
        for (int v = 0; v < kVecs; ++v) {
            float* to = t.out + r * t.out_stride + v * kLanes;
            store(to, t.add ? load(to) + sums[r][v] : sums[r][v]);
        }
    }
}

// The most rows that a tile of P panels can have.
constexpr int most_group_rows(int panels) { return std::max(1, kGroupTiles / panels); }

using GroupFunction = void (*)(const GroupArguments&);

template <bool zero_points, int P, int... R>
constexpr std::array<GroupFunction, kGroupTiles + 1> group_tiles_of(std::integer_sequence<int, R...>) {
    return {nullptr, multiply_groups<zero_points, R + 1, P>...};
}

// multiply_groups for 1 .. most_group_rows(P) rows of P panels.
template <bool zero_points>
inline constexpr std::array<std::array<GroupFunction, kGroupTiles + 1>, kMostPanels + 1> kGroupFunctions = {
    std::array<GroupFunction, kGroupTiles + 1>{},
    group_tiles_of<zero_points, 1>(std::make_integer_sequence<int, most_group_rows(1)>()),
    group_tiles_of<zero_points, 2>(std::make_integer_sequence<int, most_group_rows(2)>()),
    group_tiles_of<zero_points, 3>(std::make_integer_sequence<int, most_group_rows(3)>()),
    group_tiles_of<zero_points, 4>(std::make_integer_sequence<int, most_group_rows(4)>()),
};

}  // namespace enginery::ENGINERY_ISA
