// What the null device draws: with the host's sampler, by the inputs that lie on the device.
#pragma once

#include <map>
#include <vector>

#include "executor.h"
#include "null_step.h"
#include "sampler.h"

namespace enginery {

class NullDraws {
  public:
    // Draws for the first num_rows rows, after the step's edits. logits: [vocab_size] of each row.
    void draw(const ExecutorSpec& spec, const Variables& variables, const NullStep::Find& find, int32_t num_rows,
              Executor& model);

    // Of each row of the step drawn last.
    const std::vector<int32_t>& tokens() const { return token_; }

    // The bytes of a buffer that the plan leaves its draws in; empty for another. rows: of the step, padding included.
    std::vector<std::byte> content(const DrawsSpec& draws, int32_t buffer) const;

  private:
    // What a slot keeps of its tokens.
    struct Edits {
        TokenCounts counts;
        std::map<int32_t, float> biases;
    };

    void apply_edits(const ExecutorSpec& spec, const Variables& variables, const NullStep::Find& find);

    std::map<int32_t, Edits> edits_;  // by slot
    std::vector<int32_t> token_, rank_, top_tokens_;
    std::vector<float> logprob_, top_logprobs_;
    SamplerScratch scratch_;
};

}  // namespace enginery
