// One step of the serving loop, as an executor sees it: packed tokens of several sequences and where their state lives.
#pragma once

#include <cstdint>
#include <vector>

namespace enginery {

// Where the sequences of a step keep the state of one group of layers.
struct GroupStep {
    const int32_t* block_table = nullptr;  // [num_sequences, max_blocks], physical block or -1 where there is none
    int32_t max_blocks = 0;                // row stride of block_table
    const int64_t* slots = nullptr;        // [num_tokens], block * block_size + offset; -1 writes nothing
};

// How an executor that draws tokens itself is to draw one row's (request.h).
struct Draw {
    float temperature = 0.0F;
    int32_t top_k = 0;
    float top_p = 1.0F;
    float min_p = 0.0F;
    uint64_t seed = 0;
    int32_t num_generated = 0;
    int32_t num_logprobs = -1;  // -1: none, not even the token's own
    int32_t edit_slot = -1;     // of the sequence's edits, -1 where there are none
    float presence_penalty = 0.0F;
    float frequency_penalty = 0.0F;
    float repetition_penalty = 1.0F;
};

// What the executor keeps of a sequence's token from this step on: its count and bias. Drawn tokens it counts itself.
struct Edit {
    int32_t slot = 0;
    int32_t token = -1;  // -1: forgets all of the slot, before the step's other edits
    int32_t count = 0;   // 0 unknown, 1 of the prompt alone, 1 + n generated n times
    float bias = 0.0F;   // -infinity: not allowed
};

// Tokens are packed: those of sequence s are [query_start[s], query_start[s + 1]), at consecutive positions.
// A row is a token whose logits are wanted; rows are in rising order of tokens.
struct Step {
    int32_t num_tokens = 0;
    int32_t num_rows = 0;
    int32_t num_sequences = 0;
    const int32_t* token_ids = nullptr;       // [num_tokens]; -1 - row: what the step before draws for that row
    const int32_t* positions = nullptr;       // [num_tokens]
    const int32_t* token_sequence = nullptr;  // [num_tokens], index into the step's sequences
    const int32_t* prompt_lengths = nullptr;  // [num_tokens], length of the prompt that the token's sequence began with
    const int32_t* query_start = nullptr;     // [num_sequences + 1]
    const int32_t* rows = nullptr;            // [num_rows], index of the token
    std::vector<GroupStep> groups;            // in the plan's order
    // [num_rows], how many of the row's largest logits are wanted, 0 for all; or null: all of all rows.
    const int32_t* keep = nullptr;
    const Draw* draws = nullptr;  // [num_rows], or null where the caller wants the logits
    const Edit* edits = nullptr;  // [num_edits]; only with draws
    int32_t num_edits = 0;
};

}  // namespace enginery
