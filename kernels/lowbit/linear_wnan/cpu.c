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

enum { MOST_SPAN = 4 }; /* tiles at a time */
static __thread Scratch of_call, of_thread;

/* The tokens of a product: quantized, or floats x that are quantized a few rows at a time. */
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

static int same_grid(const ActGrid *a, const ActGrid *b) {
    return a->bits == b->bits && a->mid_rise == b->mid_rise && a->clip == b->clip;
}

/* What threads share out. Reading what another thread wrote can take longer than making it again (175 ns a cache line between two parts of
   one processor, measured; 36 within a part), so where panels stay in a core's own cache one of two things is done again by each thread:
   BY_TOKENS: tokens are shared out, and each thread unpacks every weight;
   BY_TILES_ALONE: tiles are, and each thread quantizes every token.
   BY_TILES: tiles are, of tokens that were quantized together. */
typedef enum { BY_TOKENS, BY_TILES_ALONE, BY_TILES } Sharing;

static Sharing sharing_of(int64_t m, int64_t n_out, int64_t k_in, int64_t grids, int64_t threads) {
    enum { CACHE = 1 << 19 };               /* bytes of panels that a thread may have */
    enum { TOKENS = 32, MANY_TOKENS = 128 }; /* of a thread, for which unpacking all weights pays; for which it hardly counts */
    enum { TO_UNPACK = 5 };                 /* output features that are unpacked in the time in which a token is quantized */
    enum { FEATURES_OUT = 512 };            /* of a thread, for which quantizing all tokens pays */
    const int64_t bytes = m * row_bytes(k_in) * grids, tokens = m / threads;
    if (threads == 1) return BY_TILES;
    if (tokens >= TOKENS && bytes / threads <= CACHE && (n_out <= TO_UNPACK * m || tokens >= MANY_TOKENS)) return BY_TOKENS;
    return n_out / threads >= FEATURES_OUT && bytes <= CACHE ? BY_TILES_ALONE : BY_TILES;
}

/* Of one call. Tiles are counted through all weights, `span` of them multiplied at a time. BY_TOKENS, share_rows tokens are a thread's. */
typedef struct {
    const Weight *const *weights;
    const Epilogue *ends;
    const Tokens *tokens;
    Panels of_width[MOST_WEIGHTS]; /* tokens on each grid, `widths` of them */
    const Panels *panels[MOST_WEIGHTS];
    Block common;
    int64_t m, tiles, span, step, share_rows, widths;
} Call;

/* Rows first ... last - 1 on one grid: quantized where they are not (`wide` NULL), with their sums. */
static void fill_panels(const Call *call, const Panels *to, const float *wide, int64_t first, int64_t last) {
    const Tokens *tokens = call->tokens;
    const int64_t k_in = call->common.k_in, stride = call->common.stride, groups = call->common.groups, group = call->common.group;
    int8_t *q = to->q + first * stride;
    float *scale = to->act_scale + first * tokens->act_groups;
    if (wide) lowbit_round_rows(wide, to->grid, k_in / tokens->act_groups, last - first, k_in, q, stride, scale, to->flip);
    for (int64_t row = first; row < last; row++, q += stride) {
        for (int64_t k = 0; !wide && k < k_in; k++) q[k] = tokens->q[row * k_in + k] ^ to->flip;
        for (int64_t k = k_in; k % 4; k++) q[k] = to->flip;
        for (int64_t g = 0; to->token_sums && g < groups; g++)
            to->token_sums[row * groups + g] = sum_of(q + g * group, smaller(group, k_in - g * group), to->flip);
    }
}

/* Rows first ... last - 1 on all grids. 0 when memory ran out. */
static int prepare_rows(const Call *call, int64_t first, int64_t last) {
    const int64_t k_in = call->common.k_in, at_once = lowbit_rows_at_once(k_in);
    float *wide = call->tokens->x[0] ? reserve(&of_thread, (size_t)(at_once * k_in) * 4 + 64) : NULL;
    if (call->tokens->x[0] && !wide) return 0;
    for (; first < last; first += at_once) {
        const int64_t end = smaller(last, first + at_once);
        for (int64_t row = first; wide && row < end; row++) load_parts(call->tokens, row, k_in, wide + (row - first) * k_in);
        for (int64_t i = 0; i < call->widths; i++) fill_panels(call, call->of_width + i, wide, first, end);
    }
    return 1;
}

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

/* A span of tiles from `first` on, for tokens first_m ... last_m - 1. */
static void run_span(const Call *call, int64_t first, int64_t first_m, int64_t last_m, uint8_t *scratch) {
    const int64_t count = smaller(call->span, call->tiles - first);
    Tile tiles[MOST_SPAN];
    for (int64_t t = 0; t < count; t++) tiles[t] = load_tile(call, first + t, scratch + t * tile_bytes(call));
    for (int64_t row = first_m; row < last_m; row += call->step)
        for (int64_t t = 0; t < count; t++) run_tile(tiles + t, row, smaller(call->step, last_m - row));
}

/* What one thread does where tokens are shared out: it reads nothing that others wrote, and waits for nobody. */
static int run_share(const Call *call, int64_t first_m) {
    const int64_t last_m = smaller(call->m, first_m + call->share_rows);
    if (!prepare_rows(call, first_m, last_m)) return 0;
    uint8_t *scratch = reserve(&of_thread, (size_t)(call->span * tile_bytes(call)));
    if (call->common.amx) amx_begin();
    for (int64_t tile = 0; scratch && tile < call->tiles; tile += call->span) run_span(call, tile, first_m, last_m, scratch);
    if (call->common.amx) amx_end();
    return scratch != NULL;
}

/* Tiles at a time: one, unless the tokens do not stay in a core's own cache from one to the next. */
static int64_t span_of(int64_t m, int64_t k_in, int64_t tiles, int64_t threads) {
    enum { BYTES = 1 << 20 };
    if (m * row_bytes(k_in) <= BYTES) return 1;
    const int64_t each = tiles / (4 * threads);
    return each < 1 ? 1 : smaller(each, MOST_SPAN);
}

#ifdef _OPENMP
INLINE int64_t thread_number(void) { return omp_get_thread_num(); }
INLINE int64_t threads_of(int64_t asked) { return omp_in_parallel() ? 1 : smaller(asked, omp_get_thread_limit()); }
#else
INLINE int64_t thread_number(void) { return 0; }
INLINE int64_t threads_of(int64_t asked) { return 1; }
#endif

/* Spans of tiles that begin with one thread, by its number: the next of them, in a cache line of its own. */
typedef struct {
    _Alignas(64) int64_t next;
} Queue;

INLINE int64_t take_next(Queue *queue, int64_t count) {
    int64_t i;
#pragma omp atomic read
    i = queue->next;
    if (i >= count) return count; /* no write, which would take the line from all others */
#pragma omp atomic capture
    i = queue->next++;
    return i;
}

/* What thread `own` does of all tiles: its part of them, the same in every call, so that its weights and outputs stay in its cache; then
   what is left of the others'. OpenMP's dynamic schedule knows no parts, and takes longer to begin than a small layer to multiply. */
static int run_tiles(const Call *call, Queue *queues, int64_t threads, int64_t own) {
    uint8_t *scratch = reserve(&of_thread, (size_t)(call->span * tile_bytes(call)));
    const int64_t spans = ceil_div(call->tiles, call->span);
    if (call->common.amx) amx_begin();
    for (int64_t i = 0; scratch && i < threads; i++) {
        const int64_t of = (own + i) % threads, first = of * spans / threads, count = (of + 1) * spans / threads - first;
        for (int64_t at; (at = take_next(queues + of, count)) < count;) run_span(call, (first + at) * call->span, 0, call->m, scratch);
    }
    if (call->common.amx) amx_end();
    return scratch != NULL;
}

/* Tokens on the grids that `count` weights ask for, one after another in memory. 0 when memory ran out. */
static int place_panels(Call *call, const ActGrid *grids, int64_t count) {
    const Tokens *tokens = call->tokens;
    int64_t sums = 0; /* of a token that products read */
    for (int64_t w = 0; w < count; w++) {
        const ActGrid *grid = grids ? grids + w : NULL;
        int64_t i = 0;
        while (i < call->widths && grid && !same_grid(call->of_width[i].grid, grid)) i++;
        if (i == call->widths) call->of_width[call->widths++].grid = grid;
        call->panels[w] = call->of_width + i;
        if (reads_sums(call->weights[w])) sums = call->common.groups;
    }
    const int64_t m = call->m, scales = tokens->x[0] ? m * tokens->act_groups : 0, rows = call->common.amx ? ceil_div(m, TILE) * TILE : m;
    const int64_t head = ceil_div((m * sums + scales) * 4, 64) * 64, bytes = head + rows * call->common.stride;
    int8_t *at = reserve(&of_call, (size_t)(call->widths * bytes + 1));
    for (Panels *to = call->of_width; at && to < call->of_width + call->widths; to++, at += bytes) {
        to->token_sums = sums ? (int32_t *)at : NULL;
        to->act_scale = tokens->x[0] ? (float *)at + m * sums : tokens->act_scale;
        to->q = at + head;
        to->flip = SIGNED_CODES && !call->common.amx ? -128 : 0;
    }
    return at != NULL;
}

/* All tokens against `count` weights of one K and one group size, weight w on grids[w] (NULL: as the tokens are). Returns 0, or 1
   when memory ran out. */
static int run(const Weight *const *weights, const Epilogue *ends, const ActGrid *grids, int64_t count, const Tokens *tokens, int64_t m,
               int64_t asked_threads) {
    const int64_t threads = threads_of(asked_threads);
    const int64_t k_in = weights[0]->k_in, group = weights[0]->group, groups = ceil_div(k_in, group);
    const int amx = takes_amx(m, group, groups, DEPTH);
    int64_t n_out = 0, tiles = 0;
    for (int64_t w = 0; w < count; w++) n_out += weights[w]->n_out, tiles += ceil_div(weights[w]->n_out, COLUMNS);
    const Sharing sharing = sharing_of(m, n_out, k_in, grids ? count : 1, threads);
    const int64_t share = ceil_div(ceil_div(m, sharing == BY_TOKENS ? threads : 1), TILE) * TILE;
    Call call = {.weights = weights, .ends = ends, .tokens = tokens, .m = m, .tiles = tiles, .share_rows = share,
                 .span = sharing == BY_TOKENS ? 1 : span_of(m, k_in, tiles, threads),
                 .step = rows_per_block(smaller(m, share), groups, amx),
                 .common = {.stride = row_bytes(k_in), .groups = groups, .group = group, .k_in = k_in, .amx = amx}};
    if (sharing != BY_TILES_ALONE && !place_panels(&call, grids, count)) return 1;
    const int64_t chunk = lowbit_rows_at_once(k_in);
    Queue queues[threads];
    memset(queues, 0, sizeof queues);
    int failed = 0;
#pragma omp parallel num_threads((int)threads)
    {
        int able = 1;
        if (sharing == BY_TOKENS) {
#pragma omp for schedule(static) nowait
            for (int64_t row = 0; row < m; row += share) able &= run_share(&call, row);
        } else if (sharing == BY_TILES_ALONE) {
            Call own = call;
            able = place_panels(&own, grids, count) && prepare_rows(&own, 0, m) && run_tiles(&own, queues, threads, thread_number());
        } else {
#pragma omp for schedule(static)
            for (int64_t row = 0; row < m; row += chunk) able &= prepare_rows(&call, row, smaller(m, row + chunk));
            able &= run_tiles(&call, queues, threads, thread_number());
        }
        if (!able)
#pragma omp atomic write
            failed = 1;
    }
    return failed;
}

/* q (M, K) int8, act_scale (M, act_groups) float32 with act_groups 1 or the weight's. Returns 0, or 1 when memory ran out. */
EXPORT int lowbit_linear_wnan(const Weight *weight, const Epilogue *end, const int8_t *q, const float *act_scale,
                              int64_t act_groups, int64_t m, int64_t threads) {
    const Tokens tokens = {.q = q, .act_scale = (float *)act_scale, .act_groups = act_groups};
    return run(&weight, end, NULL, 1, &tokens, m, threads);
}

/* The same from floats, quantized as act_quant does. */
EXPORT int lowbit_quant_linears(const LayersCall *call) {
    const Layers *layers = call->layers;
    const Epilogue *gated = call->gated;
    const Tokens tokens = {.x = {call->x, call->more_x}, .format = call->format, .factor = layers->factor, .block = layers->block,
                           .k_first = call->k_first, .act_groups = layers->act_groups};
    Epilogue own[MOST_WEIGHTS];
    for (int64_t w = 0; w < layers->count; w++) {
        own[w] = layers->ends[w], own[w].y = call->ys[w], own[w].y_format = call->format;
        if (gated) own[w].residual = gated->residual, own[w].gate = gated->gate, own[w].gate_stride = gated->gate_stride, own[w].tokens = gated->tokens;
    }
    return run(layers->weights, own, call->grids, layers->count, &tokens, call->m, call->threads);
}
