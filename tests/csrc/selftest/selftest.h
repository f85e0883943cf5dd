// A self-test of the CPU kernels without Python: it runs wherever a compiler reaches, emulated processors included.
// Each kernel has one file here, which holds its SVAG_CHECKs; selftest.cpp runs all of them at every SIMD level.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

namespace selftest {

struct Check {
    const char* name;
    void (*run)();
};

std::vector<Check>& checks();
bool add_check(const char* name, void (*run)());

// Count a failure and say where and what; the first few of a check are printed.
void fail(const char* file, int line, const char* condition, double got, double expected);

// Uniform in [-1, 1), the same everywhere: the standard library's distributions are not.
class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed * 2 + 1) {}
    uint64_t bits() {
        state_ ^= state_ << 13;
        state_ ^= state_ >> 7;
        state_ ^= state_ << 17;
        return state_;
    }
    double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-52 - 1; }

  private:
    uint64_t state_;
};

// The storage formats, converted by the arithmetic of their definitions rather than by bit tricks.
double from_float16(uint16_t bits);
double from_bfloat16(uint16_t bits);
uint16_t to_float16(double value);  // to nearest, ties to even
uint16_t to_bfloat16(double value);

}  // namespace selftest

#define SVAG_CHECK(name)                                                            \
    static void name();                                                             \
    [[maybe_unused]] static const bool name##_added = selftest::add_check(#name, name); \
    static void name()

#define EXPECT(condition)                                                           \
    do {                                                                            \
        if (!(condition)) selftest::fail(__FILE__, __LINE__, #condition, 0, 0);     \
    } while (false)

#define EXPECT_NEAR(got, expected, tolerance)                                                                \
    do {                                                                                                     \
        const double got_ = static_cast<double>(got), expected_ = static_cast<double>(expected);             \
        const double distance_ = got_ > expected_ ? got_ - expected_ : expected_ - got_;                     \
        if (!(distance_ <= (tolerance))) selftest::fail(__FILE__, __LINE__, #got " near " #expected, got_, expected_); \
    } while (false)
