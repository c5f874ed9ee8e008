#include "cubin.h"

#include <elf.h>

#include <cstdint>
#include <cstring>

#include "errors.h"

namespace enginery {
namespace {

bool lies_within(uint64_t offset, uint64_t bytes, uint64_t size) { return bytes <= size && offset <= size - bytes; }

template <typename Header>
Header read(const std::string& cubin, uint64_t offset) {
    Header header{};
    std::memcpy(&header, cubin.data() + offset, sizeof(header));
    return header;
}

bool is_sound(const std::string& cubin) {
    if (cubin.size() < sizeof(Elf64_Ehdr)) return false;
    const auto file = read<Elf64_Ehdr>(cubin, 0);
    if (std::memcmp(file.e_ident, ELFMAG, SELFMAG) != 0 || file.e_ident[EI_CLASS] != ELFCLASS64) return false;
    if (file.e_machine != EM_CUDA || file.e_shentsize != sizeof(Elf64_Shdr) || file.e_shstrndx >= file.e_shnum) {
        return false;
    }
    if (file.e_phnum > 0 && file.e_phentsize != sizeof(Elf64_Phdr)) return false;
    if (!lies_within(file.e_shoff, uint64_t{file.e_shnum} * sizeof(Elf64_Shdr), cubin.size()) ||
        !lies_within(file.e_phoff, uint64_t{file.e_phnum} * sizeof(Elf64_Phdr), cubin.size())) {
        return false;
    }
    for (uint64_t index = 0; index < file.e_shnum; ++index) {
        const auto section = read<Elf64_Shdr>(cubin, file.e_shoff + index * sizeof(Elf64_Shdr));
        const bool in_file = section.sh_type != SHT_NOBITS && section.sh_type != SHT_NULL;
        if (in_file && !lies_within(section.sh_offset, section.sh_size, cubin.size())) return false;
    }
    return true;
}

}  // namespace

void check_cubin(const std::string& cubin, const std::string& what) {
    if (is_sound(cubin)) return;
    throw EngineFormatError(what + " is damaged: it is no whole ELF file for a GPU. Copy or build the engine again.");
}

}  // namespace enginery
