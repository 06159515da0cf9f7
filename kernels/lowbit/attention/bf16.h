/* Attention in bfloat16, of tokens that are given so: two products and a sum for each lane in one instruction. Part of cpu.c. */
#if defined(__AVX512BF16__)
enum { PANEL = 32 }; /* keys, or channels of values, at a time: two vectors of pairs */

/* Of AMD's cores these products are twice as fast as those of float32 (measured, Zen 4); of Intel's half as fast (a Xeon without AMX). */
static int takes_bf16(int64_t format) {
    __builtin_cpu_init();
    return format == BF16 && __builtin_cpu_is("amd");
}

/* Queries are [S][C], keys [panel][C / 2][PANEL][2], values [panel][S / 2][PANEL][2]. */
INLINE void pack_bf16(const Head *to, const Token *token, const uint16_t *v, int64_t at) {
    const int64_t channels = to->channels, pairs = channels / 2;
    uint16_t k[MOST_CHANNELS], *keys = (uint16_t *)to->k + (at / PANEL * pairs * PANEL + at % PANEL) * 2;
    store_floats(token->q, channels, to->q, BF16, at * channels);
    store_floats(token->k, channels, k, BF16, 0);
    for (int64_t c = 0; c < pairs; c++) memcpy(keys + c * PANEL * 2, k + 2 * c, 4);
    for (int64_t first = 0; first < channels; first += PANEL) {
        uint16_t *values = (uint16_t *)to->v + first * to->padded + at / 2 * PANEL * 2 + at % 2;
        for (int64_t c = 0; c < smaller(PANEL, channels - first); c++) values[2 * c] = v[first + c];
    }
}

/* In place, for the reason that linear_wnan's add_dot has. */
INLINE void add_pairs(__m512 *sum, __m512i left, __m512i right) { __asm__("vdpbf16ps %2, %1, %0" : "+v"(*sum) : "v"(left), "v"(right)); }

/* to[r][0 ... PANEL - 1] = sum over pairs of left[r] with those of a panel, for QUERIES rows r. */
INLINE void products_bf16(const uint16_t *left, int64_t stride, const uint16_t *panel, int64_t pairs, float *to, int64_t to_stride) {
    __m512 sums[QUERIES][2];
#pragma GCC unroll 8
    for (int r = 0; r < QUERIES; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < pairs; pair++, panel += 2 * PANEL) {
        const __m512i w0 = _mm512_load_si512(panel), w1 = _mm512_load_si512(panel + PANEL);
#pragma GCC unroll 8
        for (int r = 0; r < QUERIES; r++) {
            int32_t two;
            memcpy(&two, left + r * stride + 2 * pair, 4);
            const __m512i a = _mm512_set1_epi32(two);
            add_pairs(&sums[r][0], a, w0);
            add_pairs(&sums[r][1], a, w1);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < QUERIES; r++) {
        _mm512_storeu_ps(to + r * to_stride, sums[r][0]);
        _mm512_storeu_ps(to + r * to_stride + 16, sums[r][1]);
    }
}

INLINE void rows_bf16(const Head *of, int64_t row, float *out, float *sum) {
    const int64_t channels = of->channels, padded = of->padded;
    const uint16_t *q = (const uint16_t *)of->q + row * channels, *k = of->k, *v = of->v;
    for (int64_t key = 0; key < padded; key += PANEL)
        products_bf16(q, channels, k + key * channels, channels / 2, of->scores + key, padded);
    for (int64_t r = 0; r < QUERIES; r++) {
        float *scores = of->scores + r * padded;
        sum[r] = weigh(scores, of->tokens, padded);
        memset(scores + of->tokens, 0, (size_t)(padded - of->tokens) * sizeof *scores); /* the second of a pair may be none */
        store_floats(scores, padded, of->weights, BF16, r * padded);
    }
    for (int64_t c = 0; c < of->wide; c += PANEL)
        products_bf16(of->weights, padded, v + c * padded, ceil_div(of->tokens, 2), out + c, MOST_CHANNELS);
}

#else /* never called */
enum { PANEL = WIDTH };
static int takes_bf16(int64_t format) { return 0; }
static void pack_bf16(const Head *to, const Token *token, const uint16_t *v, int64_t at) {}
static void rows_bf16(const Head *of, int64_t row, float *out, float *sum) {}
#endif
