#include "request.h"

#include <algorithm>
#include <cmath>

#include "errors.h"

namespace enginery {
namespace {

constexpr float kLargestBias = 1e6F;  // so that no sum of biases and penalties leaves float

class Faults {
  public:
    void unless(bool holds, const std::string& what) {
        if (!holds) faults_ += (faults_.empty() ? "" : "; ") + what;
    }
    void range(const std::string& name, double value, double low, double high) {
        unless(std::isfinite(value) && value >= low && value <= high,
               name + " is " + number(value) + ", wanted " + number(low) + " to " + number(high));
    }
    void raise() const {
        if (!faults_.empty()) throw RequestError(faults_);
    }

  private:
    static std::string number(double value) {
        std::string text = std::to_string(value);
        if (text.find('.') == std::string::npos) return text;
        text.erase(text.find_last_not_of('0') + 1);
        if (text.back() == '.') text.pop_back();
        return text;
    }

    std::string faults_;
};

void check_tokens(const Request& request, int32_t vocab_size, Faults& faults) {
    const std::string wanted = ", wanted 0 to " + std::to_string(vocab_size - 1);
    faults.unless(!request.prompt_token_ids.empty(), "the prompt has no tokens");
    for (const int32_t token : request.prompt_token_ids) {
        if (token >= 0 && token < vocab_size) continue;
        faults.unless(false, "prompt_token_ids holds " + std::to_string(token) + wanted);
        break;
    }
    for (const auto& [token, bias] : request.logit_bias) {
        faults.unless(token >= 0 && token < vocab_size, "logit_bias names token " + std::to_string(token) + wanted);
        faults.range("logit_bias of token " + std::to_string(token), static_cast<double>(bias),
                     static_cast<double>(-kLargestBias), static_cast<double>(kLargestBias));
    }
    for (const int32_t token : request.stop_token_ids) {
        faults.unless(token >= 0, "stop_token_ids holds " + std::to_string(token) + ", wanted 0 or more");
    }
}

}  // namespace

void check_request(const Request& request, const RequestLimits& limits) {
    Faults faults;
    const auto num_prompt_tokens = static_cast<int64_t>(request.prompt_token_ids.size());
    check_tokens(request, limits.vocab_size, faults);
    faults.unless(num_prompt_tokens < limits.max_model_len, "the prompt has " + std::to_string(num_prompt_tokens) +
                                                                " tokens; with one to generate that is more " +
                                                                "than max_model_len, " +
                                                                std::to_string(limits.max_model_len) + ": shorten it");
    faults.unless(request.max_tokens >= 1,
                  "max_tokens is " + std::to_string(request.max_tokens) + ", wanted 1 or more");
    faults.range("min_tokens", request.min_tokens, 0, std::max(0, request.max_tokens));
    faults.range("temperature", static_cast<double>(request.temperature), 0, 1e6);
    faults.unless(request.top_k >= 0, "top_k is " + std::to_string(request.top_k) + ", wanted 0 (off) or more");
    faults.unless(request.top_p > 0.0F && request.top_p <= 1.0F,
                  "top_p is " + std::to_string(request.top_p) + ", wanted above 0 and at most 1");
    faults.range("min_p", static_cast<double>(request.min_p), 0, 1);
    faults.range("presence_penalty", static_cast<double>(request.presence_penalty), -2, 2);
    faults.range("frequency_penalty", static_cast<double>(request.frequency_penalty), -2, 2);
    faults.range("repetition_penalty", static_cast<double>(request.repetition_penalty), 0.01, 100);
    faults.range("logprobs", request.logprobs, -1, limits.vocab_size);
    faults.range("prompt_logprobs", request.prompt_logprobs, -1, limits.vocab_size);
    faults.raise();
    // The state of the last generated token is never needed: the prompt's suffices for one.
    if (num_prompt_tokens > limits.capacity_tokens) {
        throw CapacityError("the prompt has " + std::to_string(num_prompt_tokens) + " tokens; the KV cache holds " +
                            std::to_string(limits.capacity_tokens) +
                            ": shorten it, or give the cache more memory (--kv-cache-memory-bytes)");
    }
}

}  // namespace enginery
