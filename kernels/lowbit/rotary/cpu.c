/* norm_rotary on a CPU: norm and rotation of one token's heads, written where attention reads them. */
#include "../lowbit.h"

enum { MOST_CHANNELS = 512 };

INLINE void one_head(float *restrict n, const float *restrict weight, const float *restrict cos, const float *restrict sin, float eps,
                     int64_t channels) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t c = 0; c < channels; c++) squares += n[c] * n[c];
    const float inverse = 1.0f / sqrtf(squares / (float)channels + eps);
    for (int64_t c = 0; c < channels; c++) n[c] = n[c] * inverse * weight[c];
    for (int64_t c = 0; c + 1 < channels; c += 2) {
        const float a = n[c], b = n[c + 1];
        n[c] = a * cos[c] - b * sin[c];
        n[c + 1] = b * cos[c + 1] + a * sin[c + 1];
    }
}

/* x (B, S, H C), out (B, total, H C) from token `first`, both in `format`; weight (C), cos and sin (S, C) float32, C <= 512 and even. */
EXPORT int lowbit_norm_rotary(const void *x, int64_t format, const float *weight, const float *cos, const float *sin, double eps,
                              int64_t samples, int64_t tokens, int64_t heads, int64_t channels, void *out, int64_t total, int64_t first,
                              int64_t threads) {
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t row = 0; row < samples * tokens; row++) {
        const int64_t sample = row / tokens, token = row % tokens;
        float n[MOST_CHANNELS] __attribute__((aligned(64)));
        for (int64_t head = 0; head < heads; head++) {
            load_floats(x, (int)format, (row * heads + head) * channels, channels, n);
            one_head(n, weight, cos + token * channels, sin + token * channels, (float)eps, channels);
            store_floats(n, channels, out, (int)format, ((sample * total + first + token) * heads + head) * channels);
        }
    }
    return 0;
}
