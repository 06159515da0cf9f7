/* attention on a CPU: a head of one sample at a time, its keys and values packed for whole vectors while they are normed and rotated.
   For as many tokens as a cache holds; the caller takes another way beyond that. */
#include "../lowbit.h"

enum { MOST_CHANNELS = 512, WIDTH = 16, AHEAD = 8 /* tokens that are fetched ahead */ };
#if defined(__AVX512F__)
enum { QUERIES = 8 }; /* at a time against WIDTH keys or channels: their sums stay in registers */
#else
enum { QUERIES = 4 };
#endif

INLINE void norm_rotary(float *restrict n, const float *restrict weight, const float *restrict cos, const float *restrict sin, float eps,
                        int64_t channels) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t c = 0; c < channels; c++) squares += n[c] * n[c];
    const float inverse = 1.0f / sqrtf(squares / (float)channels + eps);
    int64_t c = 0;
#if defined(__AVX512F__)
    for (; c + 16 <= channels; c += 16) {
        const __m512 x = _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(n + c), _mm512_set1_ps(inverse)), _mm512_loadu_ps(weight + c));
        const __m512 swapped = _mm512_mul_ps(_mm512_permute_ps(x, 0xb1), _mm512_loadu_ps(sin + c));
        _mm512_storeu_ps(n + c, _mm512_fmaddsub_ps(x, _mm512_loadu_ps(cos + c), swapped)); /* subtracts at even places */
    }
#endif
    for (int64_t i = c; i < channels; i++) n[i] = n[i] * inverse * weight[i];
    for (; c + 1 < channels; c += 2) {
        const float a = n[c], b = n[c + 1];
        n[c] = a * cos[c] - b * sin[c];
        n[c + 1] = b * cos[c + 1] + a * sin[c + 1];
    }
}

/* What one head needs, padded to whole vectors. In float32 queries are [S][C], keys [C][S], values [S][C]; bf16.h has its own order. */
typedef struct {
    void *q, *k, *v;
    float *scores;     /* [QUERIES][S] */
    uint16_t *weights; /* [QUERIES][S] in bfloat16 */
    int64_t tokens, padded, channels, wide; /* S and C as they are, and padded */
    int bf16;
} Head;

enum { PARTS = 5 };

/* Where each part begins, in bytes, and where the last one ends. */
static void lay_out(const Head *of, int64_t first[PARTS + 1]) {
    const int64_t number = of->bf16 ? 2 : 4, rows = of->tokens + QUERIES;
    const int64_t bytes[PARTS] = {rows * of->channels * number, of->channels * of->padded * number, of->padded * of->wide * number,
                                  QUERIES * of->padded * 4, of->bf16 ? QUERIES * of->padded * 2 : 0};
    first[0] = 0;
    for (int i = 0; i < PARTS; i++) first[i + 1] = first[i] + ceil_div(bytes[i], 64) * 64;
}

/* Queries, scaled, and keys of a token: normed and rotated. */
typedef struct {
    float q[MOST_CHANNELS], k[MOST_CHANNELS];
} Token;

INLINE void load_token(const Stream *from, int64_t format, int64_t place, const float *cos, const float *sin, float eps, int64_t channels,
                       Token *to) {
    const float scale = 1.0f / sqrtf((float)channels);
    load_floats(from->q, (int)format, place, channels, to->q);
    norm_rotary(to->q, from->q_norm, cos, sin, eps, channels);
    for (int64_t c = 0; c < channels; c++) to->q[c] *= scale;
    load_floats(from->k, (int)format, place, channels, to->k);
    norm_rotary(to->k, from->k_norm, cos, sin, eps, channels);
}

INLINE void pack_f32(const Head *to, const Token *token, const void *v, int64_t format, int64_t place, int64_t at) {
    memcpy((float *)to->q + at * to->channels, token->q, (size_t)to->channels * 4);
    for (int64_t c = 0; c < to->channels; c++) ((float *)to->k)[c * to->padded + at] = token->k[c];
    load_floats(v, (int)format, place, to->channels, (float *)to->v + at * to->wide);
}

/* to[r][0 ... WIDTH - 1] = sum over k of left[r][k] right[k][0 ... WIDTH - 1] for QUERIES rows r. */
INLINE void products(const float *restrict left, int64_t stride, const float *restrict right, int64_t right_stride, int64_t count,
                     float *restrict to, int64_t to_stride) {
    float sums[QUERIES][WIDTH] = {{0}};
    for (int64_t k = 0; k < count; k++)
#pragma GCC unroll 8
        for (int r = 0; r < QUERIES; r++)
#pragma omp simd
            for (int i = 0; i < WIDTH; i++) sums[r][i] += left[r * stride + k] * right[k * right_stride + i];
#pragma GCC unroll 8
    for (int r = 0; r < QUERIES; r++) memcpy(to + r * to_stride, sums[r], sizeof sums[r]);
}

/* Weights of a row of scores, in place, not yet divided by their sum, which is returned. */
INLINE float weigh(float *restrict scores, int64_t tokens, int64_t padded) {
    float most = scores[0], sum = 0;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < tokens; i++) most = scores[i] > most ? scores[i] : most;
    for (int64_t i = 0; i < padded; i++) scores[i] = exp_negative(scores[i] - most);
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < tokens; i++) sum += scores[i];
    return sum;
}

/* Sums of QUERIES rows from `row` on, to [QUERIES][MOST_CHANNELS], and of their weights. */
INLINE void rows_f32(const Head *of, int64_t row, float *out, float *sum) {
    const float *q = (const float *)of->q + row * of->channels, *k = of->k, *v = of->v;
    for (int64_t key = 0; key < of->padded; key += WIDTH)
        products(q, of->channels, k + key, of->padded, of->channels, of->scores + key, of->padded);
    for (int64_t r = 0; r < QUERIES; r++) sum[r] = weigh(of->scores + r * of->padded, of->tokens, of->padded);
    for (int64_t c = 0; c < of->wide; c += WIDTH) products(of->scores, of->padded, v + c, of->wide, of->tokens, out + c, MOST_CHANNELS);
}

#include "bf16.h"

/* A head's parts of tokens lie far from each other: they are asked for before they are needed. */
INLINE void fetch_token(const Stream *from, int64_t format, int64_t place, int64_t channels) {
    const int64_t bytes = format == F32 ? 4 : 2;
    for (int64_t i = 0; i < channels * bytes; i += 64) {
        __builtin_prefetch((const char *)from->q + place * bytes + i);
        __builtin_prefetch((const char *)from->k + place * bytes + i);
        __builtin_prefetch((const char *)from->v + place * bytes + i);
    }
}

static void pack(const Head *to, const Stream *streams, int64_t count, int64_t format, const float *cos, const float *sin, float eps,
                 int64_t sample, int64_t head, int64_t heads) {
    const int64_t channels = to->channels;
    Token made;
    int64_t at = 0;
    for (const Stream *from = streams; from < streams + count; from++)
        for (int64_t token = 0; token < from->tokens; token++, at++) {
            const int64_t place = ((sample * from->tokens + token) * heads + head) * channels;
            if (token + AHEAD < from->tokens) fetch_token(from, format, place + AHEAD * heads * channels, channels);
            load_token(from, format, place, cos + at * channels, sin + at * channels, eps, channels, &made);
            if (to->bf16) pack_bf16(to, &made, (const uint16_t *)from->v + place, at);
            else pack_f32(to, &made, from->v, format, place, at);
        }
}

static void attend(const Head *of, const Stream *streams, int64_t format, int64_t sample, int64_t head, int64_t heads) {
    const Stream *to = streams;
    int64_t first = 0; /* token of the stream `to` */
    for (int64_t row = 0; row < of->tokens; row += QUERIES) {
        const int64_t rows = smaller(QUERIES, of->tokens - row);
        float out[QUERIES][MOST_CHANNELS], sum[QUERIES]; /* rows beyond the last are scratch */
        if (of->bf16) rows_bf16(of, row, out[0], sum);
        else rows_f32(of, row, out[0], sum);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < of->channels; c++) out[r][c] /= sum[r];
        for (int64_t r = 0; r < rows; r++) {
            while (first == to->tokens) to++, first = 0;
            store_floats(out[r], of->channels, to->y, (int)format, ((sample * to->tokens + first++) * heads + head) * of->channels);
        }
    }
}

static __thread Scratch of_thread;

/* cos and sin (S, C) float32 over all streams; C even, at most 512. Returns 0, or 1 when memory ran out. */
EXPORT int lowbit_attention(const Stream *streams, int64_t count, int64_t format, const float *cos, const float *sin, double eps,
                            int64_t samples, int64_t heads, int64_t channels, int64_t threads) {
    const int bf16 = takes_bf16(format), width = bf16 ? PANEL : WIDTH;
    Head sizes = {.channels = channels, .wide = ceil_div(channels, width) * width, .bf16 = bf16};
    for (int64_t i = 0; i < count; i++) sizes.tokens += streams[i].tokens;
    sizes.padded = ceil_div(sizes.tokens, width) * width;
    int64_t first[PARTS + 1];
    lay_out(&sizes, first);
    int failed = 0;
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t item = 0; item < samples * heads; item++) {
        char *at = reserve(&of_thread, (size_t)first[PARTS]);
        if (!at) {
#pragma omp atomic write
            failed = 1;
            continue;
        }
        memset(at, 0, (size_t)first[PARTS]); /* what pads keys and values must be numbers */
        Head of = sizes;
        of.q = at, of.k = at + first[1], of.v = at + first[2];
        of.scores = (float *)(at + first[3]), of.weights = (uint16_t *)(at + first[4]);
        pack(&of, streams, count, format, cos, sin, (float)eps, item / heads, item % heads, heads);
        attend(&of, streams, format, item / heads, item % heads, heads);
    }
    return failed;
}
