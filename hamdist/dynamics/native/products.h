/* Products of a few to some thousand rows with a weight, for one type (REAL) and vectors of VECTOR_BITS
   (512: AVX-512; 256: AVX2 with fused multiply-adds), with names made by NAME: x (R, I), d (R, O),
   W (O, I).

       outputs    y = x W^T + b    a dot product: sums of every 64th byte over i, then of these
       pulled     m = d W          over o, from the first to the last
                  W = beta W + alpha d^T x     over r, from the first to the last

   Every sum has one order, whatever the vectors and tiles, and its products are fused: one result on
   all processors, in all shapes of tiles and at all places in memory. (The sum over r is one of sums
   over PANEL rows each.) A tile is as many sums as there are registers for; the weight is read once
   per panel from where it lies, and of a single panel its rows of a chunk are still near for the
   update. */

#ifndef PRODUCTS_H
#define PRODUCTS_H
enum { CHUNK = 48 };   /* rows of W between whose two uses nothing else is read */
enum { PANEL = 128 };  /* rows of x, y, d and m that stay near while W is read */

/* Ones in the first of so many places: what AVX2's loads and stores of a part of a vector ask for. */
static const int64_t FIRST_8_BYTES[8] = {-1, -1, -1, -1, 0, 0, 0, 0};
static const int32_t FIRST_4_BYTES[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
#endif

/* A tile of y: OUTS outputs for ROWS rows; of m: M_ROWS rows of M_WIDE vectors; of W: W_OUTS rows of
   W_WIDE vectors. HALVES: vectors of 64 bytes. */
#if VECTOR_BITS == 512
#define TARGET target("avx512f")
#define HALVES 1
#define OUTS 8
#define ROWS 3
#define M_ROWS 8
#define M_WIDE 3
#define W_OUTS 6
#define W_WIDE 4
#else
#define TARGET target("avx2,fma")
#define HALVES 2
#define OUTS 4
#define ROWS 3
#define M_ROWS 4
#define M_WIDE 3
#define W_OUTS 3
#define W_WIDE 4
#endif
#define PRODUCTS __attribute__((TARGET))
#define TILE static inline __attribute__((always_inline, TARGET))
#define WIDE (VECTOR_BITS / REAL_BITS)

/* The compiler's function for an operation on vectors of this width and type. */
#if VECTOR_BITS == 512 && REAL_BITS == 32
typedef __m512 NAME(Wide);
#define MM(operation) _mm512_##operation##_ps
#define FIRST(n) (__mmask16)((1u << (n)) - 1)
#elif VECTOR_BITS == 512
typedef __m512d NAME(Wide);
#define MM(operation) _mm512_##operation##_pd
#define FIRST(n) (__mmask8)((1u << (n)) - 1)
#elif REAL_BITS == 32
typedef __m256 NAME(Wide);
#define MM(operation) _mm256_##operation##_ps
#define FIRST(n) _mm256_loadu_si256((const __m256i *)(FIRST_4_BYTES + 8 - (n)))
#else
typedef __m256d NAME(Wide);
#define MM(operation) _mm256_##operation##_pd
#define FIRST(n) _mm256_loadu_si256((const __m256i *)(FIRST_8_BYTES + 4 - (n)))
#endif
#if VECTOR_BITS == 512
#define LOAD_PART(n, p) MM(maskz_loadu)(FIRST(n), p)
#define STORE_PART(p, n, v) MM(mask_storeu)(p, FIRST(n), v)
#else
#define LOAD_PART(n, p) MM(maskload)(p, FIRST(n))
#define STORE_PART(p, n, v) MM(maskstore)(p, FIRST(n), v)
#endif
/* (or the compiler reads a number once more for each of its products) */
#if VECTOR_BITS == 512
#define IN_A_REGISTER(v) __asm__("" : "+v"(v))
#else
#define IN_A_REGISTER(v) __asm__("" : "+x"(v))
#endif
#define LOAD MM(loadu)
#define STORE MM(storeu)
#define ALL MM(set1)
#define FUSED MM(fmadd)
#define TIMES MM(mul)
#define ZERO MM(setzero)()

/* The sums of the lanes of some neighbours in a row of sums: of 16 bytes together each, then of
   halves of 64 bytes, then of halves of these. */
#define PAIR(a, b) MM(add)(MM(unpacklo)(a, b), MM(unpackhi)(a, b))
#if REAL_BITS == 32
#define NEIGHBOURS 4
#define BY_16_BYTES(a, to)                                                                         \
    do {                                                                                           \
        NAME(Wide) ab = PAIR((a)[0], (a)[1]), cd = PAIR((a)[2], (a)[3]);                           \
        to = MM(add)(MM(shuffle)(ab, cd, 0x44), MM(shuffle)(ab, cd, 0xee));                        \
    } while (0)
#else
#define NEIGHBOURS 2
#define BY_16_BYTES(a, to) to = PAIR((a)[0], (a)[1])
#endif

typedef REAL NAME(Few) __attribute__((vector_size(16), aligned(sizeof(REAL)), may_alias));

/* Where row o of W begins: one row behind the other, or (a convolution's) at[o] numbers behind w. */
#define ROW(o) (w + (at ? at[o] : (o) * in))

/* Of several images, x and w of one so many numbers behind those of the one before: a sum over all. */
#define ALONE 1, 0, 0

/* y of `outs` outputs for `rows` rows; both are constants where this is put in. */
TILE void NAME(y_tile)(const REAL *x, const REAL *w, const size_t *at, const REAL *b, REAL *y,
                       size_t in, size_t out, int rows, int outs, size_t images, size_t x_apart,
                       size_t w_apart)
{
    const REAL *first_x = x, *first_w = w;
    NAME(Wide) sum[HALVES][ROWS][OUTS], wide[OUTS], one;
    REAL total[OUTS];
    for (int half = 0; half < HALVES; half++) {
        for (int r = 0; r < ROWS; r++)
            for (int o = 0; o < OUTS; o++)
                sum[half][r][o] = ZERO;
        x = first_x;
        w = first_w;
        for (size_t n = 0; n < images; n++, x += x_apart, w += w_apart) {
            const REAL *row[OUTS]; /* (in registers) */
            size_t i = half * WIDE;
            for (int o = 0; o < outs; o++)
                row[o] = ROW(o);
#define STEP(load)                                                                                 \
    for (int o = 0; o < outs; o++) {                                                               \
        wide[o] = load(row[o] + i);                                                                \
        IN_A_REGISTER(wide[o]);                                                                    \
    }                                                                                              \
    for (int r = 0; r < rows; r++) {                                                               \
        one = load(x + r * in + i);                                                                \
        for (int o = 0; o < outs; o++)                                                             \
            sum[half][r][o] = FUSED(one, wide[o], sum[half][r][o]);                                \
    }
#define REST(p) LOAD_PART(in - i, p)
            for (; i + WIDE <= in; i += HALVES * WIDE) {
                STEP(LOAD)
            }
            if (i < in) {
                STEP(REST)
            }
        }
#undef REST
#undef STEP
    }
    for (int r = 0; r < rows; r++) {
        for (int o = 0; o < outs; o += NEIGHBOURS) {
            REAL lanes[64 / sizeof(REAL)];
            for (int half = 0; half < HALVES; half++) {
                NAME(Wide) sums;
                BY_16_BYTES(sum[half][r] + o, sums);
                STORE(lanes + half * WIDE, sums);
            }
            const NAME(Few) *few = (const NAME(Few) *)lanes;
            *(NAME(Few) *)(total + o) = (few[0] + few[2]) + (few[1] + few[3]);
        }
        for (int o = 0; o < outs; o++)
            y[r * out + o] = b ? total[o] + b[o] : total[o];
    }
}

TILE void NAME(y_rows)(const REAL *x, const REAL *w, const size_t *at, const REAL *b, REAL *y,
                       size_t rows, size_t in, size_t out, int outs, size_t images, size_t x_apart,
                       size_t w_apart)
{
    size_t r = 0;
    for (; r + ROWS <= rows; r += ROWS)
        NAME(y_tile)(x + r * in, w, at, b, y + r * out, in, out, ROWS, outs, images, x_apart,
                     w_apart);
    if (rows - r == 2)
        NAME(y_tile)(x + r * in, w, at, b, y + r * out, in, out, 2, outs, images, x_apart,
                     w_apart);
    else if (rows - r == 1)
        NAME(y_tile)(x + r * in, w, at, b, y + r * out, in, out, 1, outs, images, x_apart,
                     w_apart);
}

PRODUCTS static void NAME(panel_outputs)(const REAL *x, const REAL *w, const REAL *b, REAL *y,
                                         size_t rows, size_t in, size_t out)
{
    size_t o = 0;
    for (; o + OUTS <= out; o += OUTS)
        NAME(y_rows)(x, w + o * in, NULL, b ? b + o : NULL, y + o, rows, in, out, OUTS, ALONE);
    for (; o < out; o++)
        NAME(y_rows)(x, w + o * in, NULL, b ? b + o : NULL, y + o, rows, in, out, 1, ALONE);
}

static void NAME(outputs)(const REAL *x, const REAL *w, const REAL *b, REAL *y, size_t rows,
                          size_t in, size_t out)
{
    for (size_t r = 0; r < rows; r += PANEL)
        NAME(panel_outputs)(x + r * in, w, b, y + r * out, rows - r < PANEL ? rows - r : PANEL, in,
                            out);
}

/* m of `rows` rows and `wide` vectors, the last of `last` numbers, over n rows of W: on top of what
   is there unless they are the first. */
TILE void NAME(m_tile)(const REAL *d, const REAL *w, const size_t *at, REAL *m, size_t n, size_t in,
                       size_t out, int first, int rows, int wide, size_t last)
{
    NAME(Wide) sum[M_ROWS][M_WIDE], part[M_WIDE];
#define READ(p, v) (last && (v) == wide - 1 ? LOAD_PART(last, p) : LOAD(p))
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < wide; v++)
            sum[r][v] = first ? ZERO : READ(m + r * in + WIDE * v, v);
    for (size_t o = 0; o < n; o++) {
        for (int v = 0; v < wide; v++)
            part[v] = READ(ROW(o) + WIDE * v, v);
        for (int r = 0; r < rows; r++) {
            NAME(Wide) one = ALL(d[r * out + o]);
            for (int v = 0; v < wide; v++)
                sum[r][v] = FUSED(one, part[v], sum[r][v]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < wide; v++)
            if (last && v == wide - 1)
                STORE_PART(m + r * in + WIDE * v, last, sum[r][v]);
            else
                STORE(m + r * in + WIDE * v, sum[r][v]);
}

TILE void NAME(m_rows)(const REAL *d, const REAL *w, const size_t *at, REAL *m, size_t n,
                       size_t rows, size_t in, size_t out, int first, int wide, size_t last)
{
    size_t r = 0;
    for (; r + M_ROWS <= rows; r += M_ROWS)
        NAME(m_tile)(d + r * out, w, at, m + r * in, n, in, out, first, M_ROWS, wide, last);
#if M_ROWS > 4
    if (r + 4 <= rows) {
        NAME(m_tile)(d + r * out, w, at, m + r * in, n, in, out, first, 4, wide, last);
        r += 4;
    }
#endif
    if (r + 2 <= rows) {
        NAME(m_tile)(d + r * out, w, at, m + r * in, n, in, out, first, 2, wide, last);
        r += 2;
    }
    if (r < rows)
        NAME(m_tile)(d + r * out, w, at, m + r * in, n, in, out, first, 1, wide, last);
}

/* W = beta W + alpha d^T x of `outs` rows of W and `wide` vectors; beta 0: W is not read. */
TILE void NAME(w_tile)(const REAL *d, const REAL *x, REAL *w, size_t rows, size_t in, size_t out,
                       REAL alpha, REAL beta, int outs, int wide, size_t last)
{
    NAME(Wide) sum[W_OUTS][W_WIDE], part[W_WIDE], step = ALL(alpha);
    for (int o = 0; o < outs; o++)
        for (int v = 0; v < wide; v++)
            sum[o][v] = ZERO;
    for (size_t r = 0; r < rows; r++) {
        for (int v = 0; v < wide; v++)
            part[v] = READ(x + r * in + WIDE * v, v);
        for (int o = 0; o < outs; o++) {
            NAME(Wide) one = ALL(d[r * out + o]);
            for (int v = 0; v < wide; v++)
                sum[o][v] = FUSED(one, part[v], sum[o][v]);
        }
    }
    for (int o = 0; o < outs; o++)
        for (int v = 0; v < wide; v++) {
            REAL *at = w + o * in + WIDE * v;
            NAME(Wide) before = beta == 0 ? ZERO : TIMES(ALL(beta), READ(at, v));
            NAME(Wide) moved = FUSED(step, sum[o][v], before);
            if (last && v == wide - 1)
                STORE_PART(at, last, moved);
            else
                STORE(at, moved);
        }
}

TILE void NAME(w_rows)(const REAL *d, const REAL *x, REAL *w, size_t n, size_t rows, size_t in,
                       size_t out, REAL alpha, REAL beta, int wide, size_t last)
{
    size_t o = 0;
    for (; o + W_OUTS <= n; o += W_OUTS)
        NAME(w_tile)(d + o, x, w + o * in, rows, in, out, alpha, beta, W_OUTS, wide, last);
    for (; o < n; o++)
        NAME(w_tile)(d + o, x, w + o * in, rows, in, out, alpha, beta, 1, wide, last);
}

/* m = d W (NULL: not wanted), then W = beta W + alpha d^T x (alpha 0: not), chunk by chunk of W's
   rows. */
PRODUCTS static void NAME(panel_pulled)(const REAL *x, REAL *w, const REAL *d, REAL *m, size_t rows,
                                        size_t in, size_t out, REAL alpha, REAL beta)
{
    for (size_t o = 0; o < out; o += CHUNK) {
        const size_t n = out - o < CHUNK ? out - o : CHUNK;
        REAL *part = w + o * in;
        size_t i = 0;
        if (m) {
            for (; i + M_WIDE * WIDE <= in; i += M_WIDE * WIDE)
                NAME(m_rows)(d + o, part + i, NULL, m + i, n, rows, in, out, o == 0, M_WIDE, 0);
            for (; i + WIDE <= in; i += WIDE)
                NAME(m_rows)(d + o, part + i, NULL, m + i, n, rows, in, out, o == 0, 1, 0);
            if (i < in)
                NAME(m_rows)(d + o, part + i, NULL, m + i, n, rows, in, out, o == 0, 1, in - i);
        }
        if (alpha == 0)
            continue;
        for (i = 0; i + W_WIDE * WIDE <= in; i += W_WIDE * WIDE)
            NAME(w_rows)(d + o, x + i, part + i, n, rows, in, out, alpha, beta, W_WIDE, 0);
        for (; i + WIDE <= in; i += WIDE)
            NAME(w_rows)(d + o, x + i, part + i, n, rows, in, out, alpha, beta, 1, 0);
        if (i < in)
            NAME(w_rows)(d + o, x + i, part + i, n, rows, in, out, alpha, beta, 1, in - i);
    }
}

/* The same of any number of rows: all of m meets W as it was. */
static void NAME(pulled)(const REAL *x, REAL *w, const REAL *d, REAL *m, size_t rows, size_t in,
                         size_t out, REAL alpha, REAL beta)
{
    if (rows <= PANEL) {
        NAME(panel_pulled)(x, w, d, m, rows, in, out, alpha, beta);
        return;
    }
    for (size_t r = 0; m && r < rows; r += PANEL)
        NAME(panel_pulled)(x + r * in, w, d + r * out, m + r * in,
                           rows - r < PANEL ? rows - r : PANEL, in, out, 0, 1);
    for (size_t r = 0; alpha != 0 && r < rows; r += PANEL)
        NAME(panel_pulled)(x + r * in, w, d + r * out, NULL,
                           rows - r < PANEL ? rows - r : PANEL, in, out, alpha, r ? 1 : beta);
}

/* The same two products where row o of W lies at[o] numbers behind w: y of several images, m of one. */
PRODUCTS static void NAME(placed_outputs)(const REAL *x, const REAL *w, const size_t *at, REAL *y,
                                          size_t rows, size_t in, size_t out, size_t images,
                                          size_t x_apart, size_t w_apart)
{
    size_t o = 0;
    for (; o + OUTS <= out; o += OUTS)
        NAME(y_rows)(x, w, at + o, NULL, y + o, rows, in, out, OUTS, images, x_apart, w_apart);
    for (; o < out; o++)
        NAME(y_rows)(x, w, at + o, NULL, y + o, rows, in, out, 1, images, x_apart, w_apart);
}

PRODUCTS static void NAME(placed_messages)(const REAL *d, const REAL *w, const size_t *at, REAL *m,
                                           size_t rows, size_t in, size_t out)
{
    size_t i = 0;
    for (; i + M_WIDE * WIDE <= in; i += M_WIDE * WIDE)
        NAME(m_rows)(d, w + i, at, m + i, out, rows, in, out, 1, M_WIDE, 0);
    const size_t last = (in - i) % WIDE;
    if (in - i > 2 * WIDE)
        NAME(m_rows)(d, w + i, at, m + i, out, rows, in, out, 1, 3, last);
    else if (in - i > WIDE)
        NAME(m_rows)(d, w + i, at, m + i, out, rows, in, out, 1, 2, last);
    else if (in - i > 0)
        NAME(m_rows)(d, w + i, at, m + i, out, rows, in, out, 1, 1, last);
}
#include "convolution.h"
#undef ALONE
#undef ROW
#undef VECTOR_BITS
#undef NAME
#undef READ
#undef BY_16_BYTES
#undef PAIR
#undef NEIGHBOURS
#undef ZERO
#undef TIMES
#undef FUSED
#undef ALL
#undef STORE_PART
#undef STORE
#undef LOAD_PART
#undef LOAD
#undef IN_A_REGISTER
#undef FIRST
#undef MM
#undef WIDE
#undef TILE
#undef PRODUCTS
#undef W_WIDE
#undef W_OUTS
#undef M_WIDE
#undef M_ROWS
#undef ROWS
#undef OUTS
#undef HALVES
#undef TARGET
