/* modulate on a CPU: mean, variance, scale and shift of one token while it is in the cache. */
#include "../lowbit.h"

static __thread Scratch of_thread;

/* x, y (B, S, D), shift and scale (B, D) with rows `stride` numbers apart, all in `format`. Returns 0, or 1 when memory ran out. */
EXPORT int lowbit_modulate(const void *x, int64_t format, const void *shift, const void *scale, int64_t stride, double eps,
                           int64_t samples, int64_t tokens, int64_t channels, void *y, int64_t threads) {
    int failed = 0;
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t row = 0; row < samples * tokens; row++) {
        float *restrict wide = reserve(&of_thread, (size_t)channels * 12 + 64);
        if (!wide) {
#pragma omp atomic write
            failed = 1;
            continue;
        }
        float *restrict gain = wide + channels, *restrict offset = gain + channels;
        const int64_t sample = row / tokens;
        load_floats(x, (int)format, row * channels, channels, wide);
        load_floats(scale, (int)format, sample * stride, channels, gain);
        load_floats(shift, (int)format, sample * stride, channels, offset);
        float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t d = 0; d < channels; d++) sum += wide[d];
        const float mean = sum / (float)channels;
#pragma omp simd reduction(+ : squares)
        for (int64_t d = 0; d < channels; d++) squares += (wide[d] - mean) * (wide[d] - mean);
        const float inverse = 1.0f / sqrtf(squares / (float)channels + (float)eps);
        for (int64_t d = 0; d < channels; d++) wide[d] = (wide[d] - mean) * inverse * (1.0f + gain[d]) + offset[d];
        store_floats(wide, channels, y, (int)format, row * channels);
    }
    return failed;
}
