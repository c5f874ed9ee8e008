// rotary_table: cos and sin [tokens, rot/2] of each token's position, times attention_factor. The angle is a product of
// floats, as transformers computes it: float32(position) * inv_freq.
#include <cmath>

#include "plugins/operators.h"
#include "plugins/share.h"
#include "plugins/simd.h"
#include "runtime/csrc/call_reader.h"

namespace enginery::ENGINERY_ISA {

namespace {

enum class Scaling : uint8_t { kStatic, kLongrope, kDynamic };

class RotaryTable : public Kernel {
  public:
    Scaling scaling = Scaling::kStatic;
    BoundOperand cos, sin;
    const float* inv_freq = nullptr;
    const float* inv_freq_long = nullptr;
    int64_t half = 0;
    int64_t threshold = 0;
    double base = 0.0, factor = 0.0;
    float attention_factor = 1.0f;

    void run(const Step& step, const Team& team) override {
        const Range tokens = share_of(team, step.num_tokens, cos.per_thread());
        for (int64_t token = tokens.begin; token < tokens.end; ++token) {
            const int64_t position = step.positions[token];
            const int64_t prompt_length = step.prompt_lengths == nullptr ? 0 : step.prompt_lengths[token];
            const bool is_long = scaling == Scaling::kLongrope && prompt_length > threshold;
            const int64_t length = std::max(prompt_length, position + 1);
            const bool is_dynamic = scaling == Scaling::kDynamic && length > threshold;
            const float dynamic_base = is_dynamic ? base_for(length) : 0.0f;
            const float* frequencies = is_long ? inv_freq_long : inv_freq;
            float* cos_row = cos.at<float>(team) + token * half;
            float* sin_row = sin.at<float>(team) + token * half;
            for (int64_t i = 0; i < half; ++i) {
                const float frequency = is_dynamic ? dynamic_frequency(dynamic_base, i) : frequencies[i];
                const float angle = static_cast<float>(position) * frequency;
                cos_row[i] = std::cos(angle) * attention_factor;
                sin_row[i] = std::sin(angle) * attention_factor;
            }
        }
    }

  private:
    // In float32 throughout, as transformers computes it.
    float base_for(int64_t length) const {
        const auto rot_dim = static_cast<double>(2 * half);
        const float stretch = static_cast<float>(factor) * static_cast<float>(length) / static_cast<float>(threshold) -
                              static_cast<float>(factor - 1.0);
        return static_cast<float>(base) * std::pow(stretch, static_cast<float>(rot_dim / (rot_dim - 2.0)));
    }
    float dynamic_frequency(float dynamic_base, int64_t i) const {
        const float exponent = static_cast<float>(2 * i) / static_cast<float>(2 * half);
        return 1.0f / std::pow(dynamic_base, exponent);
    }
};

}  // namespace

std::unique_ptr<Kernel> make_rotary_table(const CallSpec& call, const Binding& binding) {
    CallReader reader(call, binding);
    auto kernel = std::make_unique<RotaryTable>();
    const std::string kind = reader.choice("kind", {"static", "longrope", "dynamic"});
    const int64_t rot_dim = reader.integer("rot_dim", 2, 256);
    if (rot_dim % 2 != 0) reader.fault("attribute rot_dim: wanted an even number, got " + std::to_string(rot_dim));
    kernel->half = rot_dim / 2;
    kernel->attention_factor = static_cast<float>(reader.number("attention_factor", 0.0, 1e6));
    // Attributes of other kinds may be there: they are read, so that they are checked, and not used.
    if (kind != "static" || reader.has_attribute("threshold")) {
        kernel->threshold = reader.integer("threshold", kind == "dynamic" ? 1 : 0, INT32_MAX);
    }
    if (kind == "dynamic" || reader.has_attribute("base")) kernel->base = reader.number("base", 0.0, 1e30);
    if (kind == "dynamic" || reader.has_attribute("factor")) kernel->factor = reader.number("factor", 0.0, 1e6);
    reader.input("positions");
    if (kind == "static") {
        reader.optional_input("prompt_lengths");
    } else {
        reader.input("prompt_lengths");
    }
    const int64_t table_bytes = reader.largest(Domain::kTokens) * kernel->half * 4;
    const auto frequencies = [&](const BoundOperand& operand) { return reinterpret_cast<const float*>(operand.data); };
    kernel->inv_freq = frequencies(reader.required("inv_freq", {"rows_f32.v0"}, kernel->half * 4));
    if (kind == "longrope") {
        kernel->scaling = Scaling::kLongrope;
        kernel->inv_freq_long = frequencies(reader.required("inv_freq_long", {"rows_f32.v0"}, kernel->half * 4));
    }
    if (kind == "dynamic") {
        kernel->scaling = Scaling::kDynamic;
        if (rot_dim < 4) reader.fault("attribute rot_dim: dynamic wants at least 4");
    }
    kernel->cos = reader.required("cos", {"f32"}, table_bytes);
    kernel->sin = reader.required("sin", {"f32"}, table_bytes);
    if (kernel->cos.per_thread() != kernel->sin.per_thread()) {
        reader.fault("operands cos and sin: one is per thread and the other is not");
    }
    reader.finish();
    return kernel;
}

}  // namespace enginery::ENGINERY_ISA
