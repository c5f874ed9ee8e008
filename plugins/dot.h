// Products of activations and panels, one struct per pair of types. A step multiplies 4 bytes of each activation row
// (1 float, 2 bfloat16, 2 int16 or 4 int8) by the kStep bytes that 16 weight rows (or keys) hold for them, and adds to
// 16 sums.
#pragma once

#include "plugins/simd.h"

namespace enginery::ENGINERY_ISA {

inline constexpr int64_t kActivationStep = 4;                 // bytes of an activation row
inline constexpr int64_t kPanelStep = 64;                     // bytes of a panel of weights
inline constexpr int64_t kVecStep = kPanelStep / kPanelVecs;  // bytes of one vector of it
inline constexpr int kRegisterTiles = kLanes == 16 ? 24 : 6;  // panels of sums that fit the registers

// A step of an activation row in every lane.
ENGINERY_INLINE VecI broadcast_bytes(const std::byte* a) {
    int32_t step;
    std::memcpy(&step, a, sizeof(step));
    return set1_i32(step);
}

struct DotF32 {
    using Sum = VecF;
    using Element = float;
    using Activation = VecF;
    using Weight = VecF;
    static constexpr int kTiles = kRegisterTiles;
    static constexpr int64_t kStep = kPanelStep;

    ENGINERY_INLINE Sum zero_sum() { return zero(); }
    ENGINERY_INLINE Activation broadcast(const std::byte* a) { return set1(*reinterpret_cast<const float*>(a)); }
    ENGINERY_INLINE Weight load_weight(const std::byte* b) { return load(reinterpret_cast<const float*>(b)); }
    ENGINERY_INLINE Sum dot(Sum sum, Activation a, Weight b) { return fma(a, b, sum); }
};

#ifdef __AVX512BF16__

struct DotBf16 {
    using Sum = VecF;
    using Element = float;
    using Activation = VecI;
    using Weight = VecI;
    static constexpr int kTiles = kRegisterTiles;
    static constexpr int64_t kStep = kPanelStep;

    ENGINERY_INLINE Sum zero_sum() { return zero(); }
    ENGINERY_INLINE Activation broadcast(const std::byte* a) { return broadcast_bytes(a); }
    ENGINERY_INLINE Weight load_weight(const std::byte* b) { return load(reinterpret_cast<const int32_t*>(b)); }
    ENGINERY_INLINE Sum dot(Sum sum, Activation a, Weight b) {
        return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)};
    }
};

#else

// The even element of a pair is the low half of 32 bits: shifted up it is its own float; the odd one is the high half.
struct DotBf16 {
    struct Pair {
        VecF even, odd;
    };
    using Sum = VecF;
    using Element = float;
    using Activation = Pair;
    using Weight = Pair;
    static constexpr int kTiles = kLanes == 16 ? kRegisterTiles : 4;
    static constexpr int64_t kStep = kPanelStep;

    ENGINERY_INLINE Sum zero_sum() { return zero(); }
    ENGINERY_INLINE Activation broadcast(const std::byte* a) {
        uint32_t pair;
        std::memcpy(&pair, a, sizeof(pair));
        const uint32_t even = pair << 16, odd = pair & 0xffff0000u;
        return {as_float(set1_i32(static_cast<int32_t>(even))), as_float(set1_i32(static_cast<int32_t>(odd)))};
    }
    ENGINERY_INLINE Weight load_weight(const std::byte* b) {
        const VecI pairs = load(reinterpret_cast<const int32_t*>(b));
        const VecI high = set1_i32(static_cast<int32_t>(0xffff0000u));
#ifdef __AVX512F__
        return {as_float({_mm512_slli_epi32(pairs.v, 16)}), as_float({_mm512_and_si512(pairs.v, high.v)})};
#else
        return {as_float({_mm256_slli_epi32(pairs.v, 16)}), as_float({_mm256_and_si256(pairs.v, high.v)})};
#endif
    }
    ENGINERY_INLINE Sum dot(Sum sum, Activation a, Weight b) { return fma(a.odd, b.odd, fma(a.even, b.even, sum)); }
};

#endif

// Pairs of int16 by pairs of int8 that become int16: exact while the sum fits 32 bits.
struct DotS16 {
    using Sum = VecI;
    using Element = int32_t;
    using Activation = VecI;
    using Weight = VecI;
    static constexpr int kTiles = kLanes == 16 ? kRegisterTiles : 4;
    static constexpr int64_t kStep = kPanelStep / 2;

    ENGINERY_INLINE Sum zero_sum() { return set1_i32(0); }
    ENGINERY_INLINE Activation broadcast(const std::byte* a) { return broadcast_bytes(a); }
    ENGINERY_INLINE Weight load_weight(const std::byte* b) {
#ifdef __AVX512F__
        return {_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)b))};
#else
        return {_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)b))};
#endif
    }
    ENGINERY_INLINE Sum dot(Sum sum, Activation a, Weight b) {
#if defined(__AVX512VNNI__)
        return {_mm512_dpwssd_epi32(sum.v, a.v, b.v)};
#elif defined(__AVX512F__)
        return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(a.v, b.v))};
#elif defined(__AVXVNNI__)
        return {_mm256_dpwssd_avx_epi32(sum.v, a.v, b.v)};
#else
        return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(a.v, b.v))};
#endif
    }
};

// sum + the products of unsigned u and signed s in each lane of 32 bits. Without VNNI, u * s of two neighbours must fit
// 16 bits: true of |w| * +-x with both within 127.
ENGINERY_INLINE VecI add_products(VecI sum, VecI u, VecI s) {
#if defined(__AVX512VNNI__)
    return {_mm512_dpbusd_epi32(sum.v, u.v, s.v)};
#elif defined(__AVX512F__)
    const __m512i pairs = _mm512_maddubs_epi16(u.v, s.v);
    return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
#elif defined(__AVXVNNI__)
    return {_mm256_dpbusd_avx_epi32(sum.v, u.v, s.v)};
#else
    const __m256i pairs = _mm256_maddubs_epi16(u.v, s.v);
    return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
#endif
}

// Signed by signed: |w| times x with w's sign. Weights are within -127 .. 127.
struct DotS8 {
#ifdef __AVX512F__
    struct Weight {
        __m512i magnitude;
        __mmask64 negative;
    };
#else
    struct Weight {
        __m256i magnitude, sign;
    };
#endif
    using Sum = VecI;
    using Element = int32_t;
    using Activation = VecI;
    static constexpr int kTiles = kLanes == 16 ? 16 : 4;
    static constexpr int64_t kStep = kPanelStep;

    ENGINERY_INLINE Sum zero_sum() { return set1_i32(0); }
    ENGINERY_INLINE Activation broadcast(const std::byte* a) { return broadcast_bytes(a); }
#ifdef __AVX512F__
    ENGINERY_INLINE Weight load_weight(const std::byte* b) {
        const __m512i w = _mm512_loadu_si512(b);
        return {_mm512_abs_epi8(w), _mm512_movepi8_mask(w)};
    }
    ENGINERY_INLINE Sum dot(Sum sum, Activation a, Weight b) {
        const __m512i x = _mm512_mask_sub_epi8(a.v, b.negative, _mm512_setzero_si512(), a.v);
        return add_products(sum, {b.magnitude}, {x});
    }
#else
    ENGINERY_INLINE Weight load_weight(const std::byte* b) {
        const __m256i w = _mm256_loadu_si256((const __m256i*)b);
        return {_mm256_abs_epi8(w), w};
    }
    ENGINERY_INLINE Sum dot(Sum sum, Activation a, Weight b) {
        return add_products(sum, {b.magnitude}, {_mm256_sign_epi8(a.v, b.sign)});
    }
#endif
};

// Unsigned activations, x + 128, by signed weights: the sum is too large by 128 * the weights' sum, which the epilogue
// takes off. Where there is no VNNI such a product may not fit 16 bits, so x is made signed again.
struct DotU8 : DotS8 {
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
    using Weight = VecI;
    static constexpr int kTiles = kRegisterTiles;
    static constexpr bool kBiased = true;
    ENGINERY_INLINE Weight load_weight(const std::byte* b) { return load(reinterpret_cast<const int32_t*>(b)); }
    ENGINERY_INLINE Sum dot(Sum sum, Activation a, Weight b) { return add_products(sum, a, b); }
#else
    static constexpr bool kBiased = false;
    ENGINERY_INLINE Activation broadcast(const std::byte* a) {
        int32_t quad;
        std::memcpy(&quad, a, sizeof(quad));
        return set1_i32(quad ^ static_cast<int32_t>(0x80808080u));
    }
#endif
};

}  // namespace enginery::ENGINERY_ISA
