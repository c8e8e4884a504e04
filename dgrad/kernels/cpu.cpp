// A linear Bernoulli decoder on a CPU: the loss of one-hot codes, its gradient, and its sweep; and the losses of any decoder's outputs.
//
// The loss of a code is sum_d softplus(a_d) - x_d a_d, a = bias + the rows of the weight that the code picks. The sweep is the loss with
// one of those rows changed:
//
//     softplus(a + W_j - W_z) - softplus(a) = log(p + q v_j), p = sigmoid(-a), q = sigmoid(a) / v_z, v = exp(W)
//
// so that the sum over the pixels is the logarithm of a product. A running product is split into mantissa and exponent often enough to
// stay within float32. Arrays over the pixels are `width` long, a multiple of a vector's length, and filled up so that nothing comes of it.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

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

// The same, 0 for what lies below.
inline Floats exponential_or_0(Floats x) { return x < -87.0f ? Floats{} : exponential(x); }

// exp(x) and exp(-x) of x in [-87, 87], for little more than the first: the even and the odd terms of the series are shared.
inline void exponentials_of(Floats x, float* power, float* inverse) {
    x = x > 87.0f ? Floats{} + 87.0f : x;
    x = x < -87.0f ? Floats{} - 87.0f : x;
    const Floats whole = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    const Floats r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f, square = r * r;
    const Floats even = ((square * (1.0f / 720) + 1.0f / 24) * square + 0.5f) * square;
    const Floats odd = ((square * (1.0f / 5040) + 1.0f / 120) * square + 1.0f / 6) * square * r + r;
    const Integers exponent = __builtin_convertvector(whole, Integers);
    store((even + odd + 1.0f) * (Floats)((127 + exponent) << 23), power);
    store((even - odd + 1.0f) * (Floats)((127 - exponent) << 23), inverse);
}

// Takes the exponents out of `mantissa` into `exponent`: what stays lies in [1, 2).
inline void normalise(Floats& mantissa, Integers& exponent) {
    const Integers bits = (Integers)mantissa;  // a cast of vectors keeps their bits
    exponent += (bits >> 23) - 127;
    mantissa = (Floats)((bits & 0x007fffff) | 0x3f800000);
}

// log(x), within 6e-8 for the mantissa.
inline Floats logarithm(Floats mantissa, Integers exponent) {
    normalise(mantissa, exponent);
    const Integers large = mantissa > 1.41421356f;
    mantissa = large ? mantissa * 0.5f : mantissa;
    exponent -= large;  // true is -1
    // log(1 + f) = f P(f), P interpolated at Chebyshev's points on [sqrt(1/2) - 1, sqrt(2) - 1]
    const Floats f = mantissa - 1.0f;
    Floats sum = f * 0.0853331313f - 0.142692581f;
    sum = sum * f + 0.149774015f;
    sum = sum * f - 0.165779933f;
    sum = sum * f + 0.199559331f;
    sum = sum * f - 0.250013530f;
    sum = sum * f + 0.333341926f;
    sum = sum * f - 0.499999970f;
    sum = sum * f + 1.0f;
    return __builtin_convertvector(exponent, Floats) * 0.693147181f + sum * f;
}

inline float sum_of(const Floats& x) {
    typedef float Half __attribute__((vector_size(2 * LANES)));
    Half low, high;
    std::memcpy(&low, &x, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&x) + sizeof low, sizeof high);
    low += high;
    float sum = 0;
    for (int lane = 0; lane < LANES / 2; ++lane) sum += low[lane];
    return sum;
}

constexpr float MOST_APART = 60.0f;  // nats within which a product has to stay between two normalisations; float32 reaches 87

// The product and the sum over the lanes of a vector.
inline void over_lanes(const Floats& mantissa, const Integers& exponent, float* product, int32_t* sum) {
    typedef float HalfFloats __attribute__((vector_size(2 * LANES)));
    typedef int32_t HalfIntegers __attribute__((vector_size(2 * LANES)));
    HalfFloats low, high;
    HalfIntegers low_exponent, high_exponent;
    std::memcpy(&low, &mantissa, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&mantissa) + sizeof low, sizeof high);
    std::memcpy(&low_exponent, &exponent, sizeof low);
    std::memcpy(&high_exponent, reinterpret_cast<const char*>(&exponent) + sizeof low, sizeof high);
    low *= high;
    low_exponent += high_exponent;
    float factors[LANES / 2];
    int32_t parts[LANES / 2];
    std::memcpy(factors, &low, sizeof low);
    std::memcpy(parts, &low_exponent, sizeof low);
    for (int width = LANES / 4; width > 0; width /= 2)
        for (int lane = 0; lane < width; ++lane) {
            factors[lane] *= factors[lane + width];
            parts[lane] += parts[lane + width];
        }
    *product = factors[0];
    *sum = parts[0];
}

// prod_d (p_d + q_d v_jd), q_d = s_d u_d, for VALUES rows of v at once, as product * 2^power; CHAINS products each, so that no multiplication
// waits for the last one.
template <int VALUES, int CHAINS>
void products(const float* p, const float* s, const float* u, const float* const* v, const float* apart, int64_t width, float* product,
              int32_t* power) {
    Floats mantissa[VALUES][CHAINS];
    Integers exponent[VALUES][CHAINS];
    for (int value = 0; value < VALUES; ++value)
        for (int chain = 0; chain < CHAINS; ++chain) {
            mantissa[value][chain] = Floats{} + 1.0f;
            exponent[value][chain] = Integers{};
        }
    constexpr int64_t stride = CHAINS * LANES;
    int64_t d = 0;
    float room = MOST_APART;  // a factor lies within exp(+-apart) of 1
    for (; d + stride <= width; d += stride) {
        const float needed = *std::max_element(apart + d / LANES, apart + d / LANES + CHAINS);
        if (needed > room) {
            for (int value = 0; value < VALUES; ++value)
                for (int chain = 0; chain < CHAINS; ++chain) normalise(mantissa[value][chain], exponent[value][chain]);
            room = MOST_APART;
        }
        room -= needed;
        for (int chain = 0; chain < CHAINS; ++chain) {
            const int64_t at = d + chain * LANES;
            const Floats p_part = load(p + at), q_part = load(s + at) * load(u + at);
            for (int value = 0; value < VALUES; ++value) mantissa[value][chain] *= p_part + q_part * load(v[value] + at);
        }
    }
    for (int value = 0; value < VALUES; ++value)
        for (int chain = 0; chain < CHAINS; ++chain) normalise(mantissa[value][chain], exponent[value][chain]);
    for (; d < width; d += LANES)  // fewer than CHAINS vectors are left
        for (int value = 0; value < VALUES; ++value) {
            mantissa[value][0] *= load(p + d) + load(s + d) * load(u + d) * load(v[value] + d);
            normalise(mantissa[value][0], exponent[value][0]);
        }
    for (int value = 0; value < VALUES; ++value) {
        for (int chain = 1; chain < CHAINS; ++chain) {  // mantissas below 2, and 64 of them at most
            mantissa[value][0] *= mantissa[value][chain];
            exponent[value][0] += exponent[value][chain];
        }
        over_lanes(mantissa[value][0], exponent[value][0], product + value, power + value);
    }
}

void products_of(int64_t values, const float* p, const float* s, const float* u, const float* const* v, const float* apart, int64_t width,
                 float* product, int32_t* power) {
    switch (values) {
        case 1: return products<1, 4>(p, s, u, v, apart, width, product, power);
        case 2: return products<2, 3>(p, s, u, v, apart, width, product, power);
        case 3: return products<3, 2>(p, s, u, v, apart, width, product, power);
        case 4: return products<4, 2>(p, s, u, v, apart, width, product, power);
        case 5: return products<5, 1>(p, s, u, v, apart, width, product, power);
        case 6: return products<6, 1>(p, s, u, v, apart, width, product, power);
        case 7: return products<7, 1>(p, s, u, v, apart, width, product, power);
        case 8: return products<8, 1>(p, s, u, v, apart, width, product, power);
        default: return products<9, 1>(p, s, u, v, apart, width, product, power);
    }
}

constexpr int64_t MOST_VALUES = 9;
constexpr int64_t PIXELS_AT_ONCE = 4 * LANES;
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

// The sigmoids of -a and a, to the last digit at either end; returns exp(-|a|).
inline Floats sigmoids(Floats a, float* p, float* s) {
    const Floats small = exponential(a < 0.0f ? a : -a), larger = 1.0f / (1.0f + small), smaller = small * larger;
    store(a < 0.0f ? larger : smaller, p);
    store(a < 0.0f ? smaller : larger, s);
    return small;
}

constexpr double MOST_NOT_ZERO = 0.15;  // of the pixels of images, where a product goes over these alone
constexpr float NOTHING = -1e30f;  // the logit where there is no pixel: its sigmoid is 0, its softplus too

// add(a, x, d) for vector after vector of an image's outputs and pixels, from pixel d on; what the last one lacks is filled up with outputs that
// stand for no pixel.
template <typename Add>
inline void over_pixels(const float* outputs, const float* image, int64_t pixels, const Add& add) {
    const int64_t whole = pixels / LANES * LANES;
    for (int64_t d = 0; d < whole; d += LANES) add(load(outputs + d), load(image + d), d);
    if (whole == pixels) return;
    float last_outputs[LANES], last_pixels[LANES] = {};
    std::fill_n(last_outputs, LANES, NOTHING);
    std::copy(outputs + whole, outputs + pixels, last_outputs);
    std::copy(image + whole, image + pixels, last_pixels);
    add(load(last_outputs), load(last_pixels), whole);
}

// Writes a vector of pixels from pixel d on; the last one may lack some.
inline void store_pixels(const Floats& from, float* to, int64_t d, int64_t pixels) {
    if (d + LANES <= pixels) return store(from, to + d);
    float last[LANES];
    store(from, last);
    std::copy_n(last, pixels - d, to + d);
}

// v = exp(W - c) and 1 / v for the k values of a row, with c the middle of the values at each pixel: v enters only as v_j / v_z, and so the
// exponentials stay in range.
void exponentials(const float* row, int64_t k, int64_t width, float* v, float* inverse) {
    for (int64_t d = 0; d < width; d += LANES) {
        Floats least = load(row + d), most = least;
        for (int64_t value = 1; value < k; ++value) {
            const Floats weight = load(row + value * width + d);
            least = weight < least ? weight : least;
            most = weight > most ? weight : most;
        }
        const Floats middle = (least + most) * 0.5f;
        for (int64_t value = 0; value < k; ++value) {
            const Floats x = load(row + value * width + d) - middle;
            exponentials_of(x, v + value * width + d, inverse + value * width + d);
        }
    }
}

inline float largest_lane(const Floats& x) {
    float lanes[LANES];
    store(x, lanes);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int lane = 0; lane < width; ++lane) lanes[lane] = lanes[lane + width] > lanes[lane] ? lanes[lane + width] : lanes[lane];
    return lanes[0];
}

// Not a number, if one of the two is none.
inline float larger_of(float one, float other) { return one != one || other <= one ? one : other; }

// The value of a one-hot row, or -1.
int32_t value_of(const float* row, int64_t k) {
    int32_t found = -1, others = 0;
    for (int64_t value = 0; value < k; ++value) {
        if (row[value] == 1.0f)
            found = found < 0 ? static_cast<int32_t>(value) : static_cast<int32_t>(k);
        else
            others += row[value] != 0.0f;
    }
    return found < k && others == 0 ? found : -1;
}

// Runs work(first, last) on parts of 0..count. Torch's own OpenMP threads: others would compete with them, which go on spinning after
// torch's last operation.
template <typename Work>
void in_parallel(int64_t count, int64_t threads, const Work& work) {
    const int64_t parts = std::max<int64_t>(1, std::min(threads, count));
#pragma omp parallel for num_threads(parts) schedule(static, 1)
    for (int64_t part = 0; part < parts; ++part) work(count * part / parts, count * (part + 1) / parts);
}

// LANES rows of k numbers, `stride` apart, as k vectors: a row to each lane. Lanes beyond `rows` repeat the first row.
inline void read_rows(const float* from, int64_t rows, int64_t k, int64_t stride, float* block) {
    if (rows == LANES) {
        for (int64_t value = 0; value < k; ++value)
            for (int64_t lane = 0; lane < LANES; ++lane) block[value * LANES + lane] = from[lane * stride + value];
        return;
    }
    for (int64_t lane = 0; lane < LANES; ++lane)
        for (int64_t value = 0; value < k; ++value) block[value * LANES + lane] = from[(lane < rows ? lane : 0) * stride + value];
}

inline void write_rows(const float* block, int64_t rows, int64_t k, int64_t stride, float* to) {
    for (int64_t lane = 0; lane < rows; ++lane)
        for (int64_t value = 0; value < k; ++value) to[lane * stride + value] = block[value * LANES + lane];
}

constexpr int64_t LONGEST_ROW = 16;  // cpu.py has the same

// change(x, y, start, rows) for the rows of x and y [count, k] from `start` on, LANES at once, as blocks of k vectors; what it leaves in x goes
// to `to`.
template <typename Change>
void over_rows(const float* x, const float* y, float* to, int64_t count, int64_t k, int64_t threads, const Change& change) {
    in_parallel((count + LANES - 1) / LANES, threads, [=, &change](int64_t first, int64_t last) {
        Array x_array(LONGEST_ROW * LANES), y_array(LONGEST_ROW * LANES);
        for (int64_t start = first * LANES; start < std::min(count, last * LANES); start += LANES) {
            const int64_t rows = std::min<int64_t>(LANES, count - start);
            read_rows(x + start * k, rows, k, k, x_array.data());
            if (y != nullptr) read_rows(y + start * k, rows, k, k, y_array.data());
            change(x_array.data(), y_array.data(), start, rows);
            write_rows(x_array.data(), rows, k, k, to + start * k);
        }
    });
}

// The largest of a row's numbers, but for those that are none.
inline Floats largest(const float* x, int64_t k) {
    Floats result = load(x);
    for (int64_t value = 1; value < k; ++value) {
        const Floats other = load(x + value * LANES);
        result = other > result ? other : result;
    }
    return result;
}

constexpr int64_t MOST_VECTORS = 8;

// to[column + c] += sum_i rows[i][column + c] for VECTORS vectors of columns, whose sums stay in registers.
template <int VECTORS>
void sum_rows(const float* const* rows, int64_t count, int64_t column, float* to) {
    Floats sum[VECTORS];
    for (int part = 0; part < VECTORS; ++part) sum[part] = load(to + column + part * LANES);
    for (int64_t at = 0; at < count; ++at)
        for (int part = 0; part < VECTORS; ++part) sum[part] += load(rows[at] + column + part * LANES);
    for (int part = 0; part < VECTORS; ++part) store(sum[part], to + column + part * LANES);
}

void sums_of_rows(int64_t vectors, const float* const* rows, int64_t count, int64_t column, float* to) {
    switch (vectors) {
        case 1: return sum_rows<1>(rows, count, column, to);
        case 2: return sum_rows<2>(rows, count, column, to);
        case 3: return sum_rows<3>(rows, count, column, to);
        case 4: return sum_rows<4>(rows, count, column, to);
        case 5: return sum_rows<5>(rows, count, column, to);
        case 6: return sum_rows<6>(rows, count, column, to);
        case 7: return sum_rows<7>(rows, count, column, to);
        default: return sum_rows<8>(rows, count, column, to);
    }
}

}  // namespace

extern "C" {

// Lets each of so many threads take denormal numbers for zeros, or not. Elsewhere than on x86 nothing happens.
void dgrad_flush_denormals(bool flush, int64_t threads) {
#if defined(__SSE__)
    constexpr unsigned results_and_operands = 0x8040;
    in_parallel(threads, threads, [=](int64_t, int64_t) {
        _mm_setcsr(flush ? _mm_getcsr() | results_and_operands : _mm_getcsr() & ~results_and_operands);
    });
#endif
}

// to [count, k] = the softmax of rows x.
void dgrad_softmax(const float* x, const float*, float* to, int64_t count, int64_t k, int64_t threads) {
    over_rows(x, nullptr, to, count, k, threads, [k](float* x, const float*, int64_t, int64_t) {
        const Floats most = largest(x, k);
        Floats sum{};
        for (int64_t value = 0; value < k; ++value) {
            const Floats power = exponential_or_0(load(x + value * LANES) - most);
            sum += power;
            store(power, x + value * LANES);
        }
        const Floats scale = 1.0f / sum;
        for (int64_t value = 0; value < k; ++value) store(load(x + value * LANES) * scale, x + value * LANES);
    });
}

// to = the gradient in x, of the gradient y in the softmax x.
void dgrad_softmax_gradient(const float* x, const float* y, float* to, int64_t count, int64_t k, int64_t threads) {
    over_rows(x, y, to, count, k, threads, [k](float* x, const float* y, int64_t, int64_t) {
        Floats mean{};
        for (int64_t value = 0; value < k; ++value) mean += load(x + value * LANES) * load(y + value * LANES);
        for (int64_t value = 0; value < k; ++value)
            store(load(x + value * LANES) * (load(y + value * LANES) - mean), x + value * LANES);
    });
}

void dgrad_log_softmax(const float* x, const float*, float* to, int64_t count, int64_t k, int64_t threads) {
    over_rows(x, nullptr, to, count, k, threads, [k](float* x, const float*, int64_t, int64_t) {
        const Floats most = largest(x, k);
        Floats sum{};
        for (int64_t value = 0; value < k; ++value) sum += exponential_or_0(load(x + value * LANES) - most);
        const Floats shift = most + logarithm(sum, Integers{});
        for (int64_t value = 0; value < k; ++value) store(load(x + value * LANES) - shift, x + value * LANES);
    });
}

// to = the gradient in x, of the gradient y in the log-softmax x.
void dgrad_log_softmax_gradient(const float* x, const float* y, float* to, int64_t count, int64_t k, int64_t threads) {
    over_rows(x, y, to, count, k, threads, [k](float* x, const float* y, int64_t, int64_t) {
        Floats sum{};
        for (int64_t value = 0; value < k; ++value) sum += load(y + value * LANES);
        for (int64_t value = 0; value < k; ++value)
            store(load(y + value * LANES) - exponential_or_0(load(x + value * LANES)) * sum, x + value * LANES);
    });
}

// to [count, k] = the gradient of the KL of a row's softmax to the uniform distribution, in nats; kl [count] = the KL itself.
void dgrad_kl_to_uniform(const float* x, float* kl, float* to, int64_t count, int64_t k, int64_t threads) {
    const float log_k = std::log(static_cast<float>(k));
    over_rows(x, nullptr, to, count, k, threads, [=](float* x, const float*, int64_t start, int64_t rows) {
        const Floats most = largest(x, k);
        Floats sum{}, total{}, powers[LONGEST_ROW];
        for (int64_t value = 0; value < k; ++value) sum += powers[value] = exponential_or_0(load(x + value * LANES) - most);
        const Floats shift = most + logarithm(sum, Integers{}) - log_k, scale = 1.0f / sum;
        for (int64_t value = 0; value < k; ++value) {
            powers[value] *= scale;
            const Floats log_ratio = load(x + value * LANES) - shift;  // log p + log k
            const Floats ratio = log_ratio < -1e30f ? Floats{} - 1e30f : log_ratio;  // finite, as 0 times it is 0
            total += powers[value] * ratio;
            store(ratio, x + value * LANES);
        }
        for (int64_t value = 0; value < k; ++value) store(powers[value] * (load(x + value * LANES) - total), x + value * LANES);
        float lanes[LANES];
        store(total, lanes);
        std::copy_n(lanes, rows, kl + start);
    });
}

// to = one-hot rows at the first of the largest numbers of x, or at the first that is no number.
void dgrad_argmax(const float* x, const float*, float* to, int64_t count, int64_t k, int64_t threads) {
    over_rows(x, nullptr, to, count, k, threads, [k](float* x, const float*, int64_t, int64_t) {
        Floats most = load(x);
        Integers found{};
        for (int64_t value = 1; value < k; ++value) {
            const Floats other = load(x + value * LANES);
            const Integers better = (other > most) | ((other != other) & (most == most));
            most = better ? other : most;
            found = better ? Integers{} + static_cast<int32_t>(value) : found;
        }
        for (int64_t value = 0; value < k; ++value)
            store(found == static_cast<int32_t>(value) ? Floats{} + 1.0f : Floats{}, x + value * LANES);
    });
}

int64_t dgrad_width(int64_t pixels) { return (pixels + LANES - 1) / LANES * LANES; }

// own[c] = the values of one-hot codes [count, k]. Returns whether they are one-hot.
bool dgrad_values(const float* codes, int32_t* own, int64_t count, int64_t k) {
    bool fine = true;
    for (int64_t row = 0; row < count; ++row) {
        own[row] = value_of(codes + row * k, k);
        fine = fine && own[row] >= 0;
    }
    return fine;
}

// rows [n, k, width] = the weight [pixels, n*k], transposed. apart [n, width / LANES]: how far two values of a row lie apart at most, at one of a
// vector's pixels. Returns the largest of these; not a number where a weight is none.
float dgrad_rows(const float* weight, float* rows, float* apart, int64_t n, int64_t k, int64_t pixels, int64_t threads) {
    const int64_t width = dgrad_width(pixels), columns = n * k;
    std::vector<float> spreads(n);
    in_parallel(n, threads, [=, &spreads](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            float *to = rows + row * k * width, spread = 0;
            float* of_row = apart + row * (width / LANES);
            Floats widest{}, wrong{};  // wrong: 0, or not a number where a weight is none or infinite
            for (int64_t d = 0; d < width; d += LANES) {
                const float* from = weight + d * columns + row * k;
                if (d + LANES <= pixels) {
                    for (int64_t value = 0; value < k; ++value)
                        for (int64_t lane = 0; lane < LANES; ++lane) to[value * width + d + lane] = from[lane * columns + value];
                } else {
                    for (int64_t value = 0; value < k; ++value)
                        for (int64_t lane = 0; lane < LANES; ++lane)
                            to[value * width + d + lane] = d + lane < pixels ? from[lane * columns + value] : 0.0f;
                }
                Floats least = load(to + d), most = least;
                wrong += least * 0.0f;
                for (int64_t value = 1; value < k; ++value) {
                    const Floats x = load(to + value * width + d);
                    least = x < least ? x : least;
                    most = x > most ? x : most;
                    wrong += x * 0.0f;
                }
                of_row[d / LANES] = largest_lane(most - least);
                widest = most - least > widest ? most - least : widest;
            }
            widest += wrong;
            float lanes[LANES];
            store(widest, lanes);
            for (float lane : lanes) spread = larger_of(spread, lane);
            spreads[row] = spread;
        }
    });
    float result = 0;
    for (float spread : spreads) result = larger_of(result, spread);
    return result;
}

// loss[e] = sum_d softplus(a_d) - x_d a_d for a = bias + sum_i rows[i, own[e, i]], with the sigmoids of -a and a, [examples, width].
// Example e is of image e % batch.
void dgrad_loss(const int32_t* own, const float* rows, const float* bias, const float* images, float* p, float* s, float* loss,
                int64_t examples, int64_t batch, int64_t n, int64_t k, int64_t pixels, int64_t threads) {
    const int64_t width = dgrad_width(pixels);
    in_parallel(examples, threads, [=](int64_t first, int64_t last) {
        Array logits_array(width), image_array(width);
        float *a = logits_array.data(), *x = image_array.data();
        std::vector<const float*> summands(n);
        for (int64_t example = first; example < last; ++example) {
            std::copy_n(bias, pixels, a);
            for (int64_t row = 0; row < n; ++row) summands[row] = rows + (row * k + own[example * n + row]) * width;
            for (int64_t d = 0; d < width; d += MOST_VECTORS * LANES)
                sums_of_rows(std::min(MOST_VECTORS, (width - d) / LANES), summands.data(), n, d, a);
            std::fill(a + pixels, a + width, NOTHING);
            std::copy_n(images + example % batch * pixels, pixels, x);
            Floats total{}, mantissa = Floats{} + 1.0f;
            Integers exponent{};
            for (int64_t d = 0; d < width; d += LANES) {
                const Floats logit = load(a + d);
                const Floats small = sigmoids(logit, p + example * width + d, s + example * width + d);
                total += (logit > 0.0f ? logit : Floats{}) - load(x + d) * logit;
                mantissa *= 1.0f + small;  // softplus(a) = max(a, 0) + log(1 + exp(-|a|))
                if (d / LANES % 64 == 63) normalise(mantissa, exponent);
            }
            loss[example] = sum_of(total + logarithm(mantissa, exponent));
        }
    });
}

// loss[e] = sum_d softplus(a_d) - x_d a_d of given logits a [examples, pixels], whatever decoder they come from. Example e is of image e % batch.
// slope [examples, pixels]: its derivatives sigmoid(a_d) - x_d, unless it is null.
void dgrad_loss_of_logits(const float* logits, const float* images, float* loss, float* slope, int64_t examples, int64_t batch, int64_t pixels,
                          int64_t threads) {
    in_parallel(examples, threads, [=](int64_t first, int64_t last) {
        for (int64_t example = first; example < last; ++example) {
            Floats total{}, mantissa = Floats{} + 1.0f;
            Integers exponent{};
            const float *outputs = logits + example * pixels, *image = images + example % batch * pixels;
            const auto add = [&](const Floats& a, const Floats& x, const Floats& small, int64_t d) {
                total += (a > 0.0f ? a : Floats{}) - x * a;
                mantissa *= 1.0f + small;
                if (d / LANES % 64 == 63) normalise(mantissa, exponent);
            };
            if (slope == nullptr)
                over_pixels(outputs, image, pixels, [&](const Floats& a, const Floats& x, int64_t d) {
                    add(a, x, exponential(a < 0.0f ? a : -a), d);
                });
            else
                over_pixels(outputs, image, pixels, [&](const Floats& a, const Floats& x, int64_t d) {
                    const Floats small = exponential(a < 0.0f ? a : -a), larger = 1.0f / (1.0f + small);
                    store_pixels((a < 0.0f ? small * larger : larger) - x, slope + example * pixels, d, pixels);
                    add(a, x, small, d);
                });
            loss[example] = sum_of(total + logarithm(mantissa, exponent));
        }
    });
}

// loss[e] = sum_d (x_d - (1 + tanh a_d) / 2)^2 of the same; (1 + tanh a) / 2 is the sigmoid m of 2a. slope: -4 (x_d - m_d) m_d (1 - m_d).
void dgrad_squared_error(const float* outputs, const float* images, float* loss, float* slope, int64_t examples, int64_t batch, int64_t pixels,
                         int64_t threads) {
    in_parallel(examples, threads, [=](int64_t first, int64_t last) {
        for (int64_t example = first; example < last; ++example) {
            Floats total{};
            over_pixels(outputs + example * pixels, images + example % batch * pixels, pixels, [&](const Floats& a, const Floats& x, int64_t d) {
                const Floats mean = 1.0f / (1.0f + exponential(-2.0f * a)), error = x - mean;
                if (slope != nullptr) store_pixels(-4.0f * error * mean * (1.0f - mean), slope + example * pixels, d, pixels);
                total += error * error;
            });
            loss[example] = sum_of(total);
        }
    });
}

// The gradients of sum_e scale[e] loss[e] in the weight [pixels, n*k] and the bias. A few pixels at a time, so that what belongs to them stays
// in the first-level cache.
void dgrad_gradient(const int32_t* own, const float* s, const float* images, const float* scale, float* weight_gradient,
                    float* bias_gradient, int64_t examples, int64_t batch, int64_t n, int64_t k, int64_t pixels, int64_t threads) {
    const int64_t width = dgrad_width(pixels), columns = n * k, blocks = (pixels + PIXELS_AT_ONCE - 1) / PIXELS_AT_ONCE;
    // The examples of each value of each row, one value after the other: their sum stays in registers.
    std::vector<int32_t> sorted(n * examples);
    std::vector<int64_t> starts(n * (k + 1));
    for (int64_t row = 0; row < n; ++row) {
        int64_t* start = starts.data() + row * (k + 1);
        for (int64_t example = 0; example < examples; ++example) ++start[own[example * n + row] + 1];
        std::partial_sum(start, start + k + 1, start);
        std::vector<int64_t> next(start, start + k);
        for (int64_t example = 0; example < examples; ++example)
            sorted[row * examples + next[own[example * n + row]]++] = static_cast<int32_t>(example);
    }
    in_parallel(blocks, threads, [=, &sorted, &starts](int64_t first, int64_t last) {
        Array errors_array(examples * PIXELS_AT_ONCE), sums_array(k * PIXELS_AT_ONCE);
        float *errors = errors_array.data(), *sums = sums_array.data();
        for (int64_t block = first; block < last; ++block) {
            const int64_t begin = block * PIXELS_AT_ONCE, count = std::min(PIXELS_AT_ONCE, pixels - begin);
            float bias[PIXELS_AT_ONCE] = {};
            for (int64_t example = 0; example < examples; ++example) {
                const float *sigmoid = s + example * width + begin, *image = images + example % batch * pixels + begin;
                for (int64_t d = 0; d < count; ++d) {
                    errors[example * PIXELS_AT_ONCE + d] = scale[example] * (sigmoid[d] - image[d]);
                    bias[d] += errors[example * PIXELS_AT_ONCE + d];
                }
            }
            std::copy_n(bias, count, bias_gradient + begin);
            for (int64_t row = 0; row < n; ++row) {
                const int32_t* of_row = sorted.data() + row * examples;
                for (int64_t value = 0; value < k; ++value) {
                    Floats sum[PIXELS_AT_ONCE / LANES] = {};
                    for (int64_t at = starts[row * (k + 1) + value]; at < starts[row * (k + 1) + value + 1]; ++at)
                        for (int64_t part = 0; part < PIXELS_AT_ONCE / LANES; ++part)
                            sum[part] += load(errors + of_row[at] * PIXELS_AT_ONCE + part * LANES);
                    for (int64_t part = 0; part < PIXELS_AT_ONCE / LANES; ++part) store(sum[part], sums + value * PIXELS_AT_ONCE + part * LANES);
                }
                for (int64_t d = 0; d < count; ++d)
                    for (int64_t value = 0; value < k; ++value)
                        weight_gradient[(begin + d) * columns + row * k + value] = sums[value * PIXELS_AT_ONCE + d];
            }
        }
    });
}

// linear [batch, columns] = images [batch, pixels] times the weight [pixels, columns], by the pixels that are not zero; false, with nothing
// done, where so many are not that a plain product is faster.
bool dgrad_products(const float* images, const float* weight, float* linear, int64_t batch, int64_t pixels, int64_t columns, int64_t threads) {
    if (batch * pixels - std::count(images, images + batch * pixels, 0.0f) > batch * pixels * MOST_NOT_ZERO) return false;
    in_parallel(batch, threads, [=](int64_t first, int64_t last) {
        constexpr int64_t AT_ONCE = 4;
        std::vector<const float*> rows(pixels + AT_ONCE);
        std::vector<float> values(pixels + AT_ONCE);
        for (int64_t image = first; image < last; ++image) {
            int64_t count = 0;
            for (int64_t d = 0; d < pixels; ++d) {  // without a branch: each is written over while it is zero
                values[count] = images[image * pixels + d];
                rows[count] = weight + d * columns;
                count += values[count] != 0.0f;
            }
            for (; count % AT_ONCE != 0; ++count) {
                values[count] = 0.0f;
                rows[count] = weight;
            }
            float* __restrict to = linear + image * columns;
            std::fill_n(to, columns, 0.0f);
            for (int64_t at = 0; at < count; at += AT_ONCE) {
                const float *row0 = rows[at], *row1 = rows[at + 1], *row2 = rows[at + 2], *row3 = rows[at + 3];
                const float x0 = values[at], x1 = values[at + 1], x2 = values[at + 2], x3 = values[at + 3];
                for (int64_t column = 0; column < columns; ++column)
                    to[column] += x0 * row0[column] + x1 * row1[column] + x2 * row2[column] + x3 * row3[column];
            }
        }
    });
    return true;
}

// The sigmoids of -logits and logits [examples, pixels], as dgrad_loss leaves them.
void dgrad_sigmoids(const float* logits, float* p, float* s, int64_t examples, int64_t pixels, int64_t threads) {
    const int64_t width = dgrad_width(pixels);
    in_parallel(examples, threads, [=](int64_t first, int64_t last) {
        Array array(width);
        float* a = array.data();
        for (int64_t example = first; example < last; ++example) {
            std::copy_n(logits + example * pixels, pixels, a);
            std::fill(a + pixels, a + width, NOTHING);
            for (int64_t d = 0; d < width; d += LANES) sigmoids(load(a + d), p + example * width + d, s + example * width + d);
        }
    });
}

// table[e, i, j] = the loss with row i of example e's code changed to j; the code's own loss where it is j already.
//
// p, s: the sigmoids [examples, width]; linear [batch, n*k]: the images times the weight; rows, apart: as of dgrad_rows, nowhere further apart than
// MOST_APART.
void dgrad_sweep(const int32_t* own, const float* rows, const float* apart, const float* linear, const float* p, const float* s,
                 const float* loss, float* table, int64_t examples, int64_t batch, int64_t n, int64_t k, int64_t pixels,
                 int64_t threads) {
    const int64_t width = dgrad_width(pixels), columns = n * k;
    in_parallel(examples, threads, [=](int64_t first, int64_t last) {
        const int64_t padded = (k + LANES - 1) / LANES * LANES;
        Array v_array(k * width), inverse_array(k * width);
        float *v = v_array.data(), *inverse = inverse_array.data();
        std::vector<float> changes(padded, 1.0f);
        std::vector<int32_t> powers(padded);
        std::vector<const float*> others(k);
        std::vector<int64_t> values(k);
        for (int64_t start = first; start < last; start += EXAMPLES_AT_ONCE) {
            const int64_t count = std::min(EXAMPLES_AT_ONCE, last - start);
            for (int64_t row = 0; row < n; ++row) {  // before the examples, so that a row of v stays in the cache
                exponentials(rows + row * k * width, k, width, v, inverse);
                const float* of_row = apart + row * (width / LANES);
                for (int64_t example = 0; example < count; ++example) {
                    const int64_t at = start + example, z = own[at * n + row];
                    const float *own_inverse = inverse + z * width, *own_p = p + at * width, *own_s = s + at * width;
                    int64_t left = 0;
                    for (int64_t value = 0; value < k; ++value)
                        if (value != z) {
                            values[left] = value;
                            others[left++] = v + value * width;
                        }
                    const int64_t blocks = (left + MOST_VALUES - 1) / MOST_VALUES, size = blocks ? (left + blocks - 1) / blocks : 1;
                    for (int64_t begin = 0; begin < left; begin += size)
                        products_of(std::min(size, left - begin), own_p, own_s, own_inverse, others.data() + begin, of_row, width,
                                    changes.data() + begin, powers.data() + begin);
                    for (int64_t begin = 0; begin < left; begin += LANES) {
                        Integers power;
                        std::memcpy(&power, powers.data() + begin, sizeof power);
                        store(logarithm(load(changes.data() + begin), power), changes.data() + begin);
                    }
                    float* result = table + (at * n + row) * k;
                    const float* slope = linear + at % batch * columns + row * k;
                    for (int64_t other = 0; other < left; ++other)
                        result[values[other]] = loss[at] + (changes[other] - (slope[values[other]] - slope[z]));
                    result[z] = loss[at];
                }
            }
        }
    });
}

}  // extern "C"
