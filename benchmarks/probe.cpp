// What this machine can do: bytes read from DRAM and operations per second, as JSON. benchmarks/machine.py compiles and
// runs it, with as many threads as the benchmark uses.
#include <immintrin.h>
#include <sys/mman.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;
constexpr size_t kBytes = size_t{512} << 20;  // beyond any cache

double seconds_of(int threads, const std::function<void(int)>& work) {
    double best = 1e9;
    for (int repeat = 0; repeat < 5; ++repeat) {
        const auto start = Clock::now();
        std::vector<std::thread> team;
        for (int i = 0; i < threads; ++i) team.emplace_back(work, i);
        for (auto& thread : team) thread.join();
        best = std::min(best, std::chrono::duration<double>(Clock::now() - start).count());
    }
    return best;
}

double dram_gb_per_s(int threads) {
    void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) std::exit(1);
    madvise(memory, kBytes, MADV_HUGEPAGE);
    std::memset(memory, 1, kBytes);
    const size_t part = kBytes / threads;
    volatile int64_t sink = 0;
    const double seconds = seconds_of(threads, [&](int i) {
        const auto* p = reinterpret_cast<const __m256i*>(static_cast<char*>(memory) + part * i);
        __m256i sums[4] = {};
        // Four streams, as the kernels read four panels at once.
        const size_t quarter = part / sizeof(__m256i) / 4;
        for (size_t at = 0; at < quarter; ++at) {
            for (size_t s = 0; s < 4; ++s) sums[s] = _mm256_xor_si256(sums[s], _mm256_loadu_si256(p + s * quarter + at));
        }
        const __m256i all = _mm256_xor_si256(_mm256_xor_si256(sums[0], sums[1]), _mm256_xor_si256(sums[2], sums[3]));
        sink = sink + _mm256_extract_epi64(all, 0);
    });
    munmap(memory, kBytes);
    return kBytes / seconds / 1e9;
}

constexpr int64_t kRounds = 20'000'000;
constexpr int kChains = 12;

// Multiply-adds per second in 1e9, two operations each; `step` does kChains of them, `each` multiply-adds wide.
template <class Vector, class Step>
double giga_ops(int threads, int each, Step step) {
    const double seconds = seconds_of(threads, [&](int) {
        Vector sums[kChains] = {};
        for (int64_t round = 0; round < kRounds / kChains; ++round) {
            for (auto& sum : sums) {
                sum = step(sum);
                asm volatile("" : "+x"(sum));
            }
        }
    });
    return 2.0 * threads * each * (kRounds / kChains * kChains) / seconds / 1e9;
}

}  // namespace

int main(int argc, char** argv) {
    const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
    std::printf("{\"threads\": %d, \"dram_gb_per_s\": %.1f", threads, dram_gb_per_s(threads));
#if defined(__AVX512F__)
    const __m512 f = _mm512_set1_ps(1e-9F);
    std::printf(", \"fp32_gflops\": %.0f", giga_ops<__m512>(threads, 16, [&](__m512 s) { return _mm512_fmadd_ps(f, f, s); }));
#elif defined(__FMA__)
    const __m256 f = _mm256_set1_ps(1e-9F);
    std::printf(", \"fp32_gflops\": %.0f", giga_ops<__m256>(threads, 8, [&](__m256 s) { return _mm256_fmadd_ps(f, f, s); }));
#endif
#if defined(__AVX512VNNI__)
    const __m512i b = _mm512_set1_epi8(1);
    std::printf(", \"int8_gops\": %.0f",
                giga_ops<__m512i>(threads, 64, [&](__m512i s) { return _mm512_dpbusd_epi32(s, b, b); }));
#endif
#if defined(__AVX512BF16__)
    const __m512bh h = (__m512bh)_mm512_set1_epi16(0x3C00);
    std::printf(", \"bf16_gflops\": %.0f", giga_ops<__m512>(threads, 32, [&](__m512 s) { return _mm512_dpbf16_ps(s, h, h); }));
#endif
    std::printf("}\n");
}
