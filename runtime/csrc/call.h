// A checked `call` of the plan: plain data that Python has parsed and bounds-checked against the buffers.
// An operator binds a call once, at load, and refuses operands smaller than what it will touch.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <variant>
#include <vector>

namespace enginery {

// Of launches alone: kPeers, a table of where a buffer lies on every rank.
enum class OperandKind : uint8_t { kBuffer, kWeight, kInput, kState, kPeers };

// A range of bytes that a call reads or writes.
struct OperandSpec {
    OperandKind kind = OperandKind::kBuffer;
    int32_t index = 0;   // buffer, weight or state group; for kInput unused
    std::string name;    // of the weight or the step input, for messages
    std::string layout;  // of the weight: "int8_k4n16.v0", "rows_f32.v0", ...; of a buffer: "f32", "bf16", "i8", "u8"
    int64_t offset = 0;  // bytes from the start of the buffer or tensor
    int64_t bytes = 0;   // readable or writable from offset on, with every variable at its largest
    int32_t layer = -1;  // kState: index of the layer within its group
};

using Attribute = std::variant<int64_t, double, std::string, bool>;

// A call runs when every range holds: min <= variable <= max.
struct GuardRange {
    std::string variable;  // "tokens", "rows" or "sequences"
    int64_t min = 0;
    int64_t max = 0;
};

struct CallSpec {
    std::string op;
    int32_t version = 0;
    int32_t region = 0;  // calls of one region run without a barrier between them; regions are separated by one
    std::map<std::string, OperandSpec> operands;
    std::map<std::string, Attribute> attributes;
    std::vector<GuardRange> guard;
    // Largest values of the step's variables under which this call runs.
    int64_t max_tokens = 0;
    int64_t max_rows = 0;
    int64_t max_sequences = 0;
};

}  // namespace enginery
