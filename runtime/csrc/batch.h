// The arrays of one step, and which of its rows become what.
#pragma once

#include <cstdint>
#include <vector>

#include "block_manager.h"
#include "edit_slots.h"
#include "scheduler.h"
#include "step.h"

namespace enginery {

// A row of logits to read: for the next token of a sequence, or for the logprobs of a prompt token.
struct SampleTask {
    Sequence* sequence;
    int32_t row;
    int32_t prompt_token_id;  // -1 where the next token is drawn
};

class Batch {
  public:
    explicit Batch(size_t num_groups) : groups_(num_groups) { step_.groups.resize(num_groups); }

    // Fills the step from what was scheduled, in its order. slots: of an executor that is to draw the tokens, which all
    // sequences have reserved; null where the loop draws them. Memory is kept from step to step.
    // most_kept: how many of a row's largest logits the executor can keep, of a vocabulary.
    void build(const std::vector<Chunk>& chunks, int32_t block_size, const EditSlots* slots, int32_t most_kept,
               int32_t vocab_size);

    const Step& step() const { return step_; }
    const std::vector<SampleTask>& tasks() const { return tasks_; }
    const std::vector<Sequence*>& sequences() const { return sequences_; }

  private:
    struct GroupArrays {
        std::vector<int32_t> block_table;
        std::vector<int64_t> slots;
    };

    void add_chunk(const Chunk& chunk, int32_t index);
    void add_rows(const Chunk& chunk, int32_t first_token);
    void add_group(const std::vector<Chunk>& chunks, size_t group, int32_t block_size);

    Step step_;
    std::vector<int32_t> token_ids_, positions_, token_sequence_, prompt_lengths_, query_start_, rows_, keep_;
    std::vector<GroupArrays> groups_;
    std::vector<Draw> draws_;
    std::vector<Edit> edits_;
    std::vector<SampleTask> tasks_;
    std::vector<Sequence*> sequences_;
};

}  // namespace enginery
