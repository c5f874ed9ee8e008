// The inner product of everything: R activation rows times P panels, all sums in registers. `linear` multiplies by
// weight panels, `attention` by panels of keys and then of values.
//
// Each sum is one chain over the steps in their order, whatever R and P are: so results do not depend on the tile that
// a row happens to be computed in.
#pragma once

#include <array>
#include <type_traits>
#include <utility>

#include "plugins/dot.h"

namespace enginery::ENGINERY_ISA {

inline constexpr int kMostPanels = 4;
inline constexpr int kMostRows = 12;

enum class Finish : uint8_t {
    kStore,     // out = sum
    kAdd,       // out = out + sum
    kScaleAdd,  // out = out * factor of the row + sum, of whole numbers sum * scale of the row; out is float
};

// Panels that hold consecutive steps; the activations of a segment follow those of the one before.
struct Segment {
    const std::byte* panels[kMostPanels];
    int64_t steps;
};

struct TileArguments {
    const std::byte* activations;  // of the first row
    int64_t activation_stride;     // bytes between rows
    const Segment* segments;
    int num_segments;
    int64_t panel_step;              // bytes from a panel's step to its next
    void* out;                       // [R][out_stride] of the sum's type; panel p at columns 16 p
    int64_t out_stride;              // elements
    const float* factors = nullptr;  // [R], for kScaleAdd
    const float* scales = nullptr;   // [R], of whole numbers
    // What will be read next: with every step, as much as a panel's step of each is brought to the L2 cache.
    const std::byte* ahead[kMostPanels];
    int num_ahead = 0;
};

ENGINERY_INLINE VecF scale_sum(VecF sum, const float*, int) { return sum; }
ENGINERY_INLINE VecF scale_sum(VecI sum, const float* scales, int r) {
    asm("" : "+v"(sum.v));  // or GCC 12 copies every sum in every step of the loop before
    return to_float(sum) * set1(scales[r]);
}

template <class Dot, Finish finish, int R, int P>
static void multiply_tile(const TileArguments& t) {
    constexpr int kVecs = P * kPanelVecs;
    typename Dot::Sum sums[R][kVecs];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
        for (int v = 0; v < kVecs; ++v) sums[r][v] = Dot::zero_sum();
    }
    const std::byte* a = t.activations;
    for (int s = 0; s < t.num_segments; ++s) {
        const std::byte* panels[P];
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) panels[p] = t.segments[s].panels[p];
        const int64_t steps = t.segments[s].steps;
        for (int64_t step = 0; step < steps; ++step) {
            for (int i = 0; i < t.num_ahead; ++i) {
                prefetch(t.ahead[i] + (a - t.activations) * (Dot::kStep / kActivationStep));
            }
            typename Dot::Weight weights[kVecs];
#pragma GCC unroll 16
            for (int v = 0; v < kVecs; ++v) {
                weights[v] = Dot::load_weight(panels[v / kPanelVecs] + step * t.panel_step +
                                              v % kPanelVecs * (Dot::kStep / kPanelVecs));
            }
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                const auto activation = Dot::broadcast(a + r * t.activation_stride);
#pragma GCC unroll 16
                for (int v = 0; v < kVecs; ++v) sums[r][v] = Dot::dot(sums[r][v], activation, weights[v]);
            }
            a += kActivationStep;
        }
    }
    using Out = std::conditional_t<finish == Finish::kScaleAdd, float, typename Dot::Element>;
    auto* out = static_cast<Out*>(t.out);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
        for (int v = 0; v < kVecs; ++v) {
            auto* to = out + r * t.out_stride + v * kLanes;
            if constexpr (finish == Finish::kScaleAdd) {
                store(to, fma(load(to), set1(t.factors[r]), scale_sum(sums[r][v], t.scales, r)));
            } else if constexpr (finish == Finish::kAdd) {
                store(to, load(to) + sums[r][v]);
            } else {
                store(to, sums[r][v]);
            }
        }
    }
}

// The most rows that a tile of P panels can have.
template <class Dot>
constexpr int most_rows(int panels) {
    const int rows = Dot::kTiles / panels;
    return rows < 1 ? 1 : rows > kMostRows ? kMostRows : rows;
}

using TileFunction = void (*)(const TileArguments&);

// multiply_tile for 1 .. most_rows(P) rows of P panels.
template <class Dot, Finish finish, int P, int... R>
constexpr std::array<TileFunction, kMostRows + 1> tiles_of(std::integer_sequence<int, R...>) {
    return {nullptr, multiply_tile<Dot, finish, R + 1, P>...};
}

template <class Dot, Finish finish>
inline constexpr std::array<std::array<TileFunction, kMostRows + 1>, kMostPanels + 1> kTiles = {
    std::array<TileFunction, kMostRows + 1>{},
    tiles_of<Dot, finish, 1>(std::make_integer_sequence<int, most_rows<Dot>(1)>()),
    tiles_of<Dot, finish, 2>(std::make_integer_sequence<int, most_rows<Dot>(2)>()),
    tiles_of<Dot, finish, 3>(std::make_integer_sequence<int, most_rows<Dot>(3)>()),
    tiles_of<Dot, finish, 4>(std::make_integer_sequence<int, most_rows<Dot>(4)>()),
};

// Rows in tiles of at most `most`, as even as can be: 32 rows are four of 8, not three of 9 and one of 5.
class RowTiles {
  public:
    RowTiles(int64_t rows, int64_t most) : rows_(rows), tiles_((rows + most - 1) / most) {}

    int64_t left() const { return tiles_; }
    // The rows of the next tile.
    int64_t next() {
        const int64_t count = (rows_ + tiles_ - 1) / tiles_;
        rows_ -= count;
        --tiles_;
        return count;
    }

  private:
    int64_t rows_, tiles_;
};

// Rows 0 .. rows - 1 by P panels; t moves on behind them. What is ahead comes with the first tile.
template <class Dot, Finish finish>
static void multiply_rows(TileArguments& t, int64_t rows, int panels) {
    for (RowTiles tiles(rows, most_rows<Dot>(panels)); tiles.left() > 0;) {
        const int64_t count = tiles.next();
        kTiles<Dot, finish>[static_cast<size_t>(panels)][static_cast<size_t>(count)](t);
        t.num_ahead = 0;
        t.activations += count * t.activation_stride;
        t.out = static_cast<typename Dot::Element*>(t.out) + count * t.out_stride;
        if (t.factors != nullptr) t.factors += count;
        if (t.scales != nullptr) t.scales += count;
    }
}

}  // namespace enginery::ENGINERY_ISA
