// The inputs of a step as kernels read them, one behind the other, so that one copy brings them to the device.
//
// Where each lies depends on the step's variables alone: steps with the same variables have the same addresses, which a
// captured graph needs. A step that is smaller than its variables say is padded: tokens with slot -1, at position 0 of
// a sequence of their own, whose row of the block table is all zeros. drawn, edited, ranked and listed are all rows or
// 0.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "executor.h"

namespace enginery {

class StepInputs {
  public:
    explicit StepInputs(const ExecutorSpec& spec);

    // The index of an input, group by group for those that each state group has. Throws EngineFormatError.
    size_t find(const std::string& name, int32_t group) const;

    struct Input {
        std::string name;
        int32_t group = -1;
        int64_t offset = 0;  // in the step that place() was called for
        int64_t bytes = 0;
    };
    const std::vector<Input>& inputs() const { return inputs_; }

    // The variables of a step as it is.
    Variables variables_of(const Step& step) const;

    // Places every input for steps of these variables; returns the bytes of all.
    int64_t place(const Variables& variables);

    // Writes the step's inputs where place() has put them.
    void pack(const Step& step, const Variables& variables, std::byte* to) const;

  private:
    void pack_tokens(const Step& step, const Variables& variables, std::byte* to) const;
    void pack_pieces(const Step& step, std::byte* to) const;
    void pack_draws(const Step& step, const Variables& variables, std::byte* to) const;
    void pack_group(const Step& step, const Variables& variables, size_t group, std::byte* to) const;

    int32_t tile_tokens_;
    int32_t max_blocks_;
    std::vector<StateGroupSpec> groups_;
    std::vector<Input> inputs_;
};

}  // namespace enginery
