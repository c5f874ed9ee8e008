// The step that lies on the null device as inputs, read back: as the loop has made it, if they are right.
#pragma once

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "errors.h"
#include "executor.h"

namespace enginery {

// Throws EngineryError where inputs contradict each other, or padding is not as step_inputs.h says.
class NullStep {
  public:
    // Address and bytes of an input; group -1 for those that are not of a group.
    using Find = std::function<std::pair<const std::byte*, int64_t>(const char* name, int32_t group)>;

    // drawn: the tokens of the step before, which this one may refer to.
    NullStep(const ExecutorSpec& spec, const Variables& variables, const Find& find, const std::vector<int32_t>& drawn);

    // Without padding.
    const Step& step() const { return step_; }

  private:
    void check_padding(const ExecutorSpec& spec) const;
    void check_pieces(const ExecutorSpec& spec, const Find& find) const;

    Variables variables_;
    Step step_;
    std::vector<int32_t> token_ids_;
    std::vector<int32_t> query_start_;
};

// `count` elements of an input, which has no more.
template <typename T>
const T* read_input(const NullStep::Find& find, const char* name, int32_t group, int64_t count) {
    const auto [data, bytes] = find(name, group);
    if (bytes != count * static_cast<int64_t>(sizeof(T))) {
        throw EngineryError(std::string("null device: input ") + name + " has " + std::to_string(bytes) +
                            " bytes, wanted " + std::to_string(count) + " elements");
    }
    return reinterpret_cast<const T*>(data);
}

}  // namespace enginery
