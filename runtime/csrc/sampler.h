// Chooses a token from a row of logits as a request asks, and tells the logprobs of the unmodified distribution.
#pragma once

#include <cstdint>
#include <vector>

#include "filters.h"
#include "kept_logits.h"
#include "request.h"

namespace enginery {

constexpr float kGreedyBelow = 1e-5F;  // temperatures that only overflow

struct SampleResult {
    enum class Fault : uint8_t { kNone, kNonFinite, kNothingAllowed };

    int32_t token_id = -1;
    Fault fault = Fault::kNone;
    std::vector<TokenLogprob> logprobs;  // the token itself first, then the likeliest; empty if not asked for
};

// Scratch memory of one thread.
struct SamplerScratch {
    std::vector<float> row;
    std::vector<KeptLogit> largest;
    FilterScratch filters;
};

// What the logits are changed and drawn by; all but the logits outlive the call.
struct SampleInputs {
    const Request& request;
    const TokenCounts& token_counts;  // filled if the request has penalties
    uint64_t seed;
    int32_t num_generated;  // tokens before this one: with the seed it fixes the random number
};

// Draws the next token. The same inputs give the same token, whatever else is in the step.
void sample(const float* logits, int32_t vocab_size, const SampleInputs& inputs, SamplerScratch& scratch,
            SampleResult& result);

// How many of the largest logits sample_largest needs, `most` at the most, of a vocabulary; 0 where it takes all.
int32_t logits_needed(const Request& request, int32_t num_generated, int32_t most, int32_t vocab_size);

// As `sample`, from the logits_needed largest alone, which are in falling order; it leaves them in another. None are
// there where a logit is not finite.
void sample_largest(std::vector<KeptLogit>& largest, const SampleInputs& inputs, SamplerScratch& scratch,
                    SampleResult& result);

// Logprobs of `token_id`, which is given: of prompts.
void take_logprobs(const float* logits, int32_t vocab_size, int32_t token_id, int32_t num_logprobs,
                   SamplerScratch& scratch, SampleResult& result);

}  // namespace enginery
