// The step that lies on the null device as inputs, read back: as the loop has made it, if they are right.
#pragma once

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "executor.h"

namespace enginery {

// Throws EngineryError where inputs contradict each other, or padding is not as step_inputs.h says.
class NullStep {
  public:
    // Address and bytes of an input; group -1 for those that are not of a group.
    using Find = std::function<std::pair<const std::byte*, int64_t>(const char* name, int32_t group)>;

    NullStep(const ExecutorSpec& spec, const Variables& variables, const Find& find);

    // Without padding.
    const Step& step() const { return step_; }

  private:
    void check_padding(const ExecutorSpec& spec) const;
    void check_pieces(const ExecutorSpec& spec, const Find& find) const;

    Variables variables_;
    Step step_;
    std::vector<int32_t> query_start_;
};

}  // namespace enginery
