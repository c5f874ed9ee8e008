// linear: out [M, n] = epilogue(a [M, k] x weight [n, k] transposed).
//
// Work is cut into items of up to four weight panels by up to 256 rows (tuning.h). Within an item K goes in blocks
// whose weights stay in the L2 cache while all rows pass them; sums rest in the thread's scratch between blocks. Blocks
// lie at fixed K, so every sum is made of the same partial sums in the same order however many rows there are. While a
// block is multiplied, the weights of the next come from memory to the L2 cache: so reading and computing go on
// together.
#include "plugins/linear/epilogue.h"
#include "plugins/linear/products.h"
#include "plugins/linear/variants.h"
#include "plugins/operators.h"
#include "plugins/share.h"
#include "runtime/csrc/call_reader.h"

namespace enginery::ENGINERY_ISA {

namespace {

constexpr int64_t kRowBlock = 256;
constexpr int64_t kSumsStride = kMostPanels * kPanelLanes;
static_assert(kRowBlock * kSumsStride * 4 <= kKeptOffset);

struct LinearOperands {
    Domain domain = Domain::kTokens;
    BoundOperand activation_scale, residual, out;
    int64_t panels = 0;
    Variants variants;
    bool is_head = false;  // its results are the plan's logits
    ProductOperands product;
    Epilogue epilogue;
};

template <class Product>
class Linear : public Kernel {
  public:
    explicit Linear(const LinearOperands& operands) : o_(operands) {
        const int64_t steps = o_.product.steps, blocks = (steps + Product::kBlockSteps - 1) / Product::kBlockSteps;
        block_steps_ = round_up((steps + blocks - 1) / blocks, Product::kStepsTogether);
    }

    void run(const Step& step, const Team& team) override {
        const int64_t rows = domain_size(o_.domain, step);
        const Division division = divide(rows, team.num_threads);
        const int64_t row_blocks = (rows + kRowBlock - 1) / kRowBlock;
        Shares shares(team, division.items * row_blocks);
        const int32_t* keep = o_.is_head ? step.keep : nullptr;
        for (int64_t row = 0; keep != nullptr && row < rows; ++row) kept_rows(team)[row].begin();
        for (int64_t item = shares.next(); item >= 0; item = shares.next()) {
            const int64_t first_row = item / division.items * kRowBlock;
            run_item(team, keep, first_row, std::min(kRowBlock, rows - first_row), item % division.items, division);
        }
    }

    bool keeps_largest() const override { return o_.is_head; }

  private:
    struct Division {
        Variant variant;
        int64_t items;  // of a block of rows
    };

    static KeptRow* kept_rows(const Team& team) { return reinterpret_cast<KeptRow*>(team.scratch + kKeptOffset); }

    int unit_panels() const { return o_.epilogue.gate == Activation::kNone ? 1 : 2; }
    int64_t all_units() const { return o_.panels / unit_panels(); }

    Division divide(int64_t rows, int32_t num_threads) const {
        const auto suits = [&](const auto& entry) { return rows <= entry.first; };
        Variant variant = std::find_if(o_.variants.begin(), o_.variants.end(), suits)->second;
        variant.units = std::min(variant.units, kMostPanels / unit_panels());
        // No thread stands idle.
        while (variant.units > 1 && all_units() / variant.units < 4 * num_threads) --variant.units;
        return {variant, (all_units() + variant.units - 1) / variant.units};
    }

    // The panels of an item: its units' first ones, then their second ones. None of an item that does not exist.
    Block block_at(int64_t item, const Division& division, int64_t first_step) const {
        Block block;
        const auto& [variant, items] = division;
        const int64_t first = variant.apart ? item : item * variant.units, distance = variant.apart ? items : 1;
        const int64_t end = std::min(all_units(), first + distance * variant.units);
        for (int p = 0; p < unit_panels() && item < items; ++p) {
            for (int64_t unit = first; unit < end; unit += distance) {
                block.panels[block.num_panels++] = unit * unit_panels() + p;
            }
        }
        block.first_step = first_step;
        block.steps = std::min(block_steps_, o_.product.steps - first_step);
        return block;
    }

    void run_item(const Team& team, const int32_t* keep, int64_t first_row, int64_t rows, int64_t item,
                  const Division& division) const {
        Epilogue epilogue = o_.epilogue;
        epilogue.keep = keep;
        epilogue.kept = kept_rows(team);
        epilogue.activation_scale = o_.activation_scale ? o_.activation_scale.at<const float>(team) : nullptr;
        epilogue.residual = o_.residual ? o_.residual.at<const float>(team) : nullptr;
        epilogue.out = o_.out.at<float>(team);
        auto* sums = reinterpret_cast<typename Product::Element*>(team.scratch);
        const Product product(o_.product, team);
        const bool one_block = block_steps_ >= o_.product.steps;
        for (int64_t first_step = 0; first_step < o_.product.steps; first_step += block_steps_) {
            const Block block = block_at(item, division, first_step);
            const bool last = first_step + block_steps_ >= o_.product.steps;
            Block next;
            if (division.variant.ahead) {
                next = last ? block_at(item + 1, division, 0) : block_at(item, division, first_step + block_steps_);
            }
            const int units = block.num_panels / unit_panels();
            // A lone unit's panels are multiplied together, those of several in two passes.
            const int panels = division.variant.units == 1 ? block.num_panels : units;
            const int passes = block.num_panels / panels;
            int64_t row = first_row;
            RowTiles tiles(rows, Product::most_rows(panels));
            const int64_t count = tiles.left();
            while (tiles.left() > 0) {
                const int64_t index = count - tiles.left();
                Tile tile = {row, tiles.next(), 0, count * passes, 0, panels};
                // Sums that are complete at once stay in the L1 cache.
                auto* out = sums + (one_block ? 0 : (row - first_row) * kSumsStride);
                for (int pass = 0; pass < passes; ++pass) {
                    tile.index = index * passes + pass;
                    tile.first_panel = pass * panels;
                    product.multiply(block, tile, next, out + tile.first_panel * kPanelLanes, kSumsStride,
                                     first_step > 0);
                }
                for (int u = 0; last && u < units; ++u) {
                    finish_tile(epilogue, out + u * kPanelLanes, out + (units + u) * kPanelLanes, kSumsStride, row,
                                tile.rows, block.panels[u]);
                }
                row += tile.rows;
            }
        }
    }

    LinearOperands o_;
    int64_t block_steps_;
};

Activation read_activation(CallReader& reader) {
    const std::string name = reader.choice("activation", {"none", "silu_gated", "gelu_tanh_gated"});
    if (name == "none") return Activation::kNone;
    return name == "silu_gated" ? Activation::kSilu : Activation::kGeluTanh;
}

const float* floats(const BoundOperand& operand) { return reinterpret_cast<const float*>(operand.data); }

// For tests and measurements: plans leave it to the table.
Variant read_variant(CallReader& reader) {
    const auto units = static_cast<int>(reader.integer("units", 1, kMostPanels));
    return {units, reader.integer("apart", 0, 1) == 1, reader.integer("ahead", 0, 1) == 1};
}

// A weight of one element type.
void read_panels(CallReader& reader, LinearOperands& o, const std::string& type, int64_t weight_rows) {
    const std::string layout = type == "f32" ? "f32_k1n16.v0" : type == "bf16" ? "bf16_k2n16.v0" : "int8_k4n16.v0";
    o.product.steps = o.product.activation_stride / kActivationStep;
    o.product.weight = reader.required("weight", {layout}, weight_rows * o.product.activation_stride).data;
    if (type == "f32" || type == "bf16") return;
    o.epilogue.weight_scale = floats(reader.required("weight_scale", {"scale_f32.v0"}, weight_rows * 4));
    if (type == "u8" || reader.has("weight_sum")) {
        const BoundOperand sum = reader.required("weight_sum", {"sum_i32.v0"}, weight_rows * 4);
        if (type == "u8" && DotU8::kBiased) o.epilogue.weight_sum = reinterpret_cast<const int32_t*>(sum.data);
    }
}

// A weight of codes, if it is one: returns the columns of a group.
int64_t read_codes(CallReader& reader, LinearOperands& o, int64_t weight_rows, int64_t most_rows) {
    const std::string layout =
        reader.layout("weight", {"int8_k4n16.v0", "int4_k8n16g32.v0", "int4_k8n16g64.v0", "int4_k8n16g128.v0",
                                 "uint4_k8n16g32.v0", "uint4_k8n16g64.v0", "uint4_k8n16g128.v0"});
    if (layout == "int8_k4n16.v0") return 0;
    const int64_t group = layout.find("g32") != layout.npos ? 32 : layout.find("g64") != layout.npos ? 64 : 128;
    const int64_t columns = o.product.activation_stride;
    const int64_t scales = weight_rows * ((columns + group - 1) / group);
    o.product.steps = columns / kCodeColumns;
    o.product.group_steps = group / kCodeColumns;
    o.product.activation_sums = reader.required("a_sums", {"i32"}, most_rows * columns / kSumColumns * 4);
    o.product.weight = reader.required("weight", {layout}, weight_rows * columns / 2).data;
    o.product.scales =
        reinterpret_cast<const uint16_t*>(reader.required("weight_scale", {"scale_f16_n16.v0"}, scales * 2).data);
    if (layout.starts_with("uint4")) {
        o.product.zeros =
            reinterpret_cast<const uint8_t*>(reader.required("weight_zero", {"zero_u8_n16.v0"}, scales).data);
    }
    return group;
}

}  // namespace

std::unique_ptr<Kernel> make_linear(const CallSpec& call, const Binding& binding) {
    CallReader reader(call, binding);
    LinearOperands o;
    o.domain = reader.domain();
    const int64_t n = reader.integer("n", 1, kLargestColumns);
    const std::string type = reader.layout("a", {"f32", "bf16", "i8", "u8"});
    const bool is_int8 = type == "i8" || type == "u8";
    // Of int8 products 2^31 / 127^2 can be summed, and a float's sum of more columns would mean little.
    const int64_t k = reader.integer("k", 1, is_int8 ? 1 << 17 : kLargestColumns);
    o.epilogue.gate = read_activation(reader);
    o.epilogue.softcap = static_cast<float>(reader.number("softcap", 0.0, 1e30));
    o.epilogue.columns = n;
    o.epilogue.stride = row_stride(n);

    const bool gated = o.epilogue.gate != Activation::kNone;
    const int64_t weight_rows = (gated ? 2 : 1) * round_up(n, kPanelLanes);
    const int64_t element_bytes = type == "f32" ? 4 : type == "bf16" ? 2 : 1;
    const int64_t most = reader.largest(o.domain);
    o.product.activation_stride = row_stride(k) * element_bytes;
    o.product.activations = reader.required("a", {type}, most * o.product.activation_stride);
    o.panels = weight_rows / kPanelLanes;
    if (is_int8) o.activation_scale = reader.required("a_scale", {"f32"}, most * 4);
    o.epilogue.bias = floats(reader.optional("bias", {"bias_f32.v0"}, weight_rows * 4));
    o.residual = reader.optional("residual", {"f32"}, most * o.epilogue.stride * 4);
    o.out = reader.required("out", {"f32"}, most * o.epilogue.stride * 4);
    if (o.out.per_thread()) reader.fault("operand out: threads divide its columns, so it cannot be per thread");
    o.is_head =
        o.domain == Domain::kRows && o.out.data == binding.logits && n == binding.vocab_size && !gated && !o.residual;
    const int64_t group = type == "i8" ? read_codes(reader, o, weight_rows, most) : 0;
    if (group == 0) read_panels(reader, o, type, weight_rows);
    if (reader.has_attribute("units")) o.variants = {{kAnyNumber, read_variant(reader)}};
    reader.finish();
    if (o.variants.empty()) o.variants = find_variants(call.operands.at("weight").layout, row_stride(k), o.panels);

    if (group > 0 && o.product.zeros != nullptr) return std::make_unique<Linear<GroupProduct<true>>>(o);
    if (group > 0) return std::make_unique<Linear<GroupProduct<false>>>(o);
    if (type == "f32") return std::make_unique<Linear<PanelProduct<DotF32>>>(o);
    if (type == "bf16") return std::make_unique<Linear<PanelProduct<DotBf16>>>(o);
    if (type == "u8") return std::make_unique<Linear<PanelProduct<DotU8>>>(o);
    return std::make_unique<Linear<PanelProduct<DotS8>>>(o);
}

}  // namespace enginery::ENGINERY_ISA
