// Runs every check, but for those named, at every SIMD level that this processor has: `selftest [--without CHECK]...`.
#include "selftest.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "cpu/simd_level.h"

namespace selftest {
namespace {

int failures = 0;

// A format of `mantissa` explicit bits, rounded as IEEE 754 says: to nearest, ties to even, subnormals included.
uint16_t encode(double value, int mantissa, int exponent_bits) {
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    const int bias = (1 << (exponent_bits - 1)) - 1;
    const uint16_t infinity = static_cast<uint16_t>(((1 << exponent_bits) - 1) << mantissa);
    if (std::isnan(value)) return static_cast<uint16_t>(sign | infinity | (1 << (mantissa - 1)));
    const double magnitude = std::fabs(value);
    if (std::isinf(magnitude)) return static_cast<uint16_t>(sign | infinity);
    int exponent = magnitude == 0 ? 1 - bias : std::ilogb(magnitude);
    if (exponent < 1 - bias) exponent = 1 - bias;
    const double units = std::nearbyint(std::ldexp(magnitude, mantissa - exponent));
    // Adding to the exponent field carries a mantissa that was rounded up into the next exponent, up to infinity.
    const double bits = units + std::ldexp(exponent + bias - 1, mantissa);
    return static_cast<uint16_t>(sign | (bits > infinity ? infinity : static_cast<uint16_t>(bits)));
}

double decode(uint16_t bits, int mantissa, int exponent_bits) {
    const int bias = (1 << (exponent_bits - 1)) - 1;
    const int field = (bits >> mantissa) & ((1 << exponent_bits) - 1);
    const int fraction = bits & ((1 << mantissa) - 1);
    double value;
    if (field == (1 << exponent_bits) - 1)
        value = fraction != 0 ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity();
    else if (field == 0)
        value = std::ldexp(fraction, 1 - bias - mantissa);
    else
        value = std::ldexp(fraction + (1 << mantissa), field - bias - mantissa);
    return (bits & 0x8000) != 0 ? -value : value;
}

int run_level(const char* level, const std::vector<std::string>& without) {
    if (!svag::select_simd_level(level)) {
        std::printf("this processor has no %s\n", level);
        return 1;
    }
    int bad = 0;
    for (const Check& check : checks()) {
        if (std::find(without.begin(), without.end(), check.name) != without.end()) continue;
        failures = 0;
        check.run();
        std::printf("%s %s %s\n", failures == 0 ? "ok  " : "FAIL", level, check.name);
        bad += failures != 0;
    }
    return bad;
}

}  // namespace

std::vector<Check>& checks() {
    static std::vector<Check> all;
    return all;
}

bool add_check(const char* name, void (*run)()) {
    checks().push_back({name, run});
    return true;
}

void fail(const char* file, int line, const char* condition, double got, double expected) {
    if (++failures <= 3)
        std::printf("%s:%d: not so: %s (%.17g, %.17g)\n", file, line, condition, got, expected);
}

double from_float16(uint16_t bits) { return decode(bits, 10, 5); }
double from_bfloat16(uint16_t bits) { return decode(bits, 7, 8); }
uint16_t to_float16(double value) { return encode(value, 10, 5); }
uint16_t to_bfloat16(double value) { return encode(value, 7, 8); }

}  // namespace selftest

int main(int argc, char** argv) {
    const int best = static_cast<int>(svag::best_simd_level());
    std::printf("best level: %s\n", svag::simd_level_name(svag::best_simd_level()));
    if (svag::simd_level() != svag::best_simd_level()) {
        std::printf("the level in use is not the best one\n");
        return 1;
    }
    std::vector<std::string> without;
    for (int i = 1; i < argc; i += 2) {
        if (std::string(argv[i]) != "--without" || i + 1 == argc) {
            std::printf("usage: %s [--without CHECK]...\n", argv[0]);
            return 2;
        }
        without.emplace_back(argv[i + 1]);
    }
    int bad = 0;
    for (int i = 0; i <= best; ++i)
        bad += selftest::run_level(svag::simd_level_name(static_cast<svag::SimdLevel>(i)), without);
    std::printf("%d failed\n", bad);
    return bad == 0 ? 0 : 1;
}
