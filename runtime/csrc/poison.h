// In builds with sanitizers every step begins with garbage in all memory that it must write before it reads: what
// depends on an earlier step then gives other tokens in a test, where it would be one run in ten thousand.
#pragma once

namespace enginery {

#ifdef ENGINERY_POISON
inline constexpr bool kPoisons = true;
#else
inline constexpr bool kPoisons = false;
#endif

}  // namespace enginery
