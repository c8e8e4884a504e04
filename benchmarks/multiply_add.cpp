// The plain elementwise loop that the benchmarks take the machine's elementwise peak from: c = a b + c, `times` times over.

#include <cstdint>

extern "C" void multiply_add(const float* a, const float* b, float* c, int64_t size, int64_t times) {
    for (int64_t time = 0; time < times; ++time) {
        for (int64_t i = 0; i < size; ++i) c[i] = a[i] * b[i] + c[i];
        asm volatile("" : : "r"(c) : "memory");  // every pass is done
    }
}
