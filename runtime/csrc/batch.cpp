#include "batch.h"

#include <algorithm>

#include "sampler.h"

namespace enginery {

void Batch::build(const std::vector<Chunk>& chunks, int32_t block_size, const EditSlots* slots, int32_t most_kept,
                  int32_t vocab_size) {
    for (auto* array : {&token_ids_, &positions_, &token_sequence_, &prompt_lengths_, &query_start_, &rows_, &keep_}) {
        array->clear();
    }
    tasks_.clear();
    sequences_.clear();
    draws_.clear();
    edits_.clear();
    for (size_t i = 0; i < chunks.size(); ++i) add_chunk(chunks[i], static_cast<int32_t>(i));
    query_start_.push_back(static_cast<int32_t>(token_ids_.size()));
    for (size_t group = 0; group < groups_.size(); ++group) add_group(chunks, group, block_size);

    step_.num_tokens = static_cast<int32_t>(token_ids_.size());
    step_.num_rows = static_cast<int32_t>(rows_.size());
    step_.num_sequences = static_cast<int32_t>(chunks.size());
    step_.token_ids = token_ids_.data();
    step_.positions = positions_.data();
    step_.token_sequence = token_sequence_.data();
    step_.prompt_lengths = prompt_lengths_.data();
    step_.query_start = query_start_.data();
    step_.rows = rows_.data();

    for (const SampleTask& task : tasks_) {
        if (slots != nullptr) draws_.push_back(slots->prepare(*task.sequence, edits_));
        if (most_kept == 0) continue;
        const Sequence& sequence = *task.sequence;
        keep_.push_back(task.prompt_token_id >= 0
                            ? 0
                            : logits_needed(sequence.request, sequence.num_generated_tokens(), most_kept, vocab_size));
    }
    step_.keep = keep_.empty() ? nullptr : keep_.data();
    step_.draws = draws_.empty() ? nullptr : draws_.data();
    step_.edits = edits_.data();
    step_.num_edits = static_cast<int32_t>(edits_.size());
}

void Batch::add_chunk(const Chunk& chunk, int32_t index) {
    const Sequence& sequence = *chunk.sequence;
    const auto first_token = static_cast<int32_t>(token_ids_.size());
    query_start_.push_back(first_token);
    sequences_.push_back(chunk.sequence);
    for (int32_t i = 0; i < chunk.num_tokens; ++i) {
        const int32_t position = sequence.num_computed_tokens + i;
        const bool is_drawn = sequence.drawn_row >= 0 && position + 1 == sequence.num_known_tokens();
        token_ids_.push_back(is_drawn ? -1 - sequence.drawn_row : sequence.token_ids[static_cast<size_t>(position)]);
        positions_.push_back(position);
        token_sequence_.push_back(index);
        prompt_lengths_.push_back(sequence.num_prompt_tokens);
    }
    add_rows(chunk, first_token);
}

void Batch::add_rows(const Chunk& chunk, int32_t first_token) {
    const Sequence& sequence = *chunk.sequence;
    const RowRange range = rows_of(sequence, chunk.num_tokens);
    for (int32_t position = range.first_prompt; position < range.end_prompt; ++position) {
        tasks_.push_back({chunk.sequence, static_cast<int32_t>(rows_.size()),
                          sequence.token_ids[static_cast<size_t>(position) + 1]});
        rows_.push_back(first_token + position - sequence.num_computed_tokens);
    }
    if (range.last_token) {
        tasks_.push_back({chunk.sequence, static_cast<int32_t>(rows_.size()), -1});
        rows_.push_back(first_token + chunk.num_tokens - 1);
    }
}

void Batch::add_group(const std::vector<Chunk>& chunks, size_t group, int32_t block_size) {
    GroupArrays& arrays = groups_[group];
    size_t max_blocks = 0;
    for (const Chunk& chunk : chunks) max_blocks = std::max(max_blocks, chunk.sequence->block_tables[group].size());
    arrays.block_table.assign(chunks.size() * max_blocks, -1);
    arrays.slots.clear();
    for (size_t i = 0; i < chunks.size(); ++i) {
        const Sequence& sequence = *chunks[i].sequence;
        const auto& table = sequence.block_tables[group];
        std::copy(table.begin(), table.end(), arrays.block_table.begin() + static_cast<std::ptrdiff_t>(i * max_blocks));
        for (int32_t j = 0; j < chunks[i].num_tokens; ++j) {
            const int32_t position = sequence.num_computed_tokens + j;
            const int64_t block = table[static_cast<size_t>(position / block_size)];
            arrays.slots.push_back(block * block_size + position % block_size);
        }
    }
    step_.groups[group] = {arrays.block_table.data(), static_cast<int32_t>(max_blocks), arrays.slots.data()};
}

}  // namespace enginery
