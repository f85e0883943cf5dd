#include "cpu/kernels/weight_grad/weight_grad.h"

#include "cpu/kernels/weight_grad/samples_outside.h"
#include "cpu/kernels/weight_grad/tiles_outside.h"

// Both loop orders are compiled in one file, which instantiates the product of each size of tile once.
namespace svag {
namespace SVAG_SIMD {
namespace {

template <class T>
int weight_grad(const WeightGradArgs& args) {
    return args.loop_order == LoopOrder::samples_outside ? SamplesOutside<T>(args).run() : TilesOutside<T>(args).run();
}

}  // namespace
}  // namespace SVAG_SIMD
}  // namespace svag

extern "C" int SVAG_ENTRY(svag_weight_grad)(const svag::WeightGradArgs& args) {
    using namespace svag::SVAG_SIMD;
    return args.is_double ? weight_grad<double>(args) : weight_grad<float>(args);
}
