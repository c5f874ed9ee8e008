#include "sampler.h"

#include <algorithm>
#include <cmath>

#include "filters.h"
#include "row_math.h"

namespace enginery {
namespace {

// Above it different logits have the same weight, of which the lower tokens are kept: of all, not of the largest
// logits.
constexpr float kHot = 100.0F;

// The finalizer of SplitMix64 (Steele, Lea, Flood 2014).
uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9U;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebU;
    return z ^ (z >> 31);
}

// Uniform in [0, 1), a function of the seed and the position alone: a counter-based generator.
double uniform(uint64_t seed, int32_t index) {
    const uint64_t bits =
        mix(mix(seed + 0x9e3779b97f4a7c15U) ^ (0x9e3779b97f4a7c15U * (static_cast<uint64_t>(index) + 1)));
    return static_cast<double>(bits >> 11) * 0x1p-53;
}

bool masks(const Request& request, int32_t num_generated) {
    return num_generated < request.min_tokens && !request.stop_token_ids.empty();
}

bool modifies(const Request& request, int32_t num_generated) {
    return !request.logit_bias.empty() || masks(request, num_generated) || request.has_penalties();
}

// Bias, masks and penalties, on a copy of the logits. Returns false if the request changes nothing.
bool modify(const float* logits, int32_t vocab_size, const SampleInputs& inputs, std::vector<float>& row) {
    const Request& request = inputs.request;
    if (!modifies(request, inputs.num_generated)) return false;
    row.assign(logits, logits + vocab_size);
    for (const auto& [token, bias] : request.logit_bias) row[static_cast<size_t>(token)] += bias;
    if (masks(request, inputs.num_generated)) {
        for (const int32_t token : request.stop_token_ids) {
            if (token < vocab_size) row[static_cast<size_t>(token)] = -INFINITY;
        }
    }
    if (request.has_penalties()) {
        for (const auto& [token, num_generated] : inputs.token_counts) {
            float& logit = row[static_cast<size_t>(token)];
            logit = logit > 0.0F ? logit / request.repetition_penalty : logit * request.repetition_penalty;
            logit -= request.frequency_penalty * static_cast<float>(num_generated);
            logit -= num_generated > 0 ? request.presence_penalty : 0.0F;
        }
    }
    return true;
}

// Draws from `weights` of the candidates (of all tokens, if null) by inverse distribution.
int32_t draw(const std::vector<float>& weights, const std::vector<int32_t>* candidates, double total, double number) {
    const double target = number * total;
    const size_t count = candidates != nullptr ? candidates->size() : weights.size();
    double sum = 0;
    int32_t last = 0;
    for (size_t i = 0; i < count; ++i) {
        const auto token = candidates != nullptr ? (*candidates)[i] : static_cast<int32_t>(i);
        const float weight = weights[static_cast<size_t>(token)];
        if (weight <= 0.0F) continue;
        last = token;
        sum += static_cast<double>(weight);
        if (sum > target) return token;
    }
    return last;  // rounding may leave the sum a little short of the total
}

// Draws an index of `row`, whose logits it turns into weights.
int32_t draw_from(std::vector<float>& row, float peak, const SampleInputs& inputs, FilterScratch& scratch) {
    const Request& request = inputs.request;
    const auto size = static_cast<int32_t>(row.size());
    const float floor = request.min_p > 0.0F ? std::log(request.min_p) : -INFINITY;
    double total = exp_weights(row.data(), size, peak, 1.0F / request.temperature, floor);
    const bool filters = request.top_p < 1.0F || (request.top_k > 0 && request.top_k < size);
    if (filters) total = keep_likeliest(row, total, request.top_k, request.top_p, scratch);
    return draw(row, filters ? &scratch.candidates : nullptr, total, uniform(inputs.seed, inputs.num_generated));
}

}  // namespace

int32_t logits_needed(const Request& request, int32_t num_generated, int32_t most, int32_t vocab_size) {
    if (request.logprobs >= 0 || modifies(request, num_generated)) return 0;
    const bool greedy = request.temperature < kGreedyBelow;
    if (!greedy && (request.top_k < 1 || request.top_k >= vocab_size || request.temperature > kHot)) return 0;
    const int32_t wanted = greedy ? 1 : request.top_k + 1;  // one more, as top_k filters where there are more
    return wanted <= most ? wanted : 0;
}

void sample_largest(std::vector<KeptLogit>& largest, const SampleInputs& inputs, SamplerScratch& scratch,
                    SampleResult& result) {
    result.logprobs.clear();
    result.fault = largest.empty() ? SampleResult::Fault::kNonFinite : SampleResult::Fault::kNone;
    if (largest.empty()) return;
    const float peak = largest.front().logit;
    result.token_id = largest.front().token;
    if (inputs.request.temperature < kGreedyBelow) return;
    std::sort(largest.begin(), largest.end(), [](auto& a, auto& b) { return a.token < b.token; });
    scratch.row.clear();
    for (const KeptLogit& kept : largest) scratch.row.push_back(kept.logit);
    result.token_id = largest[static_cast<size_t>(draw_from(scratch.row, peak, inputs, scratch.filters))].token;
}

void take_logprobs(const float* logits, int32_t vocab_size, int32_t token_id, int32_t num_logprobs,
                   SamplerScratch& scratch, SampleResult& result) {
    const RowPeak peak = find_peak(logits, vocab_size);
    result.token_id = token_id;
    result.fault = peak.is_finite ? SampleResult::Fault::kNone : SampleResult::Fault::kNonFinite;
    result.logprobs.clear();
    if (num_logprobs < 0 || !peak.is_finite) return;
    const double log_total = std::log(exp_sum(logits, vocab_size, peak.logit));
    const auto logprob = [&](int32_t token) {
        return static_cast<float>(static_cast<double>(logits[token] - peak.logit) - log_total);
    };
    result.logprobs.push_back({token_id, logprob(token_id), num_before(logits, vocab_size, token_id) + 1});
    find_largest(logits, vocab_size, num_logprobs, scratch.filters.candidates);
    for (size_t i = 0; i < scratch.filters.candidates.size(); ++i) {
        result.logprobs.push_back(
            {scratch.filters.candidates[i], logprob(scratch.filters.candidates[i]), static_cast<int32_t>(i) + 1});
    }
}

void sample(const float* logits, int32_t vocab_size, const SampleInputs& inputs, SamplerScratch& scratch,
            SampleResult& result) {
    const Request& request = inputs.request;
    RowPeak peak = find_peak(logits, vocab_size);
    result.logprobs.clear();
    result.fault = peak.is_finite ? SampleResult::Fault::kNone : SampleResult::Fault::kNonFinite;
    if (!peak.is_finite) return;

    std::vector<float>& row = scratch.row;
    const bool modified = modify(logits, vocab_size, inputs, row);
    if (modified) peak = find_peak(row.data(), vocab_size);
    if (peak.logit == -INFINITY) {
        result.fault = SampleResult::Fault::kNothingAllowed;
        return;
    }
    result.token_id = peak.token;
    if (request.temperature >= kGreedyBelow) {
        if (!modified) row.assign(logits, logits + vocab_size);
        result.token_id = draw_from(row, peak.logit, inputs, scratch.filters);
    }
    if (request.logprobs >= 0) {
        take_logprobs(logits, vocab_size, result.token_id, request.logprobs, scratch, result);
    }
}

}  // namespace enginery
