/* Block Hadamard with a factor per channel: y = (x * factor) diag(H, ..., H) / sqrt(block), and its row for act_quant. */
#include "../lowbit.h"

/* Butterflies at distance `stride` within each run of `block` numbers. */
INLINE void stage(float *restrict x, int64_t block, int64_t stride) {
    for (int64_t first = 0; first < block; first += 2 * stride)
        for (int64_t i = first; i < first + stride; i++) {
            const float a = x[i], b = x[i + stride];
            x[i] = a + b;
            x[i + stride] = a - b;
        }
}

#if defined(__AVX512F__)
/* y = sign * x + (x with partners at distance 1, 2, 4 or 8 exchanged). */
INLINE __m512 within(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f), minus = _mm512_set1_ps(-1.0f);
    x = _mm512_fmadd_ps(x, _mm512_mask_blend_ps(0xaaaa, one, minus), _mm512_permute_ps(x, 0xb1));
    x = _mm512_fmadd_ps(x, _mm512_mask_blend_ps(0xcccc, one, minus), _mm512_permute_ps(x, 0x4e));
    x = _mm512_fmadd_ps(x, _mm512_mask_blend_ps(0xf0f0, one, minus), _mm512_shuffle_f32x4(x, x, 0xb1));
    return _mm512_fmadd_ps(x, _mm512_mask_blend_ps(0xff00, one, minus), _mm512_shuffle_f32x4(x, x, 0x4e));
}

INLINE void transform(float *restrict x, int64_t block) {
    for (int64_t i = 0; i < block; i += 16) _mm512_storeu_ps(x + i, within(_mm512_loadu_ps(x + i)));
    for (int64_t stride = 16; stride < block; stride *= 2) stage(x, block, stride);
}

/* 256 numbers stay in 16 registers. */
INLINE void transform_256(float *restrict x, __m512 scale) {
    __m512 r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) r[i] = _mm512_mul_ps(within(_mm512_loadu_ps(x + 16 * i)), scale);
#pragma GCC unroll 4
    for (int stride = 1; stride < 16; stride *= 2)
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
            if (!(i & stride)) {
                const __m512 a = r[i], b = r[i + stride];
                r[i] = _mm512_add_ps(a, b), r[i + stride] = _mm512_sub_ps(a, b);
            }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) _mm512_storeu_ps(x + 16 * i, r[i]);
}
#endif

void lowbit_hadamard_row(float *restrict row, int64_t k_in, int64_t block) {
    const float scale = 1.0f / sqrtf((float)block);
    for (int64_t first = 0; first < k_in; first += block) {
        float *x = row + first;
#if defined(__AVX512F__)
        if (block == 256) {
            transform_256(x, _mm512_set1_ps(scale));
            continue;
        }
        if (block >= 16) {
            transform(x, block);
            for (int64_t i = 0; i < block; i++) x[i] *= scale;
            continue;
        }
#endif
        for (int64_t stride = 1; stride < block; stride *= 2) stage(x, block, stride);
        for (int64_t i = 0; i < block; i++) x[i] *= scale;
    }
}

static __thread Scratch of_thread;

/* x, y (M, K) in `format`; factor (K) float32 or NULL. Returns 0, or 1 when memory ran out. */
EXPORT int lowbit_hadamard(const void *x, int64_t format, const float *factor, int64_t block, int64_t m, int64_t k_in, void *y,
                           int64_t threads) {
    int failed = 0;
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t row = 0; row < m; row++) {
        float *restrict wide = reserve(&of_thread, (size_t)k_in * 4 + 64);
        if (!wide) {
#pragma omp atomic write
            failed = 1;
            continue;
        }
        load_row(x, format, row, factor, block, k_in, wide);
        store_floats(wide, k_in, y, (int)format, row * k_in);
    }
    return failed;
}
