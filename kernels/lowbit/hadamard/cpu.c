/* Block Hadamard with a factor per channel: y = (x * factor) diag(H, ..., H) / sqrt(block), and its row for quantization. */
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

INLINE __m512 load_16(const void *x, const int format, int64_t at) {
    if (format == F32) return _mm512_loadu_ps((const float *)x + at);
    const __m256i half = _mm256_loadu_si256((const __m256i *)((const uint16_t *)x + at));
    return format == F16 ? _mm512_cvtph_ps(half) : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* 256 numbers stay in 16 registers, from x to where they go; 1 / sqrt(256) is exact and may come first. */
INLINE void transform_256(const void *x, const int format, int64_t at, const float *factor, float *restrict to) {
    const __m512 scale = _mm512_set1_ps(1.0f / 16);
    __m512 r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
        r[i] = _mm512_mul_ps(load_16(x, format, at + 16 * i), scale);
        if (factor) r[i] = _mm512_mul_ps(r[i], _mm512_loadu_ps(factor + 16 * i));
        r[i] = within(r[i]);
    }
#pragma GCC unroll 4
    for (int stride = 1; stride < 16; stride *= 2)
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
            if (!(i & stride)) {
                const __m512 a = r[i], b = r[i + stride];
                r[i] = _mm512_add_ps(a, b), r[i + stride] = _mm512_sub_ps(a, b);
            }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) _mm512_storeu_ps(to + 16 * i, r[i]);
}

INLINE void load_rotated_256(const void *x, const int format, int64_t at, const float *factor, int64_t k_in, float *restrict wide) {
    for (int64_t k = 0; k < k_in; k += 256) transform_256(x, format, at + k, factor ? factor + k : NULL, wide + k);
}
#endif

INLINE void rotate(float *restrict row, int64_t k_in, int64_t block) {
    const float scale = 1.0f / sqrtf((float)block);
    for (int64_t first = 0; first < k_in; first += block) {
        float *x = row + first;
#if defined(__AVX512F__)
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

void lowbit_load_row(const void *x, int64_t format, int64_t row, const float *restrict factor, int64_t block, int64_t k_in,
                     float *restrict wide) {
#if defined(__AVX512F__)
    if (block == 256) {
        if (format == F32) load_rotated_256(x, F32, row * k_in, factor, k_in, wide);
        else if (format == BF16) load_rotated_256(x, BF16, row * k_in, factor, k_in, wide);
        else load_rotated_256(x, F16, row * k_in, factor, k_in, wide);
        return;
    }
#endif
    load_floats(x, (int)format, row * k_in, k_in, wide);
    if (factor)
        for (int64_t k = 0; k < k_in; k++) wide[k] *= factor[k];
    if (block > 1) rotate(wide, k_in, block);
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
        lowbit_load_row(x, format, row, factor, block, k_in, wide);
        store_floats(wide, k_in, y, (int)format, row * k_in);
    }
    return failed;
}
