// Which sequences have penalties, biases or masks kept by an executor that draws tokens itself, and what it must be
// told.
#pragma once

#include <vector>

#include "executor.h"
#include "request.h"
#include "step.h"

namespace enginery {

class EditSlots {
  public:
    explicit EditSlots(const DrawLimits& limits);

    // Whether the executor draws tokens at all.
    bool are_there() const { return limits_.draws; }

    // Before the first reserve() of a step.
    void begin_step() { num_planned_ = 0; }

    // Makes sure that the executor can draw the sequence's next token in this step, and frees the slot of one that has
    // nothing to change any more. False if it cannot: then the caller must, for all of the step.
    bool reserve(Sequence& sequence);

    // How that token is drawn. Appends what the executor must be told before.
    Draw prepare(Sequence& sequence, std::vector<Edit>& edits) const;

    // The executor did not see the last token that was drawn: all must be told again.
    static void invalidate(Sequence& sequence) { sequence.edits_told = false; }

    void release(Sequence& sequence);

  private:
    DrawLimits limits_;
    std::vector<int32_t> free_;
    int64_t num_planned_ = 0;  // edits of the step, at most
};

}  // namespace enginery
