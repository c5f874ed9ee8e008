// Reads a call for an operator that binds it: every attribute and operand is asked for by name, checked, and what
// nobody asked for is refused. Engines come from anywhere, so nothing is believed; all faults are reported at once.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "call.h"
#include "plugins/kernel.h"

namespace enginery {

inline constexpr int64_t kLargestColumns = int64_t{1} << 24;  // so that no product of sizes leaves int64

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Elements in a row of an activation buffer.
constexpr int64_t row_stride(int64_t columns) { return round_up(columns, 64); }

enum class Domain : uint8_t { kTokens, kRows };

inline int64_t domain_size(Domain domain, const Step& step) {
    return domain == Domain::kTokens ? step.num_tokens : step.num_rows;
}

// The state of one layer in a group: of block b and KV head h at data + b * block_bytes + h * head_bytes.
struct LayerState {
    std::byte* data = nullptr;
    int32_t group = 0;
    int64_t block_bytes = 0;
    int64_t head_bytes = 0;
    int32_t block_size = 0;
    int32_t num_blocks = 0;
    int32_t window = 0;  // blocks behind it are gone; 0 = none ever is
    std::string dtype;
};

class CallReader {
  public:
    CallReader(const CallSpec& call, const Binding& binding) : call_(call), binding_(binding) {}

    // Attributes. Where one is missing or wrong the fault is kept for finish(), and a value within bounds returned.
    int64_t integer(const std::string& name, int64_t low, int64_t high);
    double number(const std::string& name, double low, double high);
    std::string choice(const std::string& name, std::initializer_list<std::string_view> choices);
    std::string text(const std::string& name);
    bool has_attribute(const std::string& name) const { return call_.attributes.contains(name); }
    Domain domain();

    // Operands.
    bool has(const std::string& name) const { return call_.operands.contains(name); }
    void input(const std::string& name);
    void optional_input(const std::string& name);
    // One of `layouts` ("f32", "rows_f32.v0", ...); the first where it is missing or another.
    std::string layout(const std::string& name, std::initializer_list<std::string_view> layouts);
    // A buffer or weight of at least `bytes`, in one of `layouts`.
    BoundOperand required(const std::string& name, std::initializer_list<std::string_view> layouts, int64_t bytes);
    BoundOperand optional(const std::string& name, std::initializer_list<std::string_view> layouts, int64_t bytes);
    LayerState state(const std::string& name, int64_t num_kv_heads, int64_t head_dim);

    // The most tokens or rows that a step may have.
    int64_t largest(Domain domain) const;
    // Two operands that must not share memory, since one is written while others still read the other.
    void refuse_overlap(const std::string& left, int64_t left_bytes, const std::string& right, int64_t right_bytes);
    void fault(const std::string& what);
    // Refuses what nobody asked for; throws EngineFormatError with all faults.
    void finish();

  private:
    const OperandSpec* find_operand(const std::string& name);
    const Attribute* find_attribute(const std::string& name);

    const CallSpec& call_;
    const Binding& binding_;
    std::set<std::string> read_attributes_;
    std::set<std::string> read_operands_;
    std::vector<std::string> faults_;
};

}  // namespace enginery
