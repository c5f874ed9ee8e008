// What `linear` does to its sums before they are stored. The combinations are data, not code.
#pragma once

#include "plugins/share.h"
#include "plugins/simd.h"

namespace enginery::ENGINERY_ISA {

enum class Activation : uint8_t { kNone, kSilu, kGeluTanh };

// Null pointers are steps left out. Vectors are by weight row (gate and up interleaved in panels for gated weights).
struct Epilogue {
    Activation gate = Activation::kNone;
    float softcap = 0.0f;
    const float* activation_scale = nullptr;  // [M]
    const float* weight_scale = nullptr;      // [Np]
    const int32_t* weight_sum = nullptr;      // [Np], where activations are biased by 128
    const float* bias = nullptr;              // [Np]
    const float* residual = nullptr;          // [M][stride]
    float* out = nullptr;                     // [M][stride]
    int64_t stride = 0;
    int64_t columns = 0;  // of out; what lies beyond is not written
    // Of a head: [M] how many of the largest to keep in kept[M] instead of writing the row, or 0.
    const int32_t* keep = nullptr;
    KeptRow* kept = nullptr;
};

ENGINERY_INLINE VecF activate(Activation kind, VecF x) {
    if (kind == Activation::kSilu) return x / (set1(1.0f) + exp(zero() - x));
    const VecF cubic = fma(set1(0.044715f) * x, x * x, x);
    return set1(0.5f) * x * (set1(1.0f) + tanh(set1(0.7978845608028654f) * cubic));
}

// What is the same for all rows: of the 16 or 8 weight rows from `row` on.
struct RowFactors {
    VecF scale, bias;
    VecI sum;
};

ENGINERY_INLINE RowFactors load_factors(const Epilogue& e, int64_t row) {
    RowFactors f;
    f.scale = e.weight_scale == nullptr ? set1(1.0f) : load(e.weight_scale + row);
    f.bias = e.bias == nullptr ? zero() : load(e.bias + row);
    f.sum = e.weight_sum == nullptr ? set1_i32(0) : shift_left(load(e.weight_sum + row), 7);
    return f;
}

// Sums of weight rows, scaled and biased. `scale` is the activation row's.
ENGINERY_INLINE VecF finish_sums(const RowFactors& f, const float* sums, VecF scale) {
    return fma(load(sums), scale, f.bias);
}
ENGINERY_INLINE VecF finish_sums(const RowFactors& f, const int32_t* sums, VecF scale) {
    return to_float(load(sums) - f.sum) * scale * f.scale + f.bias;
}

// One row's columns of a panel of a head: the largest go to what is kept.
template <class Element>
static void keep_row(const Epilogue& e, const Element* sums, int64_t row, int64_t panel) {
    KeptRow& kept = e.kept[row];
    const VecF scale = set1(e.activation_scale == nullptr ? 1.0f : e.activation_scale[row]);
    VecF zeros = zero();  // not so where an element is not finite
    for (int v = 0; v < kPanelVecs; ++v) {
        const int64_t column = panel * kPanelLanes + v * kLanes;
        if (column >= e.columns) break;
        VecF x = finish_sums(load_factors(e, column), sums + v * kLanes, scale);
        if (e.softcap > 0.0f) x = set1(e.softcap) * tanh(x / set1(e.softcap));
        uint32_t largest = lanes_not_less(x, set1(kept.least));
        if (const int count = lanes_left(e.columns, column); count < kLanes) {
            largest &= (1u << count) - 1;
            x = select(first_lanes(count), x, zero());
        }
        zeros = fma(x, zero(), zeros);
        if (largest == 0) continue;
        float lanes[kLanes];
        store(lanes, x);
        for (; largest != 0; largest &= largest - 1) {
            const int lane = __builtin_ctz(largest);
            kept.add({lanes[lane], static_cast<int32_t>(column + lane)}, e.keep[row]);
        }
    }
    if (lanes_not_less(zeros, zero()) != kAllLanes) kept.is_finite = 0;
}

// Rows first_row .. first_row + rows - 1 of 16 columns of out, from the sums [rows][sums_stride] of their panel; where
// it is one of gates, ups are the sums of the panel after it.
template <class Element>
static void write_rows(const Epilogue& e, const Element* sums, const Element* ups, int64_t sums_stride,
                       int64_t first_row, int64_t rows, int64_t panel) {
    const bool gated = e.gate != Activation::kNone;
    const int64_t first_column = (gated ? panel / 2 : panel) * kPanelLanes;
    for (int v = 0; v < kPanelVecs; ++v) {
        const int64_t column = first_column + v * kLanes;
        if (column >= e.columns) break;
        const int count = lanes_left(e.columns, column);
        const RowFactors factors = load_factors(e, panel * kPanelLanes + v * kLanes);
        const RowFactors up = gated ? load_factors(e, (panel + 1) * kPanelLanes + v * kLanes) : factors;
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t row = first_row + r;
            const VecF scale = set1(e.activation_scale == nullptr ? 1.0f : e.activation_scale[row]);
            VecF x = finish_sums(factors, sums + r * sums_stride + v * kLanes, scale);
            if (gated) x = activate(e.gate, x) * finish_sums(up, ups + r * sums_stride + v * kLanes, scale);
            if (e.softcap > 0.0f) x = set1(e.softcap) * tanh(x / set1(e.softcap));
            if (e.residual != nullptr) x = x + load_part(e.residual + row * e.stride + column, count);
            store_part(e.out + row * e.stride + column, x, count);
        }
    }
    if (first_column + kPanelLanes >= e.columns) {
        for (int64_t r = 0; r < rows; ++r) zero_padding(e.out + (first_row + r) * e.stride, e.columns);
    }
}

// The same where some rows are kept instead of written.
template <class Element>
static void finish_tile(const Epilogue& e, const Element* sums, const Element* ups, int64_t sums_stride,
                        int64_t first_row, int64_t rows, int64_t panel) {
    if (e.keep == nullptr) return write_rows(e, sums, ups, sums_stride, first_row, rows, panel);
    for (int64_t r = 0; r < rows; ++r) {
        const Element* from = sums + r * sums_stride;
        if (e.keep[first_row + r] > 0) {
            keep_row(e, from, first_row + r, panel);
        } else {
            write_rows(e, from, ups, sums_stride, first_row + r, 1, panel);
        }
    }
}

}  // namespace enginery::ENGINERY_ISA
