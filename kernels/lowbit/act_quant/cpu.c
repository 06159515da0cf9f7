/* act_quant on a CPU: factor, block Hadamard, scale and rounding of a few tokens while they are in the cache. */
#include "../lowbit.h"

/* Largest magnitude. As integers, magnitudes of floats order alike; NaN is above everything. */
INLINE float absmax(const float *restrict x, int64_t count) {
    uint32_t most = 0;
    int64_t i = 0;
#if defined(__AVX512F__)
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i m[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
    for (; i + 64 <= count; i += 64)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) m[j] = _mm512_max_epu32(m[j], _mm512_and_si512(_mm512_loadu_si512(x + i + 16 * j), magnitude));
    most = _mm512_reduce_max_epu32(_mm512_max_epu32(_mm512_max_epu32(m[0], m[1]), _mm512_max_epu32(m[2], m[3])));
#endif
    for (; i < count; i++) {
        const uint32_t bits = float_to_bits(x[i]) & 0x7fffffff;
        most = bits > most ? bits : most;
    }
    return bits_to_float(most);
}

/* Nearest integers within -top ... top; `inside`: none can be beyond, as after scaling by the largest of finite numbers. */
INLINE void round_to_codes(const float *restrict x, int64_t count, float inverse, int top, const int inside, int8_t flip,
                           int8_t *restrict q) {
    int64_t i = 0;
#if defined(__AVX512BW__)
    const __m512 by = _mm512_set1_ps(inverse), most = _mm512_set1_ps((float)top), least = _mm512_set1_ps((float)-top);
    const __m512i turn = _mm512_set1_epi8(flip), order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i n[4];
#define ROUND(at) \
    __m512 value = _mm512_mul_ps(_mm512_loadu_ps(x + (at)), by); \
    if (!inside) value = _mm512_min_ps(_mm512_max_ps(value, least), most); /* of a NaN and a number, the maximum is the second */
    for (; i + 64 <= count; i += 64) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            ROUND(i + 16 * j)
            n[j] = _mm512_cvtps_epi32(value);
        }
        const __m512i four = _mm512_packs_epi16(_mm512_packs_epi32(n[0], n[1]), _mm512_packs_epi32(n[2], n[3]));
        _mm512_storeu_si512(q + i, _mm512_xor_si512(_mm512_permutexvar_epi32(order, four), turn));
    }
    for (; i + 16 <= count; i += 16) {
        ROUND(i)
        _mm_storeu_si128((__m128i *)(q + i), _mm_xor_si128(_mm512_cvtepi32_epi8(_mm512_cvtps_epi32(value)), _mm512_castsi512_si128(turn)));
    }
#undef ROUND
#endif
    for (; i < count; i++) {
        const float value = __builtin_rintf(x[i] * inverse);
        const float low = value > -top ? value : -top; /* NaN becomes -top; its scale is NaN too */
        q[i] = (int8_t)(int32_t)(low < top ? low : top) ^ flip;
    }
}

/* Odd integers 2 floor + 1 within -top ... top, which is 2^b - 1. */
INLINE void round_to_odd_codes(const float *restrict x, int64_t count, float inverse, int top, int8_t flip, int8_t *restrict q) {
    const int low = -(top + 1) / 2, high = (top - 1) / 2; /* of the floor */
    int64_t i = 0;
#if defined(__AVX512F__)
    const __m512 by = _mm512_set1_ps(inverse), most = _mm512_set1_ps((float)high), least = _mm512_set1_ps((float)low);
    const __m512i one = _mm512_set1_epi32(1 ^ flip);
    for (; i + 16 <= count; i += 16) {
        const __m512 value = _mm512_min_ps(_mm512_max_ps(_mm512_mul_ps(_mm512_loadu_ps(x + i), by), least), most);
        const __m512i down = _mm512_cvt_roundps_epi32(value, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
        _mm_storeu_si128((__m128i *)(q + i), _mm512_cvtepi32_epi8(_mm512_xor_si512(_mm512_slli_epi32(down, 1), one)));
    }
#endif
    for (; i < count; i++) {
        const float value = __builtin_floorf(x[i] * inverse);
        const float least = value > low ? value : low; /* NaN becomes -top; its scale is NaN too */
        q[i] = (int8_t)(2 * (int32_t)(least < high ? least : high) + 1) ^ flip;
    }
}

/* All maxima before the first division: from one to its codes is a chain that takes longer than reading a short row. */
void lowbit_round_rows(const float *restrict wide, const ActGrid *grid, int64_t group, int64_t rows, int64_t k_in, int8_t *restrict q,
                       int64_t stride, float *restrict scale, int8_t flip) {
    const int half = 1 << (grid->bits - 1), cells = grid->mid_rise ? half : half - 1; /* from zero to the end of the grid */
    const int divisor = grid->mid_rise ? 2 * half : cells;
    const int64_t groups = k_in / group;
    for (int64_t i = 0; i < rows * groups; i++) scale[i] = absmax(wide + i * group, group) * grid->clip;
    for (int64_t i = 0; i < rows * groups; i++) {
        const float *x = wide + i * group, most = scale[i];
        /* a subnormal maximum would overflow the reciprocal */
        const float inverse = most > FLT_MIN * cells ? cells / most : 0.0f;
        int8_t *to = q + i / groups * stride + i % groups * group;
        scale[i] = most / divisor;
        if (grid->mid_rise) round_to_odd_codes(x, group, inverse, divisor - 1, flip, to);
        else if (grid->clip == 1.0f && most < INFINITY) round_to_codes(x, group, inverse, cells, 1, flip, to);
        else round_to_codes(x, group, inverse, cells, 0, flip, to);
    }
}

static __thread Scratch of_thread;

/* x (M, K) in `format`; factor (K) float32 or NULL; q (M, K) int8; scale (M, K / group) float32. Returns 0, or 1 when memory ran out. */
EXPORT int lowbit_act_quant(const void *x, int64_t format, const float *factor, int64_t block, const ActGrid *grid, int64_t group,
                            int64_t m, int64_t k_in, int8_t *q, float *scale, int64_t threads) {
    const int64_t at_once = lowbit_rows_at_once(k_in);
    int failed = 0;
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t row = 0; row < m; row += at_once) {
        const int64_t rows = smaller(at_once, m - row);
        float *restrict wide = reserve(&of_thread, (size_t)(rows * k_in) * 4 + 64);
        if (!wide) {
#pragma omp atomic write
            failed = 1;
            continue;
        }
        for (int64_t i = 0; i < rows; i++) lowbit_load_row(x, format, row + i, factor, block, k_in, wide + i * k_in);
        lowbit_round_rows(wide, grid, group, rows, k_in, q + row * k_in, k_in, scale + row * (k_in / group), 0);
    }
    return failed;
}
