/* linear_wnan on a CPU: packed n-bit weight x int8-held activations, int32 sums, scales at the end of each group.

   The dot-product instructions take one unsigned and one signed factor. With AVX2 codes stay unsigned and activations are signed; a zero
   point z of a group adds -z sum_k q[m, k], so the sums start there. With AVX-512 it is the other way round (block.h). Sums of a group are
   exact integers. */
#include "block.h"

/* Rows per block: as even as the registers allow, so that no block is left with one or two. */
static int64_t rows_per_block(int64_t m, int64_t groups) {
    const int64_t most = groups == 1 ? ROWS : ROWS_GROUPED;
    return m ? ceil_div(m, ceil_div(m, most)) : 1;
}

/* Bytes between rows of quantized tokens: whole cache lines, of an odd number, so that rows of a block do not share places in the cache. */
static int64_t row_bytes(int64_t k_in) { return (ceil_div(k_in, 64) | 1) * 64; }

enum { FLIP = SIGNED_CODES ? -128 : 0 }; /* turns q into q + 128 */

/* Of tokens as they are held. */
static int32_t sum_of(const int8_t *restrict q, int64_t count) {
    int32_t sum = 0;
    for (int64_t i = 0; i < count; i++) sum += (int8_t)(q[i] ^ FLIP);
    return sum;
}

/* Does its product need the sums of the tokens? Codes of 8 bits less a zero point do not fit a signed byte: of those 128 is taken away, and
   the rest of the zero point with the sums. */
INLINE int reads_sums(const Weight *weight) { return !SIGNED_CODES || (weight->zero && weight->bits == 8); }

enum { MOST_WEIGHTS = 8 }; /* of one call */
static __thread Scratch of_call, of_thread;

/* Tokens first_m ... last_m - 1 against one tile of a weight. `block` holds what the tiles share. */
static void run_tile(const Weight *weight, const Epilogue *end, Block block, const float *token_scale, int64_t first_m, int64_t last_m,
                     int64_t step, int64_t first_n, uint8_t *codes) {
    const int64_t quads = ceil_div(weight->k_in, 4);
    float *scale = (float *)(codes + quads * 4 * COLUMNS), *sums = scale + 3 * block.groups * COLUMNS;
    int32_t *zero = (int32_t *)(scale + block.groups * COLUMNS), *start = zero + block.groups * COLUMNS;
    lowbit_tile_scales(weight, first_n, scale, zero);
    if (!SIGNED_CODES) {
        lowbit_unpack_tile(weight, first_n, codes);
        block.zero = weight->zero ? zero : NULL;
    } else if (reads_sums(weight)) {
        lowbit_unpack_signed(weight, first_n, NULL, codes, start);
        for (int64_t i = 0; i < block.groups * COLUMNS; i++) zero[i] = 128 - zero[i];
        block.zero = zero;
    } else {
        lowbit_unpack_signed(weight, first_n, weight->zero ? zero : NULL, codes, start);
    }
    const int8_t *q = block.q;
    const float *act_scale = block.act_scale;
    const int32_t *token_sums = block.token_sums;
    block.codes = codes, block.scale = scale, block.start = start, block.sums = sums;
    for (int64_t row = first_m; row < last_m; row += step) {
        const int64_t rows = smaller(step, last_m - row);
        block.q = q + row * block.stride;
        block.token_sums = token_sums ? token_sums + row * block.groups : NULL;
        block.act_scale = act_scale ? act_scale + row * block.groups : NULL;
        run_block(&block, (int)rows);
        lowbit_finish(weight, end, sums, act_scale ? NULL : token_scale + row, row, rows, first_n);
    }
}

/* The tokens of a product: quantized, or floats x that are quantized a row at a time. */
typedef struct {
    const int8_t *q;      /* (M, K), and */
    float *act_scale;     /* (M, act_groups); act_groups is 1 or the weight's; or */
    const void *x[2];     /* (M, K) in `format`, or its first k_first columns and its others */
    const float *factor;  /* (K) or NULL */
    int64_t act_groups, format, block, k_first;
} Tokens;

/* The tokens on one grid, as the products read them. */
typedef struct {
    const ActGrid *grid; /* NULL: they are quantized already */
    int32_t *token_sums; /* [row][group], or NULL: no product reads them */
    float *act_scale;    /* [row][act_groups] */
    int8_t *q;           /* rows of row_bytes(K); q + 128 where codes are signed */
} Panels;

static void load_parts(const Tokens *tokens, int64_t row, int64_t k_in, float *wide) {
    const int64_t k = tokens->x[1] ? tokens->k_first : k_in; /* a multiple of `block` */
    const float *factor = tokens->factor;
    lowbit_load_row(tokens->x[0], tokens->format, row, factor, tokens->block, k, wide);
    if (tokens->x[1]) lowbit_load_row(tokens->x[1], tokens->format, row, factor ? factor + k : NULL, tokens->block, k_in - k, wide + k);
}

/* A row on each grid: quantized where it is not, with its sums. 0 when memory ran out. */
static int prepare_row(const Tokens *tokens, const Panels *of_width, int64_t widths, int64_t row, int64_t k_in, int64_t group) {
    const int64_t groups = ceil_div(k_in, group), padded_k = ceil_div(k_in, 4) * 4;
    float *wide = tokens->x[0] ? reserve(&of_thread, (size_t)k_in * 4 + 64) : NULL;
    if (tokens->x[0] && !wide) return 0;
    if (wide) load_parts(tokens, row, k_in, wide);
    for (const Panels *to = of_width; to < of_width + widths; to++) {
        int8_t *q = to->q + row * row_bytes(k_in);
        if (wide) lowbit_round_row(wide, to->grid, k_in / tokens->act_groups, k_in, q, to->act_scale + row * tokens->act_groups, FLIP);
        else for (int64_t k = 0; k < k_in; k++) q[k] = tokens->q[row * k_in + k] ^ FLIP;
        for (int64_t k = k_in; k < padded_k; k++) q[k] = FLIP;
        for (int64_t g = 0; to->token_sums && g < groups; g++)
            to->token_sums[row * groups + g] = sum_of(q + g * group, smaller(group, k_in - g * group));
    }
    return 1;
}

static int same_grid(const ActGrid *a, const ActGrid *b) {
    return a->bits == b->bits && a->mid_rise == b->mid_rise && a->clip == b->clip;
}

/* Among how many threads tokens are shared out, each of which then unpacks every weight: where there are enough of them to pay for that,
   and the panels that a thread wrote are still in its own cache when it reads them. Else 1: threads share the tiles. */
static int64_t shares_of(int64_t m, int64_t padded_k, int64_t threads) {
    enum { TOKENS = 128, BYTES = 1 << 19 };
    const int64_t shares = smaller(threads, m / TOKENS);
    return shares > 1 && m * padded_k / shares <= BYTES ? shares : 1;
}

/* Item i of all weights' tiles for each share of the tokens. */
static void run_item(const Weight *const *weights, const Epilogue *ends, const Panels *const *panels, Block block, const Tokens *tokens,
                     int64_t i, int64_t tiles, int64_t share_rows, int64_t step, int64_t m, uint8_t *codes) {
    int64_t w = 0, tile = i % tiles;
    for (; tile >= ceil_div(weights[w]->n_out, COLUMNS); w++) tile -= ceil_div(weights[w]->n_out, COLUMNS);
    const int64_t first = i / tiles * share_rows;
    block.q = panels[w]->q, block.token_sums = panels[w]->token_sums, block.bits = weights[w]->bits;
    block.act_scale = tokens->act_groups > 1 ? panels[w]->act_scale : NULL;
    run_tile(weights[w], ends + w, block, panels[w]->act_scale, first, smaller(m, first + share_rows), step, tile * COLUMNS,
             codes);
}

/* All tokens against `count` weights of one K and one group size, weight w on grids[w] (NULL: as the tokens are). Returns 0, or 1
   when memory ran out. */
static int run(const Weight *const *weights, const Epilogue *ends, const ActGrid *grids, int64_t count, const Tokens *tokens, int64_t m,
               int64_t threads) {
    const int64_t k_in = weights[0]->k_in, group = weights[0]->group, groups = ceil_div(k_in, group), padded_k = ceil_div(k_in, 4) * 4;
    const int64_t step = rows_per_block(m, groups), blocks = ceil_div(m, step);
    const int64_t shares = shares_of(m, padded_k, threads), share_rows = ceil_div(blocks, shares) * step;
    Panels of_width[MOST_WEIGHTS];
    const Panels *panels[MOST_WEIGHTS];
    int64_t widths = 0, tiles = 0, sums = 0; /* sums of a token that products read */
    for (int64_t w = 0; w < count; w++) {
        const ActGrid *grid = grids ? grids + w : NULL;
        int64_t i = 0;
        while (i < widths && grid && !same_grid(of_width[i].grid, grid)) i++;
        if (i == widths) of_width[widths++].grid = grid;
        panels[w] = of_width + i;
        tiles += ceil_div(weights[w]->n_out, COLUMNS);
        if (reads_sums(weights[w])) sums = groups;
    }
    const int64_t scales = tokens->x[0] ? m * tokens->act_groups : 0;
    const int64_t head = ceil_div((m * sums + scales) * 4, 64) * 64, bytes = head + m * row_bytes(k_in);
    int8_t *at = reserve(&of_call, (size_t)(widths * bytes));
    if (!at) return 1;
    for (int64_t i = 0; i < widths; i++, at += bytes) {
        of_width[i].token_sums = sums ? (int32_t *)at : NULL;
        of_width[i].act_scale = tokens->x[0] ? (float *)at + m * sums : tokens->act_scale;
        of_width[i].q = at + head;
    }
    int failed = 0;
#pragma omp parallel num_threads((int)threads)
    {
        int able = 1;
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; block++)
            for (int64_t row = block * step; row < smaller(m, (block + 1) * step); row++)
                able &= prepare_row(tokens, of_width, widths, row, k_in, group);
        uint8_t *codes = reserve(&of_thread, (size_t)((padded_k + 12 * groups + 4 * ROWS) * COLUMNS));
        if (!codes || !able)
#pragma omp atomic write
            failed = 1;
        const Block block = {.stride = row_bytes(k_in), .groups = groups, .group = group, .k_in = k_in};
        if (shares > 1) {
#pragma omp for schedule(static) /* in the order in which rows were prepared */
            for (int64_t i = 0; i < shares * tiles; i++)
                if (codes) run_item(weights, ends, panels, block, tokens, i, tiles, share_rows, step, m, codes);
        } else {
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < tiles; i++)
                if (codes) run_item(weights, ends, panels, block, tokens, i, tiles, share_rows, step, m, codes);
        }
    }
    return failed;
}

/* q (M, K) int8, act_scale (M, act_groups) float32 with act_groups 1 or the weight's. Returns 0, or 1 when memory ran out. */
EXPORT int lowbit_linear_wnan(const Weight *weight, const Epilogue *end, const int8_t *q, const float *act_scale,
                              int64_t act_groups, int64_t m, int64_t threads) {
    const Tokens tokens = {.q = q, .act_scale = (float *)act_scale, .act_groups = act_groups};
    return run(&weight, end, NULL, 1, &tokens, m, threads);
}

/* The same from x (M, K) in `format`, quantized as act_quant does on grids[i]; ys[i] is the output of layer i, in `format`. act_groups is 1
   or the weights'. x may come as two parts side by side, the first k_first columns wide, a multiple of `block`; else more_x is NULL. gated is
   NULL, or holds the residual of a single layer's output. */
EXPORT int lowbit_quant_linears(const Layers *layers, const Epilogue *gated, void *const *ys, const ActGrid *grids, const void *x,
                                const void *more_x, int64_t k_first, int64_t format, int64_t m, int64_t threads) {
    const Tokens tokens = {.x = {x, more_x}, .format = format, .factor = layers->factor, .block = layers->block, .k_first = k_first,
                           .act_groups = layers->act_groups};
    Epilogue own[MOST_WEIGHTS];
    for (int64_t w = 0; w < layers->count; w++) {
        own[w] = layers->ends[w], own[w].y = ys[w], own[w].y_format = format;
        if (gated) own[w].residual = gated->residual, own[w].gate = gated->gate, own[w].gate_stride = gated->gate_stride, own[w].tokens = gated->tokens;
    }
    return run(layers->weights, own, grids, layers->count, &tokens, m, threads);
}
