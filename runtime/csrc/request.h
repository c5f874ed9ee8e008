// What a caller asks for, and what the loop knows of it while it runs.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "sha256.h"

namespace enginery {

// How tokens are chosen, in this order: logit_bias, stop tokens masked below min_tokens, penalties, temperature, min_p,
// top_k, top_p. Temperature 0 takes the likeliest token, of equals the one with the lowest id.
struct Request {
    std::vector<int32_t> prompt_token_ids;
    int32_t max_tokens = 0;
    bool open_ended = false;  // max_tokens is as many as the context holds: nobody expects that many
    int32_t min_tokens = 0;
    std::vector<int32_t> stop_token_ids;
    float temperature = 1.0F;
    int32_t top_k = 0;  // 0 = off
    float top_p = 1.0F;
    float min_p = 0.0F;
    float presence_penalty = 0.0F;    // over generated tokens
    float frequency_penalty = 0.0F;   // over generated tokens
    float repetition_penalty = 1.0F;  // over prompt and generated tokens
    std::vector<std::pair<int32_t, float>> logit_bias;
    std::optional<uint64_t> seed;  // without one the loop draws one
    int32_t logprobs = -1;         // -1 = none; k = the sampled token's and the k likeliest
    int32_t prompt_logprobs = -1;
    std::string cache_salt;  // only requests of one salt share state

    bool has_penalties() const {
        return presence_penalty != 0.0F || frequency_penalty != 0.0F || repetition_penalty != 1.0F;
    }
};

struct TokenLogprob {
    int32_t token_id;
    float logprob;
    int32_t rank;  // from 1; of equals the lower id comes first
};

// How often each known token was generated; 0 for those of the prompt alone.
using TokenCounts = std::unordered_map<int32_t, int32_t>;

struct RequestLimits {
    int32_t vocab_size = 0;
    int32_t max_model_len = 0;    // tokens of prompt and output together
    int64_t capacity_tokens = 0;  // whose state fits in the blocks of an empty cache
};

// Throws RequestError with everything that is wrong, or CapacityError where the cache is too small for the prompt.
void check_request(const Request& request, const RequestLimits& limits);

// A request that has been admitted to the loop. There are no phases: num_computed_tokens catches up with token_ids,
// by chunks of a prompt or token by token, from the start again after a preemption.
struct Sequence {
    int64_t id = 0;
    Request request;
    uint64_t seed = 0;
    std::vector<int32_t> token_ids;  // the prompt, then what was generated
    int32_t num_prompt_tokens = 0;
    int32_t num_computed_tokens = 0;                         // their state is in the blocks
    int32_t max_length = 0;                                  // known tokens at which it ends
    int32_t num_prompt_logprobs = 0;                         // prompt positions whose logprobs were taken
    std::vector<std::vector<TokenLogprob>> prompt_logprobs;  // those, of the second prompt token and on
    int32_t num_preemptions = 0;
    int32_t num_cached_tokens = 0;  // prompt tokens that the prefix cache held at first admission
    bool running = false;           // else it waits; the scheduler's
    bool ended = false;             // and kept only for the step in flight
    int32_t drawn_row = -1;         // of the step in flight, which draws the last of token_ids; -1: that is known
    int64_t last_scheduled_step = -1;
    TokenCounts token_counts;  // kept only where penalties ask for it

    // At an executor that draws tokens (edit_slots.h).
    int32_t edit_slot = -1;
    bool edits_told = false;
    bool edits_masked = false;  // stop tokens are

    std::vector<std::vector<int32_t>> block_tables;  // [group][logical block], -1 where there is none
    std::vector<Digest> block_hashes;                // of full blocks of token_ids, as far as they were needed
    int32_t num_published_blocks = 0;                // full blocks that were offered to the prefix cache

    double arrival_time = 0;
    double first_scheduled_time = 0;
    double first_token_time = 0;
    int64_t outbox_epoch = -1;  // where in the outbox its undrained output is
    size_t outbox_index = 0;

    int32_t num_known_tokens() const { return static_cast<int32_t>(token_ids.size()); }
    // Whose state is to be computed: none, if the step in flight brings the last token.
    int32_t num_pending_tokens() const {
        return drawn_row >= 0 && num_known_tokens() >= max_length ? 0 : num_known_tokens() - num_computed_tokens;
    }
    int32_t num_generated_tokens() const { return num_known_tokens() - num_prompt_tokens; }
};

}  // namespace enginery
