// The factories of all CPU operators; registry.cpp puts them in a table.
#pragma once

#include "plugins/kernel.h"

namespace enginery::ENGINERY_ISA {

std::unique_ptr<Kernel> make_embedding(const CallSpec& call, const Binding& binding);
std::unique_ptr<Kernel> make_rotary_table(const CallSpec& call, const Binding& binding);
std::unique_ptr<Kernel> make_rms_norm(const CallSpec& call, const Binding& binding);
std::unique_ptr<Kernel> make_gather_rows(const CallSpec& call, const Binding& binding);
std::unique_ptr<Kernel> make_linear(const CallSpec& call, const Binding& binding);
std::unique_ptr<Kernel> make_kv_write(const CallSpec& call, const Binding& binding);
std::unique_ptr<Kernel> make_attention(const CallSpec& call, const Binding& binding);
std::unique_ptr<Kernel> make_all_reduce(const CallSpec& call, const Binding& binding);
std::unique_ptr<Kernel> make_all_gather(const CallSpec& call, const Binding& binding);

}  // namespace enginery::ENGINERY_ISA
