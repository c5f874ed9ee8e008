// The vector type that kernels are written in: 16 floats where there is AVX-512, 8 where there is AVX2. All choices by
// instruction set are in this file and in dot.h. Everything is inlined into a namespace per ISA, so that the linker
// cannot merge what was compiled for one machine with what another runs.
#pragma once

// GCC 12 takes the deliberately undefined vectors of its own AVX-512 intrinsics for mistakes (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#define ENGINERY_INLINE static inline __attribute__((always_inline))

namespace enginery::ENGINERY_ISA {

#ifdef __AVX512F__

inline constexpr int kLanes = 16;

struct VecF {
    __m512 v;
};
struct VecI {
    __m512i v;
};
struct Mask {
    __mmask16 v;
};

ENGINERY_INLINE Mask first_lanes(int count) { return {static_cast<__mmask16>(_bzhi_u32(0xffff, count))}; }
ENGINERY_INLINE VecF set1(float x) { return {_mm512_set1_ps(x)}; }
ENGINERY_INLINE VecI set1_i32(int32_t x) { return {_mm512_set1_epi32(x)}; }
ENGINERY_INLINE VecI lane_index() { return {_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)}; }
ENGINERY_INLINE VecF load(const float* p) { return {_mm512_loadu_ps(p)}; }
ENGINERY_INLINE VecI load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
ENGINERY_INLINE VecF load(const float* p, Mask m) { return {_mm512_maskz_loadu_ps(m.v, p)}; }
ENGINERY_INLINE void store(float* p, VecF x) { _mm512_storeu_ps(p, x.v); }
ENGINERY_INLINE void store(int32_t* p, VecI x) { _mm512_storeu_si512(p, x.v); }
ENGINERY_INLINE void store(float* p, VecF x, Mask m) { _mm512_mask_storeu_ps(p, m.v, x.v); }
ENGINERY_INLINE VecF operator+(VecF a, VecF b) { return {_mm512_add_ps(a.v, b.v)}; }
ENGINERY_INLINE VecF operator-(VecF a, VecF b) { return {_mm512_sub_ps(a.v, b.v)}; }
ENGINERY_INLINE VecF operator*(VecF a, VecF b) { return {_mm512_mul_ps(a.v, b.v)}; }
ENGINERY_INLINE VecF operator/(VecF a, VecF b) { return {_mm512_div_ps(a.v, b.v)}; }
ENGINERY_INLINE VecI operator+(VecI a, VecI b) { return {_mm512_add_epi32(a.v, b.v)}; }
ENGINERY_INLINE VecI operator-(VecI a, VecI b) { return {_mm512_sub_epi32(a.v, b.v)}; }
ENGINERY_INLINE VecF fma(VecF a, VecF b, VecF c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
ENGINERY_INLINE VecF fnma(VecF a, VecF b, VecF c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
ENGINERY_INLINE VecF max(VecF a, VecF b) { return {_mm512_max_ps(a.v, b.v)}; }  // b where either is NaN
ENGINERY_INLINE VecF min(VecF a, VecF b) { return {_mm512_min_ps(a.v, b.v)}; }
ENGINERY_INLINE VecF abs(VecF a) { return {_mm512_abs_ps(a.v)}; }
ENGINERY_INLINE VecF round_even(VecF a) { return {_mm512_roundscale_ps(a.v, 8)}; }
ENGINERY_INLINE VecI to_int(VecF a) { return {_mm512_cvtps_epi32(a.v)}; }
ENGINERY_INLINE VecF to_float(VecI a) { return {_mm512_cvtepi32_ps(a.v)}; }
ENGINERY_INLINE VecI shift_left(VecI a, int bits) { return {_mm512_sll_epi32(a.v, _mm_cvtsi32_si128(bits))}; }
ENGINERY_INLINE Mask less(VecF a, VecF b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
// Bit i: lane i of a is not less than that of b, and neither is NaN.
ENGINERY_INLINE uint32_t lanes_not_less(VecF a, VecF b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
ENGINERY_INLINE Mask greater(VecI a, VecI b) { return {_mm512_cmpgt_epi32_mask(a.v, b.v)}; }
ENGINERY_INLINE Mask both(Mask a, Mask b) { return {static_cast<__mmask16>(a.v & b.v)}; }
ENGINERY_INLINE VecF select(Mask m, VecF yes, VecF no) { return {_mm512_mask_blend_ps(m.v, no.v, yes.v)}; }
ENGINERY_INLINE VecF as_float(VecI a) { return {_mm512_castsi512_ps(a.v)}; }

// x * 2^n, rounded once.
ENGINERY_INLINE VecF scale_by_power(VecF x, VecF n) { return {_mm512_scalef_ps(x.v, n.v)}; }

ENGINERY_INLINE VecF load_bf16(const uint16_t* p) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
ENGINERY_INLINE VecF load_f16(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }

// Round to nearest even; NaN stays NaN.
ENGINERY_INLINE __m256i to_bf16(VecF x) {
#ifdef __AVX512BF16__
    // What it takes for zero, subnormal numbers, is far below what anything adds up to.
    return (__m256i)_mm512_cvtneps_pbh(x.v);
#else
    const __m512i bits = _mm512_castps_si512(x.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
#endif
}
ENGINERY_INLINE void store_bf16(uint16_t* p, VecF x) { _mm256_storeu_si256((__m256i*)p, to_bf16(x)); }

// Values of a that fit int8 / uint8.
ENGINERY_INLINE __m128i to_bytes(VecI a) { return _mm512_cvtepi32_epi8(a.v); }
ENGINERY_INLINE void store_bytes(void* p, VecI a) { _mm_storeu_si128((__m128i*)p, to_bytes(a)); }
// Values that fit int16.
ENGINERY_INLINE void store_i16(int16_t* p, VecI a) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(a.v)); }

#else

inline constexpr int kLanes = 8;

struct VecF {
    __m256 v;
};
struct VecI {
    __m256i v;
};
struct Mask {
    __m256i v;
};

ENGINERY_INLINE Mask first_lanes(int count) {
    return {_mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0))};
}
ENGINERY_INLINE VecF set1(float x) { return {_mm256_set1_ps(x)}; }
ENGINERY_INLINE VecI set1_i32(int32_t x) { return {_mm256_set1_epi32(x)}; }
ENGINERY_INLINE VecI lane_index() { return {_mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0)}; }
ENGINERY_INLINE VecF load(const float* p) { return {_mm256_loadu_ps(p)}; }
ENGINERY_INLINE VecI load(const int32_t* p) { return {_mm256_loadu_si256((const __m256i*)p)}; }
ENGINERY_INLINE VecF load(const float* p, Mask m) { return {_mm256_maskload_ps(p, m.v)}; }
ENGINERY_INLINE void store(float* p, VecF x) { _mm256_storeu_ps(p, x.v); }
ENGINERY_INLINE void store(int32_t* p, VecI x) { _mm256_storeu_si256((__m256i*)p, x.v); }
ENGINERY_INLINE void store(float* p, VecF x, Mask m) { _mm256_maskstore_ps(p, m.v, x.v); }
ENGINERY_INLINE VecF operator+(VecF a, VecF b) { return {_mm256_add_ps(a.v, b.v)}; }
ENGINERY_INLINE VecF operator-(VecF a, VecF b) { return {_mm256_sub_ps(a.v, b.v)}; }
ENGINERY_INLINE VecF operator*(VecF a, VecF b) { return {_mm256_mul_ps(a.v, b.v)}; }
ENGINERY_INLINE VecF operator/(VecF a, VecF b) { return {_mm256_div_ps(a.v, b.v)}; }
ENGINERY_INLINE VecI operator+(VecI a, VecI b) { return {_mm256_add_epi32(a.v, b.v)}; }
ENGINERY_INLINE VecI operator-(VecI a, VecI b) { return {_mm256_sub_epi32(a.v, b.v)}; }
ENGINERY_INLINE VecF fma(VecF a, VecF b, VecF c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
ENGINERY_INLINE VecF fnma(VecF a, VecF b, VecF c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
ENGINERY_INLINE VecF max(VecF a, VecF b) { return {_mm256_max_ps(a.v, b.v)}; }  // b where either is NaN
ENGINERY_INLINE VecF min(VecF a, VecF b) { return {_mm256_min_ps(a.v, b.v)}; }
ENGINERY_INLINE VecF abs(VecF a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
ENGINERY_INLINE VecF round_even(VecF a) { return {_mm256_round_ps(a.v, 8)}; }
ENGINERY_INLINE VecI to_int(VecF a) { return {_mm256_cvtps_epi32(a.v)}; }
ENGINERY_INLINE VecF to_float(VecI a) { return {_mm256_cvtepi32_ps(a.v)}; }
ENGINERY_INLINE VecI shift_left(VecI a, int bits) { return {_mm256_sll_epi32(a.v, _mm_cvtsi32_si128(bits))}; }
ENGINERY_INLINE Mask less(VecF a, VecF b) { return {_mm256_castps_si256(_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))}; }
ENGINERY_INLINE uint32_t lanes_not_less(VecF a, VecF b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)));
}
ENGINERY_INLINE Mask greater(VecI a, VecI b) { return {_mm256_cmpgt_epi32(a.v, b.v)}; }
ENGINERY_INLINE Mask both(Mask a, Mask b) { return {_mm256_and_si256(a.v, b.v)}; }
ENGINERY_INLINE VecF select(Mask m, VecF yes, VecF no) {
    return {_mm256_blendv_ps(no.v, yes.v, _mm256_castsi256_ps(m.v))};
}
ENGINERY_INLINE VecF as_float(VecI a) { return {_mm256_castsi256_ps(a.v)}; }

// x * 2^n, n in -252 .. 254, rounded once: only the second factor can leave the normal numbers.
ENGINERY_INLINE VecF scale_by_power(VecF x, VecF n) {
    const __m256i whole = _mm256_cvtps_epi32(n.v);
    const __m256i half = _mm256_srai_epi32(whole, 1);
    const __m256i rest = _mm256_sub_epi32(whole, half);
    const __m256i one = _mm256_set1_epi32(127);
    const __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, one), 23));
    const __m256 second = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, one), 23));
    return {_mm256_mul_ps(_mm256_mul_ps(x.v, first), second)};
}

ENGINERY_INLINE VecF load_bf16(const uint16_t* p) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16))};
}
ENGINERY_INLINE VecF load_f16(const uint16_t* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }

// Round to nearest even; NaN stays NaN.
ENGINERY_INLINE __m128i to_bf16(VecF x) {
    const __m256i bits = _mm256_castps_si256(x.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
    const __m256i words = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
ENGINERY_INLINE void store_bf16(uint16_t* p, VecF x) { _mm_storeu_si128((__m128i*)p, to_bf16(x)); }

// The low bytes of each lane of a.
ENGINERY_INLINE __m128i to_bytes(VecI a) {
    const __m256i low = _mm256_and_si256(a.v, _mm256_set1_epi32(0xff));
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
    return _mm_packus_epi16(words, words);
}
ENGINERY_INLINE void store_bytes(void* p, VecI a) { _mm_storel_epi64((__m128i*)p, to_bytes(a)); }
ENGINERY_INLINE void store_i16(int16_t* p, VecI a) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
    _mm_storeu_si128((__m128i*)p, words);
}

#endif

inline constexpr int kPanelLanes = 16;                   // rows of a weight panel, keys of a key panel
inline constexpr int kPanelVecs = kPanelLanes / kLanes;  // vectors that hold a panel
inline constexpr uint32_t kAllLanes = (1u << kLanes) - 1;
inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

ENGINERY_INLINE VecF zero() { return set1(0.0f); }

// Lanes that are left of n elements from i on.
ENGINERY_INLINE int lanes_left(int64_t n, int64_t i) { return n - i < kLanes ? static_cast<int>(n - i) : kLanes; }

// Brings the line of p to the L2 cache; p may be anything.
ENGINERY_INLINE void prefetch(const std::byte* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }

// Sanitizers do not see masked accesses, so they are told.
#if defined(__SANITIZE_THREAD__)
extern "C" void __tsan_read_range(void*, unsigned long);
extern "C" void __tsan_write_range(void*, unsigned long);
ENGINERY_INLINE void note_read(const float* p, int n) { __tsan_read_range(const_cast<float*>(p), 4UL * n); }
ENGINERY_INLINE void note_write(float* p, int n) { __tsan_write_range(p, 4UL * n); }
#elif defined(__SANITIZE_ADDRESS__)
extern "C" void __asan_loadN(void*, unsigned long);
extern "C" void __asan_storeN(void*, unsigned long);
ENGINERY_INLINE void note_read(const float* p, int n) { __asan_loadN(const_cast<float*>(p), 4UL * n); }
ENGINERY_INLINE void note_write(float* p, int n) { __asan_storeN(p, 4UL * n); }
#else
ENGINERY_INLINE void note_read(const float*, int) {}
ENGINERY_INLINE void note_write(float*, int) {}
#endif

// The first `count` elements of p, zero in the other lanes, which are not read.
ENGINERY_INLINE VecF load_part(const float* p, int count) {
    note_read(p, count);
    return count == kLanes ? load(p) : load(p, first_lanes(count));
}
ENGINERY_INLINE void store_part(float* p, VecF x, int count) {
    note_write(p, count);
    if (count == kLanes) return store(p, x);
    store(p, x, first_lanes(count));
}
ENGINERY_INLINE VecF load_bf16_part(const uint16_t* p, int count) {
    if (count == kLanes) return load_bf16(p);
    uint16_t lanes[kLanes] = {};
    std::memcpy(lanes, p, static_cast<size_t>(count) * 2);
    return load_bf16(lanes);
}
ENGINERY_INLINE void store_bf16_part(uint16_t* p, VecF x, int count) {
    if (count == kLanes) return store_bf16(p, x);
    uint16_t lanes[kLanes];
    store_bf16(lanes, x);
    std::memcpy(p, lanes, static_cast<size_t>(count) * 2);
}
ENGINERY_INLINE void store_bytes_part(void* p, VecI x, int count) {
    if (count == kLanes) return store_bytes(p, x);
    uint8_t lanes[kLanes];
    store_bytes(lanes, x);
    std::memcpy(p, lanes, static_cast<size_t>(count));
}

ENGINERY_INLINE void store_i16_part(int16_t* p, VecI x, int count) {
    if (count == kLanes) return store_i16(p, x);
    int16_t lanes[kLanes];
    store_i16(lanes, x);
    std::memcpy(p, lanes, static_cast<size_t>(count) * 2);
}

ENGINERY_INLINE float first_lane(VecF x) {
#ifdef __AVX512F__
    return _mm512_cvtss_f32(x.v);
#else
    return _mm256_cvtss_f32(x.v);
#endif
}

// Halves are joined until one lane is left.
template <class Join128>
ENGINERY_INLINE float join_lanes(__m128 x, Join128 join) {
    x = join(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(join(x, _mm_shuffle_ps(x, x, 1)));
}
ENGINERY_INLINE float sum_lanes(VecF x) {
#ifdef __AVX512F__
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
#else
    const __m256 half = x.v;
#endif
    const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    return join_lanes(quarter, [](__m128 a, __m128 b) { return _mm_add_ps(a, b); });
}
// Of numbers; of NaN some lane.
ENGINERY_INLINE float max_lanes(VecF x) {
#ifdef __AVX512F__
    const __m256 half = _mm256_max_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
#else
    const __m256 half = x.v;
#endif
    const __m128 quarter = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    return join_lanes(quarter, [](__m128 a, __m128 b) { return _mm_max_ps(a, b); });
}

// The greatest magnitude of x: [n]; NaN where one is not finite, which codes of eight bits cannot say.
ENGINERY_INLINE float largest_magnitude(const float* x, int64_t n) {
    VecF most = zero(), nothing = zero();
    for (int64_t i = 0; i < n; i += kLanes) {
        const VecF v = load_part(x + i, lanes_left(n, i));
        most = max(abs(v), most);
        nothing = fma(v, zero(), nothing);
    }
    return max_lanes(most) + sum_lanes(nothing);
}

// e^x within 1 ulp; exactly 1 at 0 and exactly 0 below -104 and at -infinity.
ENGINERY_INLINE VecF exp(VecF x) {
    const VecF bounded = max(set1(-104.0f), min(set1(89.0f), x));
    const VecF n = round_even(bounded * set1(1.44269504088896341f));
    VecF r = fnma(n, set1(0.693145751953125f), bounded);  // ln 2 in two parts, the first with 12 bits
    r = fnma(n, set1(1.42860682030941723212e-6f), r);
    VecF p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    p = fma(p, r * r, r) + set1(1.0f);
    return scale_by_power(p, n);
}

// 2^x within 3 ulp, x at most 127; exactly 1 at 0 and exactly 0 below -151 and at -infinity.
ENGINERY_INLINE VecF exp2(VecF x) {
    const VecF bounded = max(set1(-151.0f), x);
    const VecF n = round_even(bounded);
    const VecF r = bounded - n;
    VecF p = set1(1.326470869e-3f);  // 1 + r p: the least relative error for |r| <= 1/2
    p = fma(p, r, set1(9.671511129e-3f));
    p = fma(p, r, set1(5.550733954e-2f));
    p = fma(p, r, set1(2.402224243e-1f));
    p = fma(p, r, set1(6.931470037e-1f));
    return scale_by_power(fma(p, r, set1(1.0f)), n);
}

// tanh within 2 ulp: a polynomial near 0 (Cephes), 1 - 2 / (e^2x + 1) elsewhere.
ENGINERY_INLINE VecF tanh(VecF x) {
    const VecF magnitude = abs(x);
    const VecF z = x * x;
    VecF p = set1(-5.70498872745e-3f);
    p = fma(p, z, set1(2.06390887954e-2f));
    p = fma(p, z, set1(-5.37397155531e-2f));
    p = fma(p, z, set1(1.33314422036e-1f));
    p = fma(p, z, set1(-3.33332819422e-1f));
    const VecF near = fma(p * z, x, x);
    const VecF far = set1(1.0f) - set1(2.0f) / (exp(magnitude + magnitude) + set1(1.0f));
    const VecF signed_far = select(less(x, zero()), zero() - far, far);
    return select(less(magnitude, set1(0.625f)), near, signed_far);
}

}  // namespace enginery::ENGINERY_ISA
