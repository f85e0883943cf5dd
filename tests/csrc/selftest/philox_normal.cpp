#include "cpu/philox_normal.h"

#include <cmath>
#include <vector>

#include "selftest.h"

namespace {

constexpr double kPi = 3.14159265358979323846;

struct Block {
    uint32_t words[4];
};

// Salmon et al., SC 2011, section 3.3, one block at a time.
Block philox(Block c, uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t{0xD2511F53} * c.words[0], p1 = uint64_t{0xCD9E8D57} * c.words[2];
        c = {{static_cast<uint32_t>(p1 >> 32) ^ c.words[1] ^ key0, static_cast<uint32_t>(p1),
              static_cast<uint32_t>(p0 >> 32) ^ c.words[3] ^ key1, static_cast<uint32_t>(p0)}};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return c;
}

// Number j of one counter, by the library's functions in float64; its error is that of the angle's rounding, 64 of 1's.
double normal(const Block& b, int j, bool is_double) {
    double u, angle;
    if (is_double) {
        const uint64_t r = b.words[0] | uint64_t{b.words[1]} << 32, a = b.words[2] | uint64_t{b.words[3]} << 32;
        u = 1 - std::ldexp(static_cast<double>(r >> 12), -52);
        angle = static_cast<double>(a >> 62) + std::ldexp(static_cast<double>(a << 2 >> 12), -52) - 0.5;
    } else {
        const uint32_t r = b.words[j & 2], a = b.words[(j & 2) + 1];
        u = static_cast<double>(std::ldexp(static_cast<float>(static_cast<int32_t>(r >> 1)), -31) + 0x1p-32F);
        const double t = static_cast<double>(static_cast<float>(static_cast<int32_t>(a << 2)));
        angle = static_cast<double>(a >> 30) + std::ldexp(t, -32);
    }
    const double phi = kPi / 2 * angle;
    return std::sqrt(-2 * std::log(u)) * ((j & 1) != 0 ? std::sin(phi) : std::cos(phi));
}

template <class A>
void compare(int64_t n, int64_t first, const svag::NormalStream& s) {
    std::vector<A> out(static_cast<size_t>(n) + 1, A(77));  // one more: a guard
    EXPECT(SVAG_KERNEL(svag_philox_normal)(out.data(), sizeof(A) == 8, n, first, s) == svag::kOk);
    constexpr int per_counter = 16 / sizeof(A);
    for (int64_t i = 0; i < n; ++i) {
        const int64_t group = (first + i) / (16 * per_counter), within = (first + i) % (16 * per_counter);
        const Block block = philox({{static_cast<uint32_t>(16 * group + within % 16), static_cast<uint32_t>(s.draw),
                                     static_cast<uint32_t>(s.draw >> 32), 0}},
                                   s.key[0], s.key[1]);
        const double expected = normal(block, static_cast<int>(within / 16), sizeof(A) == 8);
        EXPECT_NEAR(out[static_cast<size_t>(i)], expected, sizeof(A) == 4 ? 8 * 0x1p-24 : 64 * 0x1p-53);
    }
    EXPECT(out.back() == A(77));
}

}  // namespace

// Known answers of the authors' library, Random123.
SVAG_CHECK(philox_normal_checks_itself_against_known_answers) {
    const Block zeros = philox({{0, 0, 0, 0}}, 0, 0), pi = philox({{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}},
                                                                  0xa4093822, 0x299f31d0);
    const uint32_t of_zeros[4] = {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8};
    const uint32_t of_pi[4] = {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1};
    for (int j = 0; j < 4; ++j) EXPECT(zeros.words[j] == of_zeros[j] && pi.words[j] == of_pi[j]);
}

SVAG_CHECK(philox_normal_follows_the_formula) {
    for (const int64_t n : {0, 1, 15, 31, 32, 33, 63, 64, 65, 1000}) {
        compare<float>(n, 0, {{1, 2}, 0});
        compare<double>(n, 0, {{1, 2}, 0});
    }
    compare<float>(200, int64_t{64} << 20, {{0xffffffffu, 0x80000000u}, 0x123456789abcdefu});
    compare<double>(200, int64_t{64} << 20, {{0xffffffffu, 0x80000000u}, 0x123456789abcdefu});
}
