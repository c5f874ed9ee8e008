// How `linear` multiplies a tile of rows by a block of its weights: panels of one element type, or codes in groups.
#pragma once

#include "plugins/linear/group_tile.h"
#include "plugins/share.h"
#include "plugins/tile.h"

namespace enginery::ENGINERY_ISA {

struct ProductOperands {
    BoundOperand activations;
    int64_t activation_stride = 0;  // bytes
    const std::byte* weight = nullptr;
    int64_t steps = 0;  // of a panel
    // Of codes in groups:
    BoundOperand activation_sums;
    int64_t group_steps = 0;
    const uint16_t* scales = nullptr;  // [panels][groups][16]
    const uint8_t* zeros = nullptr;
};

// Steps of some panels of a weight.
struct Block {
    int64_t panels[kMostPanels];
    int num_panels = 0;
    int64_t first_step = 0, steps = 0;
};

// Rows that are multiplied together, by panels first_panel .. first_panel + panels - 1 of a block: the block's tile
// `index` of `count`.
struct Tile {
    int64_t first_row, rows, index, count;
    int first_panel, panels;
};

// Tiles share the work of bringing the panels of the next block near.
inline int panels_ahead(const std::byte** ahead, const std::byte* weight, int64_t all_steps, const Block& next,
                        const Tile& tile) {
    int count = 0;
    for (int64_t p = tile.index; p < next.num_panels; p += tile.count) {
        ahead[count++] = weight + (next.panels[p] * all_steps + next.first_step) * kPanelStep;
    }
    return count;
}

template <class Dot>
class PanelProduct {
  public:
    using Element = typename Dot::Element;
    static constexpr int64_t kBlockSteps = 512;
    static constexpr int64_t kStepsTogether = 16;

    PanelProduct(const ProductOperands& operands, const Team& team)
        : o_(operands), activations_(o_.activations.at<const std::byte>(team)) {}

    static int64_t most_rows(int panels) { return enginery::ENGINERY_ISA::most_rows<Dot>(panels); }

    // out [rows][stride], the tile's panel p at 16 p: what the block gives, added to what is there if `add`.
    void multiply(const Block& block, const Tile& tile, const Block& next, Element* out, int64_t stride,
                  bool add) const {
        Segment segment;
        for (int p = 0; p < tile.panels; ++p) {
            const int64_t panel = block.panels[tile.first_panel + p];
            segment.panels[p] = o_.weight + (panel * o_.steps + block.first_step) * kPanelStep;
        }
        segment.steps = block.steps;
        TileArguments t;
        t.activations = activations_ + tile.first_row * o_.activation_stride + block.first_step * kActivationStep;
        t.activation_stride = o_.activation_stride;
        t.segments = &segment;
        t.num_segments = 1;
        t.panel_step = kPanelStep;
        t.out = out;
        t.out_stride = stride;
        t.num_ahead = panels_ahead(t.ahead, o_.weight, o_.steps, next, tile);
        const auto panels = static_cast<size_t>(tile.panels), rows = static_cast<size_t>(tile.rows);
        (add ? kTiles<Dot, Finish::kAdd> : kTiles<Dot, Finish::kStore>)[panels][rows](t);
    }

  private:
    const ProductOperands& o_;
    const std::byte* activations_;
};

template <bool zero_points>
class GroupProduct {
  public:
    using Element = float;
    static constexpr int64_t kBlockSteps = 512;
    static constexpr int64_t kStepsTogether = 16;  // the largest group

    GroupProduct(const ProductOperands& operands, const Team& team)
        : o_(operands),
          activations_(o_.activations.at<const std::byte>(team)),
          sums_(o_.activation_sums.at<const int32_t>(team)) {}

    static int64_t most_rows(int panels) { return most_group_rows(panels); }

    void multiply(const Block& block, const Tile& tile, const Block& next, float* out, int64_t stride, bool add) const {
        const int64_t groups = (o_.steps + o_.group_steps - 1) / o_.group_steps;
        GroupArguments t;
        for (int p = 0; p < tile.panels; ++p) {
            const int64_t panel = block.panels[tile.first_panel + p];
            const int64_t place = (panel * groups + block.first_step / o_.group_steps) * kPanelLanes;
            t.codes[p] = o_.weight + (panel * o_.steps + block.first_step) * kPanelStep;
            t.scales[p] = o_.scales + place;
            t.zeros[p] = zero_points ? o_.zeros + place : nullptr;
        }
        t.group_steps = o_.group_steps;
        t.steps = block.steps;
        t.activations = activations_ + tile.first_row * o_.activation_stride + block.first_step * kCodeColumns;
        t.activation_stride = o_.activation_stride;
        t.sums_stride = o_.steps / kSumSteps;
        t.sums = sums_ + tile.first_row * t.sums_stride + block.first_step / kSumSteps;
        t.out = out;
        t.out_stride = stride;
        t.add = add;
        t.num_ahead = panels_ahead(t.ahead, o_.weight, o_.steps, next, tile);
        if (t.num_ahead > 0) prefetch_scales(next, tile, groups);
        kGroupFunctions<zero_points>[static_cast<size_t>(tile.panels)][static_cast<size_t>(tile.rows)](t);
    }

  private:
    // Scales are an eighth of the bytes or less, and come all at once.
    void prefetch_scales(const Block& next, const Tile& tile, int64_t groups) const {
        const int64_t first = next.first_step / o_.group_steps,
                      count = (next.steps + o_.group_steps - 1) / o_.group_steps;
        for (int64_t p = tile.index; p < next.num_panels; p += tile.count) {
            const uint16_t* scales = o_.scales + (next.panels[p] * groups + first) * kPanelLanes;
            for (int64_t i = 0; i < count; i += 2) {
                prefetch(reinterpret_cast<const std::byte*>(scales + i * kPanelLanes));
            }
        }
    }

    const ProductOperands& o_;
    const std::byte* activations_;
    const int32_t* sums_;
};

}  // namespace enginery::ENGINERY_ISA
