// The sweep of a linear Bernoulli decoder on a CPU: products of factors with the exponent counted apart, one logarithm for each sum.
//
// softplus(a + W_j - W_z) - softplus(a) = log(p + q v_j), p = sigmoid(-a), q = sigmoid(a) / v_z, v = exp(W). The sum over the pixels
// is the logarithm of a product. A running product is split into mantissa and exponent often enough to stay within float32.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
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

inline void store(const Floats& from, float* to) { std::memcpy(to, &from, sizeof from); }

// exp(x), within two units of the last place; x is held between -87 and 87, where the result is a normal number.
inline Floats exponential(Floats x) {
    x = x > 87.0f ? Floats{} + 87.0f : x;
    x = x < -87.0f ? Floats{} - 87.0f : x;
    // x = w log 2 + r, w whole: adding and taking off 1.5 * 2^23 rounds; log 2 in two parts, the first with few digits
    const Floats whole = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    const Floats r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    // the Taylor series of exp on |r| <= 0.347
    Floats sum = r * (1.0f / 5040) + 1.0f / 720;
    sum = sum * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    sum = sum * r * r + r + 1.0f;
    return sum * (Floats)((__builtin_convertvector(whole, Integers) + 127) << 23);
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
constexpr int64_t EXAMPLES_AT_ONCE = 128;  // their sigmoids fit the second-level cache

// An array that begins at a multiple of a vector's size, so that no load crosses two lines of the cache.
class Array {
   public:
    explicit Array(int64_t size) : memory(size + LANES) {}
    float* data() {
        const auto address = reinterpret_cast<uintptr_t>(memory.data());
        return memory.data() + (-address & (4 * LANES - 1)) / 4;
    }

   private:
    std::vector<float> memory;
};

// The sigmoids of -logits and logits, to the last digit at either end; filled up with 1 and 0, a factor of 1.
void sigmoids(const float* logits, int64_t pixels, int64_t width, float* p, float* s) {
    std::copy(logits, logits + pixels, s);
    std::fill(s + pixels, s + width, -INFINITY);
    for (int64_t d = 0; d < width; d += LANES) {
        const Floats a = load(s + d), small = exponential(a < 0.0f ? a : -a);
        const Floats larger = 1.0f / (1.0f + small), smaller = small * larger;
        store(a < 0.0f ? larger : smaller, p + d);
        store(a < 0.0f ? smaller : larger, s + d);
    }
}

// v = exp(W - c) and 1 / v for the k values of a row, with c the middle of the values at each pixel: v enters only as v_j / v_z, and so the
// exponentials stay in range.
void exponentials(const float* row, int64_t k, int64_t pixels, int64_t width, float* middle, float* v, float* inverse) {
    for (int64_t d = 0; d < pixels; ++d) {
        float least = row[d], most = row[d];
        for (int64_t value = 1; value < k; ++value) {
            least = std::min(least, row[value * pixels + d]);
            most = std::max(most, row[value * pixels + d]);
        }
        middle[d] = (least + most) / 2;
    }
    for (int64_t value = 0; value < k; ++value) {
        float* to = v + value * width;
        for (int64_t d = 0; d < pixels; ++d) to[d] = row[value * pixels + d] - middle[d];
        std::fill(to + pixels, to + width, 0.0f);
        for (int64_t d = 0; d < width; d += LANES) {
            const Floats x = load(to + d);
            store(exponential(x), to + d);
            store(exponential(-x), inverse + value * width + d);
        }
    }
}

}  // namespace

// change[e, i, j] = sum_d softplus(a[e, d] + W[i, j, d] - W[i, z, d]) - softplus(a[e, d]), z = own[e, i].
//
// logits a: [examples, pixels]; rows W: [n, k, pixels], no two values of a row further apart than 60 at any pixel; own: [examples, n];
// change: [examples, n, k]; together: how many factors may be multiplied before they are normalised.
extern "C" void dgrad_softplus_sweep(const float* logits, const float* rows, const int64_t* own, float* change, int64_t together,
                                     int64_t examples, int64_t n, int64_t k, int64_t pixels, int64_t threads) {
    const int64_t width = (pixels + LANES - 1) / LANES * LANES;
    auto work = [=](int64_t first, int64_t last) {
        Array p_array(EXAMPLES_AT_ONCE * width), s_array(EXAMPLES_AT_ONCE * width);
        Array v_array(k * width), inverse_array(k * width), q_array(width), middle_array(width);
        float *p = p_array.data(), *s = s_array.data(), *v = v_array.data(), *inverse = inverse_array.data();
        float *q = q_array.data(), *middle = middle_array.data();
        for (int64_t start = first; start < last; start += EXAMPLES_AT_ONCE) {
            const int64_t count = std::min(EXAMPLES_AT_ONCE, last - start);
            for (int64_t example = 0; example < count; ++example)
                sigmoids(logits + (start + example) * pixels, pixels, width, p + example * width, s + example * width);
            for (int64_t row = 0; row < n; ++row) {  // before the examples, so that a row of v stays in the cache
                exponentials(rows + row * k * pixels, k, pixels, width, middle, v, inverse);
                for (int64_t example = 0; example < count; ++example) {
                    const int64_t at = (start + example) * n + row, z = own[at];
                    const float *own_inverse = inverse + z * width, *own_s = s + example * width;
                    for (int64_t d = 0; d < width; ++d) q[d] = own_s[d] * own_inverse[d];
                    float* result = change + at * k;
                    auto evaluate = [&](int64_t begin, int64_t values) {
                        log_products_of(values, p + example * width, q, v + begin * width, width, together, result + begin);
                    };
                    if (k == 2)
                        evaluate(1 - z, 1);
                    else {
                        const int64_t blocks = (k + MOST_VALUES - 1) / MOST_VALUES, size = (k + blocks - 1) / blocks;
                        for (int64_t begin = 0; begin < k; begin += size) evaluate(begin, std::min(size, k - begin));
                    }
                    result[z] = 0;
                }
            }
        }
    };
    const int64_t parts = std::max<int64_t>(1, std::min(threads, examples));
    // torch's own OpenMP threads: others would compete with them, which go on spinning after torch's last operation
#pragma omp parallel for num_threads(parts) schedule(static, 1)
    for (int64_t part = 0; part < parts; ++part) work(examples * part / parts, examples * (part + 1) / parts);
}
