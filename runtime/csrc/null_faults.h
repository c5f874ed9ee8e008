// Faults on request, to test how the loop takes them: spec.isa = "fail_on=7 nan_on=9" names token ids.
#pragma once

#include <cstdint>
#include <string>

namespace enginery {

// The token that `name` is asked for, -1 where it is not.
inline int32_t fault_token(const std::string& faults, const std::string& name) {
    const size_t found = faults.find(name + "=");
    return found == std::string::npos ? -1 : std::stoi(faults.substr(found + name.size() + 1));
}

}  // namespace enginery
