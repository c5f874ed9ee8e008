// linear: out [M, n] = epilogue(a [M, k] x weight [n, k] transposed).
//
// Work is cut into items of up to four weight panels by up to 256 rows. Within an item K goes in blocks whose weights
// stay in the L2 cache while all rows pass them; sums rest in the thread's scratch between blocks. Blocks lie at fixed
// K, so every sum is made of the same partial sums in the same order however many rows there are. While a block is
// multiplied, the weights of the next come from memory to the L2 cache: so reading and computing go on together.
#include "plugins/linear/epilogue.h"
#include "plugins/linear/products.h"
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
        const int group = panels_together(rows, team.num_threads);
        const int64_t groups = (o_.panels + group - 1) / group;
        const int64_t row_blocks = (rows + kRowBlock - 1) / kRowBlock;
        Shares shares(team, groups * row_blocks);
        const int32_t* keep = o_.is_head ? step.keep : nullptr;
        for (int64_t row = 0; keep != nullptr && row < rows; ++row) kept_rows(team)[row].begin();
        for (int64_t item = shares.next(); item >= 0; item = shares.next()) {
            const int64_t first_row = item / groups * kRowBlock;
            run_item(team, keep, first_row, std::min(kRowBlock, rows - first_row), item % groups * group, group);
        }
    }

    bool keeps_largest() const override { return o_.is_head; }

  private:
    static KeptRow* kept_rows(const Team& team) { return reinterpret_cast<KeptRow*>(team.scratch + kKeptOffset); }

    // Panels of one item: the more rows there are, the more of the registers are rows; and no thread stands idle.
    int panels_together(int64_t rows, int32_t num_threads) const {
        const bool gated = o_.epilogue.gate != Activation::kNone;
        int panels = gated ? 2 : 1;
        for (const int wanted : {2, 3, 4}) {
            if (gated && wanted == 3) continue;
            if (Product::suits(wanted, rows) && o_.panels / wanted >= 4 * num_threads) panels = wanted;
        }
        return panels;
    }

    Block block_at(int64_t panel, int panels, int64_t first_step) const {
        const int64_t left = std::max<int64_t>(0, o_.panels - panel);
        return {panel, first_step, std::min(block_steps_, o_.product.steps - first_step),
                static_cast<int>(std::min<int64_t>(panels, left))};
    }

    void run_item(const Team& team, const int32_t* keep, int64_t first_row, int64_t rows, int64_t panel,
                  int panels) const {
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
            const Block block = block_at(panel, panels, first_step);
            const bool last = first_step + block_steps_ >= o_.product.steps;
            const Block next =
                last ? block_at(panel + panels, panels, 0) : block_at(panel, panels, first_step + block_steps_);
            int64_t row = first_row;
            RowTiles tiles(rows, Product::most_rows(block.panels));
            const int64_t count = tiles.left();
            while (tiles.left() > 0) {
                const int64_t index = count - tiles.left();
                const RowTile tile = {row, tiles.next(), index, count};
                // Sums that are complete at once stay in the L1 cache.
                auto* out = sums + (one_block ? 0 : (row - first_row) * kSumsStride);
                product.multiply(block, tile, next, out, kSumsStride, first_step > 0);
                if (last) finish_tile(epilogue, out, kSumsStride, row, tile.rows, panel, block.panels);
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
    reader.finish();

    if (group > 0 && o.product.zeros != nullptr) return std::make_unique<Linear<GroupProduct<true>>>(o);
    if (group > 0) return std::make_unique<Linear<GroupProduct<false>>>(o);
    if (type == "f32") return std::make_unique<Linear<PanelProduct<DotF32>>>(o);
    if (type == "bf16") return std::make_unique<Linear<PanelProduct<DotBf16>>>(o);
    if (type == "u8") return std::make_unique<Linear<PanelProduct<DotU8>>>(o);
    return std::make_unique<Linear<PanelProduct<DotS8>>>(o);
}

}  // namespace enginery::ENGINERY_ISA
