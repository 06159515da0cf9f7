/* linear_wnan on a CPU: packed n-bit weight x int8-held activations, int32 sums, scales at the end of each group.

   Codes stay unsigned, activations signed, which is what the dot-product instructions take; a zero point z of a group adds
   -z sum_k q[m, k], so the sums start there and no weight is shifted. Sums of a group are exact integers. */
#include "../lowbit.h"

typedef struct {
    const int8_t *q; /* panel of the block's tokens: [k / 4][row][k % 4], rows `stride` bytes a quad */
    int64_t stride;
    const uint8_t *codes;      /* lowbit_unpack_tile */
    const float *scale;        /* [group][COLUMNS] */
    const int32_t *zero;       /* [group][COLUMNS] or NULL: `centre` for all */
    const int32_t *token_sums; /* [row][group]: sum of q over the group */
    const float *act_scale;    /* [row][group], or NULL: one scale per token, applied at the end */
    float *sums;               /* [row][COLUMNS] out */
    int64_t groups, group, k_in, centre;
} Block;

#if defined(__AVX512VNNI__)
enum { ROWS = 12, ROWS_GROUPED = 6 }; /* 24 of 32 registers hold sums: integers alone, or integers and floats */
enum { AHEAD = 2048 };             /* bytes of codes fetched ahead */

/* In place: given the intrinsic, gcc copies every sum to another register and back, and spills. */
INLINE void add_dot(__m512i *sum, __m512i codes, __m512i q) { __asm__("vpdpbusd %2, %1, %0" : "+v"(*sum) : "v"(codes), "v"(q)); }

/* Exact sums of one group; they start at what the zero point takes away. */
INLINE void sum_group(const Block *b, const int rows, int64_t g, __m512i acc[][2]) {
    const int64_t quads = ceil_div(b->group, 4), first = g * quads, last = smaller(first + quads, ceil_div(b->k_in, 4));
    const uint8_t *codes = b->codes + first * 4 * COLUMNS;
    const int8_t *q = b->q + first * b->stride;
    if (b->zero) {
        const __m512i z0 = _mm512_load_si512(b->zero + g * COLUMNS), z1 = _mm512_load_si512(b->zero + g * COLUMNS + 16);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            const __m512i s = _mm512_set1_epi32(-b->token_sums[r * b->groups + g]);
            acc[r][0] = _mm512_mullo_epi32(z0, s), acc[r][1] = _mm512_mullo_epi32(z1, s);
        }
    } else {
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++)
            acc[r][0] = acc[r][1] = _mm512_set1_epi32((int32_t)(-b->centre * b->token_sums[r * b->groups + g]));
    }
    for (int64_t quad = first; quad < last; quad++, codes += 4 * COLUMNS, q += b->stride) {
        const __m512i w0 = _mm512_load_si512(codes), w1 = _mm512_load_si512(codes + 64);
        _mm_prefetch((const char *)codes + AHEAD, _MM_HINT_T0); /* the tile is larger than the first cache */
        _mm_prefetch((const char *)codes + AHEAD + 64, _MM_HINT_T0);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            int32_t four;
            memcpy(&four, q + 4 * r, 4);
            const __m512i a = _mm512_set1_epi32(four);
            add_dot(&acc[r][0], w0, a);
            add_dot(&acc[r][1], w1, a);
        }
    }
}

INLINE void one_group(const Block *b, const int rows) {
    __m512i acc[ROWS][2];
    sum_group(b, rows, 0, acc);
    const __m512 s0 = _mm512_load_ps(b->scale), s1 = _mm512_load_ps(b->scale + 16);
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
        _mm512_store_ps(b->sums + r * COLUMNS, _mm512_mul_ps(_mm512_cvtepi32_ps(acc[r][0]), s0));
        _mm512_store_ps(b->sums + r * COLUMNS + 16, _mm512_mul_ps(_mm512_cvtepi32_ps(acc[r][1]), s1));
    }
}

INLINE void many_groups(const Block *b, const int rows) {
    __m512 total[ROWS_GROUPED][2];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) total[r][0] = total[r][1] = _mm512_setzero_ps();
    for (int64_t g = 0; g < b->groups; g++) {
        __m512i acc[ROWS_GROUPED][2];
        sum_group(b, rows, g, acc);
        const __m512 s0 = _mm512_load_ps(b->scale + g * COLUMNS), s1 = _mm512_load_ps(b->scale + g * COLUMNS + 16);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            __m512 y0 = _mm512_cvtepi32_ps(acc[r][0]), y1 = _mm512_cvtepi32_ps(acc[r][1]);
            if (b->act_scale) {
                const __m512 a = _mm512_set1_ps(b->act_scale[r * b->groups + g]);
                y0 = _mm512_mul_ps(y0, a), y1 = _mm512_mul_ps(y1, a);
            }
            total[r][0] = _mm512_fmadd_ps(y0, s0, total[r][0]);
            total[r][1] = _mm512_fmadd_ps(y1, s1, total[r][1]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
        _mm512_store_ps(b->sums + r * COLUMNS, total[r][0]);
        _mm512_store_ps(b->sums + r * COLUMNS + 16, total[r][1]);
    }
}

#elif defined(__AVX2__)
enum { ROWS = 4, ROWS_GROUPED = 4 }; /* 8 of 16 registers hold sums, for half a tile at a time */

/* acc + the dot products of 4 unsigned codes with 4 signed activations. */
#if defined(__AVXVNNI__)
INLINE __m256i dot(__m256i acc, __m256i codes, __m256i q, int wide) { return _mm256_dpbusd_avx_epi32(acc, codes, q); }
#elif defined(LOWBIT_TEST_AVXVNNI) /* the same instruction in its AVX-512 encoding: tests the code path on CPUs without the other */
__attribute__((target("avx512vl,avx512vnni"))) static inline __m256i dot(__m256i acc, __m256i codes, __m256i q, int wide) {
    return _mm256_dpbusd_epi32(acc, codes, q);
}
#else
/* Pairs are summed in 16 bits, which holds 2 x 127 x 127 but not the codes of 8 bits (`wide`): those are widened first. */
INLINE __m256i dot(__m256i acc, __m256i codes, __m256i q, int wide) {
    const __m256i ones = _mm256_set1_epi16(1);
    if (!wide) return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, q), ones));
    const __m256i low_bytes = _mm256_set1_epi16(0xff);
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(codes, low_bytes), _mm256_srai_epi16(_mm256_slli_epi16(q, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(codes, 8), _mm256_srai_epi16(q, 8));
    return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
}
#endif

INLINE void half_block(const Block *b, const int rows, const int column, const int wide) {
    const int64_t quads_in_all = ceil_div(b->k_in, 4), quads = ceil_div(b->group, 4);
    for (int64_t g = 0; g < b->groups; g++) {
        __m256i acc[ROWS][2];
        for (int r = 0; r < rows; r++) {
            const int32_t sum = b->token_sums[r * b->groups + g];
            for (int h = 0; h < 2; h++) {
                const __m256i z = b->zero ? _mm256_loadu_si256((const __m256i *)(b->zero + g * COLUMNS + column + 8 * h))
                                          : _mm256_set1_epi32((int32_t)b->centre);
                acc[r][h] = _mm256_mullo_epi32(z, _mm256_set1_epi32(-sum));
            }
        }
        const int64_t first = g * quads, last = smaller(first + quads, quads_in_all);
        for (int64_t quad = first; quad < last; quad++) {
            const uint8_t *codes = b->codes + quad * 4 * COLUMNS + 4 * column;
            const __m256i w0 = _mm256_loadu_si256((const __m256i *)codes), w1 = _mm256_loadu_si256((const __m256i *)(codes + 32));
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                int32_t four;
                memcpy(&four, b->q + quad * b->stride + 4 * r, 4);
                const __m256i a = _mm256_set1_epi32(four);
                acc[r][0] = dot(acc[r][0], w0, a, wide);
                acc[r][1] = dot(acc[r][1], w1, a, wide);
            }
        }
        for (int r = 0; r < rows; r++)
            for (int h = 0; h < 2; h++) {
                float *to = b->sums + r * COLUMNS + column + 8 * h;
                __m256 y = _mm256_cvtepi32_ps(acc[r][h]);
                if (b->act_scale) y = _mm256_mul_ps(y, _mm256_set1_ps(b->act_scale[r * b->groups + g]));
                const __m256 s = _mm256_loadu_ps(b->scale + g * COLUMNS + column + 8 * h);
                _mm256_storeu_ps(to, g ? _mm256_fmadd_ps(y, s, _mm256_loadu_ps(to)) : _mm256_mul_ps(y, s));
            }
    }
}

INLINE void many_groups(const Block *b, const int rows) {
    for (int column = 0; column < COLUMNS; column += 16) {
        if (b->centre > 32)
            half_block(b, rows, column, 1);
        else
            half_block(b, rows, column, 0);
    }
}

#define one_group many_groups
#else
enum { ROWS = 4, ROWS_GROUPED = 4 };

INLINE void many_groups(const Block *b, const int rows) {
    const int64_t quads_in_all = ceil_div(b->k_in, 4), quads = ceil_div(b->group, 4);
    for (int64_t g = 0; g < b->groups; g++) {
        const int64_t first = g * quads, last = smaller(first + quads, quads_in_all);
        for (int r = 0; r < rows; r++) {
            int32_t acc[COLUMNS];
            const int32_t sum = b->token_sums[r * b->groups + g];
            for (int n = 0; n < COLUMNS; n++) acc[n] = -sum * (b->zero ? b->zero[g * COLUMNS + n] : (int32_t)b->centre);
            for (int64_t quad = first; quad < last; quad++) {
                const uint8_t *codes = b->codes + quad * 4 * COLUMNS;
                const int8_t *q = b->q + quad * b->stride + 4 * r;
                for (int n = 0; n < COLUMNS; n++)
                    acc[n] += codes[4 * n] * q[0] + codes[4 * n + 1] * q[1] + codes[4 * n + 2] * q[2] + codes[4 * n + 3] * q[3];
            }
            float *to = b->sums + r * COLUMNS;
            const float a = b->act_scale ? b->act_scale[r * b->groups + g] : 1.0f;
            for (int n = 0; n < COLUMNS; n++) {
                const float y = (float)acc[n] * a * b->scale[g * COLUMNS + n];
                to[n] = g ? to[n] + y : y;
            }
        }
    }
}
#define one_group many_groups
#endif

static void run_block(const Block *b, int rows) {
    switch (rows) { /* the count is a constant inside each case, so the sums live in registers */
#define CASE(n) \
    case n: \
        if (b->groups == 1 && n <= ROWS) one_group(b, n <= ROWS ? n : 1); \
        else if (n <= ROWS_GROUPED) many_groups(b, n <= ROWS_GROUPED ? n : 1); \
        break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
    }
}

/* Rows per block: as even as the registers allow, so that no block is left with one or two. */
static int64_t rows_per_block(int64_t m, int64_t groups) {
    const int64_t most = groups == 1 ? ROWS : ROWS_GROUPED;
    return m ? ceil_div(m, ceil_div(m, most)) : 1;
}

/* One token: its sums over each group, and its place in the panel of its block, padded to whole quads. */
static void prepare_row(const int8_t *restrict q, int64_t k_in, int64_t group, int64_t groups, int32_t *restrict sums,
                        int8_t *restrict panel, int64_t stride) {
    for (int64_t g = 0; g < groups; g++) {
        const int64_t last = smaller((g + 1) * group, k_in);
        int32_t sum = 0;
        for (int64_t k = g * group; k < last; k++) sum += q[k];
        sums[g] = sum;
    }
    const int64_t whole = k_in / 4;
    for (int64_t quad = 0; quad < whole; quad++) memcpy(panel + quad * stride, q + 4 * quad, 4);
    if (k_in % 4) {
        int8_t rest[4] = {0};
        memcpy(rest, q + 4 * whole, (size_t)(k_in % 4));
        memcpy(panel + whole * stride, rest, 4);
    }
}

enum { SHARE = 128 }; /* tokens of a thread of its own: enough to pay for unpacking a tile again */

enum { MOST_WEIGHTS = 8 }; /* of one call */
static __thread Scratch of_call, of_thread;

/* Tokens first_m ... last_m - 1 against one tile of a weight. `block` holds what the tiles share. */
static void run_tile(const Weight *weight, const Epilogue *end, Block block, const float *token_scale, int64_t first_m, int64_t last_m,
                     int64_t first_n, uint8_t *codes) {
    const int64_t quads = ceil_div(weight->k_in, 4), step = block.stride / 4;
    float *scale = (float *)(codes + quads * 4 * COLUMNS), *sums = scale + 2 * block.groups * COLUMNS;
    int32_t *zero = (int32_t *)(scale + block.groups * COLUMNS);
    lowbit_unpack_tile(weight, first_n, codes);
    lowbit_tile_scales(weight, first_n, scale, zero);
    const int8_t *panel = block.q;
    const float *act_scale = block.act_scale;
    const int32_t *token_sums = block.token_sums;
    block.codes = codes, block.scale = scale, block.zero = weight->zero ? zero : NULL, block.sums = sums;
    for (int64_t row = first_m; row < last_m; row += step) {
        const int64_t rows = smaller(step, last_m - row);
        block.q = panel + row * quads * 4;
        block.token_sums = token_sums + row * block.groups;
        block.act_scale = act_scale ? act_scale + row * block.groups : NULL;
        run_block(&block, (int)rows);
        lowbit_finish(weight, end, sums, act_scale ? NULL : token_scale + row, row, rows, first_n);
    }
}

/* The tokens of a product: quantized, or floats x that are quantized a row at a time (act_scale is then the call's own). */
typedef struct {
    const int8_t *q;     /* (M, K) */
    float *act_scale;    /* (M, act_groups); act_groups is 1 or the weight's */
    const void *x;       /* (M, K) in `format`, or NULL */
    const float *factor; /* (K) or NULL */
    int64_t act_groups, format, block, bits;
} Tokens;

/* Rows first ... last - 1 of a block of `step`: quantized where they are not, and put in their panel. 0 when memory ran out. */
static int prepare_block(const Tokens *tokens, int64_t first, int64_t last, int64_t step, int64_t k_in, int64_t group, int64_t groups,
                         int32_t *token_sums, int8_t *panel) {
    float *wide = tokens->x ? reserve(&of_thread, (size_t)k_in * 5 + 64) : NULL;
    if (tokens->x && !wide) return 0;
    for (int64_t row = first; row < last; row++) {
        if (tokens->x) {
            load_row(tokens->x, tokens->format, row, tokens->factor, tokens->block, k_in, wide);
            lowbit_round_row(wide, tokens->bits, k_in / tokens->act_groups, k_in, (int8_t *)(wide + k_in),
                             tokens->act_scale + row * tokens->act_groups);
        }
        prepare_row(tokens->x ? (int8_t *)(wide + k_in) : tokens->q + row * k_in, k_in, group, groups, token_sums + row * groups,
                    panel + (row - first) * 4, 4 * step);
    }
    return 1;
}

/* All tokens against `count` weights of one K and one group size. Tokens are shared out among threads where there are many: a
   thread then reads what it wrote itself, and unpacks every weight for them. Returns 0, or 1 when memory ran out. */
static int run(const Weight *const *weights, const Epilogue *ends, int64_t count, const Tokens *tokens, int64_t m, int64_t threads) {
    const int64_t k_in = weights[0]->k_in, group = weights[0]->group, groups = ceil_div(k_in, group), padded_k = ceil_div(k_in, 4) * 4;
    const int64_t step = rows_per_block(m, groups), blocks = ceil_div(m, step);
    const int64_t shares = smaller(threads, m / SHARE > 1 ? m / SHARE : 1), share_rows = ceil_div(blocks, shares) * step;
    int64_t tiles = 0;
    for (int64_t w = 0; w < count; w++) tiles += ceil_div(weights[w]->n_out, COLUMNS);
    const int64_t scales = tokens->act_scale ? 0 : m * tokens->act_groups;
    int32_t *token_sums = reserve(&of_call, (size_t)((m * groups + scales) * 4 + blocks * step * padded_k));
    if (!token_sums) return 1;
    float *made_scale = (float *)(token_sums + m * groups);
    int8_t *panels = (int8_t *)(made_scale + scales);
    Tokens own = *tokens;
    if (!own.act_scale) own.act_scale = made_scale;
    int failed = 0;
#pragma omp parallel num_threads((int)threads)
    {
        int able = 1;
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; block++)
            able &= prepare_block(&own, block * step, smaller(m, (block + 1) * step), step, k_in, group, groups, token_sums,
                                  panels + block * step * padded_k);
        uint8_t *codes = reserve(&of_thread, (size_t)((padded_k + 8 * groups + 4 * ROWS) * COLUMNS));
        if (!codes || !able)
#pragma omp atomic write
            failed = 1;
#pragma omp for schedule(static)
        for (int64_t item = 0; item < shares * tiles; item++) {
            int64_t w = 0, tile = item % tiles;
            for (; tile >= ceil_div(weights[w]->n_out, COLUMNS); w++) tile -= ceil_div(weights[w]->n_out, COLUMNS);
            const Block common = {.q = panels, .stride = 4 * step, .token_sums = token_sums, .groups = groups, .group = group, .k_in = k_in,
                                  .act_scale = own.act_groups > 1 ? own.act_scale : NULL, .centre = (int64_t)1 << (weights[w]->bits - 1)};
            const int64_t first = item / tiles * share_rows;
            if (codes) run_tile(weights[w], ends + w, common, own.act_scale, first, smaller(m, first + share_rows), tile * COLUMNS, codes);
        }
    }
    return failed;
}

/* q (M, K) int8, act_scale (M, act_groups) float32 with act_groups 1 or the weight's. Returns 0, or 1 when memory ran out. */
EXPORT int lowbit_linear_wnan(const Weight *weight, const Epilogue *end, const int8_t *q, const float *act_scale,
                              int64_t act_groups, int64_t m, int64_t threads) {
    const Tokens tokens = {.q = q, .act_scale = (float *)act_scale, .act_groups = act_groups};
    return run(&weight, end, 1, &tokens, m, threads);
}

/* The same from x (M, K) in `format`, quantized once as act_quant does, for `count` weights of one K and group size; ys[i] is the
   output of weights[i], in `format`. act_groups is 1 or the weights'. */
EXPORT int lowbit_quant_linears(const Weight *const *weights, const Epilogue *ends, void *const *ys, int64_t count, const void *x,
                                int64_t format, const float *factor, int64_t block, int64_t bits, int64_t act_groups, int64_t m,
                                int64_t threads) {
    const Tokens tokens = {.x = x, .format = format, .factor = factor, .block = block, .bits = bits, .act_groups = act_groups};
    Epilogue own[MOST_WEIGHTS];
    for (int64_t w = 0; w < count; w++) own[w] = ends[w], own[w].y = ys[w], own[w].y_format = format;
    return run(weights, own, count, &tokens, m, threads);
}
