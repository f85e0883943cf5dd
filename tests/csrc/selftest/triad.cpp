#include "cpu/triad.h"

#include "selftest.h"

SVAG_CHECK(triad_adds_the_other_two_streams) {
    for (const int64_t n : {0, 1, 5, 65536, 65537 + 9}) {
        const auto size = static_cast<size_t>(n);
        std::vector<float> x(size, 1.0F), y(size, 1e9F), z(size);
        for (size_t i = 0; i < size; ++i) z[i] = static_cast<float>(i % 7) * 1e9F;
        EXPECT(SVAG_KERNEL(svag_triad)(x.data(), y.data(), z.data(), n, 2) == 0);
        for (size_t i = 0; i < size; ++i) EXPECT_NEAR(x[i], 2 + static_cast<double>(i % 7), 1e-5);
    }
}
