// The sweep of a linear Bernoulli decoder on a CPU: products of factors with the exponent counted apart, one logarithm for each sum.
//
// softplus(a + W_j - W_z) - softplus(a) = log(p + q v_j), p = sigmoid(-a), q = sigmoid(a) / v_z, v = exp(W). The sum over the pixels
// is the logarithm of a product. A running product is split into mantissa and exponent often enough to stay within float32.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));

inline Floats load(const float* from) {
    Floats result;
    std::memcpy(&result, from, sizeof result);
    return result;
}

// Takes the exponents out of `mantissa` into `exponent`: what stays lies in [1, 2).
inline void normalise(Floats& mantissa, Integers& exponent) {
    const Integers bits = (Integers)mantissa;  // a cast of vectors keeps their bits
    exponent += (bits >> 23) - 127;
    mantissa = (Floats)((bits & 0x007fffff) | 0x3f800000);
}

// The logarithm of a product of lanes; of normalised mantissas, whose product is below 2^LANES.
inline float logarithm(const Floats& mantissa, const Integers& exponent) {
    float mantissas[LANES];
    int32_t exponents[LANES];
    std::memcpy(mantissas, &mantissa, sizeof mantissas);
    std::memcpy(exponents, &exponent, sizeof exponents);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; ++lane) {
            mantissas[lane] *= mantissas[lane + half];
            exponents[lane] += exponents[lane + half];
        }
    return std::log(mantissas[0]) + 0.693147180559945f * exponents[0];
}

// log prod_d (p_d + q_d v_jd) for VALUES rows of v at once; CHAINS products each, so that no multiplication waits for the last one.
template <int VALUES, int CHAINS>
void log_products(const float* p, const float* q, const float* v, int64_t width, int64_t together, float* result) {
    Floats mantissa[VALUES][CHAINS];
    Integers exponent[VALUES][CHAINS];
    for (int value = 0; value < VALUES; ++value)
        for (int chain = 0; chain < CHAINS; ++chain) {
            mantissa[value][chain] = Floats{} + 1.0f;
            exponent[value][chain] = Integers{};
        }
    const int64_t stride = CHAINS * LANES;
    int64_t d = 0;
    while (d + stride <= width) {
        const int64_t stop = std::min(width, d + together * stride);
        for (; d + stride <= stop; d += stride)
            for (int chain = 0; chain < CHAINS; ++chain) {
                const int64_t at = d + chain * LANES;
                const Floats p_part = load(p + at), q_part = load(q + at);
                for (int value = 0; value < VALUES; ++value)
                    mantissa[value][chain] *= p_part + q_part * load(v + value * width + at);
            }
        for (int value = 0; value < VALUES; ++value)
            for (int chain = 0; chain < CHAINS; ++chain) normalise(mantissa[value][chain], exponent[value][chain]);
    }
    for (; d < width; d += LANES)  // fewer than CHAINS vectors are left
        for (int value = 0; value < VALUES; ++value) {
            mantissa[value][0] *= load(p + d) + load(q + d) * load(v + value * width + d);
            normalise(mantissa[value][0], exponent[value][0]);
        }
    for (int value = 0; value < VALUES; ++value) {
        result[value] = 0;
        for (int chain = 0; chain < CHAINS; ++chain) result[value] += logarithm(mantissa[value][chain], exponent[value][chain]);
    }
}

void log_products_of(int values, const float* p, const float* q, const float* v, int64_t width, int64_t together, float* result) {
    switch (values) {
        case 1: return log_products<1, 4>(p, q, v, width, together, result);
        case 2: return log_products<2, 3>(p, q, v, width, together, result);
        case 3: return log_products<3, 2>(p, q, v, width, together, result);
        case 4: return log_products<4, 2>(p, q, v, width, together, result);
        case 5: return log_products<5, 1>(p, q, v, width, together, result);
        case 6: return log_products<6, 1>(p, q, v, width, together, result);
        case 7: return log_products<7, 1>(p, q, v, width, together, result);
        default: return log_products<8, 1>(p, q, v, width, together, result);
    }
}

constexpr int64_t MOST_VALUES = 8;

}  // namespace

// change[e, i, j] = sum_d log(p[e, d] + s[e, d] inverse[i, z, d] v[i, j, d]), z = own[e, i].
//
// p, s: [examples, width]; v, inverse: [n, k, width]; own: [examples, n]; change: [examples, n, k]; together: how many factors may be
// multiplied before they are normalised. `width` is a multiple of 16, padded with p = 1, s = 0.
extern "C" void dgrad_softplus_sweep(const float* p, const float* s, const float* v, const float* inverse, const int64_t* own,
                                     int64_t together, float* change, int64_t examples, int64_t n, int64_t k,
                                     int64_t width, int64_t threads) {
    auto work = [=](int64_t first, int64_t last) {
        std::vector<float> q(width);
        for (int64_t row = 0; row < n; ++row)  // outermost, so that a row of v stays in the cache
            for (int64_t example = first; example < last; ++example) {
                const int64_t z = own[example * n + row];
                const float* own_inverse = inverse + (row * k + z) * width;
                for (int64_t d = 0; d < width; ++d) q[d] = s[example * width + d] * own_inverse[d];
                float* result = change + (example * n + row) * k;
                auto evaluate = [&](int64_t begin, int64_t count) {
                    log_products_of(count, p + example * width, q.data(), v + (row * k + begin) * width, width, together,
                                    result + begin);
                };
                if (k == 2)
                    evaluate(1 - z, 1);
                else {
                    const int64_t blocks = (k + MOST_VALUES - 1) / MOST_VALUES, size = (k + blocks - 1) / blocks;
                    for (int64_t begin = 0; begin < k; begin += size) evaluate(begin, std::min(size, k - begin));
                }
                result[z] = 0;
            }
    };
    const int64_t count = std::max<int64_t>(1, std::min(threads, examples));
    std::vector<std::thread> others;
    for (int64_t part = 1; part < count; ++part)
        others.emplace_back(work, examples * part / count, examples * (part + 1) / count);
    work(0, examples / count);
    for (auto& thread : others) thread.join();
}
