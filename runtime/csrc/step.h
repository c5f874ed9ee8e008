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

// Tokens are packed: those of sequence s are [query_start[s], query_start[s + 1]), at consecutive positions.
// A row is a token whose logits are wanted; rows are in rising order of tokens.
struct Step {
    int32_t num_tokens = 0;
    int32_t num_rows = 0;
    int32_t num_sequences = 0;
    const int32_t* token_ids = nullptr;       // [num_tokens]
    const int32_t* positions = nullptr;       // [num_tokens]
    const int32_t* token_sequence = nullptr;  // [num_tokens], index into the step's sequences
    const int32_t* prompt_lengths = nullptr;  // [num_tokens], length of the prompt that the token's sequence began with
    const int32_t* query_start = nullptr;     // [num_sequences + 1]
    const int32_t* rows = nullptr;            // [num_rows], index of the token
    std::vector<GroupStep> groups;            // in the plan's order
};

}  // namespace enginery
