// The schedule-free step and averages of weights, each in one pass over memory and one call for all tensors.
//
// Every function takes `count` tensors of `sizes[t]` elements each, a table of addresses for each kind of tensor, and
// scalars as doubles, rounded once to the tensors' type. Each operation is rounded on its own (built with
// -ffp-contract=off), except where fma is written: results depend neither on the number of threads nor on where
// vectors begin.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t CHUNK = 1 << 14;  // elements; seven streams of it fit into a core's cache
constexpr int64_t SERIAL = 16;      // chunks up to which waking other threads takes longer

// Calls f(tensor, begin, end) for chunks that cover all tensors once.
template <class F>
void for_all(int64_t count, const int64_t* sizes, int threads, F f) {
    std::vector<int64_t> first(count + 1, 0);
    for (int64_t t = 0; t < count; ++t) first[t + 1] = first[t] + (sizes[t] + CHUNK - 1) / CHUNK;
    const int64_t chunks = first[count];
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads) if (chunks > SERIAL && threads > 1)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t t = std::upper_bound(first.begin(), first.end(), chunk) - first.begin() - 1;
        const int64_t begin = (chunk - first[t]) * CHUNK;
        f(t, begin, std::min(begin + CHUNK, sizes[t]));
    }
}

// Rectified schedule-free step (Defazio et al. 2024, arXiv:2405.15682, algorithm 1, y in place of x).
// scalars: beta2, 1 - beta2, 1 / (1 - beta2^t), eps, weight decay, weight c of z, rate of y, rate of z.
template <class T>
void schedule_free(int64_t count, const int64_t* sizes, int threads, T* const* ys, const T* const* gradients,
                   T* const* zs, T* const* second_moments, const double* scalars) {
    const T beta2 = scalars[0], rest2 = scalars[1], correction = scalars[2], eps = scalars[3], decay = scalars[4],
            c = scalars[5], rest = 1 - c, y_rate = scalars[6], z_rate = scalars[7];
    const bool near_y = c < T(0.5);  // counted from the nearer end, as torch's lerp
    for_all(count, sizes, threads, [=](int64_t t, int64_t begin, int64_t end) {
        T* __restrict ys_t = ys[t];
        const T* __restrict gradients_t = gradients[t];
        T* __restrict zs_t = zs[t];
        T* __restrict moments_t = second_moments[t];
        for (int64_t i = begin; i < end; ++i) {
            const T y = ys_t[i], g = gradients_t[i], z = zs_t[i];
            const T v = moments_t[i] * beta2 + rest2 * g * g;
            const T direction = g / (std::sqrt(v * correction) + eps) + y * decay;
            ys_t[i] = (near_y ? y + (z - y) * c : z - (z - y) * rest) + direction * y_rate;
            zs_t[i] = z - direction * z_rate;
            moments_t[i] = v;
        }
    });
}

float widen(float value) { return value; }

float widen(uint16_t bf16) {
    const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// average + size * (weight - average), counted from the nearer end, as torch's lerp.
template <class W>
void average(int64_t count, const int64_t* sizes, int threads, float* const* averages, const W* const* weights,
             float size) {
    const bool near_average = std::fabs(size) < 0.5f;
    const float share = near_average ? size : size - 1.0f;
    for_all(count, sizes, threads, [=](int64_t t, int64_t begin, int64_t end) {
        float* __restrict averages_t = averages[t];
        const W* __restrict weights_t = weights[t];
        for (int64_t i = begin; i < end; ++i) {
            const float from = averages_t[i], to = widen(weights_t[i]), base = near_average ? from : to;
#if defined(__FMA__) || defined(__aarch64__)
            averages_t[i] = std::fma(share, to - from, base);
#else
            averages_t[i] = base + share * (to - from);
#endif
        }
    });
}

}  // namespace

#define SCHEDULE_FREE(type, suffix)                                                                                    \
    extern "C" void schedule_free_##suffix(int64_t count, const int64_t* sizes, int threads, type* const* ys,         \
                                           const type* const* gradients, type* const* zs,                              \
                                           type* const* second_moments, const double* scalars) {                       \
        schedule_free<type>(count, sizes, threads, ys, gradients, zs, second_moments, scalars);                        \
    }
SCHEDULE_FREE(float, float32)
SCHEDULE_FREE(double, float64)

#define AVERAGE(type, suffix)                                                                                          \
    extern "C" void average_##suffix(int64_t count, const int64_t* sizes, int threads, float* const* averages,        \
                                     const type* const* weights, const double* scalars) {                              \
        average<type>(count, sizes, threads, averages, weights, scalars[0]);                                           \
    }
AVERAGE(float, float32)
AVERAGE(uint16_t, bfloat16)
