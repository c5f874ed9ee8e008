// rms_norm: the residual sum, its norm and the conversion or quantization for the operator that reads it, row by row.
//
//   s = x + (post_weight ? norm(delta) * post_weight : delta)   written to `sum`
//   out = convert(weight ? norm(s) * weight : s)                f32, bf16, or int8 with a scale per row
#include <cmath>

#include "plugins/operators.h"
#include "plugins/share.h"
#include "plugins/simd.h"
#include "runtime/csrc/call_reader.h"

namespace enginery::ENGINERY_ISA {

namespace {

enum class Output : uint8_t { kF32, kBf16, kI8, kU8 };

// 1 / sqrt(mean of squares + eps). Four sums, so that additions overlap; always the same four.
float inverse_rms(const float* x, int64_t n, float eps) {
    VecF sums[4] = {zero(), zero(), zero(), zero()};
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
        for (int j = 0; j < 4; ++j) {
            const VecF value = load(x + i + j * kLanes);
            sums[j] = fma(value, value, sums[j]);
        }
    }
    for (int j = 0; i < n; i += kLanes, ++j) {
        const VecF value = load_part(x + i, lanes_left(n, i));
        sums[j] = fma(value, value, sums[j]);
    }
    const float total = sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
    return 1.0f / std::sqrt(total / static_cast<float>(n) + eps);
}

class RmsNorm : public Kernel {
  public:
    Domain domain = Domain::kTokens;
    Output output = Output::kF32;
    BoundOperand x, delta, sum, out, out_scale, out_sums;
    const float* post_weight = nullptr;
    const float* weight = nullptr;
    int64_t hidden = 0;
    float eps = 0.0f;

    void run(const Step& step, const Team& team) override {
        const Range rows = share_of(team, domain_size(domain, step), out.per_thread());
        auto* row_values = reinterpret_cast<float*>(team.scratch);
        for (int64_t row = rows.begin; row < rows.end; ++row) run_row(team, row, row_values);
    }

  private:
    void run_row(const Team& team, int64_t row, float* values) const {
        const int64_t stride = row_stride(hidden);
        const float* source = x.at<const float>(team) + row * stride;
        if (delta) {
            add_delta(source, delta.at<const float>(team) + row * stride, values);
            // Where every thread computes all rows, one of them is enough to write what they share.
            if (sum && (sum.per_thread() || !out.per_thread() || team.thread == 0)) {
                float* to = sum.at<float>(team) + row * stride;
                std::memcpy(to, values, static_cast<size_t>(hidden) * sizeof(float));
                zero_padding(to, hidden);
            }
            source = values;
        }
        if (weight != nullptr) {
            scale_row(source, weight, inverse_rms(source, hidden, eps), values);
            source = values;
        }
        write(team, row, source);
    }

    void add_delta(const float* source, const float* change, float* values) const {
        const VecF factor = set1(post_weight == nullptr ? 1.0f : inverse_rms(change, hidden, eps));
        for (int64_t i = 0; i < hidden; i += kLanes) {
            const int count = lanes_left(hidden, i);
            VecF d = load_part(change + i, count);
            if (post_weight != nullptr) d = d * factor * load_part(post_weight + i, count);
            store_part(values + i, load_part(source + i, count) + d, count);
        }
    }

    void scale_row(const float* source, const float* by, float factor, float* values) const {
        for (int64_t i = 0; i < hidden; i += kLanes) {
            const int count = lanes_left(hidden, i);
            store_part(values + i, load_part(source + i, count) * set1(factor) * load_part(by + i, count), count);
        }
    }

    void write(const Team& team, int64_t row, const float* values) const {
        const int64_t stride = row_stride(hidden);
        if (output == Output::kF32) {
            float* to = out.at<float>(team) + row * stride;
            std::memcpy(to, values, static_cast<size_t>(hidden) * sizeof(float));
            zero_padding(to, hidden);
        } else if (output == Output::kBf16) {
            uint16_t* to = out.at<uint16_t>(team) + row * stride;
            for (int64_t i = 0; i < hidden; i += kLanes) {
                const int count = lanes_left(hidden, i);
                store_bf16_part(to + i, load_part(values + i, count), count);
            }
            zero_padding(to, hidden);
        } else {
            auto* to = out.at<uint8_t>(team) + row * stride;
            quantize(values, to, out_scale.at<float>(team) + row);
            if (out_sums) add_up(reinterpret_cast<const int8_t*>(to), out_sums.at<int32_t>(team) + row * stride / 32);
        }
    }

    void quantize(const float* values, uint8_t* to, float* scale) const {
        *scale = largest_magnitude(values, hidden) / 127.0f;
        const VecF divisor = set1(*scale > 0.0f ? *scale : 1.0f);
        const VecI offset = set1_i32(output == Output::kU8 ? 128 : 0);
        for (int64_t i = 0; i < hidden; i += kLanes) {
            const int count = lanes_left(hidden, i);
            const VecF quotient = load_part(values + i, count) / divisor;
            const VecF bounded = max(set1(-127.0f), min(set1(127.0f), quotient));
            store_bytes_part(to + i, to_int(bounded) + offset, count);
        }
        zero_padding(to, hidden);
    }

    // What codes of four bits, which are 8 too large, make of each 32 values: -8 times their sum, to be added.
    void add_up(const int8_t* values, int32_t* sums) const {
        for (int64_t block = 0; block < row_stride(hidden) / 32; ++block) {
            int32_t sum = 0;
            for (int64_t i = 0; i < 32; ++i) sum += values[block * 32 + i];
            sums[block] = -8 * sum;
        }
    }
};

}  // namespace

std::unique_ptr<Kernel> make_rms_norm(const CallSpec& call, const Binding& binding) {
    CallReader reader(call, binding);
    auto kernel = std::make_unique<RmsNorm>();
    kernel->domain = reader.domain();
    // A row is worked on in a thread's scratch.
    kernel->hidden = reader.integer("hidden", 1, kThreadScratchBytes / 4);
    kernel->eps = static_cast<float>(reader.number("eps", 0.0, 1.0));
    const int64_t most = reader.largest(kernel->domain);
    const int64_t elements = most * row_stride(kernel->hidden);
    const std::string type = reader.layout("out", {"f32", "bf16", "i8", "u8"});
    const int64_t element_bytes = type == "f32" ? 4 : type == "bf16" ? 2 : 1;
    kernel->output = type == "f32"    ? Output::kF32
                     : type == "bf16" ? Output::kBf16
                     : type == "i8"   ? Output::kI8
                                      : Output::kU8;
    const auto vector = [&](const char* name) {
        return reinterpret_cast<const float*>(reader.optional(name, {"rows_f32.v0"}, kernel->hidden * 4).data);
    };
    kernel->x = reader.required("x", {"f32"}, elements * 4);
    kernel->delta = reader.optional("delta", {"f32"}, elements * 4);
    kernel->weight = vector("weight");
    if (kernel->delta) {
        kernel->post_weight = vector("post_weight");
        kernel->sum = reader.optional("sum", {"f32"}, elements * 4);
    }
    kernel->out = reader.required("out", {type}, elements * element_bytes);
    if (element_bytes == 1) kernel->out_scale = reader.required("out_scale", {"f32"}, most * 4);
    if (kernel->out_scale && kernel->out_scale.per_thread() != kernel->out.per_thread()) {
        reader.fault("operands out and out_scale: one is per thread and the other is not");
    }
    if (type == "i8") kernel->out_sums = reader.optional("out_sums", {"i32"}, elements / 32 * 4);
    if (kernel->out_sums && kernel->out_sums.per_thread() != kernel->out.per_thread()) {
        reader.fault("operands out and out_sums: one is per thread and the other is not");
    }
    if (kernel->out.per_thread() && kernel->sum && !kernel->sum.per_thread()) {
        // One thread writes the sum while others still read what it is made of.
        reader.refuse_overlap("x", elements * 4, "sum", elements * 4);
        reader.refuse_overlap("delta", elements * 4, "sum", elements * 4);
    }
    reader.finish();
    return kernel;
}

}  // namespace enginery::ENGINERY_ISA
