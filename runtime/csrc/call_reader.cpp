#include "call_reader.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "errors.h"

namespace enginery {

namespace {

std::string join(std::initializer_list<std::string_view> words) {
    std::string joined;
    for (const auto word : words) {
        if (!joined.empty()) joined += ", ";
        joined += word;
    }
    return joined;
}

std::string describe(const Attribute& value) {
    if (const auto* integer = std::get_if<int64_t>(&value)) return std::to_string(*integer);
    if (const auto* number = std::get_if<double>(&value)) return std::to_string(*number);
    if (const auto* boolean = std::get_if<bool>(&value)) return *boolean ? "true" : "false";
    return "'" + std::get<std::string>(value).substr(0, 100) + "'";
}

bool is_one_of(const std::string& word, std::initializer_list<std::string_view> words) {
    return std::find(words.begin(), words.end(), word) != words.end();
}

}  // namespace

void CallReader::fault(const std::string& what) { faults_.push_back(what); }

const Attribute* CallReader::find_attribute(const std::string& name) {
    read_attributes_.insert(name);
    const auto found = call_.attributes.find(name);
    if (found != call_.attributes.end()) return &found->second;
    fault("attribute " + name + " is missing");
    return nullptr;
}

int64_t CallReader::integer(const std::string& name, int64_t low, int64_t high) {
    const Attribute* value = find_attribute(name);
    if (value == nullptr) return low;
    const auto* integer = std::get_if<int64_t>(value);
    if (integer != nullptr && *integer >= low && *integer <= high) return *integer;
    fault("attribute " + name + ": wanted an integer from " + std::to_string(low) + " to " + std::to_string(high) +
          ", got " + describe(*value));
    return low;
}

double CallReader::number(const std::string& name, double low, double high) {
    const Attribute* value = find_attribute(name);
    if (value == nullptr) return low;
    double number = std::nan("");
    if (const auto* real = std::get_if<double>(value)) number = *real;
    if (const auto* integer = std::get_if<int64_t>(value)) number = static_cast<double>(*integer);
    if (number >= low && number <= high) return number;
    fault("attribute " + name + ": wanted a number from " + std::to_string(low) + " to " + std::to_string(high) +
          ", got " + describe(*value));
    return low;
}

std::string CallReader::text(const std::string& name) {
    const Attribute* value = find_attribute(name);
    if (value == nullptr) return "";
    if (const auto* text = std::get_if<std::string>(value)) return *text;
    fault("attribute " + name + ": wanted text, got " + describe(*value));
    return "";
}

std::string CallReader::choice(const std::string& name, std::initializer_list<std::string_view> choices) {
    const Attribute* value = find_attribute(name);
    if (value == nullptr) return std::string(*choices.begin());
    const auto* text = std::get_if<std::string>(value);
    if (text != nullptr && is_one_of(*text, choices)) return *text;
    fault("attribute " + name + ": wanted one of " + join(choices) + ", got " + describe(*value));
    return std::string(*choices.begin());
}

Domain CallReader::domain() { return choice("domain", {"tokens", "rows"}) == "rows" ? Domain::kRows : Domain::kTokens; }

int64_t CallReader::largest(Domain domain) const {
    const int64_t most = domain == Domain::kTokens ? call_.max_tokens : call_.max_rows;
    return std::clamp<int64_t>(most, 0, INT32_MAX);
}

const OperandSpec* CallReader::find_operand(const std::string& name) {
    read_operands_.insert(name);
    const auto found = call_.operands.find(name);
    if (found != call_.operands.end()) return &found->second;
    fault("operand " + name + " is missing");
    return nullptr;
}

void CallReader::input(const std::string& name) {
    const OperandSpec* operand = find_operand(name);
    if (operand == nullptr || (operand->kind == OperandKind::kInput && operand->name == name)) return;
    fault("operand " + name + ": wanted the step input " + name + ", got '" + operand->name + "'");
}

void CallReader::optional_input(const std::string& name) {
    if (has(name)) input(name);
}

std::string CallReader::layout(const std::string& name, std::initializer_list<std::string_view> layouts) {
    const OperandSpec* operand = find_operand(name);
    if (operand == nullptr) return std::string(*layouts.begin());
    if (is_one_of(operand->layout, layouts)) return operand->layout;
    fault("operand " + name + ": wanted layout " + join(layouts) + ", got '" + operand->layout.substr(0, 100) + "'");
    return std::string(*layouts.begin());
}

BoundOperand CallReader::required(const std::string& name, std::initializer_list<std::string_view> layouts,
                                  int64_t bytes) {
    if (!has(name)) {
        find_operand(name);
        return {};
    }
    layout(name, layouts);
    const OperandSpec& operand = call_.operands.at(name);
    if (operand.kind != OperandKind::kBuffer && operand.kind != OperandKind::kWeight) {
        fault("operand " + name + ": wanted a buffer or a weight");
        return {};
    }
    const auto bound = binding_.operands.find(name);
    if (bound == binding_.operands.end() || bound->second.data == nullptr) {
        fault("operand " + name + " is bound to nothing");
        return {};
    }
    if (operand.bytes < bytes) {
        fault("operand " + name + ": wanted " + std::to_string(bytes) + " bytes, got " + std::to_string(operand.bytes));
    }
    if (reinterpret_cast<uintptr_t>(bound->second.data) % 4 != 0) {
        fault("operand " + name + ": offset " + std::to_string(operand.offset) + " is not a multiple of 4");
    }
    return bound->second;
}

BoundOperand CallReader::optional(const std::string& name, std::initializer_list<std::string_view> layouts,
                                  int64_t bytes) {
    return has(name) ? required(name, layouts, bytes) : BoundOperand{};
}

LayerState CallReader::state(const std::string& name, int64_t num_kv_heads, int64_t head_dim) {
    LayerState state;
    const OperandSpec* operand = find_operand(name);
    if (operand == nullptr) return state;
    if (operand->kind != OperandKind::kState || operand->index < 0 ||
        static_cast<size_t>(operand->index) >= binding_.groups.size()) {
        fault("operand " + name + ": wanted a state group, got '" + operand->name + "'");
        return state;
    }
    const StateGroupSpec& group = binding_.groups[static_cast<size_t>(operand->index)];
    const auto bound = binding_.operands.find(name);
    if (bound == binding_.operands.end()) {
        fault("operand " + name + " is bound to nothing");
        return state;
    }
    const std::string where = "state group '" + group.name + "'";
    if (group.dtype != "f32" && group.dtype != "bf16" && group.dtype != "i8") {
        fault(where + ": wanted dtype f32, bf16 or i8, got '" + group.dtype + "'");
    }
    if (group.num_kv_heads != num_kv_heads || group.head_dim != head_dim) {
        fault(where + ": wanted " + std::to_string(num_kv_heads) + " KV heads of " + std::to_string(head_dim) +
              ", got " + std::to_string(group.num_kv_heads) + " of " + std::to_string(group.head_dim));
    }
    if (group.block_size < 16 || group.block_size > 1024 || group.block_size % 16 != 0) {
        fault(where + ": wanted a block size that is a multiple of 16 up to 1024, got " +
              std::to_string(group.block_size));
        return state;
    }
    if (group.num_layers < 1 || group.num_layers > (1 << 16) || operand->layer < 0 ||
        operand->layer >= group.num_layers) {
        fault(where + ": layer " + std::to_string(operand->layer) + " of " + std::to_string(group.num_layers));
        return state;
    }
    const int64_t element_bytes = group.dtype == "f32" ? 4 : group.dtype == "bf16" ? 2 : 1;
    const int64_t scale_bytes = group.dtype == "i8" ? 4 : 0;  // of one token: float16 of K, float16 of V
    state.head_bytes = group.block_size * ((head_dim + round_up(head_dim, 16)) * element_bytes + scale_bytes);
    state.block_bytes = group.num_layers * num_kv_heads * state.head_bytes;
    if (group.block_bytes != state.block_bytes) {
        fault(where + ": wanted blocks of " + std::to_string(state.block_bytes) + " bytes, got " +
              std::to_string(group.block_bytes));
    }
    state.data = bound->second.data + operand->layer * num_kv_heads * state.head_bytes;
    state.group = operand->index;
    state.block_size = group.block_size;
    state.window = group.window;
    state.num_blocks = binding_.num_blocks[static_cast<size_t>(operand->index)];
    state.dtype = group.dtype;
    return state;
}

void CallReader::refuse_overlap(const std::string& left, int64_t left_bytes, const std::string& right,
                                int64_t right_bytes) {
    const auto first = binding_.operands.find(left);
    const auto second = binding_.operands.find(right);
    if (first == binding_.operands.end() || second == binding_.operands.end()) return;
    const auto before = std::less_equal<const std::byte*>();
    const std::byte* first_end = first->second.data + left_bytes;
    const std::byte* second_end = second->second.data + right_bytes;
    if (before(first_end, second->second.data) || before(second_end, first->second.data)) return;
    fault("operands " + left + " and " + right + " share memory, which this operator cannot do");
}

void CallReader::finish() {
    for (const auto& [name, value] : call_.attributes) {
        if (!read_attributes_.contains(name)) fault("attribute " + name + " = " + describe(value) + " is not known");
    }
    for (const auto& [name, operand] : call_.operands) {
        if (!read_operands_.contains(name)) fault("operand " + name + " is not known");
    }
    for (const int64_t most : {call_.max_tokens, call_.max_rows, call_.max_sequences}) {
        if (most < 0 || most > INT32_MAX) fault("a step of " + std::to_string(most) + " tokens, rows or sequences");
    }
    if (faults_.empty()) return;
    std::string message = "Operator " + call_.op + " version " + std::to_string(call_.version) + ": ";
    for (size_t i = 0; i < faults_.size(); ++i) message += (i == 0 ? "" : "; ") + faults_[i];
    throw EngineFormatError(message +
                            ". The plan is damaged or was not made for this runtime: build the engine again.");
}

}  // namespace enginery
