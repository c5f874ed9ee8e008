// linear: out [M, n] = epilogue(a [M, k] x weight [n, k] transposed).
//
// Work is cut into items of up to four weight panels by up to 256 rows. Within an item K goes in blocks whose weights
// stay in the L2 cache while all rows pass them; sums rest in the thread's scratch between blocks. Blocks lie at fixed
// K, so every sum is made of the same partial sums in the same order however many rows there are.
#include "plugins/linear/epilogue.h"
#include "plugins/operators.h"
#include "plugins/share.h"
#include "plugins/tile.h"
#include "runtime/csrc/call_reader.h"

namespace enginery::ENGINERY_ISA {

namespace {

constexpr int64_t kRowBlock = 256;
constexpr int64_t kBlockSteps = 512;
constexpr int64_t kSumsStride = kMostPanels * kPanelLanes;
static_assert(kRowBlock * kSumsStride * 4 <= kThreadScratchBytes);

struct LinearOperands {
    Domain domain = Domain::kTokens;
    BoundOperand activations, activation_scale, residual, out;
    const std::byte* weight = nullptr;
    int64_t activation_stride = 0;  // bytes
    int64_t panels = 0;
    int64_t steps = 0;
    Epilogue epilogue;
};

template <class Dot>
class Linear : public Kernel {
  public:
    explicit Linear(const LinearOperands& operands) : o_(operands) {}

    void run(const Step& step, const Team& team) override {
        const int64_t rows = domain_size(o_.domain, step);
        const int group = panels_together(rows, team.num_threads);
        const int64_t groups = (o_.panels + group - 1) / group;
        const int64_t row_blocks = (rows + kRowBlock - 1) / kRowBlock;
        Shares shares(team, groups * row_blocks);
        for (int64_t item = shares.next(); item >= 0; item = shares.next()) {
            const int64_t panel = item % groups * group;
            const int64_t first_row = item / groups * kRowBlock;
            run_item(team, first_row, std::min(kRowBlock, rows - first_row), panel,
                     static_cast<int>(std::min<int64_t>(group, o_.panels - panel)));
        }
    }

  private:
    // Panels of one item: the more rows there are, the more of the registers are rows; and no thread stands idle.
    int panels_together(int64_t rows, int32_t num_threads) const {
        const bool gated = o_.epilogue.gate != Activation::kNone;
        int panels = gated ? 2 : 1;
        for (const int wanted : {2, 3, 4}) {
            if (gated && wanted == 3) continue;
            const bool fits = most_rows<Dot>(wanted) >= std::min<int64_t>(rows, 8) || wanted * rows <= Dot::kTiles;
            if (fits && o_.panels / wanted >= 4 * num_threads) panels = wanted;
        }
        return panels;
    }

    void run_item(const Team& team, int64_t first_row, int64_t rows, int64_t panel, int panels) const {
        auto* sums = reinterpret_cast<typename Dot::Element*>(team.scratch);
        TileArguments t;
        Segment segment;
        t.segments = &segment;
        t.num_segments = 1;
        t.activation_stride = o_.activation_stride;
        t.panel_step = kPanelStep;
        t.out = sums;
        t.out_stride = kSumsStride;
        const std::byte* activations = o_.activations.at<const std::byte>(team) + first_row * o_.activation_stride;
        for (int64_t first_step = 0; first_step < o_.steps; first_step += kBlockSteps) {
            segment.steps = std::min(kBlockSteps, o_.steps - first_step);
            for (int p = 0; p < panels; ++p) {
                segment.panels[p] = o_.weight + ((panel + p) * o_.steps + first_step) * kPanelStep;
            }
            t.activations = activations + first_step * kActivationStep;
            if (first_step == 0) {
                multiply_rows<Dot, Finish::kStore>(t, rows, panels);
            } else {
                multiply_rows<Dot, Finish::kAdd>(t, rows, panels);
            }
        }
        Epilogue epilogue = o_.epilogue;
        epilogue.activation_scale = o_.activation_scale ? o_.activation_scale.at<const float>(team) : nullptr;
        epilogue.residual = o_.residual ? o_.residual.at<const float>(team) : nullptr;
        epilogue.out = o_.out.at<float>(team);
        finish_tile(epilogue, sums, kSumsStride, first_row, rows, panel, panels);
    }

    LinearOperands o_;
};

Activation read_activation(CallReader& reader) {
    const std::string name = reader.choice("activation", {"none", "silu_gated", "gelu_tanh_gated"});
    if (name == "none") return Activation::kNone;
    return name == "silu_gated" ? Activation::kSilu : Activation::kGeluTanh;
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
    o.activation_stride = row_stride(k) * element_bytes;
    o.panels = weight_rows / kPanelLanes;
    o.steps = o.activation_stride / kActivationStep;
    o.activations = reader.required("a", {type}, most * o.activation_stride);
    const std::string weight_layout = type == "f32"    ? "f32_k1n16.v0"
                                      : type == "bf16" ? "bf16_k2n16.v0"
                                                       : "int8_k4n16.v0";
    o.weight = reader.required("weight", {weight_layout}, weight_rows * o.activation_stride).data;
    const auto vector = [&](BoundOperand operand) { return reinterpret_cast<const float*>(operand.data); };
    if (is_int8) {
        o.activation_scale = reader.required("a_scale", {"f32"}, most * 4);
        o.epilogue.weight_scale = vector(reader.required("weight_scale", {"scale_f32.v0"}, weight_rows * 4));
        if (type == "u8" || reader.has("weight_sum")) {
            const BoundOperand sum = reader.required("weight_sum", {"sum_i32.v0"}, weight_rows * 4);
            if (type == "u8" && DotU8::kBiased) o.epilogue.weight_sum = reinterpret_cast<const int32_t*>(sum.data);
        }
    }
    o.epilogue.bias = vector(reader.optional("bias", {"bias_f32.v0"}, weight_rows * 4));
    o.residual = reader.optional("residual", {"f32"}, most * o.epilogue.stride * 4);
    o.out = reader.required("out", {"f32"}, most * o.epilogue.stride * 4);
    if (o.out.per_thread()) reader.fault("operand out: threads divide its columns, so it cannot be per thread");
    reader.finish();

    if (type == "f32") return std::make_unique<Linear<DotF32>>(o);
    if (type == "bf16") return std::make_unique<Linear<DotBf16>>(o);
    if (type == "u8") return std::make_unique<Linear<DotU8>>(o);
    return std::make_unique<Linear<DotS8>>(o);
}

}  // namespace enginery::ENGINERY_ISA
