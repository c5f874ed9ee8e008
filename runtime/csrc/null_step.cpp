#include "null_step.h"

#include <algorithm>

#include "errors.h"

namespace enginery {
namespace {

[[noreturn]] void refuse(const std::string& what) { throw EngineryError("null device: " + what); }

}  // namespace

NullStep::NullStep(const ExecutorSpec& spec, const Variables& variables, const Find& find,
                   const std::vector<int32_t>& drawn)
    : variables_(variables) {
    const int64_t tokens = value_of(variables, Variable::kTokens), rows = value_of(variables, Variable::kRows);
    const int64_t table = (value_of(variables, Variable::kSequences) + 1) * spec.cuda.max_blocks;
    const auto* token_ids = read_input<int32_t>(find, "token_ids", -1, tokens);
    token_ids_.assign(token_ids, token_ids + tokens);
    for (int32_t& token : token_ids_) {
        const int64_t row = -1 - int64_t{token};
        if (row >= static_cast<int64_t>(drawn.size())) refuse("a token of row " + std::to_string(row) + " before");
        if (row < 0) continue;
        token = drawn[static_cast<size_t>(row)];
        // Where none was drawn the embedding gives zeros, and its sequence ends before anybody reads what comes of
        // that.
        if (token < 0 || token >= spec.vocab_size) token = 0;
    }
    step_.token_ids = token_ids_.data();
    step_.positions = read_input<int32_t>(find, "positions", -1, tokens);
    step_.prompt_lengths = read_input<int32_t>(find, "prompt_lengths", -1, tokens);
    step_.token_sequence = read_input<int32_t>(find, "token_sequence", -1, tokens);
    step_.rows = read_input<int32_t>(find, "rows", -1, rows);
    for (size_t group = 0; group < spec.groups.size(); ++group) {
        const auto index = static_cast<int32_t>(group);
        const auto* slots = read_input<int64_t>(find, "slots", index, tokens);
        const auto* blocks = read_input<int32_t>(find, "block_table", index, table);
        step_.groups.push_back({blocks, spec.cuda.max_blocks, slots});
    }
    const int64_t* slots = step_.groups.front().slots;
    step_.num_tokens = static_cast<int32_t>(std::find(slots, slots + tokens, -1) - slots);
    step_.num_rows = static_cast<int32_t>(
        std::find_if(step_.rows, step_.rows + rows, [&](int32_t r) { return r >= step_.num_tokens; }) - step_.rows);
    for (int32_t token = 0; token < step_.num_tokens; ++token) {
        if (token == 0 || step_.token_sequence[token] != step_.token_sequence[token - 1]) query_start_.push_back(token);
    }
    step_.num_sequences = static_cast<int32_t>(query_start_.size());
    query_start_.push_back(step_.num_tokens);
    step_.query_start = query_start_.data();
    check_padding(spec);
    check_pieces(spec, find);
}

void NullStep::check_padding(const ExecutorSpec& spec) const {
    const int64_t tokens = value_of(variables_, Variable::kTokens), rows = value_of(variables_, Variable::kRows);
    const int64_t spare = value_of(variables_, Variable::kSequences);
    for (int64_t token = step_.num_tokens; token < tokens; ++token) {
        const bool writes = std::any_of(step_.groups.begin(), step_.groups.end(),
                                        [&](const GroupStep& group) { return group.slots[token] != -1; });
        if (writes || step_.positions[token] != 0 || step_.token_sequence[token] != spare) {
            refuse("token " + std::to_string(token) + " is padding and not at position 0 of the spare sequence");
        }
    }
    for (int64_t row = step_.num_rows; row < rows; ++row) {
        if (step_.rows[row] < step_.num_tokens || step_.rows[row] >= tokens)
            refuse("a padding row is no padding token");
    }
    for (size_t group = 0; group < spec.groups.size(); ++group) {
        const int32_t* blocks = step_.groups[group].block_table + spare * spec.cuda.max_blocks;
        if (std::any_of(blocks, blocks + spec.cuda.max_blocks, [](int32_t block) { return block != 0; })) {
            refuse("the spare row of a block table is not all zeros");
        }
    }
}

// Attention must take every token once, as a decode or in a tile.
void NullStep::check_pieces(const ExecutorSpec& spec, const Find& find) const {
    const int64_t tokens = value_of(variables_, Variable::kTokens);
    const int64_t decodes = value_of(variables_, Variable::kDecodes), tiles = value_of(variables_, Variable::kTiles);
    const auto* decode = read_input<int32_t>(find, "decode_tokens", -1, decodes);
    const auto* tile = read_input<int32_t>(find, "tiles", -1, 2 * tiles);
    std::vector<int32_t> times(static_cast<size_t>(tokens), 0);
    const auto take = [&](const char* what, int64_t first, int64_t count) {
        if (first < 0 || count < 1 || first > tokens - count) refuse(std::string(what) + " lies outside of the step");
        for (int64_t token = first; token < first + count; ++token) {
            ++times[static_cast<size_t>(token)];
            if (step_.token_sequence[token] != step_.token_sequence[first]) {
                refuse(std::string(what) + " is of two sequences");
            }
        }
    };
    for (int64_t i = 0; i < decodes; ++i) take("a decode", decode[i], 1);
    for (int64_t i = 0; i < tiles; ++i) {
        if (tile[2 * i + 1] > spec.cuda.tile_tokens) refuse("a tile is larger than the plan says");
        take("a tile", tile[2 * i], tile[2 * i + 1]);
    }
    const auto found = std::find_if(times.begin(), times.end(), [](int32_t count) { return count != 1; });
    if (found != times.end()) {
        refuse("attention takes token " + std::to_string(found - times.begin()) + " " + std::to_string(*found) +
               " times");
    }
}

}  // namespace enginery
