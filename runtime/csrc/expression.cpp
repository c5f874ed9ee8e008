#include "expression.h"

#include <algorithm>

#include "errors.h"

namespace enginery {
namespace {

constexpr std::array<const char*, kNumVariables> kVariableNames = {
    "tokens", "rows", "sequences", "decodes", "tiles", "max_blocks", "drawn", "edited", "ranked", "listed", "edits"};
constexpr std::array<const char*, 6> kOperatorNames = {"+", "*", "ceil_div", "round_up", "min", "max"};

[[noreturn]] void refuse(const std::string& what) {
    throw EngineFormatError("The plan has " + what + ". The engine is damaged: build it again.");
}

int64_t bounded(int64_t value) { return std::min(value, Expression::kLargest + 1); }

int64_t multiply(int64_t left, int64_t right) {
    if (left == 0 || right == 0) return 0;
    return left > (Expression::kLargest + 1) / right ? Expression::kLargest + 1 : bounded(left * right);
}

}  // namespace

Variable find_variable(const std::string& name) {
    const auto found = std::find(kVariableNames.begin(), kVariableNames.end(), name);
    if (found == kVariableNames.end()) refuse("a variable '" + name.substr(0, 100) + "', which no step has");
    return static_cast<Variable>(found - kVariableNames.begin());
}

void Expression::push_value(Term term) {
    // The right side of every nested operator waits for its left: one value for each level, and one more.
    if (height_ > kDeepest + 1) refuse("an expression that is nested too deeply");
    terms_.push_back(term);
    ++height_;
}

void Expression::push_constant(int64_t value) {
    if (value < 0 || value > kLargest) refuse("the number " + std::to_string(value) + " in an expression");
    push_value({Operator::kConstant, value});
}

void Expression::push_variable(Variable variable) { push_value({Operator::kVariable, static_cast<int64_t>(variable)}); }

void Expression::push_operator(const std::string& name) {
    const auto found = std::find(kOperatorNames.begin(), kOperatorNames.end(), name);
    if (found == kOperatorNames.end()) refuse("an operator '" + name.substr(0, 100) + "' in an expression");
    const auto op = static_cast<Operator>(static_cast<size_t>(Operator::kAdd) +
                                          static_cast<size_t>(found - kOperatorNames.begin()));
    if (height_ < 2) refuse("an operator without operands");
    const Term& right = terms_.back();
    const bool divides = op == Operator::kCeilDiv || op == Operator::kRoundUp;
    if (divides && (right.op != Operator::kConstant || right.value < 1)) {
        refuse("a " + name + " by what is no positive number");
    }
    terms_.push_back({op, 0});
    --height_;
}

void Expression::finish() const {
    if (height_ != 1) refuse("an expression of " + std::to_string(height_) + " values");
}

int64_t Expression::evaluate(const Variables& variables) const {
    std::array<int64_t, kDeepest + 3> stack{};
    size_t height = 0;
    for (const Term& term : terms_) {
        if (term.op == Operator::kConstant || term.op == Operator::kVariable) {
            const bool constant = term.op == Operator::kConstant;
            stack[height++] = constant ? term.value : variables[static_cast<size_t>(term.value)];
            continue;
        }
        const int64_t right = stack[--height];
        int64_t& left = stack[height - 1];
        switch (term.op) {
            case Operator::kAdd:
                left = bounded(left + right);
                break;
            case Operator::kMultiply:
                left = multiply(left, right);
                break;
            case Operator::kCeilDiv:
                left = (left + right - 1) / right;
                break;
            case Operator::kRoundUp:
                left = (left + right - 1) / right * right;
                break;
            case Operator::kMin:
                left = std::min(left, right);
                break;
            default:
                left = std::max(left, right);
                break;
        }
    }
    return stack[0];
}

}  // namespace enginery
