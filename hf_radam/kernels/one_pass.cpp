// Whole updates in one pass over memory, of any number of tensors in one call.
//
// Every function takes `count` tensors of `sizes[t]` elements each, a table of addresses for each kind of tensor, and
// the numbers of the update as doubles, rounded once to the tensors' type. All operations are rounded one by one (built
// with -ffp-contract=off), except where fma is written: results depend neither on the number of threads nor on where
// vectors begin.

#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t CHUNK = 1 << 14;  // elements; seven streams of it fit into a core's cache
constexpr int64_t ALONE = 16;       // chunks below which waking other threads takes longer

// Calls f(tensor, begin, end) for stretches that cover all tensors once. Threads take them as they get ready, and treat
// denormal numbers as the calling thread does (torch.set_flush_denormal).
template <class F>
void for_all(int64_t count, const int64_t* sizes, int threads, F f) {
    std::vector<int64_t> first(count + 1, 0);
    for (int64_t t = 0; t < count; ++t) first[t + 1] = first[t] + (sizes[t] + CHUNK - 1) / CHUNK;
    const int64_t chunks = first[count];
    std::fenv_t callers;
    std::fegetenv(&callers);
#pragma omp parallel num_threads(threads) if (chunks > ALONE && threads > 1)
    {
        std::fenv_t own;
        std::fegetenv(&own);
        std::fesetenv(&callers);
#pragma omp for schedule(dynamic, 16)
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const int64_t t = std::upper_bound(first.begin(), first.end(), chunk) - first.begin() - 1;
            const int64_t begin = (chunk - first[t]) * CHUNK;
            f(t, begin, std::min(begin + CHUNK, sizes[t]));
        }
        std::fesetenv(&own);
    }
}

struct bfloat16 {
    uint16_t bits;
    operator float() const {
        const uint32_t wide = static_cast<uint32_t>(bits) << 16;
        float value;
        std::memcpy(&value, &wide, sizeof value);
        return value;
    }
};

// from + share (to - from), counted from the nearer end, as torch's lerp.
struct Lerp {
    float share;
    bool near;
    explicit Lerp(double size) : share(static_cast<float>(size)), near(std::fabs(share) < 0.5f) {
        if (!near) share -= 1.0f;
    }
    float operator()(float from, float to) const {
        const float base = near ? from : to;
#if defined(__FMA__) || defined(__aarch64__)
        return std::fma(share, to - from, base);
#else
        return base + share * (to - from);
#endif
    }
};

// The same in the tensors' type, each operation rounded by itself.
template <class T>
struct Between {
    T share, rest;
    bool near;
    explicit Between(double size) : share(static_cast<T>(size)), rest(1 - share), near(share < T(0.5)) {}
    T operator()(T from, T to) const { return near ? from + (to - from) * share : to - (to - from) * rest; }
};

template <class W>
void averages(int64_t count, const int64_t* sizes, int threads, float* const* average, const W* const* weights,
              double size) {
    const Lerp lerp(size);
    for_all(count, sizes, threads, [=](int64_t t, int64_t begin, int64_t end) {
        float* __restrict a = average[t];
        const W* __restrict w = weights[t];
        for (int64_t i = begin; i < end; ++i) a[i] = lerp(a[i], static_cast<float>(w[i]));
    });
}

// An optimizer's update: one(parameter, gradient, first state, second state) of every element, and then the average of
// the new parameters where there is one, while they are in the cache.
template <class T, class F>
void updates(int64_t count, const int64_t* sizes, int threads, T* const* parameters, const T* const* gradients,
             T* const* first, T* const* second, float* const* average, double size, F one) {
    const Lerp lerp(size);
    for_all(count, sizes, threads, [=](int64_t t, int64_t begin, int64_t end) {
        T* __restrict p = parameters[t];
        const T* __restrict g = gradients[t];
        T* __restrict a = first[t];
        T* __restrict b = second[t];
        for (int64_t i = begin; i < end; ++i) one(p[i], g[i], a[i], b[i]);
        if (average == nullptr || average[t] == nullptr) return;
        float* __restrict mean = average[t];
        for (int64_t i = begin; i < end; ++i) mean[i] = lerp(mean[i], static_cast<float>(p[i]));
    });
}

// Rectified update of RAdam (Liu et al. 2019, arXiv:1908.03265, algorithm 2), decoupled weight decay.
// numbers: 1 - beta1, beta2, 1 - beta2, eps, 1 - lr decay, step size with all corrections.
template <class T>
auto radam(const double* numbers) {
    const Between<T> mean(numbers[0]);
    const T beta2 = numbers[1], rest2 = numbers[2], eps = numbers[3], keep = numbers[4],
            rate = numbers[5];
    return [=](T& p, T g, T& m, T& v) {
        m = mean(m, g);
        v = v * beta2 + rest2 * g * g;
        p = p * keep - m * rate / (std::sqrt(v) + eps);
    };
}

// Rectified schedule-free update (Defazio et al. 2024, arXiv:2405.15682, algorithm 1, y in place of x).
// numbers: beta2, 1 - beta2, 1 / (1 - beta2^t), eps, weight decay, weight c of z, rate of y, rate of z.
template <class T>
auto schedule_free(const double* numbers) {
    const Between<T> mean(numbers[5]);
    const T beta2 = numbers[0], rest2 = numbers[1], correction = numbers[2], eps = numbers[3], decay = numbers[4],
            y_rate = numbers[6], z_rate = numbers[7];
    return [=](T& y, T g, T& z, T& v) {
        v = v * beta2 + rest2 * g * g;
        const T direction = g / (std::sqrt(v * correction) + eps) + y * decay;
        y = mean(y, z) + direction * y_rate;
        z = z - direction * z_rate;
    };
}

}  // namespace

#define UPDATE(kind, type, suffix)                                                                                   \
    extern "C" void kind##_##suffix(int64_t count, const int64_t* sizes, int threads, type* const* parameters,      \
                                    const type* const* gradients, type* const* first, type* const* second,           \
                                    float* const* average, double size, const double* numbers) {                     \
        updates(count, sizes, threads, parameters, gradients, first, second, average, size, kind<type>(numbers));    \
    }
UPDATE(radam, float, float32)
UPDATE(radam, double, float64)
UPDATE(schedule_free, float, float32)
UPDATE(schedule_free, double, float64)

#define AVERAGE(type, suffix)                                                                                        \
    extern "C" void average_##suffix(int64_t count, const int64_t* sizes, int threads, float* const* average,        \
                                     const type* const* weights, double size) {                                      \
        averages<type>(count, sizes, threads, average, weights, size);                                               \
    }
AVERAGE(float, float32)
AVERAGE(double, float64)
AVERAGE(bfloat16, bfloat16)
