// Expressions of a plan (engines/expressions.py): sizes as functions of a step's variables, evaluated in every step.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace enginery {

// decodes: sequences with one token in the step; tiles: pieces of the others' tokens; max_blocks: the same in all
// steps; the others: engines/expressions.py.
enum class Variable : uint8_t {
    kTokens,
    kRows,
    kSequences,
    kDecodes,
    kTiles,
    kMaxBlocks,
    kDrawn,
    kEdited,
    kRanked,
    kListed,
    kEdits
};
constexpr size_t kNumVariables = 11;
using Variables = std::array<int64_t, kNumVariables>;

// The variable called `name`. Throws EngineFormatError.
Variable find_variable(const std::string& name);

inline int64_t& value_of(Variables& variables, Variable variable) { return variables[static_cast<size_t>(variable)]; }
inline int64_t value_of(const Variables& variables, Variable variable) {
    return variables[static_cast<size_t>(variable)];
}

// In postfix order. None of its operators falls when a variable grows; what exceeds kLargest is some number above it.
class Expression {
  public:
    static constexpr int64_t kLargest = int64_t{1} << 48;
    static constexpr size_t kDeepest = 16;

    // Appends. Throw EngineFormatError for what is no expression: an operator without two values before it, a divisor
    // that is no positive constant, too deep a nesting.
    void push_constant(int64_t value);
    void push_variable(Variable variable);
    void push_operator(const std::string& name);

    // Throws EngineFormatError unless exactly one value is left.
    void finish() const;

    int64_t evaluate(const Variables& variables) const;

  private:
    enum class Operator : uint8_t { kConstant, kVariable, kAdd, kMultiply, kCeilDiv, kRoundUp, kMin, kMax };

    struct Term {
        Operator op = Operator::kConstant;
        int64_t value = 0;  // of a constant; of a variable its index
    };

    void push_value(Term term);

    std::vector<Term> terms_;
    size_t height_ = 0;  // values that a machine with a stack holds after the terms
};

}  // namespace enginery
