#include "null_draws.h"

#include <algorithm>
#include <cstring>

#include "errors.h"
#include "null_faults.h"

namespace enginery {
namespace {

template <typename T>
std::vector<std::byte> bytes_of(const std::vector<T>& values) {
    std::vector<std::byte> bytes(values.size() * sizeof(T));
    std::memcpy(bytes.data(), values.data(), bytes.size());
    return bytes;
}

// The plan launches what draws, edits and so on for all rows of a step, or not at all.
void check_asked(const Variables& variables, Variable variable, bool is_wanted) {
    const int64_t value = value_of(variables, variable), rows = value_of(variables, Variable::kRows);
    if (value == (is_wanted ? rows : 0)) return;
    throw EngineryError("null device: a variable of `sample` is " + std::to_string(value) + " in a step of " +
                        std::to_string(rows) + " rows, which " + (is_wanted ? "want" : "do not want") + " it");
}

}  // namespace

void NullDraws::draw(const ExecutorSpec& spec, const Variables& variables, const NullStep::Find& find, int32_t num_rows,
                     Executor& model) {
    apply_edits(spec, variables, find);
    const int64_t rows = value_of(variables, Variable::kRows);
    const auto* temperature = read_input<float>(find, "temperature", -1, rows);
    const auto* top_k = read_input<int32_t>(find, "top_k", -1, rows);
    const auto* top_p = read_input<float>(find, "top_p", -1, rows);
    const auto* min_p = read_input<float>(find, "min_p", -1, rows);
    const auto* seed = read_input<uint64_t>(find, "seed", -1, rows);
    const auto* num_generated = read_input<int32_t>(find, "num_generated", -1, rows);
    const auto* slot = read_input<int32_t>(find, "edit_slots", -1, rows);
    const auto* presence = read_input<float>(find, "presence_penalty", -1, rows);
    const auto* frequency = read_input<float>(find, "frequency_penalty", -1, rows);
    const auto* repetition = read_input<float>(find, "repetition_penalty", -1, rows);
    check_asked(variables, Variable::kDrawn,
                std::any_of(temperature, temperature + rows, [](float each) { return each >= kGreedyBelow; }));
    check_asked(variables, Variable::kEdited, std::any_of(slot, slot + rows, [](int32_t each) { return each >= 0; }));
    for (int64_t row = num_rows; row < rows; ++row) {
        if (slot[row] < 0 && temperature[row] < kGreedyBelow) continue;
        throw EngineryError("null device: row " + std::to_string(row) + " is padding and not the likeliest token");
    }
    const int32_t wrong = fault_token(spec.isa, "wrong_on"), unlisted = fault_token(spec.isa, "unlisted_on");
    const auto top = static_cast<size_t>(spec.ranks.front().draws.top);
    const auto count = static_cast<size_t>(num_rows);
    token_.assign(count, -1);
    rank_.assign(count, 0);
    logprob_.assign(count, 0);
    top_tokens_.assign(count * top, -1);
    top_logprobs_.assign(count * top, 0);
    for (size_t row = 0; row < count; ++row) {
        Request request;
        request.temperature = temperature[row];
        request.top_k = top_k[row];
        request.top_p = top_p[row];
        request.min_p = min_p[row];
        request.presence_penalty = presence[row];
        request.frequency_penalty = frequency[row];
        request.repetition_penalty = repetition[row];
        request.logprobs = static_cast<int32_t>(top);
        Edits* edits = slot[row] < 0 ? nullptr : &edits_.at(slot[row]);
        if (edits != nullptr) request.logit_bias.assign(edits->biases.begin(), edits->biases.end());
        const TokenCounts none;
        SampleResult result;
        sample(model.logits(static_cast<int32_t>(row)), spec.vocab_size,
               {request, edits != nullptr ? edits->counts : none, seed[row], num_generated[row]}, scratch_, result);
        if (result.fault != SampleResult::Fault::kNone) {
            token_[row] = result.fault == SampleResult::Fault::kNonFinite ? -1 : -2;
            continue;
        }
        token_[row] = result.token_id == wrong ? spec.vocab_size : result.token_id;
        logprob_[row] = result.logprobs.front().logprob;
        rank_[row] = result.logprobs.front().rank;
        for (size_t place = 0; place + 1 < result.logprobs.size(); ++place) {
            const int32_t token = result.logprobs[place + 1].token_id;
            top_tokens_[row * top + place] = token == unlisted ? spec.vocab_size : token;
            top_logprobs_[row * top + place] = result.logprobs[place + 1].logprob;
        }
        if (edits != nullptr) ++edits->counts[result.token_id];
    }
}

void NullDraws::apply_edits(const ExecutorSpec& spec, const Variables& variables, const NullStep::Find& find) {
    const int64_t edits = value_of(variables, Variable::kEdits);
    if (edits == 0) return;
    const auto* slot = read_input<int32_t>(find, "edited_slots", -1, edits);
    const auto* token = read_input<int32_t>(find, "edited_tokens", -1, edits);
    const auto* count = read_input<int32_t>(find, "edited_counts", -1, edits);
    const auto* bias = read_input<float>(find, "edited_biases", -1, edits);
    const int32_t slots = std::min(spec.ranks.front().draws.edit_slots, spec.max_sequences);
    for (int64_t edit = 0; edit < edits; ++edit) {
        if (slot[edit] < 0 || slot[edit] >= slots || token[edit] >= spec.vocab_size) {
            throw EngineryError("null device: an edit of token " + std::to_string(token[edit]) + " in slot " +
                                std::to_string(slot[edit]));
        }
        if (token[edit] < 0) edits_[slot[edit]] = {};
    }
    for (int64_t edit = 0; edit < edits; ++edit) {
        if (token[edit] < 0) continue;
        Edits& edited = edits_[slot[edit]];
        edited.counts.erase(token[edit]);
        edited.biases.erase(token[edit]);
        if (count[edit] > 0) edited.counts.emplace(token[edit], count[edit] - 1);
        if (bias[edit] != 0.0F) edited.biases.emplace(token[edit], bias[edit]);
    }
}

std::vector<std::byte> NullDraws::content(const DrawsSpec& draws, int32_t buffer) const {
    if (buffer == draws.token) return bytes_of(token_);
    if (buffer == draws.logprob) return bytes_of(logprob_);
    if (buffer == draws.rank) return bytes_of(rank_);
    if (buffer == draws.top_tokens) return bytes_of(top_tokens_);
    if (buffer == draws.top_logprobs) return bytes_of(top_logprobs_);
    return {};
}

}  // namespace enginery
