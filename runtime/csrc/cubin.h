// Machine code that nobody vouches for: the driver is given no size, and would read as far as the headers say.
#pragma once

#include <string>

namespace enginery {

// Throws EngineFormatError, naming `what`, unless `cubin` is an ELF file whose headers and sections all lie within it.
void check_cubin(const std::string& cubin, const std::string& what);

}  // namespace enginery
