// embedding: out [tokens, hidden] f32 = the rows of token_ids, times `scale`. A rank that holds rows vocab_start ..
// vocab_start + vocab - 1 writes zeros for tokens that others hold.
#include "plugins/operators.h"
#include "plugins/share.h"
#include "plugins/simd.h"
#include "runtime/csrc/call_reader.h"

namespace enginery::ENGINERY_ISA {

namespace {

enum class Table : uint8_t { kRowsF32, kRowsBf16, kPanelsF32, kPanelsBf16, kPanelsInt8 };

float widen_bf16(const std::byte* p) {
    uint16_t half;
    std::memcpy(&half, p, sizeof(half));
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

class Embedding : public Kernel {
  public:
    Table layout = Table::kRowsF32;
    const std::byte* table = nullptr;
    const float* table_scale = nullptr;
    BoundOperand out;
    int64_t hidden = 0, vocab = 0, vocab_start = 0;
    float scale = 1.0f;

    void run(const Step& step, const Team& team) override {
        const Range tokens = share_of(team, step.num_tokens, out.per_thread());
        for (int64_t token = tokens.begin; token < tokens.end; ++token) {
            float* to = out.at<float>(team) + token * row_stride(hidden);
            zero_padding(to, hidden);
            const int64_t row = int64_t{step.token_ids[token]} - vocab_start;
            if (row < 0 || row >= vocab) {
                std::memset(to, 0, static_cast<size_t>(hidden) * sizeof(float));
            } else {
                copy_row(row, to);
            }
        }
    }

  private:
    void copy_row(int64_t row, float* to) const {
        switch (layout) {
            case Table::kRowsF32:
                return copy_row(row, to, reinterpret_cast<const float*>(table) + row * hidden);
            case Table::kRowsBf16:
                return copy_row(row, to, reinterpret_cast<const uint16_t*>(table) + row * hidden);
            case Table::kPanelsF32:
                return copy_from_panel<1>(row, to, 1.0f);
            case Table::kPanelsBf16:
                return copy_from_panel<2>(row, to, 1.0f);
            case Table::kPanelsInt8:
                return copy_from_panel<4>(row, to, table_scale[row]);
        }
    }

    void copy_row(int64_t, float* to, const float* from) const {
        for (int64_t i = 0; i < hidden; i += kLanes) {
            const int count = lanes_left(hidden, i);
            store_part(to + i, load_part(from + i, count) * set1(scale), count);
        }
    }
    void copy_row(int64_t, float* to, const uint16_t* from) const {
        for (int64_t i = 0; i < hidden; i += kLanes) {
            const int count = lanes_left(hidden, i);
            store_part(to + i, load_bf16_part(from + i, count) * set1(scale), count);
        }
    }

    // A panel keeps `packed` consecutive columns of a row together in 4 bytes, 16 rows side by side.
    template <int packed>
    void copy_from_panel(int64_t row, float* to, float row_scale) const {
        const int64_t steps = row_stride(hidden) / packed;
        const std::byte* panel = table + row / 16 * steps * 64 + row % 16 * 4;
        for (int64_t i = 0; i < hidden; ++i) {
            const std::byte* from = panel + i / packed * 64 + i % packed * (4 / packed);
            if constexpr (packed == 1) {
                to[i] = *reinterpret_cast<const float*>(from) * scale;
            } else if constexpr (packed == 2) {
                to[i] = widen_bf16(from) * scale;
            } else {
                to[i] = static_cast<float>(static_cast<int8_t>(*from)) * row_scale * scale;
            }
        }
    }
};

}  // namespace

std::unique_ptr<Kernel> make_embedding(const CallSpec& call, const Binding& binding) {
    CallReader reader(call, binding);
    auto kernel = std::make_unique<Embedding>();
    kernel->hidden = reader.integer("hidden", 1, kLargestColumns);
    kernel->vocab = reader.integer("vocab", 1, kLargestColumns);
    kernel->vocab_start = reader.integer("vocab_start", 0, INT32_MAX);
    kernel->scale = static_cast<float>(reader.number("scale", -1e30, 1e30));
    reader.input("token_ids");
    const std::string layout =
        reader.layout("table", {"rows_f32.v0", "rows_bf16.v0", "f32_k1n16.v0", "bf16_k2n16.v0", "int8_k4n16.v0"});
    const int64_t rows = layout.starts_with("rows") ? kernel->vocab : round_up(kernel->vocab, 16);
    const int64_t columns = layout.starts_with("rows") ? kernel->hidden : row_stride(kernel->hidden);
    int64_t element_bytes = 4;
    if (layout == "rows_bf16.v0") kernel->layout = Table::kRowsBf16;
    if (layout == "f32_k1n16.v0") kernel->layout = Table::kPanelsF32;
    if (layout == "bf16_k2n16.v0") kernel->layout = Table::kPanelsBf16;
    if (layout == "int8_k4n16.v0") kernel->layout = Table::kPanelsInt8;
    if (layout == "rows_bf16.v0" || layout == "bf16_k2n16.v0") element_bytes = 2;
    if (layout == "int8_k4n16.v0") {
        element_bytes = 1;
        kernel->table_scale =
            reinterpret_cast<const float*>(reader.required("table_scale", {"scale_f32.v0"}, rows * 4).data);
    }
    kernel->table = reader.required("table", {layout}, rows * columns * element_bytes).data;
    kernel->out = reader.required("out", {"f32"}, reader.largest(Domain::kTokens) * row_stride(kernel->hidden) * 4);
    reader.finish();
    return kernel;
}

}  // namespace enginery::ENGINERY_ISA
