/* linear_wnan on a CPU: packed n-bit weight x int8-held activations, int32 sums, scales at the end of each group.

   The dot-product instructions take one unsigned and one signed factor. With AVX2 codes stay unsigned and activations are signed; a zero
   point z of a group adds -z sum_k q[m, k], so the sums start there. With AVX-512 it is the other way round (block.h), and with AMX both
   are signed (block_amx.h). Sums of a group are exact integers. */
#include "block.h"
#include "block_amx.h"

/* Rows per block: as even as the registers allow, so that no block is left with one or two. */
static int64_t rows_per_block(int64_t m, int64_t groups, int amx) {
    if (!m) return 1;
    if (!amx) return ceil_div(m, ceil_div(m, groups == 1 ? ROWS : ROWS_GROUPED));
    const int64_t even = ceil_div(m, ceil_div(m, groups == 1 ? AMX_ROWS : AMX_ROWS_GROUPED));
    return ceil_div(even, TILE) * TILE;
}

/* Bytes between rows of quantized tokens: whole cache lines, of an odd number, so that rows of a block do not share places in the cache. */
static int64_t row_bytes(int64_t k_in) { return (ceil_div(k_in, 64) | 1) * 64; }

/* Of tokens as they are held. */
static int32_t sum_of(const int8_t *restrict q, int64_t count, int8_t flip) {
    int32_t sum = 0;
    for (int64_t i = 0; i < count; i++) sum += (int8_t)(q[i] ^ flip);
    return sum;
}

/* Does its product need the sums of the tokens? Codes of 8 bits less a zero point do not fit a signed byte: of those 128 is taken away, and
   the rest of the zero point with the sums. */
INLINE int reads_sums(const Weight *weight) { return !SIGNED_CODES || (weight->zero && weight->bits == 8); }

enum { MOST_WEIGHTS = 8, MOST_SPAN = 4 }; /* of one call; tiles at a time */
static __thread Scratch of_call, of_thread;

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
    int8_t *q;           /* rows of row_bytes(K) */
    int8_t flip;         /* bits of q that are flipped: -128 makes it q + 128 */
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
        if (wide) lowbit_round_row(wide, to->grid, k_in / tokens->act_groups, k_in, q, to->act_scale + row * tokens->act_groups, to->flip);
        else for (int64_t k = 0; k < k_in; k++) q[k] = tokens->q[row * k_in + k] ^ to->flip;
        for (int64_t k = k_in; k < padded_k; k++) q[k] = to->flip;
        for (int64_t g = 0; to->token_sums && g < groups; g++)
            to->token_sums[row * groups + g] = sum_of(q + g * group, smaller(group, k_in - g * group), to->flip);
    }
    return 1;
}

static int same_grid(const ActGrid *a, const ActGrid *b) {
    return a->bits == b->bits && a->mid_rise == b->mid_rise && a->clip == b->clip;
}

/* Among how many threads tokens are shared out, each of which then unpacks every weight: where there are enough of them to pay for that,
   and the panels that a thread wrote are still in its own cache when it reads them. Else 1: threads share the tiles. */
static int64_t shares_of(int64_t m, int64_t k_in, int64_t threads) {
    enum { TOKENS = 128, BYTES = 1 << 19 };
    const int64_t shares = smaller(threads, m / TOKENS);
    return shares > 1 && m * row_bytes(k_in) / shares <= BYTES ? shares : 1;
}

/* Of one call. Tiles are counted through all weights; `span` of them are multiplied at a time. */
typedef struct {
    const Weight *const *weights;
    const Epilogue *ends;
    const Panels *panels[MOST_WEIGHTS];
    const Tokens *tokens;
    Block common;
    int64_t m, tiles, span, step, share_rows;
} Call;

/* A tile of COLUMNS out features, unpacked. `block` begins with the first token. */
typedef struct {
    const Weight *weight;
    const Epilogue *end;
    const float *token_scale; /* NULL: the block's act_scale */
    int64_t first_n;
    Block block;
} Tile;

/* Scratch for a tile: codes, scales, zero points, starts, sums. */
static int64_t tile_bytes(const Call *call) {
    return (call->common.stride + 12 * call->common.groups + 4 * call->step) * COLUMNS;
}

static Tile load_tile(const Call *call, int64_t tile, uint8_t *codes) {
    int64_t w = 0;
    for (; tile >= ceil_div(call->weights[w]->n_out, COLUMNS); w++) tile -= ceil_div(call->weights[w]->n_out, COLUMNS);
    const Weight *weight = call->weights[w];
    const Panels *panels = call->panels[w];
    const int grouped = call->tokens->act_groups > 1;
    const int64_t groups = call->common.groups, end = ceil_div(weight->k_in, 4) * 4;
    float *scale = (float *)(codes + call->common.stride * COLUMNS);
    int32_t *zero = (int32_t *)(scale + groups * COLUMNS), *start = zero + groups * COLUMNS;
    Tile made = {weight, call->ends + w, grouped ? NULL : panels->act_scale, tile * COLUMNS, call->common};
    Block *block = &made.block;
    block->q = panels->q, block->token_sums = panels->token_sums, block->bits = weight->bits;
    block->act_scale = grouped ? panels->act_scale : NULL;
    block->codes = codes, block->scale = scale, block->start = start, block->sums = scale + 3 * groups * COLUMNS;
    lowbit_tile_scales(weight, made.first_n, scale, zero);
    if (!SIGNED_CODES) {
        lowbit_unpack_tile(weight, made.first_n, codes);
        block->zero = weight->zero ? zero : NULL;
    } else if (reads_sums(weight)) {
        lowbit_unpack_signed(weight, made.first_n, NULL, codes, start);
        for (int64_t i = 0; i < groups * COLUMNS; i++) zero[i] = 128 - zero[i];
        block->zero = zero;
    } else {
        lowbit_unpack_signed(weight, made.first_n, weight->zero ? zero : NULL, codes, start);
    }
    if (block->amx) memset(codes + end * COLUMNS, 0, (size_t)((block->stride - end) * COLUMNS)); /* it is multiplied too */
    return made;
}

static void run_tile(const Tile *tile, int64_t row, int64_t rows) {
    Block block = tile->block;
    block.q += row * block.stride;
    if (block.token_sums) block.token_sums += row * block.groups;
    if (block.act_scale) block.act_scale += row * block.groups;
    if (block.amx) amx_block(&block, rows);
    else run_block(&block, (int)rows);
    lowbit_finish(tile->weight, tile->end, block.sums, tile->token_scale ? tile->token_scale + row : NULL, row, rows, tile->first_n);
}

/* Item i: a span of tiles for a share of the tokens. */
static void run_item(const Call *call, int64_t i, uint8_t *scratch) {
    const int64_t spans = ceil_div(call->tiles, call->span), first = i % spans * call->span;
    const int64_t count = smaller(call->span, call->tiles - first);
    const int64_t first_m = i / spans * call->share_rows, last_m = smaller(call->m, first_m + call->share_rows);
    Tile tiles[MOST_SPAN];
    for (int64_t t = 0; t < count; t++) tiles[t] = load_tile(call, first + t, scratch + t * tile_bytes(call));
    for (int64_t row = first_m; row < last_m; row += call->step)
        for (int64_t t = 0; t < count; t++) run_tile(tiles + t, row, smaller(call->step, last_m - row));
}

/* Tiles at a time: one, unless the tokens do not stay in a core's own cache from one to the next. */
static int64_t span_of(int64_t m, int64_t k_in, int64_t tiles, int64_t threads) {
    enum { BYTES = 1 << 20 };
    if (m * row_bytes(k_in) <= BYTES) return 1;
    const int64_t each = tiles / (4 * threads);
    return each < 1 ? 1 : smaller(each, MOST_SPAN);
}

/* All tokens against `count` weights of one K and one group size, weight w on grids[w] (NULL: as the tokens are). Returns 0, or 1
   when memory ran out. */
static int run(const Weight *const *weights, const Epilogue *ends, const ActGrid *grids, int64_t count, const Tokens *tokens, int64_t m,
               int64_t threads) {
    const int64_t k_in = weights[0]->k_in, group = weights[0]->group, groups = ceil_div(k_in, group);
    const int amx = takes_amx(m, group, groups, DEPTH);
    Call call = {.weights = weights, .ends = ends, .tokens = tokens, .m = m, .step = rows_per_block(m, groups, amx),
                 .common = {.stride = row_bytes(k_in), .groups = groups, .group = group, .k_in = k_in, .amx = amx}};
    Panels of_width[MOST_WEIGHTS];
    int64_t widths = 0, sums = 0; /* sums of a token that products read */
    for (int64_t w = 0; w < count; w++) {
        const ActGrid *grid = grids ? grids + w : NULL;
        int64_t i = 0;
        while (i < widths && grid && !same_grid(of_width[i].grid, grid)) i++;
        if (i == widths) of_width[widths++].grid = grid;
        call.panels[w] = of_width + i;
        call.tiles += ceil_div(weights[w]->n_out, COLUMNS);
        if (reads_sums(weights[w])) sums = groups;
    }
    const int64_t shares = shares_of(m, k_in, threads);
    const int64_t unit = amx ? TILE : call.step;
    call.share_rows = ceil_div(ceil_div(m, shares), unit) * unit;
    call.span = shares > 1 ? 1 : span_of(m, k_in, call.tiles, threads);
    const int64_t scales = tokens->x[0] ? m * tokens->act_groups : 0, rows = amx ? ceil_div(m, TILE) * TILE : m;
    const int64_t head = ceil_div((m * sums + scales) * 4, 64) * 64, bytes = head + rows * row_bytes(k_in);
    int8_t *at = reserve(&of_call, (size_t)(widths * bytes));
    if (!at) return 1;
    for (int64_t i = 0; i < widths; i++, at += bytes) {
        of_width[i].token_sums = sums ? (int32_t *)at : NULL;
        of_width[i].act_scale = tokens->x[0] ? (float *)at + m * sums : tokens->act_scale;
        of_width[i].q = at + head;
        of_width[i].flip = SIGNED_CODES && !amx ? -128 : 0;
    }
    int failed = 0;
#pragma omp parallel num_threads((int)threads)
    {
        int able = 1;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < m; row++) able &= prepare_row(tokens, of_width, widths, row, k_in, group);
        uint8_t *scratch = reserve(&of_thread, (size_t)(call.span * tile_bytes(&call)));
        if (!scratch || !able)
#pragma omp atomic write
            failed = 1;
        const int64_t spans = ceil_div(call.tiles, call.span);
        if (amx) amx_begin();
        if (shares > 1) {
#pragma omp for schedule(static) /* about in the order in which rows were prepared */
            for (int64_t i = 0; i < shares * spans; i++)
                if (scratch) run_item(&call, i, scratch);
        } else {
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < spans; i++)
                if (scratch) run_item(&call, i, scratch);
        }
        if (amx) amx_end();
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
