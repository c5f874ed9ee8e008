#include "step_inputs.h"

#include <algorithm>
#include <type_traits>
#include <utility>

#include "errors.h"
#include "sampler.h"

namespace enginery {
namespace {

constexpr int64_t kAlignment = 256;

// What every step has, then what it has for each state group.
enum Single : uint8_t {
    kTokenIds,
    kPositions,
    kPromptLengths,
    kTokenSequence,
    kRows,
    kDecodeTokens,
    kTiles,
    // How each row is drawn.
    kTemperature,
    kTopK,
    kTopP,
    kMinP,
    kSeed,
    kNumGenerated,
    kEditSlots,
    kPresencePenalty,
    kFrequencyPenalty,
    kRepetitionPenalty,
    // What edits each.
    kEditedSlots,
    kEditedTokens,
    kEditedCounts,
    kEditedBiases,
    kSingles
};
enum OfGroup : uint8_t { kSlots, kBlockTable, kOfGroup };

constexpr std::array<const char*, kSingles> kSingleNames = {"token_ids",
                                                            "positions",
                                                            "prompt_lengths",
                                                            "token_sequence",
                                                            "rows",
                                                            "decode_tokens",
                                                            "tiles",
                                                            "temperature",
                                                            "top_k",
                                                            "top_p",
                                                            "min_p",
                                                            "seed",
                                                            "num_generated",
                                                            "edit_slots",
                                                            "presence_penalty",
                                                            "frequency_penalty",
                                                            "repetition_penalty",
                                                            "edited_slots",
                                                            "edited_tokens",
                                                            "edited_counts",
                                                            "edited_biases"};
constexpr std::array<const char*, kOfGroup> kGroupNames = {"slots", "block_table"};

int64_t bytes_of(size_t input, const Variables& variables) {
    constexpr int64_t kElement = sizeof(int32_t);
    if (input == kSeed) return value_of(variables, Variable::kRows) * static_cast<int64_t>(sizeof(uint64_t));
    if (input >= kEditedSlots) return value_of(variables, Variable::kEdits) * kElement;
    if (input >= kTemperature || input == kRows) return value_of(variables, Variable::kRows) * kElement;
    if (input == kDecodeTokens) return value_of(variables, Variable::kDecodes) * kElement;
    if (input == kTiles) return 2 * value_of(variables, Variable::kTiles) * kElement;
    return value_of(variables, Variable::kTokens) * kElement;
}

template <typename T>
T* at(std::byte* base, int64_t offset) {
    return reinterpret_cast<T*>(base + offset);
}

// `values`, then `padding` up to `count`.
void write(int32_t* to, const int32_t* values, int64_t num_values, int64_t count, int32_t padding) {
    std::copy_n(values, num_values, to);
    std::fill(to + num_values, to + count, padding);
}

int32_t tokens_of(const Step& step, int32_t sequence) {
    return step.query_start[sequence + 1] - step.query_start[sequence];
}

}  // namespace

StepInputs::StepInputs(const ExecutorSpec& spec)
    : tile_tokens_(spec.cuda.tile_tokens), max_blocks_(spec.cuda.max_blocks), groups_(spec.groups) {
    for (const char* name : kSingleNames) inputs_.push_back({name, -1});
    for (size_t group = 0; group < groups_.size(); ++group) {
        for (const char* name : kGroupNames) inputs_.push_back({name, static_cast<int32_t>(group)});
    }
}

size_t StepInputs::find(const std::string& name, int32_t group) const {
    for (size_t index = 0; index < inputs_.size(); ++index) {
        if (inputs_[index].name == name && (inputs_[index].group < 0 || inputs_[index].group == group)) return index;
    }
    throw EngineFormatError("The plan wants a step input '" + name.substr(0, 100) + "' of state group " +
                            std::to_string(group) +
                            ", which no step has. Upgrade enginery, or build the engine again.");
}

Variables StepInputs::variables_of(const Step& step) const {
    int64_t decodes = 0, tiles = 0;
    for (int32_t sequence = 0; sequence < step.num_sequences; ++sequence) {
        const int32_t tokens = tokens_of(step, sequence);
        if (tokens == 1) {
            ++decodes;
        } else if (tile_tokens_ > 0) {
            tiles += (tokens + tile_tokens_ - 1) / tile_tokens_;
        }
    }
    Variables variables{step.num_tokens, step.num_rows, step.num_sequences, decodes, tiles, max_blocks_};
    for (int32_t row = 0; step.draws != nullptr && row < step.num_rows; ++row) {
        const Draw& draw = step.draws[row];
        const auto note = [&](Variable variable, bool holds) {
            if (holds) value_of(variables, variable) = step.num_rows;
        };
        note(Variable::kDrawn, draw.temperature >= kGreedyBelow);
        note(Variable::kEdited, draw.edit_slot >= 0);
        note(Variable::kRanked, draw.num_logprobs >= 0);
        note(Variable::kListed, draw.num_logprobs > 0);
    }
    value_of(variables, Variable::kEdits) = step.num_edits;
    return variables;
}

int64_t StepInputs::place(const Variables& variables) {
    int64_t position = 0;
    const auto put = [&position](Input& input, int64_t bytes) {
        input.offset = position;
        input.bytes = bytes;
        position += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    };
    for (size_t index = 0; index < kSingles; ++index) {
        put(inputs_[index], bytes_of(index, variables));
    }
    const int64_t tokens = value_of(variables, Variable::kTokens);
    const int64_t table_rows = value_of(variables, Variable::kSequences) + 1;  // the last is that of padding
    for (size_t group = 0; group < groups_.size(); ++group) {
        Input* of_group = &inputs_[kSingles + group * kOfGroup];
        put(of_group[kSlots], tokens * static_cast<int64_t>(sizeof(int64_t)));
        put(of_group[kBlockTable], table_rows * max_blocks_ * static_cast<int64_t>(sizeof(int32_t)));
    }
    return position;
}

void StepInputs::pack(const Step& step, const Variables& variables, std::byte* to) const {
    pack_tokens(step, variables, to);
    pack_pieces(step, to);
    pack_draws(step, variables, to);
    for (size_t group = 0; group < groups_.size(); ++group) pack_group(step, variables, group, to);
}

void StepInputs::pack_tokens(const Step& step, const Variables& variables, std::byte* to) const {
    const int64_t tokens = value_of(variables, Variable::kTokens), rows = value_of(variables, Variable::kRows);
    const auto spare = static_cast<int32_t>(value_of(variables, Variable::kSequences));
    const auto put = [&](Single input, const int32_t* values, int32_t padding) {
        write(at<int32_t>(to, inputs_[input].offset), values, step.num_tokens, tokens, padding);
    };
    put(kTokenIds, step.token_ids, 0);
    put(kPositions, step.positions, 0);
    put(kPromptLengths, step.prompt_lengths, 1);
    put(kTokenSequence, step.token_sequence, spare);
    // Where rows are padded, so are tokens, and as much: the padded rows are the padded tokens.
    auto* row = at<int32_t>(to, inputs_[kRows].offset);
    std::copy_n(step.rows, step.num_rows, row);
    for (int64_t i = step.num_rows; i < rows; ++i) row[i] = static_cast<int32_t>(step.num_tokens + i - step.num_rows);
    // As are the padded decodes. Others follow in pack_pieces.
    auto* decode = at<int32_t>(to, inputs_[kDecodeTokens].offset);
    for (int64_t i = 0; i < value_of(variables, Variable::kDecodes); ++i) decode[i] = static_cast<int32_t>(i);
}

void StepInputs::pack_pieces(const Step& step, std::byte* to) const {
    auto* decode = at<int32_t>(to, inputs_[kDecodeTokens].offset);
    auto* tile = at<int32_t>(to, inputs_[kTiles].offset);
    for (int32_t sequence = 0; sequence < step.num_sequences; ++sequence) {
        const int32_t first = step.query_start[sequence], tokens = tokens_of(step, sequence);
        if (tokens == 1) {
            *decode++ = first;
            continue;
        }
        for (int32_t start = 0; tile_tokens_ > 0 && start < tokens; start += tile_tokens_) {
            *tile++ = first + start;
            *tile++ = std::min(tile_tokens_, tokens - start);
        }
    }
}

// Padding takes the likeliest of what it finds.
void StepInputs::pack_draws(const Step& step, const Variables& variables, std::byte* to) const {
    if (step.draws == nullptr) return;
    const int64_t rows = value_of(variables, Variable::kRows);
    const auto put = [&](Single input, auto Draw::* field) {
        using Value = std::remove_reference_t<decltype(std::declval<Draw>().*field)>;
        auto* values = at<Value>(to, inputs_[input].offset);
        for (int64_t row = 0; row < rows; ++row) values[row] = (row < step.num_rows ? step.draws[row] : Draw{}).*field;
    };
    put(kTemperature, &Draw::temperature);
    put(kTopK, &Draw::top_k);
    put(kTopP, &Draw::top_p);
    put(kMinP, &Draw::min_p);
    put(kSeed, &Draw::seed);
    put(kNumGenerated, &Draw::num_generated);
    put(kEditSlots, &Draw::edit_slot);
    put(kPresencePenalty, &Draw::presence_penalty);
    put(kFrequencyPenalty, &Draw::frequency_penalty);
    put(kRepetitionPenalty, &Draw::repetition_penalty);
    for (int32_t edit = 0; edit < step.num_edits; ++edit) {
        at<int32_t>(to, inputs_[kEditedSlots].offset)[edit] = step.edits[edit].slot;
        at<int32_t>(to, inputs_[kEditedTokens].offset)[edit] = step.edits[edit].token;
        at<int32_t>(to, inputs_[kEditedCounts].offset)[edit] = step.edits[edit].count;
        at<float>(to, inputs_[kEditedBiases].offset)[edit] = step.edits[edit].bias;
    }
}

void StepInputs::pack_group(const Step& step, const Variables& variables, size_t group, std::byte* to) const {
    const Input* of_group = &inputs_[kSingles + group * kOfGroup];
    const GroupStep& from = step.groups[group];
    auto* slots = at<int64_t>(to, of_group[kSlots].offset);
    std::copy_n(from.slots, step.num_tokens, slots);
    std::fill(slots + step.num_tokens, slots + value_of(variables, Variable::kTokens), int64_t{-1});

    if (from.max_blocks > max_blocks_) {
        throw EngineryError("internal error: a sequence holds " + std::to_string(from.max_blocks) + " blocks of " +
                            groups_[group].name + ", and the longest may hold " + std::to_string(max_blocks_));
    }
    auto* table = at<int32_t>(to, of_group[kBlockTable].offset);
    for (int32_t sequence = 0; sequence < step.num_sequences; ++sequence, table += max_blocks_) {
        write(table, from.block_table + int64_t{sequence} * from.max_blocks, from.max_blocks, max_blocks_, -1);
    }
    const int64_t padded = value_of(variables, Variable::kSequences) + 1 - step.num_sequences;
    std::fill_n(table, padded * max_blocks_, 0);
}

}  // namespace enginery
