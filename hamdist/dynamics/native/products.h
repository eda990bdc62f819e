/* Products of a few to some hundred rows with a weight, for one type (REAL, NAME), with vectors of
   AVX-512: x (R, I), d (R, O), W (O, I).

       outputs    y = x W^T + b    a dot product: sums by lane over i, then over the lanes
       pulled     m = d W          over o, from the first to the last
                  W = beta W + alpha d^T x     over r, from the first to the last

   Every sum has one order, whatever the tiles, and its products are fused: one result for all shapes
   of tiles and all places in memory. (The sum over r is one of sums over PANEL rows each.) A tile is
   as many sums as there are registers for; the weight is read once per panel from where it lies, and
   of a single panel its rows of a chunk are still near for the update. */

#define PRODUCTS __attribute__((target("avx512f")))
#define TILE static inline __attribute__((always_inline, target("avx512f")))

#if REAL_BITS == 32
enum { OUTS = 8, ROWS = 3 };        /* a tile of y: outputs, rows */
enum { M_ROWS = 8, M_WIDE = 3 };    /* a tile of m: rows, vectors */
enum { W_OUTS = 6, W_WIDE = 4 };    /* a tile of W: rows of W, vectors */
enum { CHUNK = 48 };                /* rows of W between whose two uses nothing else is read */
enum { PANEL = 128 };               /* rows of x, y, d and m that stay near while W is read */

typedef __m512 NAME(Wide);
#define WIDE 16
#define LOAD _mm512_loadu_ps
#define LOAD_PART(n, p) _mm512_maskz_loadu_ps((__mmask16)((1u << (n)) - 1), p)
#define STORE _mm512_storeu_ps
#define STORE_PART(p, n, v) _mm512_mask_storeu_ps(p, (__mmask16)((1u << (n)) - 1), v)
#define ALL _mm512_set1_ps
#define FUSED _mm512_fmadd_ps
#define TIMES _mm512_mul_ps
#define ZERO _mm512_setzero_ps()

/* The sums of the lanes of four vectors: of each, lanes 4 apart, then the four that are left. */
TILE void sums_of_four(const __m512 *a, float *to)
{
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
    __m512 s = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    s = _mm512_add_ps(s, _mm512_shuffle_f32x4(s, s, 0x4e));
    s = _mm512_add_ps(s, _mm512_shuffle_f32x4(s, s, 0xb1));
    _mm_storeu_ps(to, _mm512_castps512_ps128(s));
}
#else
typedef __m512d NAME(Wide);
#define WIDE 8
#define LOAD _mm512_loadu_pd
#define LOAD_PART(n, p) _mm512_maskz_loadu_pd((__mmask8)((1u << (n)) - 1), p)
#define STORE _mm512_storeu_pd
#define STORE_PART(p, n, v) _mm512_mask_storeu_pd(p, (__mmask8)((1u << (n)) - 1), v)
#define ALL _mm512_set1_pd
#define FUSED _mm512_fmadd_pd
#define TIMES _mm512_mul_pd
#define ZERO _mm512_setzero_pd()

TILE void NAME(sum_of_two)(__m512d a, __m512d b, double *to)
{
    __m512d s = _mm512_add_pd(_mm512_unpacklo_pd(a, b), _mm512_unpackhi_pd(a, b));
    s = _mm512_add_pd(s, _mm512_shuffle_f64x2(s, s, 0x4e));
    s = _mm512_add_pd(s, _mm512_shuffle_f64x2(s, s, 0xb1));
    _mm_storeu_pd(to, _mm512_castpd512_pd128(s));
}
#endif

/* y of `outs` outputs for `rows` rows; both are constants where this is put in. */
TILE void NAME(y_tile)(const REAL *x, const REAL *w, const REAL *b, REAL *y, size_t in, size_t out,
                       int rows, int outs)
{
    NAME(Wide) sum[ROWS][OUTS], wide[OUTS], one;
    REAL total[OUTS];
    size_t i = 0;
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < OUTS; o++)
            sum[r][o] = ZERO;
#define STEP(load)                                                                                 \
    for (int o = 0; o < outs; o++)                                                                 \
        wide[o] = load(w + o * in + i);                                                            \
    for (int r = 0; r < rows; r++) {                                                               \
        one = load(x + r * in + i);                                                                \
        for (int o = 0; o < outs; o++)                                                             \
            sum[r][o] = FUSED(one, wide[o], sum[r][o]);                                            \
    }
#define REST(p) LOAD_PART(in - i, p)
    for (; i + WIDE <= in; i += WIDE) {
        STEP(LOAD)
    }
    if (i < in) {
        STEP(REST)
    }
#undef REST
#undef STEP
    for (int r = 0; r < rows; r++) {
#if REAL_BITS == 32
        for (int o = 0; o < outs; o += 4)
            sums_of_four(sum[r] + o, total + o);
#else
        for (int o = 0; o < outs; o += 2)
            NAME(sum_of_two)(sum[r][o], sum[r][o + 1], total + o);
#endif
        for (int o = 0; o < outs; o++)
            y[r * out + o] = b ? total[o] + b[o] : total[o];
    }
}

TILE void NAME(y_rows)(const REAL *x, const REAL *w, const REAL *b, REAL *y, size_t rows, size_t in,
                       size_t out, int outs)
{
    size_t r = 0;
    for (; r + ROWS <= rows; r += ROWS)
        NAME(y_tile)(x + r * in, w, b, y + r * out, in, out, ROWS, outs);
    if (rows - r == 2)
        NAME(y_tile)(x + r * in, w, b, y + r * out, in, out, 2, outs);
    else if (rows - r == 1)
        NAME(y_tile)(x + r * in, w, b, y + r * out, in, out, 1, outs);
}

PRODUCTS static void NAME(panel_outputs)(const REAL *x, const REAL *w, const REAL *b, REAL *y,
                                         size_t rows, size_t in, size_t out)
{
    size_t o = 0;
    for (; o + OUTS <= out; o += OUTS)
        NAME(y_rows)(x, w + o * in, b ? b + o : NULL, y + o, rows, in, out, OUTS);
    for (; o < out; o++)
        NAME(y_rows)(x, w + o * in, b ? b + o : NULL, y + o, rows, in, out, 1);
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
TILE void NAME(m_tile)(const REAL *d, const REAL *w, REAL *m, size_t n, size_t in, size_t out,
                       int first, int rows, int wide, size_t last)
{
    NAME(Wide) sum[M_ROWS][M_WIDE], part[M_WIDE];
#define READ(p, v) (last && (v) == wide - 1 ? LOAD_PART(last, p) : LOAD(p))
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < wide; v++)
            sum[r][v] = first ? ZERO : READ(m + r * in + WIDE * v, v);
    for (size_t o = 0; o < n; o++) {
        for (int v = 0; v < wide; v++)
            part[v] = READ(w + o * in + WIDE * v, v);
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

TILE void NAME(m_rows)(const REAL *d, const REAL *w, REAL *m, size_t n, size_t rows, size_t in,
                       size_t out, int first, int wide, size_t last)
{
    size_t r = 0;
    for (; r + M_ROWS <= rows; r += M_ROWS)
        NAME(m_tile)(d + r * out, w, m + r * in, n, in, out, first, M_ROWS, wide, last);
    if (r + 4 <= rows) {
        NAME(m_tile)(d + r * out, w, m + r * in, n, in, out, first, 4, wide, last);
        r += 4;
    }
    if (r + 2 <= rows) {
        NAME(m_tile)(d + r * out, w, m + r * in, n, in, out, first, 2, wide, last);
        r += 2;
    }
    if (r < rows)
        NAME(m_tile)(d + r * out, w, m + r * in, n, in, out, first, 1, wide, last);
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
                NAME(m_rows)(d + o, part + i, m + i, n, rows, in, out, o == 0, M_WIDE, 0);
            for (; i + WIDE <= in; i += WIDE)
                NAME(m_rows)(d + o, part + i, m + i, n, rows, in, out, o == 0, 1, 0);
            if (i < in)
                NAME(m_rows)(d + o, part + i, m + i, n, rows, in, out, o == 0, 1, in - i);
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
#undef READ
#undef ZERO
#undef FUSED
#undef TIMES
#undef ALL
#undef STORE_PART
#undef STORE
#undef LOAD_PART
#undef LOAD
#undef WIDE
#undef TILE
#undef PRODUCTS
